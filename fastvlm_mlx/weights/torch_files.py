"""PyTorch checkpoint files: which pickle they hold and where in the file each storage lies.

Two containers exist. Since 1.6 a checkpoint is a zip archive: `NAME/data.pkl`, a record
`NAME/data/KEY` for each storage, `NAME/byteorder`, `NAME/version`; nothing is compressed, so a
storage is a range of bytes of the file. Before, it was five pickles (magic number, protocol,
facts about the machine, the object, the storages' keys) followed by the storages, each with its
number of elements in front. See torch/serialization.py, `_load` and `_legacy_load`.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fastvlm_mlx.errors import CheckpointError

from .lazy import LazyTensor, SourceFile, itemsize, shown, where
from .torch_pickle import LARGEST_PICKLE, Inert, Pairs, PickledTensor, PickleFault, PickleMachine

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older container
_LARGEST_DIRECTORY = 16 << 20  # bytes; enough for 100,000 storages
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_DEEPEST_WRAPPING = 4
_MOST_IGNORED = 1000  # entries named in `ignored`; the state of an optimiser can have more

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7

Record = tuple[int, int]  # offset in the file, bytes


@dataclass
class TorchContents:
    """The tensors of one file, and what else its dictionary holds: name -> what it is."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


def read_torch(source: SourceFile) -> TorchContents:
    """Either container, told apart by the first bytes. Raises CheckpointError."""
    try:
        with source.open() as file:
            if file.read(4) == b"PK\x03\x04":
                value, records = _load_zip(source, file)
            else:
                value, records = _load_legacy(source, file)
        return _contents(source, value, records)
    except PickleFault as fault:
        raise CheckpointError(f"{where(source.path)}: {fault}") from fault


# The zip container ----------------------------------------------------------------------------


class _Bounded:
    """A file that refuses to read a directory of gigabytes, whatever the archive says of itself.

    Has what zipfile asks of a file, no more.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        rest = max(self._size - self._file.tell(), 0)
        count = rest if count < 0 else min(count, rest)
        if count > _LARGEST_DIRECTORY:
            raise PickleFault(f"the zip archive has a directory of {count} bytes")
        return self._file.read(count)


def _load_zip(source: SourceFile, file: BinaryIO) -> tuple[Any, dict[str, Record]]:
    """(the pickled object, key -> record)."""
    members = _members(source, file)
    roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
    roots = [root for root in roots if root.count("/") == 1]
    if len(roots) != 1:
        raise PickleFault("is a zip archive but no PyTorch checkpoint (no NAME/data.pkl in it)")
    root = roots[0]
    if root + "constants.pkl" in members:
        raise PickleFault("is a TorchScript program, not a checkpoint; save its state_dict")

    offset, nbytes = _place(source, file, members[root + "data.pkl"])
    if nbytes > LARGEST_PICKLE:
        raise PickleFault(f"the pickle is {nbytes} bytes long, more than {LARGEST_PICKLE}")
    order = members.get(root + "byteorder")
    if order is not None and _read(source, file, order, 16) == b"big":
        raise PickleFault("was saved on a big-endian machine, which is not read")
    file.seek(offset)
    machine = PickleMachine(file.read(nbytes))
    value = machine.load()

    records = {}
    for key, (_, declared) in machine.storages.items():
        member = members.get(f"{root}data/{key}")
        if member is None:
            raise PickleFault(f"lacks the record of storage {shown(key)}")
        records[key] = _place(source, file, member)
        if records[key][1] < declared:
            raise PickleFault(
                f"storage {shown(key)} takes {declared} bytes but its record has {records[key][1]}"
            )
    return value, records


def _members(source: SourceFile, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """What the archive's directory lists, checked for tricks."""
    try:
        with zipfile.ZipFile(_Bounded(file, source.size)) as archive:
            listed = archive.infolist()
    except (PickleFault, CheckpointError):
        raise
    except Exception as error:  # zipfile answers damage with a dozen kinds of exception
        raise PickleFault(f"is a damaged zip archive ({shown(error)[1:-1]})") from error
    members: dict[str, zipfile.ZipInfo] = {}
    for member in listed:
        name = member.filename
        # Nothing is ever unpacked, so such names do no harm here; an honest file has none.
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise PickleFault(f"holds a record with the unsafe name {shown(name)}")
        if name in members:
            raise PickleFault(f"holds the record {shown(name)} twice")
        members[name] = member
    if sum(member.compress_size for member in listed) > source.size:
        raise PickleFault("is a zip archive whose records are larger than the file")
    return members


def _place(source: SourceFile, file: BinaryIO, member: zipfile.ZipInfo) -> Record:
    """Where the bytes of a record lie. Checksums are not checked: that would read the whole file,
    and torch can be told to write none."""
    name = member.filename
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise PickleFault(
            f"holds the compressed record {shown(name)}; torch.save writes none: save it again"
        )
    if member.flag_bits & 0x1:
        raise PickleFault(f"holds the encrypted record {shown(name)}")
    if not 0 <= member.header_offset <= source.size - _LOCAL_HEADER.size:
        raise PickleFault(f"the record {shown(name)} lies outside the file")
    file.seek(member.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    # The extra field differs from the directory's: torch pads with it, so that storages align.
    name_length, extra_length = header[-2:]
    encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
    expected = member.orig_filename.encode(encoding)
    if header[0] != b"PK\x03\x04" or file.read(name_length) != expected:
        raise PickleFault(f"the record {shown(name)} is not where the directory says")
    offset = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if offset + member.file_size > source.size:
        raise PickleFault(f"the record {shown(name)} reaches beyond the end of the file")
    return offset, member.file_size


def _read(source: SourceFile, file: BinaryIO, member: zipfile.ZipInfo, most: int) -> bytes:
    offset, nbytes = _place(source, file, member)
    file.seek(offset)
    return file.read(min(nbytes, most))


# The older container --------------------------------------------------------------------------


def _load_legacy(source: SourceFile, file: BinaryIO) -> tuple[Any, dict[str, Record]]:
    """(the pickled object, key -> record)."""
    # Mapped, because nothing says where the pickles end and gigabytes of storages begin.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        machine = PickleMachine(data)
        if machine.load() != _MAGIC:
            raise PickleFault("is a pickle that torch.save did not write")
        if machine.load() != 1001:
            raise PickleFault("has an unknown version of the older PyTorch format")
        facts = machine.load()
        for key, value in facts.items if isinstance(facts, Pairs) else []:
            if isinstance(key, str) and key == "little_endian" and value is False:
                raise PickleFault("was saved on a big-endian machine, which is not read")
        value = machine.load()
        wanted = dict(machine.storages)
        keys = machine.load()
        if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
            raise PickleFault("lists its storages in an unknown way")

        records: dict[str, Record] = {}
        position = machine.position
        for key in map(str, keys):
            if key not in wanted or key in records:
                raise PickleFault(f"lists storage {shown(key)}, which it does not use or has twice")
            width, declared = wanted[key]
            if position + 8 > len(data):
                raise PickleFault(f"is cut before storage {shown(key)}")
            nbytes = int.from_bytes(data[position : position + 8], "little") * width
            position += 8
            if nbytes != declared:
                raise PickleFault(
                    f"storage {shown(key)} takes {declared} bytes but {nbytes} are written"
                )
            if nbytes > len(data) - position:
                raise PickleFault(f"is cut within storage {shown(key)}")
            records[key] = (position, nbytes)
            position += nbytes
    missing = [key for key in wanted if key not in records]
    if missing:
        raise PickleFault(f"lacks storage {shown(missing[0])}")
    return value, records


# From the pickled object to named tensors -----------------------------------------------------


def _contents(source: SourceFile, value: Any, records: dict[str, Record]) -> TorchContents:
    contents = TorchContents()
    pairs = _unwrap(value, contents)
    for key, item in pairs:
        if not isinstance(item, PickledTensor) or not isinstance(key, str):
            _ignore(contents, key, item)
            continue
        if key in contents.tensors:
            raise PickleFault(f"holds tensor {shown(key)} twice")
        storage = item.storage
        start = records[storage.key][0] + storage.begin + item.offset * itemsize(item.dtype)
        contents.tensors[key] = LazyTensor(key, item.shape, item.dtype, source, start, item.strides)
    if not contents.tensors:
        names = ", ".join(shown(name) for name in list(contents.ignored)[:5])
        raise PickleFault(f"holds no tensor under a name (found: {names or 'nothing'})")
    return contents


def _unwrap(value: Any, contents: TorchContents) -> list[tuple[Any, Any]]:
    """The items of the state dict: `value` itself, or what it holds under a customary name."""
    for _ in range(_DEEPEST_WRAPPING):
        if not isinstance(value, Pairs):
            raise PickleFault(f"holds {_kind(value)}, not tensors by name")
        if any(isinstance(item, PickledTensor) for _, item in value.items):
            break
        inner = {k: v for k, v in value.items if isinstance(k, str) and isinstance(v, Pairs)}
        wrapper = next((name for name in _WRAPPERS if name in inner), None)
        if wrapper is None:
            break
        for key, item in value.items:
            if item is not inner[wrapper]:
                _ignore(contents, key, item)
        value = inner[wrapper]
    return value.items if isinstance(value, Pairs) else []


def _ignore(contents: TorchContents, key: Any, item: Any) -> None:
    """Note what is passed over. By its kind alone: a few bytes can stand for a value whose text
    would fill any memory."""
    name = key if isinstance(key, str) else f"<{_kind(key)}>"
    if len(contents.ignored) < _MOST_IGNORED:
        contents.ignored[name] = _kind(item)


def _kind(value: Any) -> str:
    if isinstance(value, Pairs):
        return f"dict of {len(value.items)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, PickledTensor):
        return "tensor"
    if isinstance(value, Inert):
        return value.what
    return "None" if value is None else type(value).__name__.lower()
