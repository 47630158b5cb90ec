"""What a checkpoint is and what is wrong with it, from its headers alone.

Nothing here reads the values of a tensor: 15 GB are looked at as fast as 15 MB. And nothing here
gives up at the first fault: a broken checkpoint is described as far as it goes, with every
complaint that loading or converting it would meet.

A *fault* is what loading refuses. A *repair* is what loading corrects by itself, and says so. A
*surprise* is neither, but not what a checkpoint usually holds.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastvlm_mlx.config import (
    FASTVITHD,
    LLAVA_IMAGE_TOKEN_INDEX,
    ModelConfig,
    read_config,
    read_json,
)
from fastvlm_mlx.errors import CheckpointError, ConfigError, FastVLMError, UsageError
from fastvlm_mlx.weights.files import LazyTensor, open_tensors
from fastvlm_mlx.weights.layouts import LANGUAGE, LAYOUTS, VISION, Names, translate
from fastvlm_mlx.weights.strict_json import LARGEST_JSON

from . import merge
from .archive import is_archive, model_members
from .fit import Fit, Quantised, check_fit

IMAGE_MARK = "<image>"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_FLOATS = ("F32", "F16", "BF16")
_PACKED = "U32"

# What files hold that are a part of a model: what to call it, and how to tell by the names.
_PARTIAL: tuple[tuple[str, str], ...] = (
    ("LoRA adapter (convert it with the base model that it belongs to)", r".*\.lora_[ABEM].*"),
    (
        "trained parts beside a LoRA adapter (convert them with the base model)",
        r"base_model\.model\..+",
    ),
    (
        "projector alone (convert it with the base model that it belongs to)",
        r"(model\.)?mm_projector\..+",
    ),
    (
        "language model alone (no vision tower: convert it with an encoder)",
        r"(language_model\.)?(model\.)?(layers|embed_tokens|norm)\..+|lm_head\..+",
    ),
)


@dataclass(frozen=True)
class Surprise:
    """Something odd: `what` in words, and the file and the tensor where there is one."""

    what: str
    tensor: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        """The whole in one line: `file: tensor: what`."""
        return ": ".join(part for part in (self.file, self.tensor, self.what) if part)


@dataclass(frozen=True)
class FileSummary:
    """One file of weights. `fault` is why it cannot be read, None where it can."""

    name: str
    bytes: int
    tensors: int
    fault: str | None = None


@dataclass(frozen=True)
class PartSummary:
    """`vision_tower`, `mm_projector`, `language_model`, or what plays no part in the answer."""

    name: str
    tensors: int
    parameters: int  # packed ones are counted unpacked, their scales not at all
    bytes: int
    dtypes: dict[str, int]  # stored type -> bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass
class Inspection:
    """The whole report. `faults` empty: loading and converting will accept it, NaN apart."""

    path: str
    kind: str  # "folder", "file", "zip archive"
    layout: str | None = None  # a name of `weights.layouts`, None where none is recognised
    content: str = "nothing that could be read"  # in words
    model_type: str | None = None
    encoder: str | None = None  # "fused" or "n convolutions as training branches"
    picture_size: int | None = None
    visual_tokens: int | None = None
    quantization: dict[str, Any] | None = None
    files: list[FileSummary] = field(default_factory=list)
    parts: list[PartSummary] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    surprises: list[Surprise] = field(default_factory=list)
    faults: list[Surprise] = field(default_factory=list)
    # name -> {"file", "dtype", "shape", "canonical"}; the last None where the name is unknown
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def broken(self) -> bool:
        return bool(self.faults)

    def to_dict(self, *, tensors: bool = False) -> dict[str, Any]:
        """For `--json`; the list of all tensors only where it is asked for."""
        plain = asdict(self)
        for part, summary in zip(plain["parts"], self.parts, strict=True):
            part["bits_per_weight"] = round(summary.bits_per_weight, 3)
        if not tensors:
            plain.pop("tensors")
        return {**plain, "bytes": self.bytes, "broken": self.broken}


def inspect(path: str | Path) -> Inspection:
    """Describe the checkpoint at `path`: a folder, one file of weights, or a zip of a folder.

    Reads headers only. What is wrong with the checkpoint is in `Inspection.faults`.

    Raises:
        UsageError: there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"there is no file or folder {path}")
    if is_archive(path):
        return _inspect_archive(path)
    report = Inspection(str(path), "folder" if path.is_dir() else "file")
    tensors = _open_all(path, report)
    if tensors:
        _describe(report, path if path.is_dir() else path.parent, tensors)
    if not path.is_dir():
        return report
    _look_around(report, path)
    return report


def _describe(report: Inspection, folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Everything that the tensors and the configuration beside them say."""
    content = _partial(tensors)
    config = _read_config(report, folder, partial=content is not None)
    vision = config.vision if config else FASTVITHD
    try:
        names = translate(tensors, vision)
    except CheckpointError as error:
        if content is None:
            report.faults.append(Surprise(str(error)))
        report.content = content or "no FastVLM checkpoint known here"
        names = Names(LAYOUTS[0], unknown=list(tensors))
        report.parts = [_part("unrecognised", dict(tensors), {})]
    else:
        report.layout = names.layout.name
        report.content = "FastVLM"
        if not any(target.startswith(VISION) for target in names.canonical.values()):
            report.content = "FastVLM without its vision tower (convert it with --encoder)"
        fit = check_fit(config, names, tensors) if config else Fit()
        report.encoder = fit.encoder
        report.faults += [_named(tensors, what, name) for name, what in fit.faults]
        report.parts = _parts(names, tensors, fit.quantised)
        report.quantization = _quantisation(config, fit.quantised)
        if config:
            _describe_config(report, folder, config, names, tensors)
            if fit.branches:
                report.repairs.append(
                    f"encoder: {fit.branches} convolutions are stored as the branches of training; "
                    "loading makes one of each"
                )
    report.tensors = {
        name: {
            "file": tensor.file.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "canonical": names.canonical.get(name),
        }
        for name, tensor in tensors.items()
    }
    report.surprises += _odd_tensors(names, tensors)
    report.surprises += _odd_files(tensors)


# Opening -------------------------------------------------------------------------------------


def _open_all(path: Path, report: Inspection) -> dict[str, LazyTensor]:
    """The tensors of every file that can be read; a complaint for each that cannot."""
    tensors: dict[str, LazyTensor] = {}
    if path.is_dir() and (parts := _trained_parts(path)):
        for file in parts:
            tensors |= _open_one(file, report, "")
        return tensors
    try:
        with open_tensors(path) as opened:
            tensors = dict(opened)
            files = opened.files
            report.surprises += [
                Surprise(f"holds {what}, which is passed over", tensor=name)
                for name, what in opened.ignored.items()
            ]
    except CheckpointError as error:
        whole = str(error)
        files = tuple(_weight_files(path)) if path.is_dir() else ()
        report.faults.append(Surprise(_without_folder(whole, path)))
        if not files and path.is_file():
            size = path.stat().st_size
            report.files.append(FileSummary(path.name, size, 0, _without_folder(whole, path)))
        for file in files:
            tensors |= _open_one(file, report, whole)
        return tensors
    held = Counter(tensor.file for tensor in tensors.values())
    report.files += [FileSummary(f.name, f.stat().st_size, held[f]) for f in files]
    return tensors


def _open_one(file: Path, report: Inspection, already: str) -> Mapping[str, LazyTensor]:
    """One file of a folder that did not open as a whole; `already` has been complained of."""
    size = file.stat().st_size if file.is_file() else 0
    try:
        with open_tensors(file) as opened:
            report.files.append(FileSummary(file.name, size, len(opened)))
            return dict(opened)
    except CheckpointError as error:
        fault = _without_folder(str(error), file.parent)
        report.files.append(FileSummary(file.name, size, 0, fault))
        if str(error) != already:
            report.faults.append(Surprise(fault))
        return {}


def _trained_parts(folder: Path) -> list[Path]:
    """An adapter or a projector where no model lies beside it, else nothing."""
    names = (*merge.ADAPTERS, *merge.TRAINED_PARTS, *merge.PROJECTORS)
    parts = [folder / name for name in names if (folder / name).is_file()]
    return [] if set(_weight_files(folder)) - set(parts) else parts


def _weight_files(folder: Path) -> list[Path]:
    """Every file in `folder` that may hold weights."""
    return [
        file
        for file in sorted(folder.iterdir())
        if any(fnmatch(file.name, pattern) for pattern in _WEIGHTS)
        and not file.name.startswith(".")
    ]


def _without_folder(message: str, path: Path) -> str:
    """A complaint without the folder that the whole report is about."""
    folder = path if path.is_dir() else path.parent
    return message.replace(f"{folder}{os.sep}", "", 1).replace(f"{folder}: ", "", 1)


def _named(tensors: Mapping[str, LazyTensor], what: str, name: str | None) -> Surprise:
    found = tensors.get(name) if name else None
    return Surprise(what, name, found.file.name if found else None)


# Configuration -------------------------------------------------------------------------------


def _read_config(report: Inspection, folder: Path, *, partial: bool) -> ModelConfig | None:
    optional = report.kind == "file" or partial
    if optional and not (folder / "config.json").exists():
        return None
    try:
        return read_config(folder)
    except ConfigError as error:
        report.faults.append(Surprise(_without_folder(str(error), folder)))
        return None


def _describe_config(
    report: Inspection,
    folder: Path,
    config: ModelConfig,
    names: Names,
    tensors: Mapping[str, LazyTensor],
) -> None:
    report.model_type = config.model_type
    report.picture_size = size = config.vision.image_size
    rows, columns = config.vision.grid(size, size)
    report.visual_tokens = rows * columns
    report.repairs += _tensor_repairs(config, names, tensors)
    if report.kind != "file":
        report.repairs += _token_repairs(folder, config)


def _tensor_repairs(
    config: ModelConfig, names: Names, tensors: Mapping[str, LazyTensor]
) -> list[str]:
    """What `loading.believe_tensors` corrects, as far as headers tell."""
    repairs = []
    source = {target: name for name, target in names.canonical.items()}
    embeddings = source.get(f"{LANGUAGE}model.embed_tokens.weight")
    if embeddings is not None:
        rows, stated = tensors[embeddings].shape[:1], config.text["vocab_size"]
        if rows and rows[0] != stated:
            repairs.append(f"vocab_size: config says {stated}, the tensors {rows[0]}")
    stored = f"{LANGUAGE}lm_head.weight" in source
    tied = config.text.get("tie_word_embeddings")
    if not stored and tied is not True:
        said = "says nothing" if tied is None else "says false"
        repairs.append(f"tie_word_embeddings: config {said}, but there is no lm_head: tied")
    if stored and tied:
        repairs.append(
            "tie_word_embeddings: config says true, but an lm_head is stored; "
            "loading compares it with the embeddings and keeps it if they differ"
        )
    if not isinstance(config.raw.get("vision_config"), Mapping):
        size = config.vision.image_size
        repairs.append(f"vision_config: missing; taken to be FastViTHD at {size} pixels")
    return repairs


def _token_repairs(folder: Path, config: ModelConfig) -> list[str]:
    """What loading makes of the ids of the picture and of the answer's end."""
    repairs = []
    added = _added_tokens(folder)
    image = added.get(IMAGE_MARK)
    stated = config.image_token_id
    if added and image is None:
        repairs.append(f"image token: the tokenizer has no {IMAGE_MARK}; loading adds it")
    elif image is not None and stated not in (image, LLAVA_IMAGE_TOKEN_INDEX):
        repairs.append(f"image token: config says {stated}, the tokenizer {image}")
    end = added.get("<|im_end|>")
    if end is not None and end not in config.eos_token_ids:
        known = ", ".join(map(str, config.eos_token_ids)) or "nothing"
        repairs.append(
            f"end of answer: config and generation_config say {known}; the tokenizer's "
            f"<|im_end|> ({end}) is added where it is its end of text"
        )
    return repairs


def _added_tokens(folder: Path) -> dict[str, int]:
    """Special tokens by text, from whichever file of the tokenizer names them."""
    found: dict[str, int] = {}
    try:
        if (folder / "tokenizer.json").exists():
            for token in read_json(folder / "tokenizer.json").get("added_tokens") or []:
                found[str(token["content"])] = int(token["id"])
        if (folder / "tokenizer_config.json").exists():
            settings = read_json(folder / "tokenizer_config.json")
            for number, token in (settings.get("added_tokens_decoder") or {}).items():
                found[str(token["content"])] = int(number)
        if (folder / "added_tokens.json").exists():
            found |= {str(k): int(v) for k, v in read_json(folder / "added_tokens.json").items()}
    except (FastVLMError, TypeError, ValueError, KeyError, AttributeError):
        return {}
    return found


# Sizes by part -------------------------------------------------------------------------------


def _partial(names: Iterable[str]) -> str | None:
    """What the tensors are where they are not a whole model, or None."""
    names = list(names)
    for content, pattern in _PARTIAL:
        matches = [re.fullmatch(pattern, name) is not None for name in names]
        if all(matches) or (content.startswith("LoRA") and any(matches)):
            return content
    return None


def _parts(
    names: Names, tensors: Mapping[str, LazyTensor], quantised: Mapping[str, Quantised]
) -> list[PartSummary]:
    groups: dict[str, dict[str, LazyTensor]] = {
        part: {} for part in ("vision_tower", "mm_projector", "language_model")
    }
    for source, target in names.canonical.items():
        groups[target.split(".", 1)[0]][target] = tensors[source]
    if names.ignored:
        groups["not used"] = {name: tensors[name] for name in names.ignored}
    if names.unknown:
        groups["unrecognised"] = {name: tensors[name] for name in names.unknown}
    return [_part(name, group, quantised) for name, group in groups.items()]


def _part(
    name: str, group: Mapping[str, LazyTensor], quantised: Mapping[str, Quantised]
) -> PartSummary:
    dtypes: Counter[str] = Counter()
    parameters = 0
    for target, tensor in group.items():
        how = quantised.get(target.rpartition(".")[0])
        kind = tensor.dtype
        if how is not None and target.endswith(".weight"):
            parameters += tensor.size * 32 // how.bits
            kind = f"{how.bits}-bit" if how.mode == "affine" else how.mode
        elif how is not None and target.endswith((".scales", ".biases")):
            kind = f"{tensor.dtype} (scales)"
        elif not target.endswith((".running_mean", ".running_var", ".num_batches_tracked")):
            parameters += tensor.size
        dtypes[kind] += tensor.nbytes
    total = sum(tensor.nbytes for tensor in group.values())
    return PartSummary(name, len(group), parameters, total, dict(dtypes.most_common()))


def _quantisation(
    config: ModelConfig | None, quantised: Mapping[str, Quantised]
) -> dict[str, Any] | None:
    """Ways of packing and how many layers have each; and what the configuration says of it."""
    stated = config.quantization if config else None
    if not quantised and not stated:
        return None
    layers = Counter(str(how) for how in quantised.values())
    plain = {k: v for k, v in (stated or {}).items() if not isinstance(v, dict)}
    return {"layers": dict(layers.most_common()), "config": plain}


# Oddities ------------------------------------------------------------------------------------


def _odd_tensors(names: Names, tensors: Mapping[str, LazyTensor]) -> list[Surprise]:
    found = []
    by_part: dict[str, Counter[str]] = {}
    for name, tensor in tensors.items():
        target = names.canonical.get(name)
        if target is not None and tensor.dtype in _FLOATS:
            by_part.setdefault(target.split(".", 1)[0], Counter())[tensor.dtype] += 1
        elif target is not None and not _is_packed(target, tensor):
            found.append(_named(tensors, f"is stored as {tensor.dtype}", name))
        if tensor.size == 0:
            found.append(_named(tensors, f"is empty, {list(tensor.shape)}", name))
        elif tensor.strides is not None and not _row_major(tensor):
            found.append(_named(tensors, "is stored transposed or expanded", name))
    for part, dtypes in by_part.items():
        if len(dtypes) > 1:
            mix = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
            found.append(Surprise(f"the tensors of {part} have several types ({mix})"))
    if names.ignored:
        kinds = Counter(re.sub(r"\d+", "N", name).rpartition(".")[2] for name in names.ignored)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        found.append(
            Surprise(f"{len(names.ignored)} tensors play no part in the answer ({listed})")
        )
    return found


def _is_packed(target: str, tensor: LazyTensor) -> bool:
    return tensor.dtype in (_PACKED, "U8") and target.endswith((".weight", ".scales", ".biases"))


def _row_major(tensor: LazyTensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides or ()), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _odd_files(tensors: Mapping[str, LazyTensor]) -> list[Surprise]:
    """Bytes after the last tensor of a safetensors file: allowed, and never written by a tool."""
    ends: dict[Path, int] = {}
    sizes: dict[Path, int] = {}
    for tensor in tensors.values():
        if tensor.file.suffix == ".safetensors":
            ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.offset + tensor.nbytes)
            sizes[tensor.file] = tensor.source.size
    return [
        Surprise(f"has {sizes[file] - end} bytes after its last tensor", file=file.name)
        for file, end in ends.items()
        if sizes[file] > end
    ]


def _look_around(report: Inspection, folder: Path) -> None:
    """Files beside the weights that are missing or have something to say."""
    here = {entry.name for entry in folder.iterdir()}
    if not here & {"tokenizer.json", "tokenizer.model", "vocab.json"} and report.layout:
        report.faults.append(Surprise("no tokenizer (tokenizer.json or tokenizer.model)"))
    read = {summary.name for summary in report.files}
    beside = [
        name
        for name in sorted(here - read)
        if any(fnmatch(name, pattern) for pattern in _WEIGHTS) and not name.startswith(".")
    ]
    unread = "lies beside the weights and is not read"
    report.surprises += [Surprise(unread, file=name) for name in beside]
    packages = sorted(name for name in here if name.endswith(".mlpackage"))
    report.surprises += [Surprise("is a Core ML package, not read here", file=n) for n in packages]


# Archives ------------------------------------------------------------------------------------


def _inspect_archive(path: Path) -> Inspection:
    """A zip of a model folder: the beginnings of its members are unpacked, and nothing else.

    What is inspected is a folder of sparse files that are as long as the members, with headers and
    no values.
    """
    report = Inspection(str(path), "zip archive")
    try:
        with zipfile.ZipFile(path) as archive, TemporaryDirectory(prefix="fastvlm-") as folder:
            for name, member in model_members(path, archive).items():
                _unpack_beginning(archive, member, Path(folder) / name, report)
            tensors = _open_all(Path(folder), report)
            if tensors:
                _describe(report, Path(folder), tensors)
            _look_around(report, Path(folder))
    except CheckpointError as error:
        report.faults.append(Surprise(_without_folder(str(error), path)))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
        report.faults.append(Surprise(f"is a damaged zip archive ({error})", file=path.name))
    return report


def _unpack_beginning(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, report: Inspection
) -> None:
    if target.suffix not in (".safetensors", ".json"):
        if any(fnmatch(target.name, pattern) for pattern in _WEIGHTS):
            what = "is not looked into: in an archive, only safetensors are"
            report.surprises.append(Surprise(what, file=target.name))
        return
    with archive.open(member) as packed, open(target, "xb") as file:
        if target.suffix == ".json":
            file.write(packed.read(LARGEST_JSON))
            return
        length = packed.read(8)
        file.write(length)
        file.write(packed.read(min(int.from_bytes(length, "little"), LARGEST_JSON)))
        file.truncate(member.file_size)


__all__ = ["FileSummary", "Inspection", "PartSummary", "Surprise", "inspect"]
