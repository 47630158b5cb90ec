"""Checkpoints of the released sizes with drawn weights, written in a stream. For benchmarks.

    python benchmarks/synthetic_checkpoint.py OUT [--size 0.5b|1.5b|7b] [--dtype float16]

The values are small and finite, and repeat every 64 MB: what they are does not matter here, how
many there are does. The layout is that of the published PyTorch checkpoints, in shards.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny
from fastvlm_mlx.convert.fit import language_shapes

# hidden, layers, heads, key-value heads, intermediate, vocabulary, tied (Qwen2's configurations)
SIZES = {
    "0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "7b": (3584, 28, 28, 4, 18944, 152064, False),
}
_BLOCK = 64 << 20
_SHARD = 5_000_000_000
_ITEM = {"float16": 2, "float32": 4}
_NAME = {"float16": "F16", "float32": "F32"}


def config(size: str) -> dict[str, Any]:
    """config.json as Apple publishes it."""
    hidden, layers, heads, narrow, inner, vocabulary, tied = SIZES[size]
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "eos_token_id": tiny.IM_END,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_aspect_ratio": "pad",
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "mm_hidden_size": 3072,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "mobileclip_l_1024",
        "model_type": "llava_qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": narrow,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        "tokenizer_model_max_length": 8192,
        "vocab_size": vocabulary,
    }


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Every tensor by its published name."""
    settings = config(size)
    hidden = settings["hidden_size"]
    found = {tiny.APPLE_TOWER + e.apple: e.shape for e in tiny.encoder(tiny.FASTVITHD)}
    found = {n: s for n, s in found.items() if not n.endswith("num_batches_tracked")}
    for i, width in ((0, 3072), (2, hidden)):
        found[f"model.mm_projector.{i}.weight"] = (hidden, width)
        found[f"model.mm_projector.{i}.bias"] = (hidden,)
    language = language_shapes({**settings, "model_type": "qwen2"})
    assert language is not None
    found |= language
    if not settings["tie_word_embeddings"]:
        found["lm_head.weight"] = language["model.embed_tokens.weight"]
    return found


def write(folder: Path, size: str, dtype: str = "float16") -> int:
    """Write the checkpoint; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    item = _ITEM[dtype]
    noise = np.random.default_rng(0).standard_normal(_BLOCK // item, np.float32)
    block = (0.5 + 0.01 * noise.clip(-4, 4)).astype(dtype).tobytes()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes(size).items():
        nbytes = math.prod(shape) * item
        if filled + nbytes > _SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    listed: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(folder / file, shard, dtype, block)
        listed |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(size)))
    tiny.write_tokenizer(folder)
    return total


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], dtype: str, block: bytes) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        begin, end = end, end + math.prod(shape) * _ITEM[dtype]
        header[name] = {"dtype": _NAME[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = end
        while left > 0:
            file.write(memoryview(block)[: min(left, len(block))])
            left -= len(block)
    return end


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--dtype", choices=_ITEM, default="float16")
    given = parser.parse_args()
    print(write(given.folder, given.size, given.dtype), "bytes of tensors")


if __name__ == "__main__":
    main()
