"""Whether the tensors of a checkpoint fit the model that its configuration describes: by shape.

The encoder is put together exactly as loading does it, but on arrays that MLX never computes: a
shape costs nothing. The language model's tensors come from a table for the three families that
FastVLM checkpoints have; mlx-lm has the last word at load, and would take seconds to import here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastvlm_mlx.config import ModelConfig, VisionConfig
from fastvlm_mlx.weights.files import LazyTensor
from fastvlm_mlx.weights.layouts import LANGUAGE, PROJECTOR, VISION, Names

Shape = tuple[int, ...]
Fault = tuple[str | None, str]  # (the tensor as the checkpoint spells it, what is wrong)

_BITS = (2, 3, 4, 5, 6, 8)
# Scales of one byte: (bits, group size) -> the mode's name in MLX.
_MICROSCALED = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}


@dataclass(frozen=True)
class Quantised:
    """How one layer is packed."""

    bits: int
    group_size: int
    mode: str

    def __str__(self) -> str:
        return f"{self.bits}-bit, groups of {self.group_size}, {self.mode}"


@dataclass
class Fit:
    """The outcome. `quantised` is by canonical name of the layer (without `.weight`)."""

    faults: list[Fault] = field(default_factory=list)
    quantised: dict[str, Quantised] = field(default_factory=dict)
    branches: int = 0  # convolutions that are stored as the branches of training
    encoder: str | None = None


def check_fit(config: ModelConfig, names: Names, tensors: Mapping[str, LazyTensor]) -> Fit:
    """Compare every translated tensor with what the model needs. Reads no values."""
    fit = Fit()
    source = {target: name for name, target in names.canonical.items()}
    shapes = {target: tensors[name].shape for target, name in source.items()}
    fit.faults += [(name, "is no tensor of this model") for name in names.unknown]
    _check_vision(config.vision, names, shapes, source, fit)

    expected = dict(projector_shapes(config))
    language = language_shapes(config.text)
    rest = {t: s for t, s in shapes.items() if not t.startswith(VISION)}
    if language is None:
        rest = {t: s for t, s in rest.items() if not t.startswith(LANGUAGE)}
    else:
        rows = shapes.get(f"{LANGUAGE}model.embed_tokens.weight", (0,))[0]
        width = config.text["hidden_size"]
        if rows and f"{LANGUAGE}model.embed_tokens.scales" not in rest:
            # The number of rows is believed, whatever the configuration says.
            language["model.embed_tokens.weight"] = (rows, width)
        expected |= {LANGUAGE + name: shape for name, shape in language.items()}
        if f"{LANGUAGE}lm_head.weight" in rest:
            expected[f"{LANGUAGE}lm_head.weight"] = language["model.embed_tokens.weight"]
    _unpack(rest, expected, tensors, source, fit)
    _compare(expected, rest, source, fit)
    return fit


def _check_vision(
    config: VisionConfig,
    names: Names,
    shapes: Mapping[str, Shape],
    source: Mapping[str, str],
    fit: Fit,
) -> None:
    import mlx.core as mx

    from fastvlm_mlx.weights import folding
    from fastvlm_mlx.weights.assemble import channels_last

    lazy = {}
    for target, shape in shapes.items():
        if target.startswith(VISION):
            nothing = mx.zeros(shape, mx.float16)  # never evaluated
            lazy[target.removeprefix(VISION)] = channels_last(target, nothing, names.layout)
    if not lazy and names.layout.name == "apple-mlx":
        return  # by design: the encoder is a Core ML package beside it
    if not lazy:
        fit.faults.append((None, "the vision tower is missing"))
        return
    try:
        fit.branches = folding.fuse_branches(config, lazy)
    except KeyError as error:
        fit.faults.append((None, f"training branches are incomplete: no {error.args[0]}"))
        return
    except ValueError as error:  # branches whose shapes cannot be added up
        reason = str(error).splitlines()[0]
        fit.faults.append((None, f"training branches do not fit together ({reason})"))
        return
    fit.encoder = f"{fit.branches} convolutions as training branches" if fit.branches else "fused"
    expected = {VISION + name: shape for name, shape in folding.expected_shapes(config).items()}
    found = {VISION + name: tuple(value.shape) for name, value in lazy.items()}
    _compare(expected, found, source, fit)


def _compare(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    source: Mapping[str, str],
    fit: Fit,
) -> None:
    for name, shape in expected.items():
        if name not in found:
            fit.faults.append((None, f"{name} is missing, {list(shape)}"))
        elif found[name] != shape:
            what = f"has the shape {list(found[name])}, expected {list(shape)}"
            fit.faults.append((source.get(name, name), what))
    for name in found:
        if name not in expected:
            fit.faults.append((source.get(name, name), "is no tensor of this model"))


def _unpack(
    found: dict[str, Shape],
    expected: Mapping[str, Shape],
    tensors: Mapping[str, LazyTensor],
    source: Mapping[str, str],
    fit: Fit,
) -> None:
    """Replace the shapes of packed layers in `found` by those before packing."""
    for scales in [name for name in found if name.endswith(".scales")]:
        stem = scales.removesuffix(".scales")
        weight, groups = found.get(f"{stem}.weight"), found.pop(scales)
        offsets = found.pop(f"{stem}.biases", None)
        if weight is None or len(weight) != 2 or len(groups) != 2:
            fit.faults.append((source[scales], "are scales of no packed weight"))
            continue
        columns = expected.get(f"{stem}.weight", (0, 0))[-1]
        one_byte = tensors[source[scales]].dtype == "U8"
        how = _packing(weight, groups, columns, one_byte)
        if how is None or (offsets is not None and offsets != groups):
            what = f"packed as {list(weight)} with scales {list(groups)}: no known quantisation"
            fit.faults.append((source[f"{stem}.weight"], what))
            found.pop(f"{stem}.weight")
            continue
        fit.quantised[stem] = how
        found[f"{stem}.weight"] = (weight[0], weight[1] * 32 // how.bits)


def _packing(weight: Shape, groups: Shape, columns: int, one_byte: bool) -> Quantised | None:
    """Bits and group size from the shapes (o, i * bits / 32) and (o, i / group) for i columns."""
    if not columns or not groups[1] or columns % groups[1] or weight[0] != groups[0]:
        return None
    bits, rest = divmod(weight[1] * 32, columns)
    group_size = columns // groups[1]
    if rest or bits not in _BITS:
        return None
    if not one_byte:
        return Quantised(bits, group_size, "affine")
    mode = _MICROSCALED.get((bits, group_size))
    return None if mode is None else Quantised(bits, group_size, mode)


# What a model needs --------------------------------------------------------------------------


def projector_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Canonical names and shapes of `mm_projector`: a linear layer, an activation, and so on."""
    width, hidden = config.projector.input_dim, config.projector.output_dim
    for i in range(config.projector.depth):
        yield f"{PROJECTOR}{2 * i}.weight", (hidden, width)
        yield f"{PROJECTOR}{2 * i}.bias", (hidden,)
        width = hidden


def language_shapes(text: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Names (without `language_model.`) and shapes of a tied qwen2, llama or mistral.

    None for another architecture, or settings that are not all there.
    """
    kind = text.get("model_type")
    if kind not in ("qwen2", "llama", "mistral"):
        return None
    try:
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        mlp, layers = int(text["intermediate_size"]), int(text["num_hidden_layers"])
        head = int(text.get("head_dim") or hidden // heads)
        narrow = head * int(text.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    biased = {"qkv": kind == "qwen2", "o": False, "mlp": False}
    if kind == "llama" and text.get("attention_bias"):
        biased |= {"qkv": True, "o": True}
    biased["mlp"] = kind == "llama" and bool(text.get("mlp_bias"))

    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (int(text["vocab_size"]), hidden),
        "model.norm.weight": (hidden,),
    }
    linears = [
        ("self_attn.q_proj", heads * head, hidden, "qkv"),
        ("self_attn.k_proj", narrow, hidden, "qkv"),
        ("self_attn.v_proj", narrow, hidden, "qkv"),
        ("self_attn.o_proj", hidden, heads * head, "o"),
        ("mlp.gate_proj", mlp, hidden, "mlp"),
        ("mlp.up_proj", mlp, hidden, "mlp"),
        ("mlp.down_proj", hidden, mlp, "mlp"),
    ]
    for i in range(layers):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (hidden,)
        for name, rows, columns, group in linears:
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            if biased[group]:
                shapes[f"{layer}{name}.bias"] = (rows,)
    return shapes
