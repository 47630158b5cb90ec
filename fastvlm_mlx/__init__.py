"""Ask a picture a question: FastVLM in MLX.

    from fastvlm_mlx import load, generate

    model, processor = load("apple/FastVLM-0.5B")
    print(generate(model, processor, "What is this?", images=["examples/cat.jpg"]))

The public names are looked up on first use, so that `import fastvlm_mlx` costs next to nothing and
the command line can print its help without loading MLX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import (
    CheckpointError,
    ConfigError,
    FastVLMError,
    HubError,
    PictureError,
    PromptError,
    UsageError,
)

if TYPE_CHECKING:
    from fastvlm_mlx.generation import describe_model as describe_model
    from fastvlm_mlx.generation import generate as generate
    from fastvlm_mlx.generation import load as load
    from fastvlm_mlx.generation import stream_generate as stream_generate
    from fastvlm_mlx.hub import download as download
    from fastvlm_mlx.hub import find_model as find_model

__version__ = "0.1.0"

# Public name -> the module that defines it.
_LAZY = {
    "load": "fastvlm_mlx.generation",
    "generate": "fastvlm_mlx.generation",
    "stream_generate": "fastvlm_mlx.generation",
    "describe_model": "fastvlm_mlx.generation",
    "find_model": "fastvlm_mlx.hub",
    "download": "fastvlm_mlx.hub",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "FastVLMError",
    "HubError",
    "PictureError",
    "PromptError",
    "UsageError",
    "__version__",
    *_LAZY,
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastvlm_mlx.device import prefer_openblas

    prefer_openblas()  # has an effect only before the first import of mlx.core
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
