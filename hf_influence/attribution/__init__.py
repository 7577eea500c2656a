"""The methods: from stored rows to scores. A module here that defines a method adds it to the table by being there."""

from importlib import import_module
from pkgutil import iter_modules

from hf_influence.attribution.attribute import attribute
from hf_influence.attribution.combined import combined
from hf_influence.attribution.lacking import lacking
from hf_influence.attribution.method import About, methods

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["About", "attribute", "combined", "lacking", "methods"]
