"""A store does not show how training went: killed and resumed, or by one process or two."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import autograd_row, prompts, tiny, worst_error
from runs import run

from hf_influence.store import GradientStore

SCRIPT = str(Path(__file__).parent / "runs.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def process(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ERRORS = """
import torch.distributed as dist
from hf_influence.errors import BadSetting, StoreError
from hf_influence.gradients.processes import by_first, rank

def fail(error):
    raise error

dist.init_process_group("gloo")
for error, elsewhere in ((OSError("full"), StoreError), (BadSetting("no"), BadSetting)):
    try:
        by_first(lambda: fail(error))
    except (OSError, StoreError, BadSetting) as raised:
        assert type(raised) is (type(error) if rank() == 0 else elsewhere), raised
        assert str(error) in str(raised)
    else:
        raise AssertionError
assert by_first(lambda: 3 + rank()) == 3
dist.destroy_process_group()
"""

LOOKS = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from hf_influence.gradients.processes import by_first, rank

dist.init_process_group("gloo")
file = Path(sys.argv[1])
by_first(file.touch)
if rank() == 1:
    time.sleep(1)
    assert file.exists()
by_first(file.unlink)
assert not file.exists()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("script", [ERRORS, LOOKS], ids=["errors", "looks"])
def test_the_first_process_waits_for_the_others_and_they_learn_of_its_errors(tmp_path: Path, script: str) -> None:
    (tmp_path / "script.py").write_text(script)
    process(*TORCHRUN, str(tmp_path / "script.py"), str(tmp_path / "file"))


def assert_same_stores(one: Path, other: Path, points: list[int], tolerance: float) -> None:
    a, b = (GradientStore.open(folder / "rows") for folder in (one, other))
    assert a.points() == b.points() == [0, 1, 2, 3]
    for point in points:
        assert a.splits(point) == b.splits(point) == ["query", "train"]
        for split in a.splits(point):
            x, y = a.rows(split, point), b.rows(split, point)
            assert x.ids == y.ids
            for name in x.blocks:
                torch.testing.assert_close(y.block(name), x.block(name), rtol=tolerance, atol=tolerance)
            for name, values in x.stats.items():
                torch.testing.assert_close(y.stats[name], values, rtol=tolerance, atol=tolerance)


def test_a_run_that_is_killed_ten_times_leaves_the_store_of_an_undisturbed_one(tmp_path: Path) -> None:
    process(SCRIPT, str(tmp_path / "undisturbed"))
    assert "finished after 10 kills" in process(SCRIPT, str(tmp_path / "killed"), "--kill", "10")
    for folder in sorted((tmp_path / "killed").iterdir()):
        assert_same_stores(tmp_path / "undisturbed", folder, [0, 1, 2, 3], tolerance=0)


@pytest.mark.parametrize("examples", [32, 31])
def test_two_processes_give_the_same_store_as_one(tmp_path: Path, examples: int) -> None:
    run(tmp_path / "one", examples=examples, batch_size=4, dropout=0.0)
    settings = ["--examples", str(examples), "--batch-size", "4", "--dropout", "0"]
    process(*TORCHRUN, SCRIPT, str(tmp_path / "two"), *settings)
    # of 31 examples the second process trains on one twice, so from its last step on training itself is another
    same = [0, 1, 2, 3] if examples == 32 else []
    assert_same_stores(tmp_path / "one", tmp_path / "two", same, tolerance=1e-5)
    one, two = (GradientStore.open(tmp_path / folder / "rows").rows("train", 1) for folder in ("one", "two"))
    assert one.ids == two.ids == list(range(examples))
    for name in one.blocks:
        torch.testing.assert_close(two.block(name), one.block(name), rtol=1e-5, atol=1e-6)


def test_two_processes_that_go_on_from_a_checkpoint_give_the_store_of_an_undisturbed_run(tmp_path: Path) -> None:
    command = [*TORCHRUN, SCRIPT, str(tmp_path / "two"), "--examples", "32", "--batch-size", "4", "--dropout", "0"]
    process(*command)
    shutil.copytree(tmp_path / "two/rows", tmp_path / "undisturbed/rows")
    last = sorted((tmp_path / "two").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for folder in last[len(last) // 2 :]:
        shutil.rmtree(folder)
    process(*command)
    assert_same_stores(tmp_path / "undisturbed", tmp_path / "two", [0, 1, 2, 3], tolerance=1e-5)


def test_examples_that_occur_twice_have_their_rows_whichever_process_saw_them(tmp_path: Path) -> None:
    settings = ["--examples", "24", "--batch-size", "2", "--dropout", "0", "--twice"]
    process(*TORCHRUN, SCRIPT, str(tmp_path), *settings)
    for epoch in (1, 2, 3):
        rows = GradientStore.open(tmp_path / "rows").rows("train", epoch)
        assert rows.ids == list(range(24))
        assert torch.equal(rows.stats["hash"][0::2], rows.stats["hash"][1::2])
        for name in rows.blocks:
            assert (rows.block(name).abs().amax(1) > 0).all()


def test_rows_of_both_processes_equal_autograd_under_accumulation_and_unequal_lengths(tmp_path: Path) -> None:
    settings = ["--examples", "24", "--batch-size", "4", "--dropout", "0", "--record"]
    process(*TORCHRUN, SCRIPT, str(tmp_path), *settings)
    micros = {file.stem: torch.load(file) for file in sorted((tmp_path / "record").glob("*.pt"))}
    data = prompts(24)
    position = {tuple(example["input_ids"]): at for at, example in enumerate(data)}
    model = tiny(torch.float32, lora_dropout=0.0)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    store = GradientStore.open(tmp_path / "rows")
    for epoch in (1, 2, 3):
        rows = store.rows("train", epoch)
        steps = set(rows.stats["step"].tolist())
        of_rank: dict[str, set[int]] = {"0": set(), "1": set()}
        want: dict[int, dict[str, torch.Tensor]] = {}
        for name, micro in micros.items():
            if micro["step"] not in steps:
                continue
            with torch.no_grad():
                for parameter, value in micro["weights"].items():
                    weights[parameter].copy_(value)
            batch = micro["batch"]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                at = position[tuple(ids[mask.bool()].tolist())]
                of_rank[name[0]].add(at)
                want[at] = autograd_row(model, data[at])
                assert int(rows.stats["step"][at]) == micro["step"]
        assert of_rank["0"].isdisjoint(of_rank["1"])
        assert len(of_rank["0"]) == len(of_rank["1"]) == 12
        assert rows.ids == sorted(want) == list(range(24))
        assert worst_error(rows, [want[at] for at in rows.ids]) < 1e-5
    in_one_step = [name for name, micro in micros.items() if micro["step"] == 1]
    assert [name[0] for name in in_one_step] == ["0", "0", "1", "1"]  # each process accumulates two batches
    assert any(not micro["batch"]["attention_mask"].all() for micro in micros.values())
