"""Whatever was named as the source, as one set of canonical tensors, still in their files.

A source is a folder, a `.zip`, or a hub repository. Most hold a whole model. A LoRA adapter or a
projector alone is put onto `--base`; a model without an encoder takes one from `--encoder`. Sources
are only ever read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastvlm_mlx import hub
from fastvlm_mlx.config import FASTVITHD, ModelConfig, read_config, read_json
from fastvlm_mlx.errors import CheckpointError, ConfigError, HubError, UsageError
from fastvlm_mlx.weights.files import LazyTensor, TensorFiles, open_tensors
from fastvlm_mlx.weights.files import inside as inside_folder
from fastvlm_mlx.weights.layouts import (
    LANGUAGE,
    LAYOUTS,
    PROJECTOR,
    VISION,
    Layout,
    recognise,
    translate,
)

from . import merge
from .archive import is_archive, unpack
from .merge import LLAVA, Delta
from .options import ConvertOptions
from .report import Progress
from .target import Target

_MLX = next(layout for layout in LAYOUTS if layout.name == "mlx")
_HEAD = re.compile(r"(.*\.)?head\.proj")
# MobileCLIP's own checkpoints: the image half is the encoder.
_MOBILECLIP = "image_encoder.model."
_TOWER = "model.vision_tower.vision_tower.model."
_LANGUAGE_TYPES = ("qwen2", "llama", "mistral")


@dataclass(frozen=True)
class Origin:
    """A tensor where it lies, the layout it lies in, and what a LoRA adds to it."""

    tensor: LazyTensor
    layout: Layout
    delta: Delta | None = None


@dataclass(frozen=True)
class Located:
    """A source that is on this machine now."""

    path: Path  # a folder, or one file of weights
    name: str  # as it was named
    repo: str | None = None  # OWNER/NAME, where it came from the hub
    archive: Path | None = None  # the zip that it was unpacked from


@dataclass
class Source:
    """Everything that a conversion reads. Tensors can be read until the stack it was opened on is
    closed."""

    located: Located
    layout: str
    config: ModelConfig
    tensors: dict[str, Origin]  # by canonical name
    folders: list[Path]  # where tokenizer, settings and licence are looked for, the first first
    head: Origin | None = None  # the encoder's pooled projection
    files: list[Path] = field(default_factory=list)  # what was read, for hashing
    notes: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether the source by itself is a model that loads (and can be compared with)."""
        return len(self.folders) == 1 and self.layout != "apple-mlx" and "+" not in self.layout

    def find(self, name: str) -> Path | None:
        """The file `name` of the first folder that has it."""
        return next((f / name for f in self.folders if (f / name).is_file()), None)


def locate(
    name: str | Path,
    *,
    download: bool,
    target: Target,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Located:
    """Find a source, unpacking a zip and fetching a repository if need be.

    Raises HubError, CheckpointError, TargetError (no room to unpack).
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_file():
        target.refuse_source(path)
        if not is_archive(path):
            return Located(path, text)

        def advance(done: int, total: int) -> None:
            if progress is not None:
                progress("unpack", done, total)

        with target.writing():
            folder = unpack(path, target.workspace(), target.require_space, advance)
        return Located(folder, text, archive=path)
    try:
        found = hub.find_model(name)
    except HubError:
        is_repo = not path.exists() and hub._REPO.fullmatch(text) and not isinstance(name, Path)
        if not (download and is_repo):
            raise
        note(f"{text} is not on this machine; downloading it into the hub's local cache")
        found = hub.download(text)
    target.refuse_source(found.path)
    return Located(found.path, text, repo=text if found.source == "cache" else None)


def open_source(
    name: str | Path,
    options: ConvertOptions,
    target: Target,
    stack: ExitStack,
    progress: Progress | None = None,
) -> Source:
    """Open the source and whatever it is to be joined with. Reads headers and configurations.

    Raises FastVLMError subclasses naming the file, and the tensor where there is one.
    """
    notes: list[str] = []

    def find(wanted: str | Path) -> Located:
        found = locate(
            wanted,
            download=options.download,
            target=target,
            progress=progress,
            note=notes.append,
        )
        if found.path.is_dir():
            _refuse_links_out(found.path)
        return found

    located = find(name)
    if located.path.is_file():
        raise UsageError(
            f"{name} is a file of weights: give the folder that holds it and config.json"
        )
    if _is_partial(located.path):
        source = _open_on_base(located, options, find, stack)
    else:
        if options.base is not None:
            raise UsageError(
                f"{name} is a whole model: --base is for an adapter or a projector alone"
            )
        config = _any_config(located.path)
        files = stack.enter_context(open_tensors(located.path))
        source = _from_files(located, config, files)
    if options.encoder is not None:
        _take_encoder(source, find(options.encoder), stack)
    _require_parts(source, options)
    source.notes[:0] = notes
    return source


def _refuse_links_out(folder: Path) -> None:
    """The small files are copied into the result: a link must not bring a private file along."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():
            inside_folder(folder, entry.name)


# One folder -----------------------------------------------------------------------------------


def _any_config(folder: Path) -> ModelConfig:
    """The configuration of a FastVLM; of a bare language model, that of the FastVLM it will be."""
    raw = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    kind = raw.get("model_type")
    if kind not in _LANGUAGE_TYPES:
        return read_config(folder)
    promoted = {
        "image_aspect_ratio": "pad",
        **raw,
        "model_type": f"llava_{kind}",
        "text_config": {"model_type": kind},
    }
    try:
        config = ModelConfig.from_dict(promoted)
    except (ConfigError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None
    return replace(config, raw=promoted)


def _from_files(located: Located, config: ModelConfig, files: TensorFiles) -> Source:
    layout = _layout_of(files, located)
    names = translate(files, config.vision, layout)
    if names.unknown:
        tensor = files[names.unknown[0]]
        more = f" (and {len(names.unknown) - 1} more)" if len(names.unknown) > 1 else ""
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} is of no part of FastVLM{more}"
        )
    tensors: dict[str, Origin] = {}
    for name, target in names.canonical.items():
        if target in tensors:
            other = tensors[target].tensor.name
            raise CheckpointError(f"{files[name].file}: {name!r} and {other!r} are the same tensor")
        tensors[target] = Origin(files[name], layout)
    source = Source(located, layout.name, config, tensors, [located.path])
    source.files = [located.archive] if located.archive else list(files.files)
    source.head = _find_head(files, layout)
    return source


def _layout_of(files: Mapping[str, LazyTensor], located: Located) -> Layout:
    try:
        return recognise(files)
    except CheckpointError:
        if any(name.startswith("language_model.") for name in files):
            return _MLX
        if any(name.startswith("model.layers.") for name in files):
            return LLAVA
        raise CheckpointError(
            f"{located.name}: the tensor names are not those of any FastVLM checkpoint known here"
        ) from None


def _find_head(files: Mapping[str, LazyTensor], layout: Layout) -> Origin | None:
    for name, tensor in files.items():
        if _HEAD.fullmatch(name) and "vision" in name and len(tensor.shape) == 2:
            return Origin(tensor, layout)
    return None


# Parts onto a base ----------------------------------------------------------------------------


def _is_partial(folder: Path) -> bool:
    """An adapter or a projector, and no model's own weights beside it."""
    if merge.find(folder, (*merge.ADAPTERS, *merge.TRAINED_PARTS)):
        return True
    if merge.find(folder, merge.PROJECTORS) is None:
        return False
    try:
        open_tensors(folder).close()
    except CheckpointError:
        return True
    return False


def _open_on_base(
    located: Located,
    options: ConvertOptions,
    find: Callable[[str | Path], Located],
    stack: ExitStack,
) -> Source:
    folder = located.path
    if options.base is None:
        raise UsageError(
            f"{located.name} holds trained parts alone (an adapter or a projector): "
            "name the model that they belong to with --base"
        )
    base = find(options.base)
    if base.path.is_file() or _is_partial(base.path):
        raise UsageError(f"{base.name} is no whole model, so it cannot be the --base")
    base_config = _any_config(base.path)
    source = _from_files(base, base_config, stack.enter_context(open_tensors(base.path)))
    source.located = located
    source.folders = [folder, base.path]
    source.notes.append(f"base: {base.name}")
    if (folder / "config.json").exists():
        config = _any_config(folder)
        # Text settings that the adapter's file leaves out are the base's.
        text = {**base_config.text, **config.text}
        source.config = replace(config, text=text)
    vision = source.config.vision
    if path := merge.find(folder, merge.TRAINED_PARTS) or merge.find(folder, merge.PROJECTORS):
        parts = stack.enter_context(open_tensors(path))
        _override(source, parts, merge.canonical_names(list(parts), vision), path.name)
    if path := merge.find(folder, merge.ADAPTERS):
        adapter = stack.enter_context(open_tensors(path))
        deltas, replaced = merge.read_deltas(folder, adapter, vision)
        _override(
            source, replaced, {t.name: c for c, t in replaced.items()}, path.name, by=replaced
        )
        _add(source, deltas, path)
    source.layout = f"{source.layout} + {'LoRA' if merge.find(folder, merge.ADAPTERS) else 'parts'}"
    return source


def _override(
    source: Source,
    parts: Mapping[str, LazyTensor],
    canonical: Mapping[str, str],
    file: str,
    by: Mapping[str, LazyTensor] | None = None,
) -> None:
    """Trained tensors in the place of the base's. A part of the encoder replaces all its branches
    only where it has the same names."""
    count = 0
    for name, target in canonical.items():
        tensor = by[target] if by is not None else parts[name]
        source.tensors[target] = Origin(tensor, LLAVA)
        if tensor.file not in source.files:
            source.files.append(tensor.file)
        count += 1
    if count:
        source.notes.append(f"{file}: {count} tensors in the place of the base's")


def _add(source: Source, deltas: Mapping[str, Delta], path: Path) -> None:
    for target, delta in deltas.items():
        origin = source.tensors.get(target)
        if origin is None:
            raise CheckpointError(f"{path}: {delta.a.name!r} is for a layer that the base lacks")
        if f"{target.removesuffix('weight')}scales" in source.tensors:
            raise CheckpointError(
                f"{origin.tensor.file}: the base is quantised; merge onto the original instead"
            )
        wanted = (delta.b.shape[0], delta.a.shape[1])
        if origin.tensor.shape != wanted:
            raise CheckpointError(
                f"{path}: {delta.a.name!r} makes {list(wanted)}, "
                f"but {origin.tensor.name!r} of the base is {list(origin.tensor.shape)}"
            )
        source.tensors[target] = replace(origin, delta=delta)
    source.files.append(path)
    source.notes.append(f"{path.name}: merged into {len(deltas)} layers")


# The encoder from elsewhere -------------------------------------------------------------------


def _take_encoder(source: Source, located: Located, stack: ExitStack) -> None:
    files = stack.enter_context(open_tensors(located.path))
    vision = FASTVITHD
    if located.path.is_dir() and (located.path / "config.json").exists():
        vision = read_config(located.path).vision
    renamed = {
        name.replace(_MOBILECLIP, _TOWER) if name.startswith(_MOBILECLIP) else name: tensor
        for name, tensor in files.items()
        if not name.startswith("text_encoder.")
    }
    layout = _layout_of(renamed, located)
    names = translate(renamed, vision, layout)
    tower = {t: renamed[n] for n, t in names.canonical.items() if t.startswith(VISION)}
    if not tower:
        raise CheckpointError(f"{located.name}: holds no encoder to take")
    kept = {t: o for t, o in source.tensors.items() if not t.startswith(VISION)}
    source.tensors = {t: Origin(tensor, layout) for t, tensor in tower.items()} | kept
    source.head = _find_head(renamed, layout)
    image_size = vision.image_size
    if located.path.is_file():  # no configuration came with it
        image_size = source.config.vision.image_size
    vision = replace(vision, image_size=image_size)
    source.config = replace(
        source.config,
        vision=vision,
        projector=replace(source.config.projector, input_dim=vision.feature_dim),
    )
    source.files += [located.archive] if located.archive else list(files.files)
    if located.path.is_dir():
        source.folders.append(located.path)
    source.layout = f"{source.layout} + encoder"
    source.notes.append(f"encoder: {located.name}")


def _require_parts(source: Source, options: ConvertOptions) -> None:
    has = {
        prefix
        for prefix in (VISION, PROJECTOR, LANGUAGE)
        if any(name.startswith(prefix) for name in source.tensors)
    }
    where = source.located.name
    if VISION not in has:
        raise CheckpointError(
            f"{where}: holds no encoder (vision tower): name one that does with --encoder"
        )
    if PROJECTOR not in has and source.config.projector.depth:
        raise CheckpointError(f"{where}: holds no projector (mm_projector)")
    if LANGUAGE not in has:
        raise CheckpointError(f"{where}: holds no language model")


def sha256(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """The digest of a file, in little memory. Raises CheckpointError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(8 << 20):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
