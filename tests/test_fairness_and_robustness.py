"""Fairness and accuracy under attack: exact on small examples, against plain autograd, and the benchmark's texts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import models
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset
from models import bert, labelled, lora, padding, prompts, tiny
from torch import Tensor, nn
from worlds import accuracy, examples, fitted, half_moons, network, tensors

from hf_influence import evasion, robustness
from hf_influence.errors import BadExample, BadSetting, UnsupportedModel
from hf_influence.evaluation import (
    accuracy_under_attack,
    biased_labels,
    demographic_parity,
    fair_score,
    swap_terms,
)
from hf_influence.gradients import losses, own_loss
from hf_influence.task import CausalLM

PAIRS = [("he", "she"), ("actor", "actress"), ("his wife", "her husband"), ("wife", "husband"), ("John", "Mary")]


def classifier(num_labels: int = 2) -> Any:
    torch.manual_seed(0)
    return lora(bert(num_labels=num_labels), ["query", "value"], modules_to_save=["classifier"])


def test_parity_is_the_gap_between_the_means_of_groups() -> None:
    y = [0.9, 0.7, 0.4, 0.2, 0.5]
    assert demographic_parity(y, ["f", "f", "m", "m", "m"]) == pytest.approx(0.8 - 1.1 / 3)
    assert demographic_parity(y, ["m", "m", "f", "f", "f"]) == pytest.approx(0.8 - 1.1 / 3)
    assert demographic_parity(y, list("aabbc")) == pytest.approx(0.8 - 0.3)
    assert demographic_parity([0.3] * 4, [0, 1, 0, 1]) == 0
    assert demographic_parity(torch.tensor([True, False, True]), np.array([0, 1, 1])) == 0.5
    assert demographic_parity(np.float32(y), torch.tensor([0, 0, 1, 1, 1])) == pytest.approx(0.8 - 1.1 / 3)
    scalars = [torch.tensor(v) for v in (0, 0, 1, 1, 1)]
    assert demographic_parity([torch.tensor(v) for v in y], scalars) == pytest.approx(0.8 - 1.1 / 3)


def test_columns_of_a_table_are_taken_in_their_order_whatever_its_index_says() -> None:
    people = pd.DataFrame({"y": [0.1, 0.9, 0.7, 0.4, 0.2], "sex": list("xffmm"), "class": [1, 1, 1, 0, 0]})
    known = people[people.sex != "x"]
    assert demographic_parity(known.y, known.sex) == pytest.approx(0.5)
    assert demographic_parity(known.y[::-1], known.sex[::-1]) == pytest.approx(0.5)
    assert fair_score(known["class"], known["class"][::-1]) == 1


def test_those_without_a_group_are_one_group() -> None:
    y, missing = [0.9, 0.1, 0.5, 0.5], float("nan")
    assert demographic_parity(y, [missing, float("nan"), 1.0, 1.0]) == 0
    assert demographic_parity(y, pd.Series([missing, missing, 1.0, 1.0])) == 0
    assert demographic_parity(y, torch.tensor([missing, missing, 1.0, 1.0])) == 0
    assert demographic_parity(y, [None, missing, "f", "f"]) == 0


def test_the_fair_score_is_the_share_that_changes() -> None:
    assert fair_score([0, 1, 1, 0], [0, 1, 0, 1]) == 0.5
    assert fair_score(["yes", "no"], ["yes", "no"]) == 0
    assert fair_score(torch.tensor([0, 2, 1]), np.array([2.0, 2.0, 1.0])) == pytest.approx(1 / 3), "not by how much"


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("he said that she was there", "she said that he was there"),  # both at once, and not within words
        ("He's LATE. SHE is not; mr. he?", "She's LATE. HE is not; mr. she?"),
        ("the actress met actors", "the actor met actors"),
        ("his wife and a wife", "her husband and a husband"),  # the longer term first
        ("John and JOHN and john", "Mary and MARY and mary"),
        ("nothing of the kind (the, sheer, hero, _he)", "nothing of the kind (the, sheer, hero, _he)"),
        ("", ""),
    ],
)
def test_terms_are_swapped_as_they_are_written(text: str, swapped: str) -> None:
    assert swap_terms([text], PAIRS) == [swapped]
    assert swap_terms([swapped], PAIRS) == [text], "twice is not at all"


def test_terms_may_hold_any_signs() -> None:
    assert swap_terms(["Mr. (A) of C++"], [("mr.", "mrs."), ("(a)", "[b]"), ("c++", "r")]) == ["Mrs. [B] of R"]


@pytest.mark.parametrize("typed", [False, True])
def test_labels_are_biased_against_one_group_alone(typed: bool) -> None:
    rows = Dataset.from_dict({"sex": ["f", "m"] * 50, "label": [1, 1, 0, 0] * 25, "text": [str(i) for i in range(100)]})
    if typed:
        rows = rows.cast_column("label", ClassLabel(names=["bad", "good"]))
    biased = biased_labels(rows, 0.2, within="sex", group="f", seed=3)
    wrong = [i for i, flag in enumerate(biased["is_wrong"]) if flag]
    assert len(wrong) == 20
    assert wrong == [i for i in range(100) if biased["label"][i] != rows["label"][i]]
    assert {(biased["sex"][i], rows["label"][i], biased["label"][i]) for i in wrong} == {("f", 1, 0)}
    assert biased.column_names == [*rows.column_names, "is_wrong", "right_label"]
    assert biased.features["label"] == rows.features["label"]
    assert biased["text"][:] == rows["text"][:]
    assert biased["right_label"][:] == rows["label"][:]
    assert biased_labels(rows, 0.2, within="sex", group="f", seed=3)[:] == biased[:]
    assert biased_labels(rows, 0.2, within="sex", group="f", seed=4)[:] != biased[:]
    other = biased_labels(rows, 0.25, within="sex", group="m", right=0, wrong=1)
    assert other["label"][:] == [1 if sex == "m" else y for sex, y in zip(rows["sex"], rows["label"], strict=True)]
    with pytest.raises(BadExample, match="Plant once"):
        biased_labels(biased, 0.1, within="sex", group="f")
    with pytest.raises(BadExample, match=r"26 of 100 rows .* only 25 have sex='f' and label=1"):
        biased_labels(rows, 0.26, within="sex", group="f")
    with pytest.raises(BadExample, match="no \\['gender'\\]"):
        biased_labels(rows, 0.1, within="gender", group="f")
    with pytest.raises(BadSetting, match="not a share"):
        biased_labels(rows, 1.1, within="sex", group="f")
    with pytest.raises(BadSetting, match="right=1 and wrong=1 are one label"):
        biased_labels(rows, 0.1, within="sex", group="f", wrong=1)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: demographic_parity([0.1], [0, 1]), r"shape \[1\] for 2 groups"),
        (lambda: demographic_parity([[0.1, 0.9]] * 2, [0, 1]), r"shape \[2, 2\].*softmax"),
        (lambda: demographic_parity([0.1, float("nan")], [0, 1]), "one finite number"),
        (lambda: demographic_parity([0.1, 0.2], [1, 1]), r"of the groups \[1\]; it takes two"),
        (lambda: demographic_parity([], []), "it takes two"),
        (lambda: fair_score([0.3, 0.7], [0.4, 0.6]), "0.3, which is no class"),
        (lambda: fair_score([np.float32(0.5)], [np.float32(0.5)]), "0.5, which is no class"),
        (lambda: fair_score(torch.eye(2), torch.eye(2)), "is no class"),
        (lambda: fair_score([0], [0, 1]), "1 predictions and 2"),
        (lambda: fair_score([], []), "at least one"),
        (lambda: swap_terms("he", PAIRS), "one string"),
        (lambda: swap_terms(["he"], []), "pairs is empty"),
        (lambda: swap_terms(["he"], [("him", "her"), ("his", "Her")]), "'Her', which is empty or stands"),
        (lambda: swap_terms(["he"], [("he", "He")]), "stands in the pairs twice"),
        (lambda: swap_terms(["he"], [("", "she")]), "'', which is empty"),
    ],
)
def test_what_would_give_a_wrong_figure_is_refused(act: Any, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        act()


def test_the_benchmark_tells_every_text_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    fairness = importlib.import_module("fairness")
    rows = Dataset.from_dict({"text": [f"he is there {i}" for i in range(40)], "label": [i % 2 for i in range(40)]})
    told = fairness.told(rows, seed=0)
    both = fairness.both(told)
    assert both.column_names == told.column_names
    assert both[:40] == told[:]
    assert both["label"][40:] == rows["label"][:]
    for i, (one, other) in enumerate(zip(both["text"][:40], both["text"][40:], strict=True)):
        sexes = [
            next(k for k in (0, 1) if text.split()[1] in [pair[k] for pair in fairness.SPEAKERS])
            for text in (one, other)
        ]
        assert [fairness.GROUPS[k] for k in sexes] == [both["group"][i], both["group"][40 + i]]
        assert sorted(sexes) == [0, 1]
        assert one.split(" ", 2)[2] == other.split(" ", 2)[2] == f"said : he is there {i}", "the speaker alone"
    assert 10 < told["group"][:].count("woman") < 30


def attacked(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float, steps: int, sign: bool) -> float:
    """Accuracy on x moved up its loss, by plain autograd."""
    moved = x
    for _ in range(steps):
        at = moved.detach().requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(at).logits, y, reduction="sum"), at)
        moved = moved + epsilon / steps * (g.sign() if sign else g / g.norm(dim=1, keepdim=True))
    return float((model(moved).logits.argmax(1) == y).double().mean())


@pytest.mark.parametrize("direction", ["sign", "gradient"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_attack_is_made_for_the_model_at_hand(direction: Any, steps: int) -> None:
    train, test, _ = half_moons(0)
    model = fitted(network(16), train, epochs=60)
    found = accuracy_under_attack(model, test, robustness(0.8, steps, direction=direction), batch_size=300)
    assert found == pytest.approx(attacked(model, *tensors(test), 0.8, steps, direction == "sign"))
    assert found < accuracy(model, test) - 0.1
    assert accuracy_under_attack(model, test, robustness(1e-9)) == pytest.approx(accuracy(model, test))


def friendly(logits: Tensor, labels: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits, labels, reduction="none")


def test_the_attack_goes_up_the_loss_that_is_given() -> None:
    train, test, _ = half_moons(0)
    model = fitted(network(16), train, epochs=60)
    clean, attack = accuracy(model, test), robustness(0.8, 3)
    assert accuracy_under_attack(model, test, attack, task=own_loss(friendly)) > clean + 0.02
    with pytest.raises(BadSetting, match="task="):
        accuracy_under_attack(model, test, attack, task=CausalLM())


def test_examples_that_cannot_be_moved_are_judged_where_they_are() -> None:
    train, test, _ = half_moons(0)
    model = fitted(network(3, seed=1), train, epochs=300, learning_rate=0.05)
    x, y = tensors(test)
    z = model(x.requires_grad_()).logits
    (g,) = torch.autograd.grad((z[:, 0] - z[:, 1]).sum(), x)
    still, right = (g == 0).all(1), z.argmax(1) == y
    assert 100 < still.sum() < 500, "all ReLUs are shut there"
    assert bool(right[still].all())
    for attack in (evasion(), robustness(0.1), robustness(0.1, direction="sign")):
        assert accuracy_under_attack(model, [row for row, at in zip(test, still, strict=True) if at], attack) == 1
    assert accuracy_under_attack(model, test, evasion()) > float(still.double().mean())


def test_what_is_neither_right_nor_wrong_is_refused() -> None:
    draw = torch.Generator().manual_seed(0)
    data = examples(torch.randn(6, 2, generator=draw).double().numpy(), np.arange(6) % 2)
    data[4]["x"][0] = torch.nan
    for attack in (evasion(), robustness(0.1)):
        with pytest.raises(BadExample, match=r"example 4 a loss that is not finite.*smaller epsilon"):
            accuracy_under_attack(network(), data, attack, batch_size=3)


def test_evasion_turns_every_answer_of_a_linear_model() -> None:
    draw = torch.Generator().manual_seed(0)
    data = examples(torch.randn(40, 3, generator=draw).double().numpy(), np.arange(40) % 2)
    model = network(inputs=3)
    assert accuracy_under_attack(model, data, evasion(1.1)) == pytest.approx(1 - accuracy(model, data))
    assert 0.2 < accuracy(model, data) < 0.8


def test_tokens_are_attacked_by_way_of_their_embedding() -> None:
    model, data = classifier(), labelled(lambda i: i % 2, 12)
    attack = robustness(0.2, 2)
    right = []
    for row in data:
        ids, y = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        x = model.get_input_embeddings()(ids).detach()
        for _ in range(2):
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(model.eval()(inputs_embeds=x, labels=y).loss, x)
            x = x + 0.1 * g / g.norm()
        right.append(float(model(inputs_embeds=x).logits.argmax(1) == y))
    before = models.state_of(model.train())
    found = accuracy_under_attack(model, data, attack, data_collator=padding("left"), batch_size=5)
    assert found == pytest.approx(np.mean(right))
    assert 0 < found < float(losses(model, data)["correct"].mean())
    models.assert_same_state(before, models.state_of(model))


def test_of_a_language_model_right_tokens_are_counted() -> None:
    model = tiny()
    data = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in prompts(6)]
    with torch.no_grad():  # labels that the model gets right, so that there is something to lose
        for row in data:
            answer = model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(1).tolist()
            row["labels"] = [-100, *(answer if len(row["labels"]) % 2 else row["labels"][1:])]
    clean = float(losses(model, data)["correct"].double().mean())
    assert accuracy_under_attack(model, data, robustness(1e-9)) == pytest.approx(clean)
    assert accuracy_under_attack(model, data, robustness(3.0, 3)) < clean - 0.1


def test_numbers_are_not_right_or_wrong() -> None:
    data = labelled(lambda i: i / 3)
    with pytest.raises(UnsupportedModel, match=r"predicts numbers.*has no accuracy"):
        accuracy_under_attack(classifier(num_labels=1), data, robustness(0.1))
