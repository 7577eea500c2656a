"""The state of Adam from an optimizer and from a checkpoint, and the scores that use it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import bert, labelled, lora, padding
from stores import Blocks, make_store, random_blocks
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_influence.attribution import attribute
from hf_influence.errors import MissingRows, StoreError, StoreMismatch, UnsupportedModel
from hf_influence.gradients import adam_state, collect
from hf_influence.gradients.compress import dropout, gaussian
from hf_influence.store import GradientStore
from hf_influence.store.artifacts import read_artifact, write_artifact

assert_exact = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
N, M = 6, 2
BETAS, EPS, STEPS = (0.8, 0.95), 1e-3, 7.0


def trained(path: Path, **settings: Any) -> tuple[Trainer, GradientStore]:
    """A model that a Trainer has trained for four steps, with weights in both of its parameter groups."""
    model = lora(bert(num_labels=3), ["query"], dtype=torch.float32, bias="lora_only", task_type="SEQ_CLS")
    data = Dataset.from_list(labelled(lambda i: i % 3, 8))
    args = TrainingArguments(
        str(path / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        weight_decay=0.1,
        **{"save_steps": 4, **settings},
    )
    trainer = Trainer(model, args, data_collator=padding(), train_dataset=data)
    trainer.train()
    return trainer, collect(model, data, path / "rows")


def test_a_checkpoint_and_the_optimizer_give_the_same_state(tmp_path: Path) -> None:
    trainer, store = trained(tmp_path)
    assert all(len(group["params"]) for group in trainer.optimizer.param_groups)
    weights = dict(trainer.model.named_parameters())
    for source in (trainer.optimizer, tmp_path / "run" / "checkpoint-4"):
        adam_state(trainer.model, store.path, source)
        adam = read_artifact(store.rows(), "adam", "the test")
        for block in store.blocks:
            state = trainer.optimizer.state[weights[block]]
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(adam.tensor(f"{kind}.{block}"), state[kind].flatten())
            assert adam.details["steps"][block] == 4
            assert adam.details["betas"][block] == [0.9, 0.999]
            assert adam.details["eps"][block] == 1e-8


def test_the_state_belongs_to_the_point_that_it_is_kept_at(tmp_path: Path) -> None:
    trainer, store = trained(tmp_path)
    collect(trainer.model, trainer.train_dataset, store.path, point=3)
    adam_state(trainer.model, store.path, trainer.optimizer, point=3)
    weights, adam = dict(trainer.model.named_parameters()), read_artifact(store.rows(point=3), "adam", "the test")
    for block in store.blocks:
        state = trainer.optimizer.state[weights[block]]
        assert torch.equal(adam.tensor(f"exp_avg.{block}"), state["exp_avg"].flatten())
    with pytest.raises(MissingRows, match="0000 does not hold the artifact 'adam'"):
        read_artifact(store.rows(), "adam", "the test")


def test_other_optimizers_are_refused(tmp_path: Path) -> None:
    trainer, store = trained(tmp_path, optim="sgd")
    for source in (trainer.optimizer, str(tmp_path / "run" / "checkpoint-4")):
        with pytest.raises(UnsupportedModel, match="exp_avg_sq"):
            adam_state(trainer.model, store.path, source)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer, store = trained(tmp_path)
    for name, weight in trainer.model.named_parameters():
        weight.requires_grad_("lora_A" in name or "classifier" in name)
    with pytest.raises(StoreMismatch, match="not known which is which"):
        adam_state(trainer.model, store.path, tmp_path / "run" / "checkpoint-4")
    with pytest.raises(StoreError, match=r"optimizer.pt cannot be read"):
        adam_state(trainer.model, store.path, tmp_path / "nowhere")
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(StoreMismatch, match="holds no state of the stored block"):
        adam_state(trainer.model, store.path, other)


def moments(seed: int) -> dict[str, dict[str, Tensor]]:
    draw = random_blocks(2, seed, (5, 12))
    return {name: {"exp_avg": pair[0], "exp_avg_sq": pair[1].square()} for name, pair in draw.items()}


def keep(store: GradientStore, point: int, seed: int) -> None:
    """The state of Adam that `moments(seed)` are."""
    state = moments(seed)
    details = {what: dict.fromkeys(state, value) for what, value in (("steps", STEPS), ("betas", BETAS), ("eps", EPS))}
    tensors = {f"{kind}.{name}": value for name, pair in state.items() for kind, value in pair.items()}
    write_artifact(store, "adam", tensors, details, adapter="", point=point)


def less(points: dict[int, tuple[Blocks, Blocks, Tensor]], seeds: dict[int, int]) -> Tensor:
    """The score of every example for every query, entry by entry; the step is that of torch's own Adam."""
    out = torch.zeros(N, M, dtype=torch.float64)
    for point, (train, query, rate) in points.items():
        state = moments(seeds[point])
        for i in range(N):
            step = []
            for name, g in train.items():
                weight = torch.nn.Parameter(torch.zeros_like(g[i]))
                weight.grad = g[i].clone()
                optimizer = torch.optim.Adam([weight], lr=1.0, betas=BETAS, eps=EPS)
                pair = {kind: value.clone() for kind, value in state[name].items()}
                optimizer.state[weight] = {"step": torch.tensor(STEPS), **pair}
                optimizer.step()
                step.append(-weight.detach())
            for q in range(M):
                v = torch.cat([rows[q] for rows in query.values()])
                out[i, q] += rate[i] * torch.cosine_similarity(torch.cat(step), v, dim=0)
    return out


def course(path: Path) -> dict[int, tuple[Blocks, Blocks, Tensor]]:
    """Two points of training, on disk and in memory."""
    points = {}
    for point in (1, 2):
        train, query = random_blocks(N, point, (5, 12)), random_blocks(M, 10 + point, (5, 12))
        rate = torch.rand(N, dtype=torch.float64)
        stats = {"learning_rate": rate, "step": torch.arange(N)}
        make_store(path, train, query, stats=stats, point=point)
        points[point] = train, query, rate
    return points


def test_less_is_the_cosine_with_the_step_of_adam(tmp_path: Path) -> None:
    points = course(tmp_path)
    store = GradientStore.open(tmp_path)
    for point, seed in ((0, 30), (1, 31), (2, 32)):
        keep(store, point, seed)
    assert_exact(attribute(store, "less").values, less(points, {1: 30, 2: 30}))
    assert_exact(attribute(store, "less", state="each").values, less(points, {1: 31, 2: 32}))
    mean = attribute(store, "less", queries="mean").values[:, 0]
    assert_exact(mean, less(points, {1: 30, 2: 30}).mean(1))


def test_a_missing_state_says_how_to_keep_it(tmp_path: Path) -> None:
    course(tmp_path)
    with pytest.raises(MissingRows, match=r"'adam' that method 'less'.*adam_state\(model, '.*', trainer.optimizer\)"):
        attribute(tmp_path, "less")
    keep(GradientStore.open(tmp_path), 1, 31)
    with pytest.raises(MissingRows, match=r"0002 does not hold .*trainer.optimizer, point=2\)"):
        attribute(tmp_path, "less", state="each")


def test_entries_are_enough_and_projections_are_refused(tmp_path: Path) -> None:
    model, examples = lora(bert(), ["query"], r=2, task_type="SEQ_CLS"), labelled(lambda i: i % 2, 4)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad])
    for weight in optimizer.param_groups[0]["params"]:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    kept = {}
    for compress in (None, dropout(9), gaussian(9)):
        path = tmp_path / str(compress and compress.name)
        store = collect(model, examples, path, compress=compress)
        collect(model, examples[:2], path, "query", compress=compress)
        adam_state(model, path, optimizer)
        if compress is not None and compress.name == "gaussian":
            with pytest.raises(StoreMismatch, match=r"projections.*'gaussian'"):
                attribute(store, "less", points=[0], weighted=False)
        else:
            kept[path.name] = store, attribute(store, "less", points=[0], weighted=False)
    (whole, _), (small, scores) = kept["None"], kept["dropout"]
    columns = {name: small.header.columns[name] for name in small.blocks}  # type: ignore[index]
    adam = read_artifact(whole.rows(), "adam", "the test")
    steps, plain = [], []
    for name in whole.blocks:
        g = whole.rows().block(name)
        first = 0.9 * adam.tensor(f"exp_avg.{name}") + 0.1 * g
        second = 0.999 * adam.tensor(f"exp_avg_sq.{name}") + 0.001 * g**2
        gamma = first / (1 - 0.9**2) / ((second / (1 - 0.999**2)).sqrt() + 1e-8)
        steps.append(gamma[:, columns[name]])
        plain.append(whole.rows("query").block(name)[:, columns[name]])
    expected = torch.cosine_similarity(torch.cat(steps, 1)[:, None], torch.cat(plain, 1)[None], dim=2)
    assert_exact(scores.values, expected)
