"""Packages that only a few methods need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hf_influence.errors import MissingPackage


def package(module: str, method: str) -> Any:
    """The module, imported when it is first needed.

    Raises:
        MissingPackage: It is not installed; says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        if error.name != name:  # it is there, and something else is wrong
            raise
        raise MissingPackage(
            f"method '{method}' computes its scores with the package {name!r}, which is not installed. Install it: "
            "pip install 'hf-influence[baselines]'."
        ) from error
