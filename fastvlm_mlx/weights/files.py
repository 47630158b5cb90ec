"""Opening a checkpoint: from a folder or a file to tensors by name, without torch.

    with open_tensors("FastVLM-0.5B") as tensors:
        for name, tensor in tensors.items():
            print(name, tensor.shape, tensor.dtype)
        weight = tensors["lm_head.weight"].read()

Opening reads headers only, and checks them in full: a file that opens has every tensor where it
says. Which module does what: `lazy` the tensors, `safetensors_header` and `torch_files` the
formats, `torch_pickle` the pickle inside a PyTorch file, and this one the choice of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from types import TracebackType

from fastvlm_mlx.errors import CheckpointError

from .finite import NonFinite, find_non_finite
from .lazy import LazyTensor, SourceFile, shown, where
from .safetensors_header import looks_like_safetensors, read_safetensors
from .strict_json import LARGEST_JSON, read_strict
from .torch_files import read_torch

__all__ = ["LazyTensor", "NonFinite", "TensorFiles", "find_non_finite", "open_tensors"]

# Files that lie beside the weights of a model and are something else: parts that a caller asks
# for by name, and what a training run leaves behind.
_NOT_MAIN = (
    "adapter_model*",
    "adapters*",
    "mm_projector*",
    "non_lora_trainables*",
    "optimizer*",
    "random_states*",
    "rng_state*",
    "scaler*",
    "scheduler*",
    "training_args*",
)
# Where weights are looked for, the first that finds any: an index, or files by pattern.
_PLACES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model.safetensors.index.json", ("model*.safetensors",)),
    ("", ("*.safetensors",)),
    ("pytorch_model.bin.index.json", ("pytorch_model*.bin",)),
    ("", ("*.bin", "*.pt", "*.pth")),
)
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.[^.]+)")


class TensorFiles(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint by name, in the order of its files.

    Holds no file open; leaving the `with` block, or `close()`, ends reading from it.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, LazyTensor] = {}
        self._sources: list[SourceFile] = []
        self.metadata: dict[str, str] = {}  # of the safetensors headers, merged
        self.ignored: dict[str, str] = {}  # what else torch files hold: name -> what it is

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(source.path for source in self._sources)

    @property
    def nbytes(self) -> int:
        """Bytes of all values in their stored types."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def close(self) -> None:
        for source in self._sources:
            source.closed = True

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TensorFiles: {len(self)} tensors in {len(self._sources)} files>"

    def _add(self, path: Path) -> None:
        """Read the header of one more file. A tensor may be in one file only."""
        source, tensors, metadata, ignored = _read_headers(path)
        for name in tensors:
            if name in self._tensors:
                other = where(self._tensors[name].file)
                raise CheckpointError(f"{where(path)}: tensor {shown(name)} is also in {other}")
        self._tensors.update(tensors)
        self._sources.append(source)
        self.metadata.update(metadata)
        self.ignored.update(ignored)


def open_tensors(path: str | Path) -> TensorFiles:
    """The tensors at `path`: a safetensors or PyTorch file, or a folder of them.

    In a folder safetensors come before PyTorch files and an index before a search. Adapters,
    projectors, `non_lora_trainables` and the leavings of training are not main weights: name such a
    file itself to read it. A file is known by its content, not by its ending.

    Raises CheckpointError where anything is missing, damaged, listed wrongly or unsafe.
    """
    path = Path(path)
    tensors = TensorFiles()
    if not path.is_dir():
        tensors._add(path)
        return tensors

    for index_name, patterns in _PLACES:
        index = path / index_name
        if index_name and (index.exists() or index.is_symlink()):
            _open_index(tensors, path, index)
            return tensors
        names = _main_files(path, patterns)
        if names:
            _require_all_shards(path, names)
            for name in names:
                tensors._add(inside(path, name))
            return tensors
    raise CheckpointError(
        f"{where(path)}: holds no weights (no .safetensors, .bin, .pt or .pth file of a model)"
    )


# Which files ----------------------------------------------------------------------------------


def _main_files(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """Names in `folder` that match, in order; hidden files and _NOT_MAIN left out."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    except OSError as error:
        raise CheckpointError(f"{where(folder)}: cannot be read ({error.strerror})") from error
    return [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in patterns)
        and not any(fnmatch(name, pattern) for pattern in _NOT_MAIN)
        and not name.startswith(".")
    ]


def _require_all_shards(folder: Path, names: list[str]) -> None:
    """`model-00001-of-00003.safetensors` promises two more, even where no index does."""
    missing = set()
    for name in names:
        shard = _SHARD.fullmatch(name)
        if shard is None or len(shard[3]) > 6:
            continue
        stem, width, last, ending = shard[1], len(shard[2]), shard[3], shard[4]
        if int(last) > 10_000:
            continue
        wanted = {f"{stem}-{n:0{width}}-of-{last}{ending}" for n in range(1, int(last) + 1)}
        missing |= wanted - set(names)
    if missing:
        shards = _listed(sorted(missing))
        raise CheckpointError(f"{where(folder)}: lacks {shards}; download it again")


def _open_index(tensors: TensorFiles, folder: Path, index: Path) -> None:
    """Open every shard that `index` lists, and hold it to what it says."""
    listed = _read_index(folder, index)
    shards = sorted(set(listed.values()))
    paths = {shard: inside(folder, shard) for shard in shards}
    missing = [shard for shard in shards if not paths[shard].exists()]
    if missing:
        raise CheckpointError(
            f"{where(index)}: lists {_listed(missing)}, not in the folder; download it again"
        )
    for shard in shards:
        tensors._add(paths[shard])
    for name, shard in listed.items():
        found = tensors.get(name)
        if found is None or found.file != paths[shard]:
            raise CheckpointError(
                f"{where(index)}: places tensor {shown(name)} in {shown(shard)}, which lacks it"
            )


def _read_index(folder: Path, index: Path) -> dict[str, str]:
    """Tensor -> shard, out of {"metadata": ..., "weight_map": {tensor: shard}}."""
    source = SourceFile.look_at(inside(folder, index.name))
    if source.size > LARGEST_JSON:
        raise CheckpointError(f"{where(index)}: is {source.size} bytes long, no index")
    with source.open() as file:
        data = file.read()
    _refuse_stand_ins(index, data[:1024])
    try:
        content = read_strict(data)
    except ValueError as error:
        raise CheckpointError(f"{where(index)}: {error}") from error
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(s, str) for s in listed.values()):
        raise CheckpointError(f"{where(index)}: has no weight_map from tensors to files")
    if not listed:
        raise CheckpointError(f"{where(index)}: lists no tensors")
    return listed


def inside(folder: Path, name: str) -> Path:
    """The path of the file `name` of a checkpoint folder, if it stays there.

    A link may lead anywhere inside the folder, and out of it in one case: the hub's cache keeps
    the content of models--OWNER--NAME/snapshots/REVISION in models--OWNER--NAME/blobs. Otherwise
    a downloaded checkpoint could have any file of this machine read as weights.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
        raise CheckpointError(f"{where(folder)}: refuses {shown(name)}, which leaves the folder")
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a ring of links, a NUL
        raise CheckpointError(f"{where(folder)}: cannot follow {shown(name)}") from error
    if not target.is_relative_to(home) and not _in_hub_cache(home, target):
        raise CheckpointError(
            f"{where(folder)}: refuses {shown(name)}, a link out of the folder; copy the file there"
        )
    return path


def _in_hub_cache(home: Path, target: Path) -> bool:
    """Whether `target` is a blob of the cached repository that the snapshot `home` belongs to."""
    for above in home.parents:
        if above.name.startswith("models--"):
            in_snapshot = home.is_relative_to(above / "snapshots")
            return in_snapshot and target.is_relative_to(above / "blobs")
    return False


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(shown(name)[1:-1] for name in names[:20]) + more


# Which format ---------------------------------------------------------------------------------


def _read_headers(
    path: Path,
) -> tuple[SourceFile, dict[str, LazyTensor], dict[str, str], dict[str, str]]:
    """(file, tensors, metadata, ignored entries) of one file of any format."""
    source = SourceFile.look_at(path)
    try:
        with source.open() as file:
            head = file.read(1024)
        _refuse_stand_ins(path, head)
        if head.startswith((b"PK\x03\x04", b"\x80")) and not looks_like_safetensors(
            head, source.size
        ):
            contents = read_torch(source)
            return source, contents.tensors, {}, contents.ignored
        if path.suffix != ".safetensors" and not looks_like_safetensors(head, source.size):
            raise CheckpointError(f"{where(path)}: is neither a safetensors nor a PyTorch file")
        tensors, metadata = read_safetensors(source)
    except OSError as error:
        raise CheckpointError(f"{where(path)}: cannot be read ({error.strerror})") from error
    except (MemoryError, RecursionError) as error:
        raise CheckpointError(f"{where(path)}: is damaged ({type(error).__name__})") from error
    return source, tensors, metadata, {}


def _refuse_stand_ins(path: Path, head: bytes) -> None:
    """Files that often lie where weights should, each with what to do about it."""
    start = head.lstrip()[:64].lower()
    if not head:
        reason = "is empty; download it again"
    elif head.startswith(b"version https://git-lfs"):
        reason = "is a Git LFS pointer, not the weights: run `git lfs pull` or download it again"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = "is a web page, not the weights: download it again"
    elif head[257:262] == b"ustar":
        reason = "is a tar archive, a PyTorch format from before 2017: save it again with torch"
    elif head.startswith(b"GGUF"):
        reason = "is a GGUF file, which is not read; use the model's safetensors"
    else:
        return
    raise CheckpointError(f"{where(path)}: {reason}")
