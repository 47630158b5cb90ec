"""Every published configuration, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from fastvlm_mlx.config import (
    ARCHITECTURES,
    FASTVITHD,
    MCI2,
    ModelConfig,
    ProjectorConfig,
    picture_config,
    read_config,
    read_json,
)
from fastvlm_mlx.errors import ConfigError

# As Apple publishes the 0.5 B model: flat, and without a word about the encoder but its name.
APPLE: dict[str, Any] = {
    "architectures": ["LlavaQwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "image_aspect_ratio": "pad",
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "mm_hidden_size": 3072,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "mobileclip_l_1024",
    "model_type": "llava_qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 8192,
    "vocab_size": 151936,
}


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({k: v for k, v in {**APPLE, **changes}.items() if v is not None})


def test_apple() -> None:
    config = parse()
    assert config.vision == FASTVITHD
    assert config.projector == ProjectorConfig("mlp2x_gelu", 3072, 896)
    assert config.image_token_id == -200
    assert config.aspect == "pad"
    assert config.max_length == 8192
    assert config.eos_token_ids == (151645,)
    assert config.quantization is None
    text = config.text
    assert text["model_type"] == "qwen2"
    assert text["rope_theta"] == 1e6
    assert text["num_key_value_heads"] == 2
    assert not any(name.startswith(("mm_", "image_", "vision_")) for name in text)


@pytest.mark.parametrize(
    ("model_type", "text_type"),
    [
        ("llava_qwen2", "qwen2"),
        ("fastvlm", "qwen2"),
        ("llava_llama", "llama"),
        ("llava_mistral", "mistral"),
    ],
)
def test_language_models(model_type: str, text_type: str) -> None:
    assert parse(model_type=model_type).text["model_type"] == text_type


def test_mlx_vlm() -> None:
    """Nested, the outer model type copied inwards, and stages counted as Apple's code does."""
    config = ModelConfig.from_dict(tiny.mlx_config())
    vision = config.vision
    assert config.text["model_type"] == "qwen2"
    assert config.image_token_id == -200
    assert vision.depths == tiny.TINY.depths
    assert vision.embed_dims == tiny.TINY.dims
    assert vision.downsamples == (False, True, True, True, True)
    assert vision.pos_emb_kernels == (0, 0, 0, 7, 7)
    assert vision.image_size == tiny.IMAGE_SIZE
    assert vision.patch_size == 64


def test_down_sampling_counted_in_either_way() -> None:
    """timm asks of a stage whether it down-samples first, Apple whether something follows it."""
    for downsamples in ([False, True, True, True, True], [True, True, True, True, True]):
        config = parse(vision_config={"downsamples": downsamples})
        assert config.vision.downsamples == (False, True, True, True, True)


def test_transformers() -> None:
    config = ModelConfig.from_dict(tiny.transformers_config())
    assert config.vision.depths == tiny.TINY.depths
    assert config.text["model_type"] == "qwen2"
    assert config.text["rope_theta"] == 1e6
    assert "rope_parameters" not in config.text
    assert config.image_token_id == tiny.IM_END + 1
    assert config.aspect == "pad"
    assert config.eos_token_ids == (tiny.IM_END,)


def test_transformers_keeps_the_outer_fields_out_of_the_language_model() -> None:
    config = tiny.transformers_config() | {"hidden_size": 7, "projector_hidden_act": "gelu"}
    assert ModelConfig.from_dict(config).text["hidden_size"] == tiny.HIDDEN


def test_apple_mlx_export() -> None:
    config = ModelConfig.from_dict(tiny.apple_mlx_config())
    assert config.image_token_id == tiny.IM_END + 1


@pytest.mark.parametrize(
    ("value", "aspect"),
    [("pad", "pad"), (None, "crop"), ("square", "crop"), ("anyres", "anyres")],
)
def test_aspect(value: str | None, aspect: str) -> None:
    assert parse(image_aspect_ratio=value).aspect == aspect


@pytest.mark.parametrize(
    ("tower", "size"), [("mobileclip_l_1024", 1024), ("mobileclip_l_384", 384), ("x", 1024)]
)
def test_the_name_of_the_tower_tells_the_size(tower: str, size: int) -> None:
    assert parse(mm_vision_tower=tower).vision.image_size == size


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_named_architectures(name: str) -> None:
    config = parse(vision_config={"architecture": name}, mm_vision_tower=None)
    assert config.vision == ARCHITECTURES[name]


def test_fields_of_timm_override() -> None:
    config = parse(
        vision_config={
            "architecture": "fastvit_mci2",
            "embed_dims": [16, 32, 64, 128],
            "layers": [1, 1, 1, 1],
            "mlp_ratios": [2, 2, 2, 2],
            "cls_ratio": 1.0,
            "image_size": 320,
        },
        mm_vision_tower=None,
    )
    assert config.vision.embed_dims == (16, 32, 64, 128)
    assert set(config.vision.mlp_ratios) == {2}
    assert config.vision.attention_norm == MCI2.attention_norm
    assert config.vision.feature_dim == 128 == config.projector.input_dim
    assert config.vision.image_size == 320


def test_quantisation() -> None:
    settings = {"group_size": 64, "bits": 4}
    assert parse(quantization=settings).quantization == settings
    assert "quantization" not in parse(quantization=settings).text


@pytest.mark.parametrize(
    ("kind", "depth"), [("identity", 0), ("linear", 1), ("mlp2x_gelu", 2), ("mlp10x_gelu", 10)]
)
def test_projectors(kind: str, depth: int) -> None:
    assert parse(mm_projector_type=kind).projector.depth == depth


def test_to_dict_is_json() -> None:
    made = json.loads(json.dumps(parse().to_dict()))
    assert made["vision"]["embed_dims"] == list(FASTVITHD.embed_dims)
    assert "raw" not in made


# Errors -------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llava-qwen2"}, "Bunny"),
    ({"model_type": "qwen2"}, "'qwen2' is not a FastVLM"),
    ({"model_type": None}, "None is not a FastVLM"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"num_hidden_layers": "24"}, "num_hidden_layers"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"mm_projector_type": "mlp2x_relu"}, "mlp2x_relu"),
    ({"mm_projector_type": "mlp0x_gelu"}, "mlp0x_gelu"),
    ({"mm_projector_type": "resampler"}, "linear, identity or mlpNx_gelu"),
    ({"text_config": "x"}, "text_config is not an object"),
    ({"vision_config": [1]}, "vision_config is not an object"),
    ({"vision_config": {"architecture": "vit_large"}}, "vit_large"),
    ({"vision_config": {"layers": [1, 1]}}, "5 stages"),
    ({"vision_config": {"mlp_ratios": [4, 4]}}, "one entry per stage"),
    ({"vision_config": {"embed_dims": [96, 192, 384, 768, 1540]}}, "1540"),
    ({"vision_config": {"embed_dims": [32, 64, 128, 256, 528]}}, "of width 256 to one of 528"),
    ({"vision_config": {"token_mixers": ["pool"] * 5}}, "'pool'"),
    ({"vision_config": {"downsamples": [False, False, True, True, True]}}, "width 96 to one of"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**changes)


def folder_with(tmp_path: Path, config: Any) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    return tmp_path


MALFORMED: list[dict[str, Any]] = [
    {"eos_token_id": "end"},
    {"eos_token_id": [[1]]},
    {"vision_config": "fastvit"},
    {"vision_config": {"layers": 5}},
    {"vision_config": {"image_size": [1024, 1024]}},
    {"vision_config": {"embed_dims": ["a"] * 5}},
    {"tokenizer_model_max_length": "long"},
    {"image_token_index": "<image>"},
    {"mm_projector_type": 3},
    {"model_type": ["llava_qwen2"]},
]


@pytest.mark.parametrize("changes", MALFORMED)
def test_malformed_values_name_the_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(folder_with(tmp_path, {**APPLE, **changes}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('"text"', "found str"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_json(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(folder_with(tmp_path, text))


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path / "config.json")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        read_config(tmp_path)


# More than one file -------------------------------------------------------------------------------


def test_ends_are_united(tmp_path: Path) -> None:
    folder_with(tmp_path, {**APPLE, "eos_token_id": 5, "text_config": {"eos_token_id": [6, 7]}})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 5]}))
    assert read_config(tmp_path).eos_token_ids == (5, 6, 7, 8)


@pytest.mark.parametrize("text", ["{", '{"eos_token_id": "x"}', "[]"])
def test_a_broken_generation_config(tmp_path: Path, text: str) -> None:
    folder_with(tmp_path, APPLE)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_size": {"height": 192, "width": 192}},
        {"size": {"shortest_edge": 192}},
        {"crop_size": 192},
    ],
)
def test_transformers_keeps_the_size_with_the_processor(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder_with(tmp_path, tiny.transformers_config())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert read_config(tmp_path).vision.image_size == 192


def test_a_processor_file_of_transformers_5(tmp_path: Path) -> None:
    folder_with(tmp_path, tiny.transformers_config())
    settings = {"image_processor": {"size": {"height": 256, "width": 256}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    assert read_config(tmp_path).vision.image_size == 256
    assert picture_config(tmp_path) == settings["image_processor"]


def test_no_processor_file(tmp_path: Path) -> None:
    assert picture_config(tmp_path) == {}
