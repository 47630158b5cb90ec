"""What becomes of each tensor, decided from headers alone; the work is left in `Job`s.

The shapes of everything are checked here, against the encoder's description and against mlx-lm's
own language model (built, but never computed), so that nothing is written for a checkpoint that
could not be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.models.fastvlm import build_language_model
from fastvlm_mlx.weights import folding
from fastvlm_mlx.weights.assemble import channels_last, check_shapes
from fastvlm_mlx.weights.files import find_non_finite
from fastvlm_mlx.weights.layouts import LANGUAGE, PROJECTOR, VISION
from fastvlm_mlx.weights.lazy import LazyTensor, itemsize, shown, where
from fastvlm_mlx.weights.packing import Packing

from . import quantise
from .fit import projector_shapes
from .naming import DISK_VISION, HEAD, HEAD_WIDTH, disk_name, disk_shape
from .options import ConvertOptions
from .report import PartReport
from .source import Origin, Source
from .writer import Array, Job, Spec, bytes_of, row_blocks

_ASKED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What a stored type is kept as, where nothing is asked for.
_KEPT = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "F64": "F32",
    "F8_E4M3": "BF16",
    "F8_E5M2": "F16",
}
_MX = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# Bits of the exponent, all ones in NaN and infinity.
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
_LOOK_AT = 1 << 20  # elements tested together; what they need stays in a CPU's cache


@dataclass
class Plan:
    """Jobs in the order to write them, and what can be said beforehand."""

    jobs: list[Job] = field(default_factory=list)
    parts: dict[str, PartReport] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    head_width: int = HEAD_WIDTH
    dtype: str = "bfloat16"  # of most of the language model's unpacked values

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)


def make_plan(source: Source, config: ModelConfig, options: ConvertOptions) -> Plan:
    """Raises CheckpointError: tensors missing, unexpected, of a wrong shape or type."""
    plan = Plan()
    chosen: dict[str, Packing] = {}
    try:
        _add(plan, "vision_tower", _plan_vision(source, config, options, plan))
        _add(plan, "mm_projector", _plan_projector(source, config, options, plan, chosen))
        _add(plan, "language_model", _plan_language(source, config, options, plan, chosen))
    except CheckpointError as error:
        folder = str(source.folders[-1])  # of the tensors, where an adapter is on its base
        if folder in str(error):
            raise
        raise CheckpointError(f"{folder}: {error}") from None
    default = quantise.from_settings(options.settings) if options.quantises else None
    plan.quantization = quantise.quantization_config(chosen, default)
    return plan


@dataclass(frozen=True)
class _Planned:
    """A job, and how many parameters its tensors hold."""

    job: Job
    parameters: int


def _add(plan: Plan, part: str, planned: list[_Planned]) -> None:
    plan.jobs += [p.job for p in planned]
    nbytes = sum(p.job.nbytes for p in planned)
    plan.parts[part] = PartReport(nbytes, sum(p.parameters for p in planned))


# The encoder ----------------------------------------------------------------------------------


def _plan_vision(
    source: Source, config: ModelConfig, options: ConvertOptions, plan: Plan
) -> list[_Planned]:
    tower = {n: o for n, o in source.tensors.items() if n.startswith(VISION)}
    stored = _vision_type(tower, options, plan)
    expected = {VISION + n: s for n, s in folding.expected_shapes(config.vision).items()}
    branches = _branches(config, tower)
    _check_vision(config, tower, expected)
    in_branch = {name: conv for conv, names in branches.items() for name in names}
    planned = []
    done: set[str] = set()
    for name in tower:
        conv = in_branch.get(name)
        if conv is None:
            planned.append(_vision_job(name, tower[name], expected[name], config, stored))
        elif conv not in done:
            done.add(conv)
            members = {n: tower[n] for n in branches[conv]}
            planned.append(_fusing_job(conv, members, expected, config, stored))
    if branches:
        plan.notes.append(f"{len(branches)} convolutions were stored as training branches: fused")
    planned.append(_head_job(source.head, config, stored, plan))
    return planned


def _vision_type(tower: dict[str, Origin], options: ConvertOptions, plan: Plan) -> str:
    """The one type that the encoder is stored in.

    Not float16 unless it is asked for by name: activations of published encoders pass its largest
    value, 65504, and what reads these folders computes in the type that the weights are in.
    """
    if options.encoder_dtype is not None:
        return _ASKED[options.encoder_dtype]
    sizes: dict[str, int] = {}
    for origin in tower.values():
        kind = _KEPT.get(origin.tensor.dtype, "F32")
        sizes[kind] = sizes.get(kind, 0) + origin.tensor.nbytes
    kind = _ASKED[options.dtype] if options.dtype else max(sizes, key=lambda k: sizes[k])
    if kind == "F16":
        plan.notes.append(
            "the encoder is stored as float32: its activations can pass float16's range"
        )
        return "F32"
    return kind


def _branches(config: ModelConfig, tower: dict[str, Origin]) -> dict[str, list[str]]:
    """Convolution -> the tensors it is fused from, for those that are not fused yet."""
    expected = {VISION + name for name in folding.expected_shapes(config.vision)}
    found = {}
    for conv in folding.fused_convs(config.vision):
        prefix = f"{VISION}{conv.name}."
        if f"{prefix}reparam_conv.weight" in tower:
            continue
        names = [n for n in tower if n.startswith(prefix) and n not in expected]
        if names:
            found[conv.name] = names
    return found


def _check_vision(
    config: ModelConfig, tower: dict[str, Origin], expected: dict[str, tuple[int, ...]]
) -> None:
    """Put the encoder together from zeros that are never computed, and compare shapes."""
    lazy = {
        name.removeprefix(VISION): channels_last(name, mx.zeros(o.tensor.shape), o.layout)
        for name, o in tower.items()
        if _require_float(o.tensor)
    }
    try:
        folding.fuse_branches(config.vision, lazy)
    except KeyError as error:
        raise CheckpointError(f"training branches are incomplete: no {error.args[0]!r}") from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"training branches do not fit together ({reason})") from None
    found = {VISION + name: tuple(value.shape) for name, value in lazy.items()}
    check_shapes(expected, found, {n: o.tensor.name for n, o in tower.items()}, [])


def _vision_job(
    name: str, origin: Origin, shape: tuple[int, ...], config: ModelConfig, stored: str
) -> _Planned:
    spec = Spec(disk_name(name, config.vision), stored, disk_shape(name, shape))

    def pieces() -> Iterator[tuple[Array, ...]]:
        value = channels_last(name, _read(origin), origin.layout)
        yield (_stored(value.reshape(spec.shape), stored, origin.tensor),)

    statistics = name.endswith((".running_mean", ".running_var"))
    return _Planned(Job((spec,), pieces, origin.tensor.name), 0 if statistics else math.prod(shape))


def _fusing_job(
    conv: str,
    members: dict[str, Origin],
    expected: dict[str, tuple[int, ...]],
    config: ModelConfig,
    stored: str,
) -> _Planned:
    names = [f"{VISION}{conv}.reparam_conv.{part}" for part in ("weight", "bias")]
    specs = tuple(Spec(disk_name(n, config.vision), stored, expected[n]) for n in names)
    first = next(iter(members.values())).tensor

    def pieces() -> Iterator[tuple[Array, ...]]:
        tensors = {
            n.removeprefix(VISION): channels_last(n, _read(o), o.layout) for n, o in members.items()
        }
        folding.fuse_branches(config.vision, tensors)
        yield tuple(_stored(tensors[n.removeprefix(VISION)], stored, first) for n in names)

    return _Planned(Job(specs, pieces, first.name), sum(math.prod(expected[n]) for n in names))


def _head_job(head: Origin | None, config: ModelConfig, stored: str, plan: Plan) -> _Planned:
    """The pooled projection, which mlx-vlm and mlx-swift-lm load and never use."""
    features = config.vision.feature_dim
    if head is not None and head.tensor.shape[0] != features:
        head = None
    shape = head.tensor.shape if head is not None else (features, HEAD_WIDTH)
    plan.head_width = shape[1]
    spec = Spec(DISK_VISION + HEAD, stored, shape)

    def pieces() -> Iterator[tuple[Array, ...]]:
        value = mx.zeros(shape) if head is None else _read(head)
        yield (_stored(value, stored, head.tensor if head is not None else None),)

    return _Planned(Job((spec,), pieces, HEAD), 0)


# Projector and language model -----------------------------------------------------------------


def _plan_projector(
    source: Source,
    config: ModelConfig,
    options: ConvertOptions,
    plan: Plan,
    chosen: dict[str, Packing],
) -> list[_Planned]:
    expected = dict(projector_shapes(config))
    layers = {n.removesuffix(".weight"): s for n, s in expected.items() if n.endswith(".weight")}
    wanted: dict[str, Packing | None] | None = None
    if options.dequantize:
        wanted = dict.fromkeys(layers)
    elif options.projector_bits:
        wanted = {}
        for path, (_, width) in layers.items():
            wanted[path] = quantise.projector_packing(options.projector_bits, width, options)
            if wanted[path] is None:
                plan.kept[path] = f"its width {width} is no multiple of the group size"
    return _plan_linear(PROJECTOR, source, expected, layers, wanted, options, chosen)


def _plan_language(
    source: Source,
    config: ModelConfig,
    options: ConvertOptions,
    plan: Plan,
    chosen: dict[str, Packing],
) -> list[_Planned]:
    model = build_language_model(config.text)
    own: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    expected = {LANGUAGE + n: tuple(p.shape) for n, p in own.items()}
    layers: dict[str, tuple[int, ...]] = {
        path: tuple(module.weight.shape)
        for path, module in quantise.quantisable_layers(model).items()
    }
    wanted: dict[str, Packing | None] | None = None
    if options.dequantize:
        wanted = dict.fromkeys(layers)
    elif options.quantises:
        how, kept = quantise.choose(model, options, plan.notes)
        plan.kept |= kept
        wanted = {path: how.get(path) for path in layers}
    if config.text.get("tie_word_embeddings"):
        for part in ("weight", "scales", "biases"):
            source.tensors.pop(f"{LANGUAGE}lm_head.{part}", None)
    plan.dtype = _main_type(source, options)
    if options.quantises and plan.dtype == "float32":
        plan.notes.append(
            "scales are float32, as the source is: --dtype bfloat16 saves up to a bit a weight"
        )
    return _plan_linear(LANGUAGE, source, expected, layers, wanted, options, chosen)


def _main_type(source: Source, options: ConvertOptions) -> str:
    if options.dtype is not None:
        return options.dtype
    sizes: dict[str, int] = {"BF16": 0}
    for name, origin in source.tensors.items():
        kind = _KEPT.get(origin.tensor.dtype)
        if name.startswith(LANGUAGE) and kind:
            sizes[kind] = sizes.get(kind, 0) + origin.tensor.nbytes
    most = max(sizes, key=lambda kind: sizes[kind])
    return next(name for name, kind in _ASKED.items() if kind == most)


def _plan_linear(
    prefix: str,
    source: Source,
    expected: dict[str, tuple[int, ...]],
    layers: dict[str, tuple[int, ...]],
    wanted: dict[str, Packing | None] | None,
    options: ConvertOptions,
    chosen: dict[str, Packing],
) -> list[_Planned]:
    """Jobs of all tensors under `prefix`. `wanted`: path of a layer -> how to store it (None:
    whole); `wanted` None: every layer as it is."""
    tensors = {n: o for n, o in source.tensors.items() if n.startswith(prefix)}
    packed = _packed(tensors, layers)
    shapes = {n: o.tensor.shape for n, o in tensors.items()}
    for path in packed:
        shapes[f"{path}.weight"] = layers[path]
        for part in ("scales", "biases"):
            shapes.pop(f"{path}.{part}", None)
    check_shapes(expected, shapes, {n: o.tensor.name for n, o in tensors.items()}, [])

    planned = []
    for name, origin in tensors.items():
        path, _, part = name.rpartition(".")
        if path in packed and part in ("scales", "biases"):
            continue  # with their weight
        is_layer = part == "weight" and path in layers
        before = packed.get(path) if is_layer else None
        after = before if wanted is None else wanted.get(path)
        if not is_layer:
            before = after = None
        if after is not None:
            chosen[path] = after
        if before is None:
            _require_float(origin.tensor)
        parts = [tensors[f"{path}.{p}"] for p in ("weight", "scales", "biases")
                 if before is not None and f"{path}.{p}" in tensors]  # fmt: skip
        planned.append(_matrix_job(name, parts or [origin], shapes[name], before, after, options))
    return planned


def _packed(tensors: dict[str, Origin], layers: dict[str, tuple[int, ...]]) -> dict[str, Packing]:
    """How each layer that has scales is packed in the source."""
    found = {}
    for name, origin in tensors.items():
        if not name.endswith(".scales"):
            continue
        path = name.removesuffix(".scales")
        weight = tensors.get(f"{path}.weight")
        tensor = origin.tensor
        if path not in layers or weight is None or weight.tensor.dtype != "U32":
            raise CheckpointError(
                f"{where(tensor.file)}: {shown(tensor.name)} belongs to no packed layer"
            )
        shape, scales = weight.tensor.shape, tensor.shape
        if len(shape) != 2 or len(scales) != 2 or not scales[1]:
            raise CheckpointError(
                f"{where(tensor.file)}: {shown(tensor.name)} has the shape {scales}"
            )
        how = quantise.packing(path, layers[path][1], shape, scales, tensor.dtype)
        biases = tensors.get(f"{path}.biases")
        if (how.mode == "affine") != (biases is not None and biases.tensor.shape == scales):
            raise CheckpointError(f"{where(tensor.file)}: {path} lacks biases that fit its scales")
        if shape[0] != layers[path][0]:
            raise CheckpointError(
                f"{where(tensor.file)}: {shown(weight.tensor.name)} has {shape[0]} rows, "
                f"expected {layers[path][0]}"
            )
        found[path] = how
    return found


def _matrix_job(
    name: str,
    origins: list[Origin],
    shape: tuple[int, ...],
    before: Packing | None,
    after: Packing | None,
    options: ConvertOptions,
) -> _Planned:
    """One tensor or one layer: copied, cast, quantised, dequantised, some rows at a time."""
    values = origins[0] if before is None else origins[1]  # of the floating-point type
    kind = _KEPT.get(values.tensor.dtype, "BF16")
    if options.dtype is not None:
        kind = _ASKED[options.dtype]
    rows = shape[0] if shape else 1
    stem = name.removesuffix("weight")
    if after is not None:
        parts = quantise.packed_shapes(rows, shape[1], after)
        specs = tuple(Spec(stem + p, t or kind, s) for p, (s, t) in parts.items())
    else:
        specs = (Spec(name, kind, shape),)
    row_bytes = max(origins[0].tensor.nbytes // max(rows, 1), math.prod(shape[1:]) * 4)

    def pieces() -> Iterator[tuple[Array, ...]]:
        if not shape:
            yield (_stored(_read(origins[0]), kind, origins[0].tensor),)
            return
        delta = _Delta(origins[0]) if origins[0].delta else None
        for begin, end in row_blocks(rows, row_bytes):
            cut = [replace(o, tensor=_rows(o.tensor, begin, end)) for o in origins]
            if before == after:
                yield tuple(
                    _copy(o, spec.dtype, delta, begin, end)
                    for o, spec in zip(cut, specs, strict=True)
                )
                continue
            if before is None:
                value = _value(cut[0], delta, begin, end)
            else:
                value = quantise.dequantise_rows(tuple(_read(o) for o in cut), before)
            value = value.astype(_MX[kind])
            if after is None:
                yield (_stored(value, kind, origins[0].tensor),)
            else:
                if kind == "F16":
                    _stored(value, kind, origins[0].tensor)  # what overflowed must not be packed
                yield tuple(_bytes(part) for part in quantise.quantise_rows(value, after))

    return _Planned(Job(specs, pieces, origins[0].tensor.name), math.prod(shape))


class _Delta:
    """B and A of a LoRA, read once for all rows of its weight."""

    def __init__(self, origin: Origin) -> None:
        delta = origin.delta
        assert delta is not None
        self._a = _read(Origin(delta.a, origin.layout)).astype(mx.float32)
        self._b = _read(Origin(delta.b, origin.layout)).astype(mx.float32) * delta.scale

    def onto(self, value: mx.array, begin: int, end: int) -> mx.array:
        """Rows [begin, end) of the weight, with the same rows of scale * B @ A added, float32."""
        return value.astype(mx.float32) + self._b[begin:end] @ self._a


def _value(origin: Origin, delta: _Delta | None, begin: int, end: int) -> mx.array:
    value = _read(origin)
    return value if delta is None else delta.onto(value, begin, end)


def whole_value(origin: Origin) -> mx.array:
    """A tensor as it is before any change of type, with its LoRA added."""
    delta = _Delta(origin) if origin.delta else None
    rows = origin.tensor.shape[0] if origin.tensor.shape else 0
    return _value(origin, delta, 0, rows)


def _copy(origin: Origin, kind: str, delta: _Delta | None, begin: int, end: int) -> Array:
    """Rows as they are, cast if need be; straight out of the file's map where they can be."""
    tensor = origin.tensor
    if delta is None and tensor.dtype == kind and tensor.strides is None:
        stored = tensor.stored()
        _require_finite(tensor, stored)
        return stored
    return _stored(_value(origin, delta, begin, end), kind, tensor)


# Reading and writing values -------------------------------------------------------------------


def _rows(tensor: LazyTensor, begin: int, end: int) -> LazyTensor:
    """Rows [begin, end) of a tensor, still in its file."""
    if tensor.strides is None:
        step = math.prod(tensor.shape[1:])
    else:
        step = tensor.strides[0] if tensor.shape[0] > 1 else 0
    return replace(
        tensor,
        shape=(end - begin, *tensor.shape[1:]),
        offset=tensor.offset + begin * step * itemsize(tensor.dtype),
    )


def _read(origin: Origin) -> mx.array:
    """The values; refused if any is NaN or infinite."""
    _require_finite(origin.tensor)
    return origin.tensor.read()


def _require_float(tensor: LazyTensor) -> bool:
    if tensor.dtype not in _KEPT:
        raise CheckpointError(
            f"{where(tensor.file)}: tensor {shown(tensor.name)} is of the type {tensor.dtype}, "
            "not of numbers with a fraction"
        )
    return True


def _require_finite(tensor: LazyTensor, stored: Array | None = None) -> None:
    """Raises CheckpointError naming file and tensor."""
    if tensor.dtype in _EXPONENT and tensor.strides is None:
        stored = tensor.stored() if stored is None else stored
        if _all_finite(stored, _EXPONENT[tensor.dtype]):
            return
    found = find_non_finite(tensor)
    if found is not None:
        raise CheckpointError(
            f"{where(tensor.file)}: tensor {shown(tensor.name)} holds {found.nan} NaN and "
            f"{found.inf} infinite values"
        )


def _all_finite(values: Array, exponent: int) -> bool:
    """Whether no value has an exponent of all ones; a slice at a time, into one small buffer."""
    flat = values.reshape(-1).view(f"<u{values.itemsize}")
    mask = flat.dtype.type(exponent)
    buffer = np.empty(min(flat.size, _LOOK_AT), flat.dtype)
    for begin in range(0, flat.size, _LOOK_AT):
        part = flat[begin : begin + _LOOK_AT]
        masked = np.bitwise_and(part, mask, out=buffer[: part.size])
        if masked.max() == mask:
            return False
    return True


def stored_bytes(value: mx.array, kind: str, place: LazyTensor) -> memoryview:
    """The bytes of `value` in the stored type of `place`; refused if one overflows."""
    return bytes_of(_stored(value, kind, place))


def _stored(value: mx.array, kind: str, origin: LazyTensor | None) -> Array:
    """The values in the type to be stored, as an array of its bytes; refused if one overflows."""
    array = _bytes(value.astype(_MX[kind]))
    if not _all_finite(array, _EXPONENT[kind]):
        name = (
            f"{where(origin.file)}: tensor {shown(origin.name)}"
            if origin is not None
            else "a tensor"
        )
        raise CheckpointError(f"{name} has values too large for {kind}; choose another --dtype")
    return array


def _bytes(value: mx.array) -> Array:
    """An array of the same bytes in row-major order; numpy has no bfloat16 and gets integers."""
    if value.dtype == mx.bfloat16:
        value = value.view(mx.uint16)
    return np.ascontiguousarray(np.asarray(value))
