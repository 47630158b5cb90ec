"""Quantised conversions against mlx-lm doing the same to the same model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from convert_helpers import arrays, features, greedy, stored
from fastvlm_mlx.convert import ConvertOptions, convert
from fastvlm_mlx.convert.quantise import quantise_rows
from fastvlm_mlx.convert.writer import row_blocks
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model

from fastvlm_mlx import load
from fastvlm_mlx.config import read_config
from fastvlm_mlx.errors import CheckpointError, UsageError
from fastvlm_mlx.models.fastvlm import build_language_model
from fastvlm_mlx.weights.packing import Packing

WAYS: list[tuple[dict[str, Any], Packing]] = [
    *(({"bits": b, "group_size": 32}, Packing(b, 32, "affine")) for b in (2, 3, 4, 5, 6, 8)),
    ({"bits": 4}, Packing(4, 64, "affine")),
    ({"mode": "mxfp4"}, Packing(4, 32, "mxfp4")),
    ({"mode": "nvfp4"}, Packing(4, 16, "nvfp4")),
    ({"mode": "mxfp8"}, Packing(8, 32, "mxfp8")),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(
        tmp_path_factory.mktemp("source") / "FastVLM-tiny", tensors=tiny.llava(tied=False)
    )


def language_model(folder: Path, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """mlx-lm's own model with the weights of an unquantised folder."""
    config = read_config(folder)
    model = build_language_model({**config.text, "tie_word_embeddings": False})
    weights = {n: a for n, a in arrays(folder).items() if n in tiny.language(tied=False)}
    model.load_weights([(n, a.astype(dtype)) for n, a in weights.items()])
    return model


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return {f"language_model.{n}": p for n, p in tree_flatten(model.parameters())}  # type: ignore[str-unpack, misc]


def assert_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    found = {n: a for n, a in found.items() if n.startswith("language_model.")}
    assert set(found) == set(expected)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        assert mx.array_equal(array, expected[name]).item(), name


@pytest.mark.parametrize("options, how", WAYS, ids=lambda value: str(value)[:40])
def test_every_mode_is_what_mlx_lm_makes(
    source: Path, tmp_path: Path, options: dict[str, Any], how: Packing
) -> None:
    report = convert(source, tmp_path / "t", ConvertOptions(dtype="float16", **options))
    expected, settings = quantize_model(
        language_model(source, mx.float16), {}, how.group_size, how.bits, mode=how.mode
    )
    assert_same(arrays(tmp_path / "t"), parameters(expected))
    assert report.quantization == settings["quantization"]
    written = json.loads((tmp_path / "t" / "config.json").read_text())
    assert written["quantization"] == written["quantization_config"] == report.quantization
    model, _ = load(tmp_path / "t")
    assert len(greedy(model)) == 8
    if (how.bits, how.mode) == (8, "affine"):
        assert greedy(model) == greedy(load(source)[0])


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_recipes_are_mlx_lms(source: Path, tmp_path: Path, recipe: str) -> None:
    report = convert(source, tmp_path / "t", ConvertOptions(recipe=recipe, group_size=32))
    model = language_model(source)
    predicate = mixed_quant_predicate_builder(recipe, model, 32)
    expected, settings = quantize_model(
        model, {}, 32, int(recipe.split("_")[1]), quant_predicate=predicate
    )
    assert_same(arrays(tmp_path / "t"), parameters(expected))
    # Ours lists only what departs from the default; mlx-lm lists every layer.
    quantization = report.quantization
    assert quantization is not None
    for path, wanted in settings["quantization"].items():
        if isinstance(wanted, dict):
            default = {k: quantization[k] for k in ("group_size", "bits", "mode")}
            assert quantization.get(f"language_model.{path}", default) == wanted
    load(tmp_path / "t")


def test_layers_to_keep(source: Path, tmp_path: Path) -> None:
    options = ConvertOptions(bits=4, group_size=32, keep=("lm_head", "layers.1.*.down_proj"))
    report = convert(source, tmp_path / "t", options)
    kept = {"language_model.lm_head", "language_model.model.layers.1.mlp.down_proj"}
    assert set(report.kept) == kept
    found = stored(tmp_path / "t")
    for path in kept:
        assert f"{path}.scales" not in found
    assert "language_model.model.layers.0.mlp.down_proj.scales" in found
    with pytest.raises(UsageError, match="--keep lmhead"):
        convert(source, tmp_path / "u", ConvertOptions(bits=4, keep=("lmhead",)))


def test_keeping_the_head_of_a_tied_model_is_said_to_be_moot(tmp_path: Path) -> None:
    tied = tiny.write(tmp_path / "s")
    report = convert(tied, tmp_path / "t", ConvertOptions(bits=4, keep=("lm_head",)))
    assert any("tied" in note for note in report.notes)
    assert greedy(load(tmp_path / "t")[0])


def test_widths_that_do_not_divide_are_kept_and_reported(source: Path, tmp_path: Path) -> None:
    # 64 columns are no multiple of 128; down_proj's 128 are.
    report = convert(source, tmp_path / "t", ConvertOptions(bits=4, group_size=128))
    found = stored(tmp_path / "t")
    packed = {n.removesuffix(".scales") for n in found if n.endswith(".scales")}
    assert packed == {f"language_model.model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert all("no multiple of the group size 128" in why for why in report.kept.values())
    assert "language_model.model.embed_tokens" in report.kept
    load(tmp_path / "t")


def test_nothing_to_quantise_is_an_error(tmp_path: Path) -> None:
    shapes = {n: s for n, s in tiny.language().items() if "down_proj" in n}
    assert shapes
    folder = tiny.write(tmp_path / "s")
    with pytest.raises(UsageError, match="no layer would be quantised"):
        convert(folder, tmp_path / "t", ConvertOptions(bits=4, group_size=128, keep=("down_proj",)))


def test_the_projector_by_choice(source: Path, tmp_path: Path) -> None:
    plain = convert(source, tmp_path / "a", ConvertOptions(bits=4, group_size=32))
    assert plain.parts["mm_projector"].bits_per_weight == 32
    report = convert(
        source, tmp_path / "b", ConvertOptions(bits=4, group_size=32, projector_bits=8)
    )
    assert report.parts["mm_projector"].bits_per_weight < 11
    quantization = report.quantization
    assert quantization is not None
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    for name in ("mm_projector.0", "mm_projector.2", "mm_projector.layers.0"):
        assert quantization[name] == eight
    found, wanted = load(tmp_path / "b")[0], load(source)[0]
    assert abs(features(found) - features(wanted)).max() < 0.05 * abs(features(wanted)).max()


def test_the_encoder_is_never_quantised(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "t", ConvertOptions(bits=2, group_size=32, projector_bits=2))
    tower = {n for n in stored(tmp_path / "t") if n.startswith("vision_tower.")}
    assert tower and not any(n.endswith(".scales") for n in tower)


def test_bits_per_weight_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    options = ConvertOptions(bits=4, group_size=64, dtype="bfloat16")
    report = convert(source, tmp_path / "t", options)
    assert report.bytes == sum(a.nbytes for a in arrays(tmp_path / "t").values())
    part = report.parts["language_model"]
    assert part.parameters == sum(mx.zeros(s).size for s in tiny.language(tied=False).values())
    assert 4.5 < part.bits_per_weight < 5  # 4 and a scale and a bias of 16 bits per 64; norms whole


# From quantised models ------------------------------------------------------------------------


def test_a_quantised_model_converts_to_itself(source: Path, tmp_path: Path) -> None:
    mixed = ConvertOptions(recipe="mixed_4_6", group_size=32, projector_bits=8)
    convert(source, tmp_path / "a", mixed)
    report = convert(tmp_path / "a", tmp_path / "b")
    a, b = arrays(tmp_path / "a"), arrays(tmp_path / "b")
    assert set(a) == set(b) and all(mx.array_equal(a[n], b[n]).item() for n in a)
    before = json.loads((tmp_path / "a" / "config.json").read_text())["quantization"]
    assert {k: v for k, v in (report.quantization or {}).items() if "layers.1." in k} == {
        k: v for k, v in before.items() if "layers.1." in k
    }
    assert greedy(load(tmp_path / "b")[0]) == greedy(load(tmp_path / "a")[0])


@pytest.mark.parametrize("options, how", WAYS[2:], ids=lambda value: str(value)[:40])
def test_making_whole_again(
    source: Path, tmp_path: Path, options: dict[str, Any], how: Packing
) -> None:
    convert(source, tmp_path / "q", ConvertOptions(projector_bits=4, **options))
    report = convert(
        tmp_path / "q", tmp_path / "t", ConvertOptions(dequantize=True, dtype="float32")
    )
    assert report.quantization is None
    assert "quantization" not in json.loads((tmp_path / "t" / "config.json").read_text())
    packed, whole = arrays(tmp_path / "q"), arrays(tmp_path / "t")
    path = "language_model.model.layers.0.mlp.down_proj"
    expected = mx.dequantize(
        packed[f"{path}.weight"],
        packed[f"{path}.scales"],
        packed.get(f"{path}.biases"),
        how.group_size,
        how.bits,
        how.mode,
    ).astype(mx.float32)
    assert mx.array_equal(whole[f"{path}.weight"], expected).item()
    assert not any(name.endswith(".scales") for name in whole)
    assert greedy(load(tmp_path / "t")[0]) == greedy(load(tmp_path / "q")[0])


def test_quantising_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "a", ConvertOptions(bits=8, group_size=32))
    report = convert(tmp_path / "a", tmp_path / "b", ConvertOptions(bits=4, group_size=64))
    assert (report.quantization or {})["bits"] == 4
    once = convert(source, tmp_path / "c", ConvertOptions(bits=4, group_size=64))
    assert report.parts == once.parts
    # Layers that are stored as asked already are copied, not rounded a second time.
    convert(tmp_path / "b", tmp_path / "d", ConvertOptions(bits=4, group_size=64))
    b, d = arrays(tmp_path / "b"), arrays(tmp_path / "d")
    assert all(mx.array_equal(b[n], d[n]).item() for n in b)


def test_packed_tensors_that_do_not_fit_are_refused(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "q", ConvertOptions(bits=4, group_size=32))
    whole = arrays(tmp_path / "q")
    name = "language_model.model.layers.0.self_attn.q_proj"
    for part, value, why in (
        ("scales", mx.ones((64, 3)), "do not divide"),
        ("weight", mx.zeros((64, 7), mx.uint32), "no quantisation"),
        ("scales", mx.ones((32, 2)), "do not fit"),
        ("biases", mx.ones((64, 1)), "lacks biases"),
        ("scales", mx.full((64, 2), float("nan")), "NaN"),
    ):
        mx.save_safetensors(
            str(tmp_path / "q" / "model.safetensors"), {**whole, f"{name}.{part}": value}
        )
        with pytest.raises(CheckpointError, match=why):
            convert(tmp_path / "q", tmp_path / "t", ConvertOptions(dequantize=True))


@pytest.mark.parametrize("how", [way[1] for way in WAYS], ids=str)
def test_rows_can_be_quantised_apart(how: Packing) -> None:
    weight = mx.random.normal((50, 256), dtype=mx.bfloat16, key=mx.random.key(1))
    at_once = quantise_rows(weight, how)
    apart = [quantise_rows(weight[i : i + 7], how) for i in range(0, 50, 7)]
    for i, whole in enumerate(at_once):
        assert mx.array_equal(mx.concatenate([part[i] for part in apart]), whole).item()
    assert len(list(row_blocks(50, 32 << 20))) == 50
