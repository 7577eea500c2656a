"""Rows from the Trainer's own backward passes: each is the gradient of its example's own loss, whatever the setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import models
import pytest
import torch
from models import bert, labelled, llama, lora, padding, tiny
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    Trainer,
)
from transformers.optimization import Adafactor, AdafactorSchedule
from watched import (
    EXAMPLES,
    QUERIES,
    HalfPrecision,
    Overflowing,
    Recording,
    adapted,
    assert_exact,
    classifier,
    key,
    own_gradients,
    packed_llama,
    train,
    weights_and_logs,
)

from hf_influence import attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadSetting, MissingRows, StoreError, UnsupportedModel
from hf_influence.gradients import dropout, gaussian, logra, sparse_jl, verify
from hf_influence.gradients.modes import autocasts
from hf_influence.gradients.verify import TOLERANCE
from hf_influence.store import GradientStore


def two_adapters() -> Any:
    """The second of two adapters is active."""
    model = tiny(torch.float32)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    model.set_adapter("second")
    for name, weight in model.named_parameters():
        if "second" in name:
            nn.init.normal_(weight, std=0.2)
    return model


def quantised(**config: Any) -> Callable[[], Any]:
    def made() -> Any:
        torch.manual_seed(0)
        with TemporaryDirectory() as folder:
            llama().save_pretrained(folder)
            quantise = BitsAndBytesConfig(**config)
            base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantise, device_map={"": "cpu"})
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # whose kernel for inference takes 32 columns at a time
        model = get_peft_model(
            prepare_model_for_kbit_training(base, use_gradient_checkpointing=False),
            LoraConfig(r=3, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
        )
        for weight in model.parameters():
            if weight.requires_grad:
                nn.init.normal_(weight, std=0.2)
        return model

    return made


FOUR_BIT = quantised(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@dataclass
class Setting:
    """One row of the matrix."""

    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Any] = lambda: tiny(torch.float32)
    data: list[dict[str, Any]] = field(default_factory=lambda: EXAMPLES)
    collate: Any = None
    tolerance: float = 1e-5
    autocast: torch.dtype | None = None
    kind: type[Trainer] = Recording


def checkpointed(reentrant: bool) -> dict[str, Any]:
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}


BF16: dict[str, Any] = {"tolerance": 2e-2, "autocast": torch.bfloat16}
FP16: dict[str, Any] = {"tolerance": 2e-2, "autocast": torch.float16, "kind": HalfPrecision}
MATRIX = {
    "plain": Setting(),
    "left padding": Setting(collate=padding("left")),
    "accumulation": Setting({"gradient_accumulation_steps": 3}),
    "accumulation, batch of one": Setting({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}),
    "by token": Setting({"gradient_accumulation_steps": 2, "average_tokens_across_devices": False}),
    "checkpointing": Setting(checkpointed(False)),
    "reentrant checkpointing": Setting(checkpointed(True)),
    "bf16": Setting({"bf16": True}, **BF16),
    "bf16, checkpointing": Setting({"bf16": True, **checkpointed(False)}, **BF16),
    "bf16, accumulation": Setting({"bf16": True, "gradient_accumulation_steps": 2}, **BF16),
    "fp16": Setting({"fp16": True}, **FP16),
    "fp16, checkpointing": Setting({"fp16": True, **checkpointed(False)}, **FP16),
    "fp16, accumulation": Setting({"fp16": True, "gradient_accumulation_steps": 2}, **FP16),
    "by length": Setting({"train_sampling_strategy": "group_by_length"}),
    "workers": Setting({"dataloader_num_workers": 2}),
    "drop last": Setting({"dataloader_drop_last": True}),
    "clipping": Setting({"max_grad_norm": 1e-3}),
    "adafactor": Setting({"optim": "adafactor"}),
    "classes": Setting(make=classifier, data=labelled(lambda i: i % 3, 10)),
    "classes, accumulation": Setting(
        {"gradient_accumulation_steps": 2}, classifier, labelled(lambda i: i % 3, 10), padding("left")
    ),
    "packing": Setting(make=packed_llama, collate=DataCollatorWithFlattening()),
    "packing, accumulation": Setting(
        {"gradient_accumulation_steps": 2}, packed_llama, collate=DataCollatorWithFlattening()
    ),
    "rank-stabilised": Setting(make=adapted(["q_proj", "v_proj", "down_proj"], use_rslora=True)),
    "embeddings": Setting(make=adapted(["embed_tokens", "q_proj"])),
    "conv1d": Setting(make=adapted(["c_attn"], models.gpt2)),
    "two adapters": Setting(make=two_adapters),
    "4 bit": Setting(make=FOUR_BIT),
    "4 bit, checkpointing": Setting(checkpointed(False), FOUR_BIT),
    "8 bit": Setting(make=quantised(load_in_8bit=True)),
    "packing, no dropout": Setting(make=lambda: packed_llama(lora_dropout=0.0), collate=DataCollatorWithFlattening()),
}


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*", "ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("name", MATRIX)
def test_every_row_equals_autograd(tmp_path: Path, name: str) -> None:
    s = MATRIX[name]
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    run = train(s.make(), tmp_path, capture, data=s.data, collate=s.collate, kind=s.kind, **s.options)
    store = GradientStore.open(capture.path)
    assert store.points() == [1, 2]
    for epoch in (1, 2):
        rows = store.rows("train", epoch)
        assert len(rows) == len(s.data) - (len(s.data) % 3 if name == "drop last" else 0)
        assert_exact(run, rows, s.data, epoch, s.tolerance, autocast=s.autocast)
        assert (rows.stats["epoch"] == epoch).all()


def test_padding_that_sees_the_example_behind_it_is_refused(tmp_path: Path) -> None:
    """Eager attention lets a masked token attend to all; it predicts the first token, if that has a label."""
    first_labelled = [{**row, "labels": list(row["input_ids"])} for row in EXAMPLES]
    for attention, side in (("sdpa", "left"), ("eager", "right"), ("eager", "left")):
        model = lora(llama(attn_implementation=attention), ["q_proj", "v_proj"], dtype=torch.float32)
        folder = tmp_path / f"{attention}-{side}"
        capture = GradientCapture(folder, during="epochs", at_end=False)
        if (attention, side) == ("eager", "left"):
            with pytest.raises(UnsupportedModel, match="padding on the left sees the example behind it"):
                train(model, tmp_path, capture, data=first_labelled, collate=padding(side))
            continue
        run = train(model, tmp_path, capture, data=first_labelled, collate=padding(side))
        assert_exact(run, GradientStore.open(folder).rows("train", 1), first_labelled, 1, 1e-5)


def test_a_step_that_overflows_in_fp16_is_left_out_and_counted(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    run = train(tiny(torch.float32), tmp_path, capture, kind=Overflowing, fp16=True)
    store = GradientStore.open(capture.path)
    assert [len(store.rows("train", epoch)) for epoch in (1, 2)] == [len(EXAMPLES) - 3, len(EXAMPLES)]
    assert_exact(run, store.rows("train", 2), EXAMPLES, 2, 2e-2, autocast=torch.float16)
    assert [log["capture/lost"] for log in run.state.log_history if "capture/lost" in log][-1] == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_goes_on_saving_memory(tmp_path: Path, reentrant: bool) -> None:
    """Between the passes no input of an adapter is alive: the second pass makes it again."""
    inputs: list[Any] = []
    alive: list[int] = []

    class Looking(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            inputs.clear()
            loss = super().compute_loss(*args, **kwargs)
            alive.append(sum(not storage.expired() for storage in inputs))
            return loss

    model = tiny(torch.float32)
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):  # no tensor of the model's own outlives the layer there
            module.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    train(model, tmp_path, capture, kind=Looking, **checkpointed(reentrant))
    assert len(inputs) >= 4
    assert set(alive) == {0}


SETTINGS_OF_CAPTURE: dict[str, dict[str, Any]] = {
    "whole": {},
    "dropout": {"compress": dropout(5)},
    "gaussian": {"compress": gaussian(5)},
    "steps": {"during": "steps", "every": 2},
}


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_rows_at_the_end_are_as_exact_as_the_forward_pass(tmp_path: Path, options: dict[str, Any]) -> None:
    run = train(tiny(torch.float32), tmp_path / "out", GradientCapture(tmp_path / "rows"), **options)
    assert autocasts(run.model) == bool(options), "a Trainer leaves the model as it was wrapped"
    error = verify(run.model, EXAMPLES, tmp_path / "rows", k=len(EXAMPLES), data_collator=padding())
    assert (error > TOLERANCE) == bool(options)


@pytest.mark.parametrize("name", SETTINGS_OF_CAPTURE)
@pytest.mark.parametrize(
    "options",
    [{}, checkpointed(True), {"bf16": True}, {"fp16": True}],
    ids=["plain", "reentrant", "bf16", "fp16"],
)
def test_training_is_bit_identical_with_and_without_capture(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    settings = {"during": "epochs", **SETTINGS_OF_CAPTURE[name]}
    capture = GradientCapture(tmp_path / "rows", QUERIES, **settings)
    runs = []
    for callbacks in ([], [capture]):
        model = tiny(torch.float32)
        hooks = models.state_of(model)["hooks"]
        kind = HalfPrecision if "fp16" in options else Trainer
        run = train(model, tmp_path / "out", *callbacks, kind=kind, gradient_accumulation_steps=2, **options)
        if not options:
            assert models.state_of(model)["hooks"] == hooks
        assert "training_step" not in vars(run)
        runs.append(weights_and_logs(run))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["plain", "packing", "embeddings"])
@pytest.mark.parametrize("compress", [dropout(5), gaussian(5), sparse_jl(5), logra(2, 2)], ids=lambda c: c.name)
def test_compressed_rows_are_whole_rows_compressed(tmp_path: Path, compress: Any, name: str) -> None:
    s = MATRIX[name]
    stores = []
    for folder, settings in (("whole", {}), ("compressed", {"compress": compress})):
        torch.manual_seed(0)
        capture = GradientCapture(tmp_path / folder, during="epochs", at_end=False, **settings)
        train(s.make(), tmp_path, capture, collate=s.collate, kind=Trainer)
        stores.append(GradientStore.open(tmp_path / folder))
    whole, small = (store.rows("train", 2) for store in stores)
    for block in whole.blocks:
        fit = compress.fit(block, whole.header.blocks[block])
        torch.testing.assert_close(small.block(block), fit(whole.block(block)), rtol=1e-4, atol=1e-6)


def test_points_of_steps_hold_the_examples_of_the_step_and_queries_at_its_weights(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", QUERIES, during="steps", every=3)
    run = train(tiny(torch.float32), tmp_path, capture)
    store = GradientStore.open(capture.path)
    assert store.points() == [0, 1, 4, 7]
    micros = dict(enumerate(run.micros, 1))
    for point in (1, 4, 7):
        rows = store.rows("train", point)
        want = own_gradients(run.model, micros[point])
        assert len(rows) == len(want)
        assert (rows.stats["step"] == point).all()
        assert models.worst_error(rows, [want[key(EXAMPLES[at])] for at in rows.positions.tolist()]) < 1e-5
        assert len(store.rows("query", point)) == len(QUERIES)


def test_chosen_epochs_alone_are_captured(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", epochs=[2], at_end=False)
    train(tiny(torch.float32), tmp_path, capture, num_train_epochs=3)
    assert GradientStore.open(capture.path).points() == [2]


def test_a_row_says_where_it_was_taken(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    run = train(tiny(torch.float32), tmp_path, capture, kind=Recording)
    stats = GradientStore.open(capture.path).rows("train", 2).stats
    assert sorted(set(stats["step"].tolist())) == [5, 6, 7, 8]
    rates = {log["step"]: log["learning_rate"] for log in run.state.log_history if "loss" in log}
    for step, rate in zip(stats["step"].tolist(), stats["learning_rate"].tolist(), strict=True):
        assert rate == pytest.approx(rates[step])
    assert set(stats) >= {"loss", "margin", "el2n", "correct", "n_tokens", "length", "hash", "grad_norm"}


def test_equal_examples_each_get_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [*EXAMPLES, EXAMPLES[0], EXAMPLES[0]]
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    with caplog.at_level("WARNING"):
        train(tiny(torch.float32), tmp_path, capture, data=data)
    assert "2 training examples are equal to earlier ones" in caplog.text
    assert len(GradientStore.open(capture.path).rows("train", 1)) == 12


def test_a_budget_thins_out_the_epochs(tmp_path: Path) -> None:
    model = tiny(torch.float32)
    one_epoch = sum(w.numel() for w in model.parameters() if w.requires_grad) * 4 * len(EXAMPLES) / 2**30
    settings: dict[str, Any] = {"during": "epochs", "at_end": False}
    capture = GradientCapture(tmp_path / "rows", budget=2.5 * one_epoch, **settings)
    train(model, tmp_path, capture, num_train_epochs=4)
    assert GradientStore.open(capture.path).points() == [1, 3]
    with pytest.raises(StoreError, match=r"(?s)capturing less often does not help.*compress=dropout"):
        train(model, tmp_path, GradientCapture(tmp_path / "more", budget=0.5 * one_epoch, **settings))


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_what_was_captured_is_logged_beside_the_losses(tmp_path: Path, strategy: str) -> None:
    logs = []
    for callbacks in ([], [GradientCapture(tmp_path / "rows", during="epochs", at_end=False)]):
        run = train(tiny(torch.float32), tmp_path, *callbacks, logging_strategy=strategy)
        logs.append([{k: v for k, v in log.items() if k in ("loss", "epoch")} for log in run.state.log_history])
    captured = [log for log in run.state.log_history if "capture/rows" in log]
    assert [log["capture/rows"] for log in captured] == [10, 20]
    assert [log for log in logs[1] if "loss" in log] == [log for log in logs[0] if "loss" in log]


def test_batch_normalisation_after_a_captured_layer_is_refused(tmp_path: Path) -> None:
    """In training the loss of an example then depends on the others of its batch; at rest it does not."""

    def normalised() -> nn.Module:
        base = bert(num_labels=3)
        base.classifier = nn.Sequential(nn.BatchNorm1d(models.WIDTH), nn.Linear(models.WIDTH, 3))
        return lora(base, ["query"], dtype=torch.float32)

    data = labelled(lambda i: i % 3, 8)
    with pytest.raises(BadSetting, match=r"classifier.0 normalises by the batch in training.*during=None"):
        train(normalised(), tmp_path, GradientCapture(tmp_path / "during", during="epochs"), data=data)
    train(normalised(), tmp_path, GradientCapture(tmp_path / "end"), data=data)
    assert len(GradientStore.open(tmp_path / "end").rows()) == 8


def test_an_optimizer_that_chooses_its_own_rates_leaves_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class OwnRates(Trainer):
        def create_optimizer(self, *args: Any) -> Any:
            self.optimizer = Adafactor(self.model.parameters(), lr=None, relative_step=True, warmup_init=True)
            return self.optimizer

        def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
            self.lr_scheduler = AdafactorSchedule(self.optimizer)
            return self.lr_scheduler

    capture = GradientCapture(tmp_path / "rows", EXAMPLES[:3], during="epochs", at_end=False)
    train(tiny(torch.float32), tmp_path, capture, kind=OwnRates)
    assert "chooses its learning rates itself" in caplog.text
    assert "learning_rate" not in GradientStore.open(capture.path).rows("train", 1).stats
    with pytest.raises(MissingRows, match="learning rate"):
        attribute(capture.path, "self_tracin")
    assert bool(attribute(capture.path, "self_tracin", weighted=False).values.any())


def test_a_compute_loss_of_ones_own_is_told_of_what_rows_leave_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Penalised(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            out = model(**inputs, output_hidden_states=True)
            return out.loss + out.hidden_states[-1].square().mean()

    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    train(tiny(torch.float32), tmp_path, capture, kind=Penalised)
    assert "Penalised has a compute_loss of its own" in caplog.text
    caplog.clear()
    train(tiny(torch.float32), tmp_path, GradientCapture(tmp_path / "plain", during="epochs", at_end=False))
    assert "compute_loss" not in caplog.text
