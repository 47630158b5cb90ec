"""LLaVA training output onto its base, against the same sum by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from convert_helpers import (
    ALPHA,
    RANK,
    WRAPPED,
    greedy,
    leftovers,
    lora,
    merged,
    stored,
    write_adapter,
)
from fastvlm_mlx.convert import ConvertOptions, convert
from safetensors.numpy import save_file

from fastvlm_mlx import load
from fastvlm_mlx.errors import CheckpointError, FastVLMError, UsageError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("base") / "base")


def assert_same(folder: Path, expected: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    wanted = tiny.as_mlx(expected)
    found = stored(folder)
    assert set(found) == set(wanted)
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
    ],
)
def test_lora_is_added(tmp_path: Path, base: Path, settings: dict[str, Any], scale: float) -> None:
    adapter = write_adapter(tmp_path / "adapter", settings)
    report = convert(adapter, tmp_path / "t", ConvertOptions(base=base))
    assert report.source_layout == "llava + LoRA"
    assert "adapter_model.safetensors: merged into 2 layers" in report.notes
    assert set(report.source_sha256) == {"model.safetensors", "adapter_model.safetensors"}
    assert_same(tmp_path / "t", merged(scale))
    expected = tiny.write(tmp_path / "expected", tensors=merged(scale))
    assert greedy(load(tmp_path / "t")[0]) == greedy(load(expected)[0])


def test_a_scale_by_layer(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"alpha_pattern": {"q_proj": 2 * ALPHA}})
    convert(adapter, tmp_path / "t", ConvertOptions(base=base))
    name = "model.layers.0.self_attn.q_proj.weight"
    plain, twice = tiny.llava()[name], merged(2 * ALPHA / RANK)[name]
    found = stored(tmp_path / "t")[f"language_model.{name}"]
    np.testing.assert_allclose(found - plain, twice - plain, atol=1e-6)


def test_parts_trained_in_full_replace_the_bases(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    new = {n: a for n, a in tiny.llava(seed=9).items() if "mm_projector" in n}
    tower = tiny.APPLE_TOWER + "patch_embed.0.reparam_conv.bias"
    new[tower] = tiny.llava(seed=9)[tower]
    save_file(
        {f"base_model.model.{n}": a for n, a in new.items()},
        adapter / "non_lora_trainables.safetensors",
    )
    convert(adapter, tmp_path / "t", ConvertOptions(base=base))
    assert_same(tmp_path / "t", merged() | new)


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model."])
def test_a_projector_alone(tmp_path: Path, base: Path, prefix: str) -> None:
    folder = tmp_path / "projector"
    folder.mkdir()
    new = {n: a for n, a in tiny.llava(seed=9).items() if "mm_projector" in n}
    named = {prefix + n.removeprefix("model."): a for n, a in new.items()}
    save_file(named, folder / "mm_projector.bin")  # known by its content, not by its ending
    with pytest.raises(UsageError, match="--base"):
        convert(folder, tmp_path / "t")
    report = convert(folder, tmp_path / "t", ConvertOptions(base=base))
    assert report.source_layout == "llava + parts"
    assert_same(tmp_path / "t", tiny.llava() | new)


def test_a_projector_a_language_model_and_an_encoder(tmp_path: Path, base: Path) -> None:
    """The three parts from three places, the base being no FastVLM at all."""
    qwen = tmp_path / "qwen"
    tiny.write(
        qwen,
        tensors={n: a for n, a in tiny.llava().items() if n in tiny.language()},
        config={
            **dict.fromkeys(k for k in tiny.llava_config() if k not in tiny.TEXT_CONFIG),
            "model_type": "qwen2",
            "tie_word_embeddings": True,
        },
    )
    folder = tmp_path / "projector"
    folder.mkdir()
    new = {n: a for n, a in tiny.llava().items() if "mm_projector" in n}
    save_file(new, folder / "mm_projector.safetensors")
    with pytest.raises(CheckpointError, match="--encoder"):
        convert(folder, tmp_path / "t", ConvertOptions(base=qwen))
    convert(folder, tmp_path / "t", ConvertOptions(base=qwen, encoder=base))
    assert_same(tmp_path / "t", tiny.llava())
    assert greedy(load(tmp_path / "t")[0]) == greedy(load(base)[0])


def test_merging_and_quantising_at_once(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    whole = tiny.write(tmp_path / "whole", tensors=merged())
    options = {"bits": 4, "group_size": 32}
    convert(adapter, tmp_path / "a", ConvertOptions(base=base, **options))  # type: ignore[arg-type]
    convert(whole, tmp_path / "b", ConvertOptions(**options))  # type: ignore[arg-type]
    a, b = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert set(a) == set(b)
    for name, array in a.items():
        if array.dtype == np.uint32:  # a sum in another order may tip a value over
            assert (array != b[name]).mean() < 0.02
        else:
            np.testing.assert_allclose(array, b[name], atol=1e-4)


def test_a_merged_model_is_handed_to_the_check(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")

    def compare(original: Any, folder: Path) -> str:
        model, processor = original()
        assert processor.tokenizer is not None
        assert greedy(model) == greedy(load(folder)[0])
        return "same"

    report = convert(adapter, tmp_path / "t", ConvertOptions(base=base), verification=compare)
    assert report.verification == "same"


def broken(folder: Path, how: str) -> None:
    pairs = lora()
    first = next(iter(pairs))
    settings: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": ALPHA}
    if how == "rank":
        pairs[first] = pairs[first][:2]
    elif how == "half":
        del pairs[first]
    elif how == "layer":
        pairs = {n.replace("layers.1", "layers.7"): a for n, a in pairs.items()}
    elif how == "width":
        pairs[first] = pairs[first][:, :5]
    elif how == "part":
        pairs = {n.replace("self_attn", "other_attn"): a for n, a in pairs.items()}
    elif how == "unknown":
        pairs[f"{WRAPPED}model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = pairs[first]
    elif how == "dora":
        settings["use_dora"] = True
    elif how == "kind":
        settings["peft_type"] = "IA3"
    elif how == "alpha":
        settings["lora_alpha"] = "x"
    elif how == "nan":
        pairs[first][0, 0] = np.nan
    if how == "empty":
        pairs = {"x.weight": pairs[first]}
    save_file(
        {n: np.ascontiguousarray(a) for n, a in pairs.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("rank", "does not fit its B"),
        ("half", "no counterpart"),
        ("layer", "a layer that the base lacks"),
        ("width", "of the base is"),
        ("part", "a layer that the base lacks"),
        ("unknown", "a kind of LoRA not known here"),
        ("dora", "use_dora"),
        ("kind", "IA3"),
        ("alpha", "lora_alpha"),
        ("nan", "holds 1 NaN"),
        ("empty", "no LoRA pair"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path: Path, base: Path, how: str, why: str) -> None:
    folder = write_adapter(tmp_path / "adapter")
    broken(folder, how)
    with pytest.raises(FastVLMError, match=why) as caught:
        convert(folder, tmp_path / "t", ConvertOptions(base=base))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "adapter") == []


def test_a_quantised_base_is_refused(tmp_path: Path, base: Path) -> None:
    convert(base, tmp_path / "q", ConvertOptions(bits=4, group_size=32))
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="the base is quantised"):
        convert(adapter, tmp_path / "t", ConvertOptions(base=tmp_path / "q"))
    with pytest.raises(UsageError, match="no whole model"):
        convert(adapter, tmp_path / "t", ConvertOptions(base=adapter))
