"""One model in every layout gives the same answers; what published files get wrong is put right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from fastvlm_mlx import device
from fastvlm_mlx.errors import CheckpointError, ConfigError, FastVLMError, UsageError
from fastvlm_mlx.loading import load, load_folder
from fastvlm_mlx.models.fastvlm import FastVLM

Array = np.ndarray[Any, Any]
N = tiny.PICTURE_TOKENS


def logits(model: FastVLM) -> Array:
    """(L, vocabulary) for a prompt with two pictures."""
    image = [model.config.image_token_id] * N
    tokens = mx.array([[1, 2, *image, 3, *image, 4]])
    out = model(tokens, pixel_values=mx.array(tiny.pictures(2)))[0]
    return np.array(out.astype(mx.float32))


def dtypes(module: nn.Module) -> set[mx.Dtype]:
    return {p.dtype for p in tiny.parameters(module).values()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Array:
    """Logits of the model in Apple's layout."""
    model, _ = load_folder(tiny.write(tmp_path_factory.mktemp("llava")))
    return logits(model)


@pytest.fixture(scope="module")
def expected_of_training(tmp_path_factory: pytest.TempPathFactory) -> Array:
    model, _ = load_folder(tiny.write(tmp_path_factory.mktemp("llava"), training=True))
    return logits(model)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)


# Layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["llava", "mlx", "transformers"])
def test_layouts(tmp_path: Path, expected: Array, layout: str, shards: int) -> None:
    model, processor = load_folder(tiny.write(tmp_path, layout, shards=shards))
    assert model.loaded_from.layout == layout
    assert model.loaded_from.path == tmp_path
    assert model.loaded_from.repairs == []
    assert processor.pictures.output_size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert processor.pictures.aspect == "pad"
    assert np.array_equal(logits(model), expected)
    assert expected.std() > 0.1


def test_training_checkpoints(tmp_path: Path, expected_of_training: Array) -> None:
    model, _ = load_folder(tiny.write(tmp_path, "transformers", training=True))
    assert np.array_equal(logits(model), expected_of_training)


def test_torch_files(tmp_path: Path, expected: Array) -> None:
    torch = pytest.importorskip("torch")
    tiny.write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({n: torch.tensor(t) for n, t in tensors.items()}, tmp_path / "pytorch_model.bin")
    assert np.array_equal(logits(load_folder(tmp_path)[0]), expected)


def test_a_folder_is_never_written_to(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    load_folder(tmp_path)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()} == before


def test_load_takes_a_path(tmp_path: Path, expected: Array) -> None:
    tiny.write(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        assert np.array_equal(logits(load(path)[0]), expected)


def test_apples_mlx_export_has_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no encoder among these tensors"):
        load_folder(tiny.write(tmp_path, "apple-mlx"))


@pytest.mark.parametrize("kind", ["linear", "identity", "mlp1x_gelu", "mlp3x_gelu"])
def test_projectors(tmp_path: Path, kind: str) -> None:
    tensors = tiny.llava()
    for name in tiny.projector():
        del tensors[name]
    rng = np.random.default_rng(0)
    wide, depth = 256, {"linear": 1, "identity": 0, "mlp1x_gelu": 1, "mlp3x_gelu": 3}[kind]
    for i in range(depth):
        name = "model.mm_projector." + ("" if kind == "linear" else f"{2 * i}.")
        tensors[name + "weight"] = rng.standard_normal((64, wide if not i else 64), np.float32)
        tensors[name + "bias"] = rng.standard_normal(64, np.float32)
    folder = tiny.write(tmp_path, tensors=tensors, config={"mm_projector_type": kind})
    model, _ = load_folder(folder)
    features = rng.standard_normal((2, 3, wide), np.float32)
    found = model.project([mx.array(features)])[0]
    assert found.shape == (6, 64 if depth else wide)
    if depth == 1:
        weight, bias = (tensors[n] for n in list(tensors)[-2:])
        assert np.allclose(np.array(found), features.reshape(6, -1) @ weight.T + bias, atol=1e-3)


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["llava", "mlx"])
@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_auto_on_a_cpu_is_float32(tmp_path: Path, layout: str, stored: str) -> None:
    made = tiny.llava()
    tensors = {
        n: t.astype(stored) for n, t in (tiny.as_mlx(made) if layout == "mlx" else made).items()
    }
    model, _ = load_folder(tiny.write(tmp_path, layout, tensors=tensors))
    assert dtypes(model) == {mx.float32}
    assert model.loaded_from.dtype == "float32"


@pytest.mark.usefixtures("on_a_gpu")
def test_auto_on_a_gpu_is_the_checkpoints(tmp_path: Path) -> None:
    tensors = {n: t.astype("float16") for n, t in tiny.llava().items()}
    model, _ = load_folder(tiny.write(tmp_path, tensors=tensors))
    assert dtypes(model.language_model) == dtypes(model.mm_projector) == {mx.float16}
    assert model.loaded_from.dtype == "float16"


@pytest.mark.parametrize(
    ("dtype", "language", "vision"),
    [
        ("float32", mx.float32, mx.float32),
        ("bfloat16", mx.bfloat16, mx.bfloat16),
        ("float16", mx.float16, mx.float32),  # the encoder's activations pass 65504
    ],
)
def test_dtypes(
    tmp_path: Path, expected: Array, dtype: Any, language: mx.Dtype, vision: mx.Dtype
) -> None:
    model, _ = load_folder(tiny.write(tmp_path), dtype)
    assert dtypes(model.language_model) == dtypes(model.mm_projector) == {language}
    assert dtypes(model.vision_tower) == {vision}
    found = logits(model)
    assert np.abs(found - expected).max() < {"float32": 1e-6, "float16": 0.05}.get(dtype, 0.5)


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float64"):
        load_folder(tmp_path, "float64")  # type: ignore[arg-type]


# Quantised ----------------------------------------------------------------------------------------


def write_quantised(
    folder: Path, settings: dict[str, Any], *, said: bool = True, mode: str = "affine"
) -> FastVLM:
    """A folder in mlx layout as mlx-lm quantises it, and the quantised model itself."""
    tiny.write(folder, "mlx")
    model, _ = load_folder(folder)
    nn.quantize(
        model,
        **settings,
        mode=mode,
        class_predicate=lambda path, m: (
            hasattr(m, "to_quantized") and model.quant_predicate(path, m)
        ),
    )
    tensors = load_file(folder / "model.safetensors")
    kept = {n: mx.array(t) for n, t in tensors.items() if not n.startswith("language_model.")}
    packed = {n: t for n, t in tiny.parameters(model).items() if n.startswith("language_model.")}
    mx.save_safetensors(str(folder / "model.safetensors"), kept | packed)
    if said:
        config = json.loads((folder / "config.json").read_text())
        config["quantization"] = {**settings, "mode": mode}
        (folder / "config.json").write_text(json.dumps(config))
    return model


QUANTISED: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 32, "bits": 4}, "affine"),
    ({"group_size": 64, "bits": 8}, "affine"),
    ({"group_size": 64, "bits": 3}, "affine"),
    ({"group_size": 32, "bits": 4}, "mxfp4"),
]


@pytest.mark.parametrize(("settings", "mode"), QUANTISED)
def test_quantised_on_a_cpu(tmp_path: Path, settings: dict[str, int], mode: str) -> None:
    """Unpacked to float32, where products of packed weights are slow: the same function."""
    packed = write_quantised(tmp_path, settings, mode=mode)
    model, _ = load_folder(tmp_path)
    assert dtypes(model) == {mx.float32}
    # mxfp4 has bfloat16 embeddings, in whose precision the packed model then takes pictures too.
    assert np.abs(logits(model) - logits(packed)).max() < (0.05 if mode == "mxfp4" else 1e-3)


@pytest.mark.parametrize("said", [True, False])
def test_quantised_stays_packed_where_asked(tmp_path: Path, said: bool) -> None:
    """Layers are known by their `.scales`, whether or not the configuration says so."""
    packed = write_quantised(tmp_path, {"group_size": 32, "bits": 4}, said=said)
    model, _ = load_folder(tmp_path, "float32")
    assert isinstance(model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert isinstance(model.language_model.model.embed_tokens, nn.QuantizedEmbedding)
    assert np.abs(logits(model) - logits(packed)).max() < 1e-4


@pytest.mark.usefixtures("on_a_gpu")
def test_quantised_on_a_gpu(tmp_path: Path) -> None:
    write_quantised(tmp_path, {"group_size": 32, "bits": 4})
    model, _ = load_folder(tmp_path)
    assert isinstance(model.layers[0].self_attn.q_proj, nn.QuantizedLinear)


def test_one_layer_quantised_otherwise(tmp_path: Path) -> None:
    """mlx-lm's mixed quantisation: settings of a layer under its path."""
    write_quantised(tmp_path, {"group_size": 32, "bits": 4})
    model, _ = load_folder(tmp_path, "float32")
    path = "language_model.model.layers.0.mlp.down_proj"
    tensors = tiny.read(tmp_path)
    whole = mx.array(tiny.llava()["model.layers.0.mlp.down_proj.weight"])
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(whole, 64, 8), strict=True))
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), tensors | {f"{path}.{k}": v for k, v in parts.items()}
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization"][path] = {"group_size": 64, "bits": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load_folder(tmp_path, "float32")
    assert model.layers[0].mlp.down_proj.bits == 8
    assert model.layers[0].mlp.up_proj.bits == 4


def test_a_quantised_projector(tmp_path: Path, expected: Array) -> None:
    tiny.write(tmp_path, "mlx")
    tensors = tiny.read(tmp_path)
    weight = tensors.pop("mm_projector.2.weight")
    for part, value in zip(("weight", "scales", "biases"), mx.quantize(weight, 32, 8), strict=True):
        tensors[f"mm_projector.2.{part}"] = value
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    packed, _ = load_folder(tmp_path, "float32")
    assert isinstance(packed.mm_projector.layers[2], nn.QuantizedLinear)
    model, _ = load_folder(tmp_path)
    assert np.abs(logits(model) - logits(packed)).max() < 1e-3
    assert np.abs(logits(model) - expected).max() < 0.5


# Repairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("head", ["none", "same", "other"])
@pytest.mark.parametrize("layout", ["llava", "transformers"])
def test_tied_embeddings(
    tmp_path: Path, expected: Array, layout: str, head: str, said: bool | None
) -> None:
    """The tensors decide, whatever the configuration says."""
    tensors = tiny.llava(tied=head != "other")
    if head == "same":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    if layout == "transformers":
        tensors = tiny.as_transformers(tensors)
    folder = tiny.write(tmp_path, layout, tensors=tensors)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("tie_word_embeddings", None)
        if said is not None:
            part["tie_word_embeddings"] = said
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_folder(folder)
    tied = head != "other"
    assert model.config.text["tie_word_embeddings"] is tied
    assert ("lm_head" in model.language_model) is not tied
    wrong = said is not None and said != tied
    assert ["tie_word_embeddings" in r for r in model.loaded_from.repairs] == [True] * wrong
    assert np.array_equal(logits(model), expected) is tied


@pytest.mark.parametrize("said", [100, tiny.VOCABULARY + 4])
def test_size_of_the_vocabulary(tmp_path: Path, expected: Array, said: int) -> None:
    model, _ = load_folder(tiny.write(tmp_path, config={"vocab_size": said}))
    repair = f"vocab_size: config says {said}, the tensors {tiny.VOCABULARY}"
    assert model.loaded_from.repairs == [repair]
    assert np.array_equal(logits(model), expected)


@pytest.mark.parametrize("said", [None, -200, tiny.IM_END + 1])
def test_a_stock_tokenizer_gains_the_image_token(tmp_path: Path, said: int | None) -> None:
    model, processor = load_folder(tiny.write(tmp_path, config={"image_token_index": said}))
    assert model.config.image_token_id == processor.config.image_token_id == tiny.IM_END + 1
    assert model.loaded_from.repairs == []
    encode = processor.tokenizer.encode
    assert encode("<image>", add_special_tokens=False) == [tiny.IM_END + 1]


def test_a_wrong_image_token(tmp_path: Path) -> None:
    """It would index the table all the same, and put a word where a picture belongs."""
    config = {"image_token_index": 7}
    model, _ = load_folder(tiny.write(tmp_path, "transformers", config=config))
    assert model.config.image_token_id == tiny.IM_END + 1
    assert model.loaded_from.repairs == [
        f"image token: config says 7, the tokenizer {tiny.IM_END + 1}"
    ]


# Ends ---------------------------------------------------------------------------------------------


def ends(folder: Path) -> set[int]:
    return set(load_folder(folder)[1].tokenizer.eos_token_ids)


def test_ends_of_an_answer_are_united(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, config={"eos_token_id": 11})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [12, 13]}))
    assert ends(folder) == {11, 12, 13, tiny.IM_END}


def test_the_tokenizers_own_end_counts(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, config={"eos_token_id": 11})
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ends(folder) == {11, tiny.ENDOFTEXT, tiny.IM_END}


def test_im_end_ends_even_where_nobody_says_so(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, config={"eos_token_id": None})
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ends(folder) == {tiny.ENDOFTEXT, tiny.IM_END}


# Pictures -----------------------------------------------------------------------------------------


def test_a_preprocessor_file_is_heeded(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, config={"image_aspect_ratio": None})
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 192}}
    settings["crop_size"] = {"height": 192, "width": 192}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    _, processor = load_folder(folder)
    assert processor.pictures.output_size == (192, 192)
    assert processor.pictures.aspect == "crop"
    assert processor.pictures.mean == (0.5,) * 3


def test_released_models_have_no_normalisation(tmp_path: Path) -> None:
    _, processor = load_folder(tiny.write(tmp_path))
    assert processor.pictures.mean == (0.0,) * 3
    assert processor.pictures.std == (1.0,) * 3


# Faults -------------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        for name in names:
            del tensors[name]

    return change


def with_shape(name: str) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        tensors[name] = np.ascontiguousarray(tensors[name][:-1])

    return change


def with_stranger(name: str) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        tensors[name] = np.zeros(3, np.float32)

    return change


TOWER = tiny.APPLE_TOWER
FAULTS: list[tuple[Callable[[dict[str, Array]], None], str]] = [
    (without("model.layers.1.mlp.up_proj.weight"), r"missing: .*layers\.1\.mlp\.up_proj\.weight"),
    (without("model.norm.weight"), r"missing: language_model\.model\.norm\.weight"),
    (without("model.embed_tokens.weight"), r"missing: .*embed_tokens"),
    (without("model.mm_projector.2.bias"), r"missing: mm_projector.*2\.bias"),
    (without(TOWER + "conv_exp.se.reduce.bias"), r"missing: vision_tower\.final_conv\.se\.fc1"),
    (with_shape("model.mm_projector.0.weight"), r"wrong shape: model\.mm_projector\.0\.weight"),
    (
        with_shape("model.layers.0.self_attn.k_proj.bias"),
        r"wrong shape: model\.layers\.0\.self_attn\.k_proj\.bias \(31,\), expected \(32,\)",
    ),
    (with_shape(TOWER + "network.6.reparam_conv.bias"), r"wrong shape: .*network\.6\.reparam"),
    (
        with_stranger("model.layers.9.mlp.up_proj.weight"),
        r"unexpected: model\.layers\.9\.mlp\.up_proj\.weight",
    ),
    (with_stranger("model.mm_projector.4.weight"), r"unexpected: model\.mm_projector\.4\.weight"),
    (with_stranger("model.something.else"), r"unexpected: model\.something\.else"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Array]], None], message: str
) -> None:
    tensors = tiny.llava()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_folder(tiny.write(tmp_path, tensors=tensors))


def test_no_layers_of_the_language_model(tmp_path: Path) -> None:
    tensors = {n: t for n, t in tiny.llava().items() if ".layers." not in n}
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load_folder(tiny.write(tmp_path, tensors=tensors))


def test_integers_for_weights(tmp_path: Path) -> None:
    """Not taken for numbers: without scales they are somebody else's quantisation."""
    tensors = tiny.llava()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 10).astype(np.int8)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight is of .* I8"):
        load_folder(tiny.write(tmp_path, tensors=tensors))


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_file_is_missing(tmp_path: Path, file: str) -> None:
    tiny.write(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FastVLMError, match=file.partition(".")[0][:6]):
        load_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": 3}'])
def test_a_broken_tokenizer(tmp_path: Path, text: str) -> None:
    tiny.write(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer") as error:
        load_folder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_broken_json(tmp_path: Path, file: str) -> None:
    tiny.write(tmp_path)
    (tmp_path / file).write_text('{"a": ')
    with pytest.raises(ConfigError, match=file):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2", "vision_config": None},
        {"model_type": "llava-qwen2"},
        {"model_type": "gemma3", "text_config": None},
    ],
)
def test_another_model(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"not a FastVLM|not FastVLM"):
        load_folder(tiny.write(tmp_path, config=config))


def test_a_language_model_alone(tmp_path: Path) -> None:
    tensors = {n: tiny.value(n, s) for n, s in tiny.language().items()}
    with pytest.raises(CheckpointError, match="language model alone"):
        load_folder(tiny.write(tmp_path, tensors=tensors))


def test_another_language_model(tmp_path: Path) -> None:
    """Llama has no biases: a configuration that names it does not fit these tensors."""
    with pytest.raises(CheckpointError, match=r"unexpected: .*bias"):
        load_folder(tiny.write(tmp_path, config={"model_type": "llava_llama"}))


def test_copies_of_a_folder_load_alike(tmp_path: Path, expected: Array) -> None:
    """Nothing is decided by the name of a folder."""
    tiny.write(tmp_path / "bunny-llava-qwen2")
    shutil.copytree(tmp_path / "bunny-llava-qwen2", tmp_path / "mlx-int4")
    assert np.array_equal(logits(load_folder(tmp_path / "mlx-int4")[0]), expected)
