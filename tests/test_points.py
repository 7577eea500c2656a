"""Points that are no weights of training: the model enters them, leaves them, and a store holds what was seen there."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import (
    WIDTH,
    Example,
    all_rows,
    assert_same_state,
    bert,
    labelled,
    llama,
    lora,
    own_loss,
    padding,
    prompts,
    state_of,
    tiny,
)
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_influence import attribute, collect, collect_at, losses
from hf_influence.errors import BadSetting, MissingRows, StoreError, StoreMismatch
from hf_influence.gradients import own_loss as task_with
from hf_influence.gradients.identity import adapter_identity
from hf_influence.points import Point, checkpoints, continued_sgd, parameter_dropout, present
from hf_influence.points.point import moving, set_values, trainable, trainable_values
from hf_influence.store import GradientStore, PointAbout

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
same = partial(torch.testing.assert_close, rtol=0, atol=0)

EXAMPLES, QUERIES = prompts(), prompts(3, seed=1)
SPLITS = {"train": EXAMPLES, "query": QUERIES}


def entered(model: nn.Module, point: Point) -> dict[str, Tensor]:
    with point.entered(model):
        return trainable_values(model)


def sgd(model: nn.Module, folder: Path, n: int = 2, **settings: Any) -> list[Point]:
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 0.5, **settings}
    return continued_sgd(model, EXAMPLES, n, folder=folder, **settings)


MAKERS: dict[str, Callable[[nn.Module, Path], list[Point]]] = {
    "parameter_dropout": lambda model, folder: parameter_dropout(2, max_rate=0.5),
    "continued_sgd": sgd,
    "present": lambda model, folder: [present()],
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("raises", [False, True])
def test_the_model_comes_back_bit_for_bit(tmp_path: Path, maker: str, raises: bool) -> None:
    model = tiny(torch.float32).train()
    model.base_model.model.model.norm.eval()
    model(**padding()(EXAMPLES)).loss.backward()
    before, numbers = state_of(model), torch.get_rng_state()
    points = MAKERS[maker](model, tmp_path)
    assert_same_state(before, state_of(model))
    assert torch.equal(torch.get_rng_state(), numbers)
    for point in points:
        try:
            with point.entered(model):
                assert (adapter_identity(model) != adapter_identity(tiny(torch.float32))) == (maker != "present")
                if raises:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert_same_state(before, state_of(model))


def test_dropped_weights_are_zero_and_the_others_as_they_were() -> None:
    model = tiny()
    points = parameter_dropout(4, max_rate=0.5, seed=3)
    rates = [point.details()["rate"] for point in points]
    assert len(set(rates)) == 4
    assert all(0 < rate < 0.5 for rate in rates)
    own = trainable_values(model)
    for point, rate in zip(points, rates, strict=True):
        values = entered(model, point)
        kept = {name: value != 0 for name, value in values.items()}
        same({name: value[kept[name]] for name, value in values.items()}, {n: own[n][kept[n]] for n in own})
        share = torch.cat([(~mask).flatten() for mask in kept.values()]).double().mean()
        assert abs(share - rate) < 4 * math.sqrt(rate / sum(mask.numel() for mask in kept.values())) + 1e-3


def test_members_follow_the_seed_and_not_their_number() -> None:
    model = tiny()
    make = partial(parameter_dropout, max_rate=0.5)
    states = [
        [adapter_identity_at(model, point) for point in make(n, seed=seed)] for n, seed in ((3, 0), (5, 0), (3, 1))
    ]
    assert states[0] == states[1][:3]
    assert len({*states[1], *states[2]}) == 8


def adapter_identity_at(model: nn.Module, point: Point) -> str:
    with point.entered(model):
        return adapter_identity(model)


@pytest.mark.parametrize(
    "settings", [{"n": 0}, {"n": 2.5}, {"max_rate": 0}, {"max_rate": 1.5}, {"max_rate": float("nan")}], ids=str
)
def test_parameter_dropout_refuses_what_cannot_work(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match=rf"parameter_dropout\({next(iter(settings))}="):
        parameter_dropout(**settings)


FULL_BATCH: dict[str, Any] = {"steps": 4, "learning_rate": 0.3, "momentum": 0.8, "batch_size": len(EXAMPLES)}

Alone = Callable[[nn.Module, Example], Tensor]
"""The loss of one example in a batch of one."""


def by_hand(
    model: nn.Module, start: dict[str, Tensor], steps: int, rate: float, momentum: float, alone: Alone = own_loss
) -> dict[str, Tensor]:
    """Full-batch descent with momentum along a cosine, by plain autograd."""
    model.train()
    set_values(model, start)
    speed = {name: torch.zeros_like(value) for name, value in start.items()}
    for step in range(steps):
        weights = trainable(model)
        loss = torch.stack([alone(model, example) for example in EXAMPLES]).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        eta = rate * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                speed[name] = momentum * speed[name] + gradient
                weight -= eta * speed[name]
    return trainable_values(model)


@pytest.mark.parametrize("begin", ["final", "previous"])
def test_members_are_where_sgd_leads(tmp_path: Path, begin: Any) -> None:
    model = tiny(lora_dropout=0.0)
    start = trainable_values(model)
    points = sgd(model, tmp_path, begin=begin, **FULL_BATCH)
    first = by_hand(tiny(lora_dropout=0.0), start, 4, 0.3, 0.8)
    second = first if begin == "final" else by_hand(tiny(lora_dropout=0.0), first, 4, 0.3, 0.8)
    for point, expected in zip(points, (first, second), strict=True):
        assert_exact(entered(model, point), expected)


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none").square()


def squared_alone(model: nn.Module, example: Example) -> Tensor:
    labels = torch.tensor(example["labels"])[1:]
    logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
    return squared(logits[labels != -100], labels[labels != -100]).mean()


def test_members_descend_the_loss_of_their_task(tmp_path: Path) -> None:
    model = tiny(lora_dropout=0.0)
    start = trainable_values(model)
    [point] = sgd(model, tmp_path, n=1, task=task_with(squared), **FULL_BATCH)
    assert_exact(entered(model, point), by_hand(tiny(lora_dropout=0.0), start, 4, 0.3, 0.8, squared_alone))
    with pytest.raises(StoreMismatch, match=r"members with task = .*'loss': 'squared'"):
        sgd(model, tmp_path, n=1, **FULL_BATCH)


def scaled(logits: Tensor, labels: Tensor, by: Any) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none") * torch.as_tensor(by)[0]


@pytest.mark.parametrize("by", [(2.0, 3.0), torch.tensor([2.0, 3.0])], ids=["tuple", "tensor"])
def test_members_of_a_loss_with_settings_go_on(tmp_path: Path, by: Any) -> None:
    model = tiny()
    for n in (1, 2):
        points = sgd(model, tmp_path, n=n, task=task_with(scaled, by=by))
    assert points[0].details()["task"]["by"] == [2.0, 3.0]


def test_members_bring_their_running_statistics(tmp_path: Path) -> None:
    model, data, _ = normalised()
    before = moved(model)
    for begin, batches in (("final", [3, 3]), ("previous", [3, 6])):
        settings: dict[str, Any] = {"steps": 3, "batch_size": 3, "begin": begin}
        points = continued_sgd(model, data, 2, folder=tmp_path / begin, **settings)
        for point, count in zip(points, batches, strict=True):
            with point.entered(model):
                assert model.classifier[0].num_batches_tracked == count
                assert not torch.equal(model.classifier[0].running_mean, before["classifier.0.running_mean"])
            same(moved(model), before)


def test_steps_too_small_for_half_precision_add_up(tmp_path: Path) -> None:
    half = tiny(torch.bfloat16, lora_dropout=0.0)
    ways = []
    for model in (half, copy.deepcopy(half).float()):
        start = trainable_values(model)
        [point] = sgd(model, tmp_path / str(model.dtype), n=1, steps=60, learning_rate=0.005)
        ways.append(torch.cat([(value - start[name]).flatten() for name, value in entered(model, point).items()]))
    assert (ways[0] - ways[1]).norm() < 0.1 * ways[1].norm()


def test_members_differ_by_order_and_dropout_and_follow_the_seed(tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(7 + len(states))  # torch's own random numbers do not matter
        model = tiny(lora_dropout=0.5)
        states.append([adapter_identity_at(model, point) for point in sgd(model, tmp_path / name, seed=seed)])
    assert states[0] == states[1]
    assert len({*states[0], *states[2]}) == 4


def test_members_that_are_there_are_kept_and_more_are_added(tmp_path: Path) -> None:
    model = tiny()
    for begin in ("final", "previous"):
        folder = tmp_path / begin
        sgd(model, folder, n=2, begin=begin)
        written = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
        points = sgd(model, folder, n=3, begin=begin)
        assert all(file.stat().st_mtime_ns == time for file, time in written.items())
        at_once = sgd(model, tmp_path / f"{begin} at once", n=3, begin=begin)
        for one, other in zip(points, at_once, strict=True):
            same(entered(model, one), entered(model, other))


def test_members_of_a_classifier_go_on_with_one_that_was_loaded(tmp_path: Path) -> None:
    data = labelled(lambda i: i % 2)
    model = lora(bert(), ["query"], dtype=torch.float32)
    fresh = copy.deepcopy(model)
    model.get_base_model().config.problem_type = "single_label_classification"  # as training leaves it
    continued_sgd(model, data, 1, steps=2, folder=tmp_path)
    assert fresh.get_base_model().config.problem_type is None
    assert len(continued_sgd(fresh, data, 2, steps=2, folder=tmp_path)) == 2


def test_members_of_one_folder_are_made_alike(tmp_path: Path) -> None:
    model = tiny()
    sgd(model, tmp_path)
    with pytest.raises(StoreMismatch, match=r"steps = 3, now 5.*another folder"):
        sgd(model, tmp_path, steps=5)
    with torch.no_grad():
        next(iter(trainable(model).values())).add_(1)
    with pytest.raises(StoreMismatch, match="members with start = "):
        sgd(model, tmp_path)


def test_descent_that_diverges_says_so_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = tiny()
    before = state_of(model)
    with pytest.raises(BadSetting, match=r"member 0 has the loss .* diverged.*learning_rate=1e\+200"):
        sgd(model, tmp_path, learning_rate=1e200, steps=5)
    assert_same_state(before, state_of(model))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    "settings",
    [{"n": 0}, {"steps": 0}, {"batch_size": 1.5}, {"learning_rate": 0}, {"momentum": 1}, {"begin": "first"}],
    ids=str,
)
def test_continued_sgd_refuses_what_cannot_work(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match=rf"continued_sgd\(.*{next(iter(settings))}="):
        sgd(tiny(), tmp_path, **settings)


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training moves."""
    return {name: value.detach().clone() for name, value in moving(model).items()}


class Remember(TrainerCallback):
    """What the trainable values and the buffers were at each save, and the rates of the steps."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, Tensor]] = {}
        self.rates: dict[int, float] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.values[state.global_step] = moved(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            self.rates[state.global_step] = logs["learning_rate"]


def train(model: nn.Module, folder: Path, data: list[Any]) -> Remember:
    args = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=3,
        learning_rate=0.1,
        save_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    remember = Remember()
    data_of = Dataset.from_list(data)
    Trainer(model, args, data_collator=padding(), train_dataset=data_of, callbacks=[remember]).train()
    return remember


def classifier() -> tuple[nn.Module, list[Any], dict[str, Any]]:
    torch.manual_seed(0)
    targets = ["query", "value"]
    model = lora(bert(num_labels=3), targets, dtype=torch.float32, task_type="SEQ_CLS", modules_to_save=["classifier"])
    return model, labelled(lambda i: i % 3), {}


def embedding() -> tuple[nn.Module, list[Any], dict[str, Any]]:
    torch.manual_seed(0)
    return lora(llama(), ["embed_tokens", "q_proj"], dtype=torch.float32), prompts(), {}


def whole() -> tuple[nn.Module, list[Any], dict[str, Any]]:
    torch.manual_seed(0)
    model = bert(num_labels=3)
    for name, weight in model.named_parameters():
        weight.requires_grad_("classifier" in name or "query" in name)
    return model, labelled(lambda i: i % 3), {"modules": "trainable"}


def normalised() -> tuple[nn.Module, list[Any], dict[str, Any]]:
    """Its running statistics move in training, and no parameter beside them does."""
    torch.manual_seed(0)
    model = bert(num_labels=3)
    model.classifier = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3))
    for name, weight in model.named_parameters():
        weight.requires_grad_("classifier.1" in name or "query" in name)
    return model, labelled(lambda i: i % 3, 6), {"modules": "trainable"}


def tied() -> tuple[nn.Module, list[Any], dict[str, Any]]:
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True)
    return lora(base, ["embed_tokens"], dtype=torch.float32, ensure_weight_tying=True), prompts(), {}


def second_of_two() -> tuple[nn.Module, list[Any], dict[str, Any]]:
    model = tiny(torch.float32)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    return model, prompts(), {}


def without_default() -> tuple[nn.Module, list[Any], dict[str, Any]]:
    model, data, options = second_of_two()
    model.delete_adapter("default")
    return model, data, options


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT, whenever it saves these
@pytest.mark.parametrize("make", [classifier, embedding, whole, normalised, tied, second_of_two, without_default])
def test_rows_at_checkpoints_are_those_of_the_model_as_it_was(tmp_path: Path, make: Any) -> None:
    model, data, options = make()
    remember = train(model, tmp_path / "run", data)
    points = checkpoints(tmp_path / "run")
    assert [point.details()["step"] for point in points] == [2, 4, 6]
    fresh = make()[0]
    before, own = state_of(fresh), moved(fresh)
    store = collect_at(fresh, {"train": data, "query": data[:2]}, tmp_path / "store", points, **options)
    assert_same_state(before, state_of(fresh))
    same(moved(fresh), own)
    assert store.points("checkpoint") == store.points() == [1_000_000, 1_000_001, 1_000_002]
    for number, (step, values) in zip(store.points(), remember.values.items(), strict=True):
        details = {"folder": f"run/checkpoint-{step}", "step": step, "learning_rate": remember.rates[step]}
        assert store.point_about(number) == PointAbout("checkpoint", details)
        fresh.load_state_dict(values, strict=False)
        assert store.adapter(number) == adapter_identity(fresh)  # the same values, bit for bit
        then = collect(fresh, data, tmp_path / f"at {step}", **options)
        same(all_rows(store.rows("train", number)), all_rows(then.rows()))
    first, second, third = (attribute(store, "ip", point=number).values for number in store.points())
    eta = remember.rates
    assert eta[2] > eta[4] > eta[6] > 0
    expected = eta[2] * first + eta[4] * second + eta[6] * third
    torch.testing.assert_close(attribute(store, "tracin").values, expected)


def test_checkpoints_by_name_and_those_that_are_none(tmp_path: Path) -> None:
    model, data, _ = classifier()
    train(model, tmp_path / "run", data)
    named = checkpoints([tmp_path / "run" / "checkpoint-6", tmp_path / "run" / "checkpoint-2"])
    assert [point.details()["step"] for point in named] == [6, 2]
    model.save_pretrained(tmp_path / "run")  # as Trainer.save_model does after training
    assert [point.details()["step"] for point in checkpoints(tmp_path / "run")] == [2, 4, 6]
    with pytest.raises(BadSetting, match=r"no checkpoint.*no folders checkpoint-\*.*save_strategy"):
        checkpoints(tmp_path)
    with pytest.raises(BadSetting, match="name the Trainer's output folder"):
        checkpoints([])
    file = tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"checkpoint-4.*cannot be read"):
        checkpoints(tmp_path / "run")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(StoreError, match=r"checkpoint-4 has no .*safetensors"):
        checkpoints(tmp_path / "run")


def test_a_run_that_logged_no_rate_is_told_what_that_leaves_out(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        classifier()[0].save_pretrained(folder)
        logged = [] if step == 2 else [{"step": 4, "learning_rate": 0.1}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": logged}))
    with pytest.warns(UserWarning, match=r"no learning rate up to .*checkpoint-2, .*weighted=False.*logging_steps=1"):
        points = checkpoints(tmp_path)
    assert [point.details()["learning_rate"] for point in points] == [None, 0.1]


def test_a_checkpoint_without_a_state_has_no_step(tmp_path: Path) -> None:
    classifier()[0].save_pretrained(tmp_path)
    (point,) = checkpoints(tmp_path)
    assert (point.details()["step"], point.details()["learning_rate"]) == (None, None)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (point,) = checkpoints(tmp_path)
    with pytest.raises(StoreMismatch, match=r"no such part of an adapter"), point.entered(lora(llama(), ["q_proj"])):
        pass
    more = lora(llama(), ["q_proj", "k_proj", "v_proj"])
    with pytest.raises(StoreMismatch, match=r"k_proj.* it is missing"), point.entered(more):
        pass
    other = tiny(r=2)
    before = state_of(other)
    with pytest.raises(StoreMismatch, match=r"has the shape \[3, 16\] there and \[2, 16\]"), point.entered(other):
        pass
    assert_same_state(before, state_of(other))


def test_a_whole_checkpoint_of_other_frozen_weights_is_refused(tmp_path: Path) -> None:
    model, half = whole()[0], whole()[0].bfloat16()  # the same weights
    for saved, other in ((half, model), (model, half)):
        saved.save_pretrained(tmp_path)
        (point,) = checkpoints(tmp_path)
        with point.entered(other):
            pass
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.add_(1)
    with pytest.raises(StoreMismatch, match=r"other values of bert\.embeddings\.word.* frozen"), point.entered(model):
        pass


def test_runs_whose_folders_have_the_same_names_are_told_apart(tmp_path: Path) -> None:
    runs = [tmp_path / f"seed{seed}" / "out" / "checkpoint-10" for seed in (0, 1)]
    model = tiny()
    for shift, run in enumerate(runs):
        other = tiny()
        with torch.no_grad():
            next(iter(trainable(other).values())).add_(shift)
        other.save_pretrained(run)
    collect_at(model, SPLITS, tmp_path / "store", checkpoints(runs[0].parent))
    store = collect_at(model, SPLITS, tmp_path / "store", checkpoints([run.parent for run in runs] + runs))
    folders = [store.point_about(point).details["folder"] for point in store.points("checkpoint")]
    assert folders == ["out/checkpoint-10", "seed1/out/checkpoint-10"]
    assert len({store.adapter(point) for point in store.points()}) == 2
    with pytest.raises(StoreMismatch, match="other values of the adapter"):  # a run that has been made anew, say
        collect_at(model, SPLITS, tmp_path / "store", checkpoints(runs[1].parent))


def test_a_checkpoint_of_several_adapters_is_read_by_the_name_of_the_active_one(tmp_path: Path) -> None:
    model = second_of_two()[0]
    model.save_pretrained(tmp_path)
    (point,), (only,) = checkpoints(tmp_path), checkpoints(tmp_path / "second")
    own = trainable_values(model)
    other = second_of_two()[0]
    other.add_adapter("third", model.peft_config["second"])
    with pytest.raises(BadSetting, match="no checkpoint"):
        checkpoints(tmp_path.parent)
    for read in (point, only):
        same(dict(read.values(other)), own)
    other.set_adapter("third")
    same(list(only.values(other).values()), list(own.values()))
    with pytest.raises(StoreMismatch, match=r"adapters default, second, and the model's active one is third.*set_adap"):
        point.values(other)


def test_losses_alone_are_those_of_the_model_in_the_state(tmp_path: Path) -> None:
    model = tiny()
    points = [present(), *parameter_dropout(2, max_rate=0.5)]
    store = collect_at(model, SPLITS, tmp_path, points, rows=False)
    assert store.points() == [0, 1_000_000, 1_000_001]
    assert store.splits(1_000_000) == ["query", "train"]
    for number, point in zip(store.points(), points, strict=True):
        with point.entered(model):
            for split, examples in SPLITS.items():
                rows = store.rows(split, number)
                assert rows.statistics_only
                same(rows.stats["loss"], losses(model, examples)["loss"])
                assert "grad_norm" not in rows.stats
                with pytest.raises(MissingRows, match="statistics of its examples alone"):
                    rows.block(next(iter(rows.blocks)))
                with pytest.raises(MissingRows, match="statistics of its examples alone"):
                    next(rows.chunks(next(iter(rows.blocks))))
    assert sum(file.stat().st_size for file in tmp_path.rglob("rows-*")) < 20_000


def test_losses_and_rows_of_one_split_are_not_mixed(tmp_path: Path) -> None:
    model = tiny()
    collect(model, EXAMPLES, tmp_path, rows=False)
    with pytest.raises(StoreMismatch, match=r"holds statistics alone, and now rows .*rows=False.*overwrite=True"):
        collect(model, EXAMPLES, tmp_path)
    store = collect(model, EXAMPLES, tmp_path, overwrite=True)
    assert attribute(store, "self_ip").values.isfinite().all()
    collect(model, EXAMPLES, tmp_path, rows=False)  # whole rows have the losses, too
    assert not store.rows().statistics_only


def test_gex_from_end_to_end(tmp_path: Path) -> None:
    model = tiny(lora_dropout=0.0)
    collect_at(model, SPLITS, tmp_path / "store", [present()])
    points = sgd(model, tmp_path / "members", n=3)
    store = collect_at(model, SPLITS, tmp_path / "store", points, rows=False)
    examples = [*EXAMPLES, *QUERIES]
    start = trainable_values(model)
    at_start = [own_loss(model.eval(), example) for example in examples]
    slopes = [torch.autograd.grad(loss, list(trainable(model).values())) for loss in at_start]
    moved, straight = [], []
    for point in points:
        with point.entered(model), torch.no_grad():
            way = [value - start[name] for name, value in trainable_values(model).items()]
            moved.append([float(own_loss(model, z) - loss) for z, loss in zip(examples, at_start, strict=True)])
        straight.append([sum(float((g * w).sum()) for g, w in zip(slope, way, strict=True)) for slope in slopes])
    for method, rows in (("gex", moved), ("gex_lin", straight)):
        changes = torch.tensor(rows, dtype=torch.float64)  # [M, n + m]
        products = torch.einsum("mi,mq->miq", changes[:, :7], changes[:, 7:]).mean(0)
        assert_exact(attribute(store, method).values, products)
        assert_exact(attribute(store, f"self_{method}").values, -changes[:, :7].square().mean(0)[:, None])


def test_ip_ensemble_from_end_to_end(tmp_path: Path) -> None:
    model = tiny()
    points = parameter_dropout(3, max_rate=0.5)
    store = collect_at(model, SPLITS, tmp_path / "store", points)
    parts = []
    for number, point in enumerate(points):
        with point.entered(model):
            for split, examples in SPLITS.items():
                alone = collect(model, examples, tmp_path / str(number), split)
        parts.append(attribute(alone, "ip").values)
    assert_exact(attribute(store, "ip_ensemble").values, torch.stack(parts).mean(0))


def test_a_point_keeps_its_number(tmp_path: Path) -> None:
    model = tiny()
    members = parameter_dropout(2, max_rate=0.5)
    collect_at(model, {"train": EXAMPLES}, tmp_path, members[:1], rows=False)
    collect_at(model, {"train": EXAMPLES}, tmp_path, sgd(model, tmp_path / "members"), rows=False)
    store = collect_at(model, SPLITS, tmp_path, members, rows=False)
    collect_at(model, {"train": EXAMPLES}, tmp_path, parameter_dropout(1, max_rate=0.5, seed=1), rows=False)
    assert store.points("continued_sgd") == [2_000_000, 2_000_001]
    assert store.points("parameter_dropout") == [1_000_000, 1_000_001, 1_000_002]
    assert [store.point_about(point).details["seed"] for point in store.points("parameter_dropout")] == [0, 0, 1]
    assert store.splits(1_000_000) == ["query", "train"]


def test_members_of_other_weights_are_refused(tmp_path: Path) -> None:
    model, members = tiny(), parameter_dropout(2, max_rate=0.5)
    made = sgd(model, tmp_path / "members")
    collect_at(model, SPLITS, tmp_path, [present(), *members], rows=False)
    with torch.no_grad():
        next(iter(trainable(model).values())).add_(1)
    with pytest.raises(StoreMismatch, match=r"point 0 of .* other weights"):
        collect_at(model, SPLITS, tmp_path, members, rows=False)
    with pytest.raises(StoreMismatch, match="made from other weights"):
        collect_at(model, SPLITS, tmp_path / "new", made, rows=False)
    assert not (tmp_path / "new").exists()
    collect_at(model, SPLITS, tmp_path, [present(), *members][:1], rows=False, overwrite=True)
    with pytest.raises(StoreMismatch, match="not all made from the weights of point 0"):
        attribute(tmp_path, "ip_ensemble")
    with pytest.raises(StoreMismatch, match="other values of the adapter"):
        collect_at(model, SPLITS, tmp_path, members, rows=False)
    store = collect_at(model, SPLITS, tmp_path, members, rows=False, overwrite=True)
    assert {store.point_about(point).start for point in store.points("parameter_dropout")} == {store.adapter()}


@pytest.mark.parametrize(
    ("datasets", "points"),
    [({}, [present()]), (EXAMPLES, [present()]), (SPLITS, []), (SPLITS, ["present"]), (SPLITS, present())],
    ids=["no data", "no splits", "no point", "no Point", "no list"],
)
def test_collect_at_wants_datasets_and_points(tmp_path: Path, datasets: Any, points: Any) -> None:
    with pytest.raises(BadSetting, match=r"at least one dataset by the name of its split.* a list of points"):
        collect_at(tiny(), datasets, tmp_path, points)


def test_a_store_that_says_nothing_of_its_points_holds_weights(tmp_path: Path) -> None:
    store = collect(tiny(), EXAMPLES, tmp_path)
    assert store.point_about() == PointAbout("weights", {}, None)
    file = tmp_path / "points" / "0000" / "point.json"
    file.write_text(json.dumps({"adapter": json.loads(file.read_text())["adapter"]}))
    rows = tmp_path / "points" / "0000" / "train" / "rows.json"
    manifest = json.loads(rows.read_text())
    del manifest["blocks"]
    rows.write_text(json.dumps(manifest))
    old = GradientStore.open(tmp_path)
    assert old.point_about() == PointAbout()
    assert old.points("weights") == [0]
    assert not old.rows().statistics_only
    shutil.rmtree(tmp_path / "points")
    assert store.points() == []
