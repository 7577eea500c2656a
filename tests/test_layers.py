"""Who may import whom, what may be named how, and that every public name says what it gives."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    {"errors"},
    {"saving"},
    {"store", "scores", "task"},
    {"dataset"},
    {"gradients", "curvature"},
    {"points"},
    {"attribution"},
    {"filter", "evaluation"},
    {"callbacks"},
    {"pretrained", "demo", "cli"},
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
ENDS = {"pretrained", "demo", "cli"}
FILES = {
    ".".join(file.relative_to(root).with_suffix("").parts): file
    for root, folder in ((ROOT / "hf_influence", "."), (ROOT, "callbacks"))
    for file in (root / folder).rglob("*.py")
}
MODULES = sorted(name for name in FILES if name != "__init__")
EXAMPLES = [name for name in MODULES if re.search(r">>> (?!.*\+SKIP)", FILES[name].read_text())]


def imports(module: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"hf_influence.{module.removesuffix('.__init__')}"))
    assert found.attempted
    assert not found.failed


def test_the_readme_imports_what_there_is() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert len(nodes) > 5
    for node in nodes:
        module = importlib.import_module(str(node.module))
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_the_left(module: str) -> None:
    own = module.split(".")[0]
    for name in imports(module):
        if name.startswith("hf_influence."):
            other = name.split(".")[1]
            assert other in LEVEL, f"{module} imports {name}: import from the module that defines it"
            same = other == own or {own, other} <= ENDS
            assert same or LEVEL[other] < LEVEL[own], f"{module} imports {name}, which stands to its right"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_neighbours_stay_in_their_place(module: str) -> None:
    own = module.split(".")[0]
    for name in imports(module):
        root, _, what = name.partition(".")
        if root == "peft":
            assert module == "gradients.lora" or own in ENDS, f"{module} imports {name}"
        if root in ("transformers", "trl") and what.startswith(("Trainer", "Training", "trainer", "SFT")):
            assert own in {"callbacks", *ENDS}, f"{module} imports {name}"


def test_nothing_is_called_utils() -> None:
    assert not [module for module in MODULES if {"util", "utils", "helpers", "common"} & set(module.split("."))]
    assert {module.split(".")[0] for module in MODULES} <= set(LEVEL)


@pytest.mark.parametrize("package", ["", "attribution", "callbacks", "evaluation", "filter", "gradients", "points"])
def test_every_public_name_has_a_docstring(package: str) -> None:
    module = importlib.import_module(f"hf_influence.{package}".rstrip("."))
    assert module.__doc__
    assert list(module.__all__) == sorted(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert inspect.ismodule(value) or (value.__doc__ or "").strip(), name
        for member, method in inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else ():
            if not member.startswith(("_", "on_")) and member in vars(value):
                assert method.__doc__, f"{name}.{member}"
