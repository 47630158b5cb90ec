"""What the tests of the converter share: partial checkpoints, and two models compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tiny
from safetensors.numpy import load_file, save_file

RANK, ALPHA = 4, 8
WRAPPED = "base_model.model."


def lora(seed: int = 1) -> dict[str, np.ndarray]:
    """A and B for two layers of the language model, under peft's names."""
    rng = np.random.default_rng(seed)
    shapes = tiny.language()
    out = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rows, columns = shapes[f"{name}.weight"]
        a = rng.standard_normal((RANK, columns), dtype=np.float32) * 0.2
        b = rng.standard_normal((rows, RANK), dtype=np.float32) * 0.2
        out[f"{WRAPPED}{name}.lora_A.weight"], out[f"{WRAPPED}{name}.lora_B.weight"] = a, b
    return out


def write_adapter(folder: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """What a LLaVA run with LoRA leaves: pairs, and a projector trained in full."""
    folder.mkdir()
    save_file(lora(), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **(settings or {})}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(tiny.llava_config()))
    return folder


def merged(scale: float = ALPHA / RANK) -> dict[str, np.ndarray]:
    """The whole model with `lora()` added by hand."""
    tensors = tiny.llava()
    pairs = lora()
    for name, a in pairs.items():
        if ".lora_A." in name:
            b = pairs[name.replace("lora_A", "lora_B")]
            target = name.removeprefix(WRAPPED).replace(".lora_A", "")
            tensors[target] = tensors[target] + np.float32(scale) * (b @ a)
    return tensors


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a converted folder, with types that numpy has."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def arrays(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= loaded
    return found


def features(model: Any, seed: int = 0) -> np.ndarray:
    """(h * w, hidden) projected tokens of one picture."""
    picture = mx.array(tiny.pictures(seed=seed)[0])
    return np.array(model.project(model.vision_features([picture]))[0].astype(mx.float32))


def greedy(model: Any, count: int = 8) -> list[int]:
    """Greedy tokens after words, a picture and words."""
    picture = mx.array(tiny.pictures(seed=3)[0])
    visual = model.project(model.vision_features([picture]))
    image = model.config.image_token_id
    ids = [5, 6, 7, *[image] * visual[0].shape[0], 8, 9]
    embeddings = model.embed_inputs(mx.array(ids), visual_tokens=visual)
    cache = model.make_cache()
    logits = model(mx.array([ids]), cache=cache, input_embeddings=embeddings[None])
    tokens = []
    for _ in range(count):
        tokens.append(int(mx.argmax(logits[0, -1]).item()))
        logits = model(mx.array([[tokens[-1]]]), cache=cache)
    return tokens


def leftovers(folder: Path, *expected: str) -> list[str]:
    """Names in `folder` that should not be there."""
    return sorted(p.name for p in folder.iterdir() if p.name not in expected)
