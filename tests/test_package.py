"""What a user installs: every module, the type marker and the licence, and imports that do not need this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from zipfile import ZipFile

import hf_influence
from hf_influence.attribution import attribute
from hf_influence.filter import Relabel

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_module_and_works_without_the_sources(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    for folder in ("hf_influence", "callbacks"):
        copytree(ROOT / folder, sources / folder, ignore=ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / file, sources)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    build.append(str(sources))
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path / "installed")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_influence").rglob("*.py")}
    modules |= {f"hf_influence/callbacks/{path.name}" for path in (ROOT / "callbacks").glob("*.py")}
    assert modules <= names
    assert "hf_influence/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    look = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hf_influence, hf_influence.callbacks as callbacks; "
        "print(hf_influence.__file__, callbacks.__file__, callbacks.GradientCapture.__module__)"
    )
    command = [sys.executable, "-c", look, str(tmp_path / "installed")]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True).stdout
    package, callbacks, module = printed.split()
    assert Path(package).is_relative_to(tmp_path)
    assert Path(callbacks).is_relative_to(tmp_path)
    assert module == "hf_influence.callbacks.capture"


def test_nothing_heavy_is_loaded_before_it_is_asked_for() -> None:
    """The command line answers --help at once."""
    code = "import sys, hf_influence.cli; print(sorted({'datasets', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert hf_influence.attribute is attribute
    assert hf_influence.filter.Relabel is Relabel
    assert {"GradientStore", "collect"} <= set(dir(hf_influence))
