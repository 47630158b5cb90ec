"""From any published checkpoint to a folder in the layout of the MLX ecosystem, and to Core ML.

    from fastvlm_mlx.convert import ConvertOptions, convert

    report = convert("apple/FastVLM-0.5B", "FastVLM-0.5B-4bit", ConvertOptions(bits=4))

The folder `convert/` of the repository is the package `fastvlm_mlx.convert`. Who does what:

| module | what |
| --- | --- |
| `options`, `report` | what is asked for, and what was done |
| `source`, `archive`, `merge` | any source, zip, adapter on a base -> canonical tensors |
| `calibrate` | training the scales of a quantised model on pictures |
| `quantise`, `plan` | what becomes of each tensor, decided from headers alone |
| `naming`, `writer` | names on disk; shards, streamed |
| `sidecars`, `card` | configuration, tokenizer and processor files; the model card |
| `target` | the lock, the folder beside, and putting it in place in one step |
| `pipeline` | `convert`: the road from one end to the other |
| `inspection`, `verify`, `upload` | looking before, comparing after, sending to the hub |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .options import ConvertOptions as ConvertOptions
    from .pipeline import convert as convert
    from .report import ConvertReport as ConvertReport

# Looked up on first use: the commands import this package before they need MLX.
_LAZY = {"ConvertOptions": "options", "ConvertReport": "report", "convert": "pipeline"}

__all__ = ["ConvertOptions", "ConvertReport", "convert"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
