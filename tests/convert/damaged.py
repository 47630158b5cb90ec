"""The small model of `tiny`, with its tensors changed before they are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny

Change = Callable[[dict[str, Any]], None]
Q_PROJ = "model.layers.0.self_attn.q_proj"
TOWER = tiny.APPLE_TOWER


def checkpoint(
    folder: Path, change: Change | None = None, *, dtype: str = "float32", **options: Any
) -> Path:
    """A llava checkpoint. `change` edits the dictionary of its tensors in place."""
    tensors = {
        name: value.astype(dtype) if value.dtype == np.float32 else value
        for name, value in tiny.llava(seed=options.pop("seed", 0)).items()
    }
    if change is not None:
        change(tensors)
    return tiny.write(folder, tensors=tensors, **options)
