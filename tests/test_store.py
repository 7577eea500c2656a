"""The folder: what is in it, what survives an accident, and whether its rows are still right."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import all_rows, bert, labelled, lora, padding, prompts, state_of, stored, tiny
from safetensors.torch import load_file, save_file
from stores import make_store

from hf_influence.errors import MissingRows, StoreError, StoreMismatch
from hf_influence.gradients import collect, dropout, gaussian, verify
from hf_influence.gradients.compress import compressor_of
from hf_influence.store import GradientStore
from hf_influence.store import writer as writer_module

EXAMPLES = prompts()


def shards(path: Path) -> list[Path]:
    return sorted(path.rglob("*.safetensors"))


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 1)  # one a batch


def test_the_folder_holds_json_and_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    store = collect(tiny(), EXAMPLES, tmp_path, batch_size=2)
    collect(tiny(), EXAMPLES[:2], tmp_path, split="query")
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    rows = "points/0000/{}/rows-0000{}.safetensors"
    assert files == [
        "points/0000/point.json",
        "points/0000/query/" + "rows-00000.safetensors",
        "points/0000/query/rows.json",
        *(rows.format("train", i) for i in range(4)),
        "points/0000/train/rows.json",
        "store.json",
    ]
    assert store.splits() == ["query", "train"]
    store.rows().check()


@pytest.mark.parametrize("shard_bytes", [1, 1 << 26])
def test_rows_come_in_dataset_order_and_chunks_cover_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(writer_module, "SHARD_BYTES", shard_bytes)
    rows = stored(tiny(), EXAMPLES, tmp_path, batch_size=2)
    assert rows.ids == list(range(7))
    assert rows.stats["length"].tolist() == [len(row["input_ids"]) for row in EXAMPLES]  # although sorted on disk
    assert load_file(shards(tmp_path)[0])["index"].tolist() != [0, 1]
    for name in rows.blocks:
        for size in (1, 3, 100, None):
            out, seen = torch.zeros_like(rows.block(name)), []
            for at, piece in rows.chunks(name, size):
                assert size is None or len(at) <= size
                out[at] = piece
                seen += at.tolist()
            assert sorted(seen) == rows.ids
            assert torch.equal(out, rows.block(name))


def test_columns_are_the_gradient_flattened_row_major(tmp_path: Path) -> None:
    g = torch.arange(2 * 12.0).reshape(2, 3, 4)
    rows = make_store(tmp_path, {"w": g.flatten(1)}).rows()
    assert torch.equal(rows.block("w").unflatten(1, (3, 4)), g)
    assert torch.equal(rows.columns("w"), torch.arange(12))
    model = tiny()
    rows = stored(model, EXAMPLES, tmp_path / "model")
    shape = rows.header.blocks["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert shape == [3, 16]


def test_what_was_never_collected_says_how_to(tmp_path: Path) -> None:
    store = collect(tiny(), EXAMPLES, tmp_path)
    with pytest.raises(MissingRows, match=r"split 'query' at point 0 \(it has: train\).*collect\(model, dataset"):
        store.rows("query")
    with pytest.raises(MissingRows, match=r"no block 'w'"):
        store.rows().block("w")
    with pytest.raises(StoreError, match=r"is not a gradient store.*collect"):
        GradientStore.open(tmp_path / "nowhere")


def test_training_rows_stay_at_their_weights_when_the_queries_are_dropped(tmp_path: Path) -> None:
    model = tiny()
    for split in ("train", "query"):
        store = collect(model, EXAMPLES, tmp_path, split)
    adapter = store.adapter()
    store.drop(0, "query")
    assert store.adapter() == adapter
    with pytest.raises(StoreMismatch, match="other values of the adapter"):
        collect(moved("lora_A"), EXAMPLES, tmp_path, "query")
    store.drop(0, "train")
    assert store.adapter() is None
    assert collect(moved("lora_A"), EXAMPLES, tmp_path).adapter() != adapter


def cut(path: Path) -> None:
    file = shards(path)[0]
    file.write_bytes(file.read_bytes()[:-8])


def flip(path: Path) -> None:
    file = shards(path)[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def rewrite(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        file = next(path.rglob(name))
        content = json.loads(file.read_text())
        file.write_text(json.dumps(change(content) or content))

    return act


ACCIDENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard cut": (cut, "rows-00000.safetensors is missing or cut short.*Delete .* collect it again"),
    "shard gone": (lambda path: shards(path)[0].unlink(), "rows-00000.safetensors is missing or cut short"),
    "bit flipped": (flip, r"rows-00000.safetensors is damaged. Delete"),
    "list cut": (lambda path: next(path.rglob("rows.json")).write_text("{"), "rows.json cannot be read"),
    "list of another kind": (lambda path: next(path.rglob("rows.json")).write_text("[]"), "is not a JSON object"),
    "list incomplete": (rewrite("rows.json", lambda about: about.pop("n") and None), "rows.json is damaged"),
    "shard twice": (
        rewrite("rows.json", lambda about: about.update(shards=about["shards"] * 2, n=14)),
        "lists an example twice or not at all",
    ),
    "header incomplete": (rewrite("store.json", lambda about: about.pop("blocks") and None), "store.json is damaged"),
    "newer layout": (rewrite("store.json", lambda about: about.update(schema=99)), "another store layout"),
}


@pytest.mark.parametrize("case", ACCIDENTS)
def test_damage_is_found_and_named(tmp_path: Path, case: str) -> None:
    damage, message = ACCIDENTS[case]
    collect(tiny(), EXAMPLES, tmp_path)
    damage(tmp_path)
    with pytest.raises(StoreError, match=message):
        GradientStore.open(tmp_path).rows().check()
    if case not in ("bit flipped", "shard twice"):  # only a checksum sees the one, only a reader the other
        with pytest.raises(StoreError):
            collect(tiny(), EXAMPLES, tmp_path)
        collect(tiny(), EXAMPLES, tmp_path, overwrite=True).rows().check()


def full_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def save(content: Any, file: Path, metadata: Any = None) -> None:
        if re.search(name, file.name):
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(content, file, metadata)

    monkeypatch.setattr("hf_influence.saving.save_file", save)


def test_a_disk_that_fills_up_keeps_the_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = all_rows(stored(tiny(), EXAMPLES, tmp_path / "roomy"))
    small_shards(monkeypatch)
    with monkeypatch.context() as patch:
        full_for(patch, r"00002\.")
        with pytest.raises(StoreError, match=r"could not write.*No space left.*The 4 rows before it are safe"):
            collect(tiny(), EXAMPLES, tmp_path / "full", batch_size=2)
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(MissingRows, match="4 of 7"):
        GradientStore.open(tmp_path / "full").rows()
    torch.testing.assert_close(all_rows(stored(tiny(), EXAMPLES, tmp_path / "full", batch_size=2)), expected)


def test_a_displacement_that_does_not_fit_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = make_store(tmp_path, {"a": torch.zeros(2, 3)}).displacement(0)
    kept.save({"a": torch.ones(3, 2).T, "b": torch.zeros(2)})
    full_for(monkeypatch, "displacement")
    with pytest.raises(StoreError, match=r"could not write .*displacement\.safetensors.*No space left.*Make room"):
        kept.save({"a": 2 * torch.ones(2, 3)})
    assert not list(tmp_path.rglob("*.part"))
    assert kept.moved() == ["a"]
    assert torch.equal(kept.of("a"), torch.ones(6))


def test_a_compressed_store_that_does_not_say_how_wide_it_is_is_refused(tmp_path: Path) -> None:
    collect(tiny(), EXAMPLES, tmp_path, compress=dropout(3))
    file = tmp_path / "store.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "widths": None}))
    with pytest.raises(StoreError, match=r"damaged \(compress without widths\).*Collect the rows again"):
        GradientStore.open(tmp_path)


def test_what_was_taken_does_not_hang_on_the_batch_it_came_from(tmp_path: Path) -> None:
    store = make_store(tmp_path, {"a": torch.zeros(2, 3)}, stats={"label": torch.zeros(2, dtype=torch.long)})
    about = {"adapter": None, "dataset": "d", "n": 2, "point": 1}
    labels, loss = torch.tensor([3, 4]), torch.zeros(2)
    with store.writer("train", **about) as writer:
        writer.append([0, 1], {"a": torch.ones(2, 3)}, {"label": labels[:], "loss": loss})
        labels.fill_(9)  # a worker of the dataloader may write the next batch there
    assert store.rows("train", 1).stats["label"].tolist() == [3, 4]


def test_other_processes_look_at_a_split_and_leave_its_list_alone(tmp_path: Path) -> None:
    """They do so at the same time, through one name for what is being written."""
    store = make_store(tmp_path, {"block": torch.ones(4, 3)})
    listed = tmp_path / "points/0000/train/rows.json"
    before = listed.stat().st_ino
    writer = store.writer("train", adapter="", dataset="", n=4, rank=1)
    assert writer.done == {0, 1, 2, 3}
    assert listed.stat().st_ino == before, "it was written anew"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_is_too_small_is_seen_before_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    collect(tiny(), EXAMPLES, tmp_path)
    rewrite("rows.json", lambda about: about.update(n=8))(tmp_path)  # one row is still to come
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 100))
    store = GradientStore.open(tmp_path)
    about = {
        "adapter": store.adapter(),
        "dataset": json.loads(next(tmp_path.rglob("rows.json")).read_text())["dataset"],
    }
    with pytest.raises(
        StoreError, match=r"need 0.00\d+ MiB and the disk of .* has 9.54e-05 MiB free.*compress=dropout"
    ):
        store.writer("train", **about, n=8, overwrite=overwrite)
    assert len(shards(tmp_path)) == 1  # and nothing is lost


VERIFIED: dict[str, tuple[Callable[[], Any], list[Any], dict[str, Any], dict[str, Any]]] = {
    "mean": (tiny, EXAMPLES, {}, {}),
    "sum": (tiny, EXAMPLES, {"loss_reduction": "sum"}, {}),
    "dropout": (tiny, EXAMPLES, {"compress": dropout(5, seed=2)}, {}),
    "gaussian": (tiny, EXAMPLES, {"compress": gaussian(5, seed=2)}, {}),
    "float32": (lambda: tiny(torch.float32), EXAMPLES, {}, {}),
    "skip": (lambda: tiny(use_dora=True), EXAMPLES, {"skip": ["*magnitude*"]}, {}),
    "padded": (tiny, EXAMPLES, {"data_collator": padding("left", 3)}, {"data_collator": padding("left", 3)}),
    "label": (lambda: lora(bert(), ["query"]), labelled(lambda i: i % 2), {}, {}),
    "names": (tiny, [{**row, "name": f"{i}"} for i, row in enumerate(EXAMPLES)], {"id_column": "name"}, {}),
}


@pytest.mark.parametrize("case", VERIFIED)
def test_verify_finds_the_rows_right_and_leaves_the_model_alone(tmp_path: Path, case: str) -> None:
    make, examples, settings, checked = VERIFIED[case]
    model = make().train()
    store = collect(model, examples, tmp_path, batch_size=3, **settings)
    before = state_of(model)
    assert verify(model, examples, store, **checked) < 1e-5
    models.assert_same_state(before, state_of(model))


def test_verify_counts_an_example_without_labels_as_zero(tmp_path: Path) -> None:
    examples = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}, EXAMPLES[0]]
    with pytest.warns(UserWarning, match="no labelled token"):
        collect(tiny(), examples, tmp_path)
    assert verify(tiny(), examples, tmp_path) < 1e-6


@pytest.mark.parametrize("k", [1, 7, 100])
def test_verify_finds_a_wrong_row_and_names_it(tmp_path: Path, k: int) -> None:
    collect(tiny(), EXAMPLES, tmp_path, batch_size=7)
    file = shards(tmp_path)[0]
    content = load_file(file)
    wrong = {name: -value if name.startswith("rows.") else value for name, value in content.items()}
    save_file(wrong, file)
    with pytest.raises(StoreError, match=r"the row of example \d in .* differs from plain autograd by 2.0e\+00 of"):
        verify(tiny(), EXAMPLES, tmp_path, k=k)
    assert verify(tiny(), EXAMPLES, tmp_path, k=k, tolerance=3.0) == pytest.approx(2)


def moved(part: str) -> Any:
    model = tiny()
    next(weight for name, weight in model.named_parameters() if part in name).data += 0.1
    return model


@pytest.mark.parametrize(
    ("model", "examples", "message"),
    [
        (lambda: moved("lora_A"), EXAMPLES, "other values of the adapter"),
        (lambda: moved("embed"), EXAMPLES, "another model"),
        (lambda: tiny(r=2), EXAMPLES, "another blocks"),
        (tiny, prompts(7, seed=1), "other tokenised dataset"),
        (tiny, EXAMPLES[:6], "other tokenised dataset"),
    ],
)
def test_verify_refuses_another_model_or_dataset(
    tmp_path: Path, model: Callable[[], Any], examples: list[Any], message: str
) -> None:
    collect(tiny(), EXAMPLES, tmp_path)
    with pytest.raises(StoreMismatch, match=message):
        verify(model(), examples, tmp_path)


@pytest.mark.parametrize("compress", [None, dropout(3, seed=7), gaussian(4)])
def test_a_compressor_is_rebuilt_from_its_settings(compress: Any) -> None:
    assert compressor_of(None if compress is None else compress.settings()) == compress


def test_a_compressor_of_a_newer_version_is_refused() -> None:
    with pytest.raises(
        StoreError, match=r"'of_tomorrow'.*does not know \(it has: dropout, gaussian, sparse_jl, logra\)"
    ):
        compressor_of({"name": "of_tomorrow", "r_in": 4})
