"""From a folder on disk to a model that runs: configuration, tensors, tokenizer, precision.

Where the published configuration and the tensors disagree, the tensors are believed, and what was
corrected is kept in `LoadedFrom.repairs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import transformers
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tokenizer_utils import load as load_mlx_lm_tokenizer
from mlx_lm.utils import dequantize_model

from . import device, hub
from .config import ModelConfig, picture_config, read_config
from .errors import CheckpointError, UsageError
from .models.fastvlm import FastVLM
from .processing.processor import Processor, picture_processor
from .processing.prompt import IMAGE_MARK, chat_style
from .weights.assemble import (
    assemble_canonical,
    channels_last,
    check_shapes,
    parameter_name,
)
from .weights.files import LazyTensor, open_tensors
from .weights.layouts import LANGUAGE, VISION, translate
from .weights.packing import Packing

Dtype = Literal["auto", "float32", "float16", "bfloat16"]

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# File names, without their endings, of what LLaVA's training writes beside a base model.
_TRAINING_OUTPUT = ("adapter_model", "non_lora_trainables", "mm_projector", "training_args")
_STORED = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass
class LoadedFrom:
    """Where a model came from and what was done on the way."""

    path: Path
    layout: str
    dtype: str
    repairs: list[str] = field(default_factory=list)


def load(
    path_or_repo: str | Path | None = None, dtype: Dtype = "auto"
) -> tuple[FastVLM, Processor]:
    """Load a model and its processor from a folder, or a hub repository that is in the local cache.

    Every layout of `weights.layouts` is read as it is, without torch. `dtype="auto"` keeps the
    checkpoint's precision on a GPU and uses float32 on a CPU, where half precision and quantised
    products are many times slower in MLX. float16 leaves the encoder in float32: its activations
    can pass float16's largest value.

    Raises:
        HubError: no such model here. ConfigError, CheckpointError: it cannot be read.
    """
    folder = hub.find_model(None if path_or_repo is None else str(path_or_repo)).path
    return load_folder(folder, dtype)


def load_folder(folder: Path, dtype: Dtype = "auto") -> tuple[FastVLM, Processor]:
    """`load` for a folder that is known to be here."""
    if dtype not in ("auto", *_DTYPES):
        raise UsageError(f"dtype {dtype!r} is unknown; use auto, {', '.join(_DTYPES)}")
    _refuse_parts(folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    with open_tensors(folder) as tensors:
        config, repairs = believe_tensors(config, tensors)
        config = believe_tokenizer(config, tokenizer, repairs)
        chosen = _choose_dtype(dtype, tensors)
        model, layout = _build(
            config, tensors, chosen, dequantise=dtype == "auto" and not device.on_gpu()
        )
    # Some published configurations and tokenizers leave out the mark that ends every answer, and
    # mlx-lm before 0.32 forgets the tokenizer's own where the configuration names another.
    end = tokenizer.get_vocab().get(chat_style(config.text["model_type"]).end)
    ends = {*tokenizer.eos_token_ids, tokenizer.eos_token_id, *config.eos_token_ids, end}
    tokenizer.eos_token_ids = ends - {None}
    model.eval()
    mx.eval(model.parameters())
    model.loaded_from = LoadedFrom(folder, layout, str(chosen).removeprefix("mlx.core."), repairs)
    processor = Processor(config, picture_processor(config, picture_config(folder)), tokenizer)
    return model, processor


def _refuse_parts(folder: Path) -> None:
    """LLaVA training output is a part of a model; say how to make a whole one of it."""
    for name, what in (
        ("adapter_config.json", "a LoRA adapter"),
        ("mm_projector.bin", "a projector alone"),
    ):
        if (folder / name).exists() and not any(folder.glob("*.safetensors.index.json")):
            weights = [p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin")]
            if all(p.stem in _TRAINING_OUTPUT for p in weights):
                raise CheckpointError(
                    f"{folder} is {what}, not a whole model; join it with its base: "
                    f"fastvlm-mlx convert {folder} TARGET --base MODEL"
                )


def load_tokenizer(folder: Path, config: ModelConfig) -> Any:
    """The tokenizer, as mlx-lm wraps it, with `<image>` among its special tokens.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise CheckpointError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model)")
    # transformers warns of model types that it does not know; ours need not be among them.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = load_mlx_lm_tokenizer(
            folder, {"trust_remote_code": False}, eos_token_ids=list(config.eos_token_ids)
        )
    except Exception as error:  # whatever transformers makes of a broken file
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({first_line})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    return tokenizer


def believe_tokenizer(config: ModelConfig, tokenizer: Any, repairs: list[str]) -> ModelConfig:
    """The picture's token id as the tokenizer has it; a stock tokenizer gains `<image>`."""
    vocabulary = tokenizer.get_vocab()
    if IMAGE_MARK not in vocabulary:
        tokenizer.add_tokens([transformers.AddedToken(IMAGE_MARK, special=True, normalized=False)])
        vocabulary = tokenizer.get_vocab()
    token_id = vocabulary[IMAGE_MARK]
    if config.image_token_id not in (token_id, -200):
        repairs.append(
            f"image token: config says {config.image_token_id}, the tokenizer {token_id}"
        )
    return replace(config, image_token_id=token_id)


def believe_tensors(
    config: ModelConfig, tensors: Mapping[str, LazyTensor]
) -> tuple[ModelConfig, list[str]]:
    """Correct the configuration where the tensors say otherwise; and say what was corrected."""
    repairs: list[str] = []
    names = {
        target: source for source, target in translate(tensors, config.vision).canonical.items()
    }
    text = dict(config.text)
    embeddings = names.get(LANGUAGE + "model.embed_tokens.weight")
    head = names.get(LANGUAGE + "lm_head.weight")
    if embeddings is not None:
        rows = tensors[embeddings].shape[0]
        if rows != text["vocab_size"]:
            repairs.append(f"vocab_size: config says {text['vocab_size']}, the tensors {rows}")
            text["vocab_size"] = rows
    tied = head is None or (embeddings is not None and _equal(tensors[head], tensors[embeddings]))
    if tied != text.get("tie_word_embeddings", tied):
        repairs.append(
            f"tie_word_embeddings: config says {not tied}, but lm_head is "
            + ("missing or equal to the embeddings" if tied else "a tensor of its own")
        )
    text["tie_word_embeddings"] = tied
    return replace(config, text=text), repairs


def _equal(a: LazyTensor, b: LazyTensor, rows: int = 4096) -> bool:
    """Whether two matrices hold the same bytes; read in slices, seldom past the first."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = a.stored(), b.stored()
    return all(np.array_equal(x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows))


def _choose_dtype(dtype: Dtype, tensors: Mapping[str, LazyTensor]) -> mx.Dtype:
    """The precision asked for; for "auto" this machine's, given what most bytes are stored in."""
    if dtype != "auto":
        return _DTYPES[dtype]
    sizes: dict[mx.Dtype, int] = {}
    for tensor in tensors.values():
        if stored := _STORED.get(tensor.dtype):
            sizes[stored] = sizes.get(stored, 0) + tensor.nbytes
    most = max(sizes, key=lambda stored: sizes[stored]) if sizes else mx.float32
    return device.default_dtype(most)


def _build(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], dtype: mx.Dtype, *, dequantise: bool
) -> tuple[FastVLM, str]:
    names = translate(tensors, config.vision)
    if not any(target.startswith(VISION) for target in names.canonical.values()):
        raise CheckpointError(
            "there is no encoder among these tensors (Apple's MLX exports keep it elsewhere); join "
            "one from another checkpoint: fastvlm-mlx convert FOLDER TARGET --encoder MODEL"
        )
    canonical = {}
    for source, target in names.canonical.items():
        _require_float(tensors, source)
        canonical[target] = channels_last(target, tensors[source].read(), names.layout)
    parameters = assemble_canonical(config, canonical, names)
    del canonical
    if config.text.get("tie_word_embeddings"):
        for part in ("weight", "scales", "biases"):
            parameters.pop(f"{LANGUAGE}lm_head.{part}", None)
    model = FastVLM(config)
    quantised = quantise_like(model, parameters)
    own: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    expected = {name: tuple(p.shape) for name, p in own.items()}
    source_of = {parameter_name(target): source for source, target in names.canonical.items()}
    found = {name: tuple(p.shape) for name, p in parameters.items()}
    check_shapes(expected, found, source_of, [])
    model.load_weights(list(parameters.items()))
    del parameters
    if quantised and dequantise:
        model = dequantize_model(model)
    cast(model, dtype)
    return model, names.layout.name


def _require_float(tensors: Mapping[str, LazyTensor], name: str) -> None:
    """Integers are weights only where scales lie beside them; else they are another's packing."""
    tensor, path = tensors[name], name.rpartition(".")[0]
    if not tensor.dtype.startswith(("F", "BF")) and f"{path}.scales" not in tensors:
        raise CheckpointError(
            f"{tensor.file}: {name} is of the type {tensor.dtype}, and no {path}.scales tells how "
            "to unpack it"
        )


def quantise_like(model: FastVLM, parameters: Mapping[str, mx.array]) -> bool:
    """Turn each layer that has `.scales` among the parameters into its quantised form.

    The shapes say how a layer is packed; what the configuration says of it is not needed.
    """
    if not any(name.endswith(".scales") for name in parameters):
        return False

    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in parameters or not hasattr(module, "to_quantized"):
            return False
        scales = parameters[f"{path}.scales"]
        try:
            return asdict(
                Packing.of(
                    module.weight.shape[-1],
                    parameters[f"{path}.weight"].shape,
                    scales.shape,
                    scales.dtype == mx.uint8,
                )
            )
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    nn.quantize(model, class_predicate=how)
    return True


def cast(model: FastVLM, target: mx.Dtype) -> None:
    """Give every floating-point parameter its precision; packed integers stay as they are."""

    def to(dtype: mx.Dtype, module: nn.Module) -> None:
        module.update(
            tree_map(
                lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p,
                module.parameters(),
            )
        )

    to(target, model.language_model)
    to(target, model.mm_projector)
    to(mx.float32 if target == mx.float16 else target, model.vision_tower)
