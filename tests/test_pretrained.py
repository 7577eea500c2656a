"""The models whose weights come as packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hf_influence.pretrained import MINILM, SMOLLM2, load_classifier, load_language_model


@pytest.mark.parametrize(("load", "hub_name"), [(load_classifier, MINILM), (load_language_model, SMOLLM2)])
def test_the_hub_names_of_the_packaged_models_lead_to_the_installed_weights(
    load: Callable[[Any], tuple[Any, Any]], hub_name: str
) -> None:
    named, default = (load(model)[0].state_dict() for model in (hub_name, None))
    assert named.keys() == default.keys()
    assert all(weight.equal(default[name]) for name, weight in named.items())
