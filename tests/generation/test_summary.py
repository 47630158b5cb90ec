"""What `describe_model` says, against the files."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generation import describe_model


def sizes(folder: Path, part: str) -> tuple[int, int]:
    """Parameters and bytes of a part, counted from the file."""
    tensors = {
        n: t
        for n, t in load_file(folder / "model.safetensors").items()
        if not n.endswith(("num_batches_tracked", "head.proj"))
    }
    marks = {"vision_tower": "vision_tower", "mm_projector": "projector"}
    own = {
        n: t
        for n, t in tensors.items()
        if (marks[part] in n if part in marks else not any(m in n for m in marks.values()))
    }
    counted = sum(t.size for n, t in own.items() if ".running_" not in n)
    return counted, sum(t.nbytes for t in own.values())


@pytest.mark.parametrize("layout", ["llava", "mlx", "transformers"])
def test_parts(tmp_path: Path, layout: str) -> None:
    folder = tiny.write(tmp_path, layout)
    made = describe_model(folder)
    assert made.layout == layout
    for part in ("vision_tower", "mm_projector", "language_model"):
        assert (made.parameters[part], made.bytes[part]) == sizes(folder, part)
        assert made.precision[part] == "F32"


def test_pictures_and_words(tmp_path: Path) -> None:
    made = describe_model(tiny.write(tmp_path))
    assert made.resolution == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert made.visual_tokens == tiny.PICTURE_TOKENS
    assert made.picture_mode == "pad"
    assert made.vocabulary == tiny.VOCABULARY
    assert made.context_length == 512
    assert made.model_type == "llava_qwen2"
    assert made.quantization is None and made.repairs == []
    cache = 2 * tiny.LAYERS * tiny.KV_HEADS * (tiny.HIDDEN // tiny.HEADS) * 2 * 1024
    assert made.memory_bytes == sum(made.bytes.values()) + cache


def test_half_precision(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    half = {
        n: t.astype(np.float16) if n.startswith("model.layers") else t for n, t in tensors.items()
    }
    save_file(half, folder / "model.safetensors")
    made = describe_model(folder)
    assert made.precision == {
        "vision_tower": "F32",
        "mm_projector": "F32",
        "language_model": "F16",
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_packed(tmp_path: Path, bits: int) -> None:
    """Packed numbers are counted as the numbers that they stand for."""
    folder = tiny.write(tmp_path, "mlx")
    whole = describe_model(folder)
    tensors = tiny.read(folder)
    for name in [n for n, t in tensors.items() if n.startswith("language") and t.ndim == 2]:
        parts = mx.quantize(tensors.pop(name), 32, bits)
        for part, value in zip(("weight", "scales", "biases"), parts, strict=True):
            tensors[name.removesuffix("weight") + part] = value
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": bits}
    (folder / "config.json").write_text(json.dumps(config))
    made = describe_model(folder)
    assert made.parameters == whole.parameters
    assert made.precision["language_model"] == f"{bits}-bit"
    assert made.bytes["language_model"] < whole.bytes["language_model"] / 2
    assert made.quantization == config["quantization"]


def test_repairs_are_told(tmp_path: Path) -> None:
    made = describe_model(tiny.write(tmp_path, config={"tie_word_embeddings": False}))
    assert len(made.repairs) == 1 and "tie_word_embeddings" in made.repairs[0]


def test_to_dict_is_json(tmp_path: Path) -> None:
    made = describe_model(tiny.write(tmp_path))
    again = json.loads(json.dumps(made.to_dict()))
    assert again["visual_tokens"] == made.visual_tokens
    assert again["parameters"] == made.parameters


def test_nothing_is_read_but_headers(tmp_path: Path) -> None:
    """Every value of every tensor may be missing from the disk."""
    folder = tiny.write(tmp_path, config={"tie_word_embeddings": None})
    path = folder / "model.safetensors"
    before = describe_model(folder)
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:header] + bytes(size - header))
    assert describe_model(folder) == before


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FastVLMError):
        describe_model(tmp_path / "nothing")
    with pytest.raises(FastVLMError):
        describe_model(tmp_path)
