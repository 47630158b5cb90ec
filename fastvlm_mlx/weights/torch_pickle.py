"""The pickle inside a PyTorch checkpoint, read without running anything.

A pickle is a program for a small stack machine, and Python's own machine can import and call
whatever the program names. This is a machine of its own, not a restricted `pickle.Unpickler`: it
knows only the operations that describe data, imports nothing, and makes inert stand-ins (a list
of pairs for a dictionary, a `PickledTensor` for a tensor). A name outside a short list is refused
with its name. Operations, bytes and the size of every number are bounded, so a hostile pickle
costs a few seconds and some hundreds of MB at the worst.

Opcodes: Lib/pickletools.py. What torch writes: torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .lazy import extent, itemsize, shape_fault, shown

LARGEST_PICKLE = 64 << 20  # bytes; that of a 7B model is well below 1 MB
_MOST_OPERATIONS = 2_000_000  # that of a 7B model is below 50,000
_LARGEST_INTEGER = 32  # bytes of a LONG; torch's magic number has 10
_LONGEST_NAME = 512  # bytes of a module or attribute name
_FREE_EXPANSION = 256 << 20  # bytes a tensor may have beyond those of its storage (stride 0)

STORAGE_TYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
TORCH_TYPES = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "long": "I64",
    "int32": "I32",
    "int": "I32",
    "int16": "I16",
    "short": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "complex64": "C64",
}


class PickleFault(Exception):
    """Why a pickle is not read; fit to follow `FILE: `."""


class Pairs:
    """A pickled dictionary: its items in order. Not hashed: keys made to collide cost nothing."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[tuple[Any, Any]] = []


@dataclass(frozen=True)
class Storage:
    """Where values lie: the record `key`, from byte `begin` of it, `nbytes` long."""

    key: str
    dtype: str | None  # canonical; None = plain bytes, the tensor says what they are
    begin: int
    nbytes: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage. `offset` and `strides` count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class DType:
    """A type in place of a value, as in {"dtype": torch.float16}; and the classes of storages."""

    name: str | None


@dataclass(frozen=True)
class Inert:
    """Something recognised and of no use to us, such as a device."""

    what: str


@dataclass(frozen=True)
class _Callable:
    """One of the few things that a pickle may call, all of which are functions in this module."""

    name: str
    call: Callable[[PickleMachine, tuple[Any, ...]], Any]


class _Mark:
    """Where a variable number of operands begins on the stack."""


_MARK = _Mark()


class PickleMachine:
    """Reads consecutive pickles out of `data`, which may be a map of a file of any size.

    `position` is where the next begins. Storages seen so far are kept in `storages`: key ->
    (bytes of one element as first named, bytes in all).
    """

    def __init__(self, data: Any, position: int = 0, limit: int | None = None) -> None:
        self._data = data
        self._end = len(data) if limit is None else min(limit, len(data))
        self.position = position
        self.storages: dict[str, tuple[int, int]] = {}

    def load(self) -> Any:
        """The next pickle's value, in stand-ins. Raises PickleFault."""
        began = self.position
        self._stop_at = min(self._end, began + LARGEST_PICKLE)
        self._left = _MOST_OPERATIONS
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        try:
            while True:
                code = self._take(1)[0]
                self.charge(1)
                if code == 0x2E:  # STOP
                    if len(self._stack) != 1:
                        raise PickleFault("the pickle leaves its stack in disorder")
                    return self._pop()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise PickleFault(
                        f"refuses operation 0x{code:02x} of the pickle (byte {self.position - 1}); "
                        "only tensors are read"
                    )
                operation(self)
        except PickleFault:
            raise
        except (struct.error, UnicodeDecodeError) as error:
            raise PickleFault(f"the pickle is damaged near byte {self.position}") from error
        finally:
            self._stack, self._memo = [], {}

    def charge(self, work: int) -> None:
        """Count `work` against what one pickle may cost."""
        self._left -= work
        if self._left < 0:
            raise PickleFault(f"the pickle takes more than {_MOST_OPERATIONS} operations to read")

    # Bytes ------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        begin = self.position
        if count > self._stop_at - begin:
            if self._stop_at == self._end:
                raise PickleFault("the pickle is cut short")
            raise PickleFault(f"the pickle is longer than {LARGEST_PICKLE} bytes")
        self.position = begin + count
        return bytes(self._data[begin : begin + count])

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        last = min(self._stop_at, self.position + _LONGEST_NAME)
        end = self._data.find(b"\n", self.position, last)
        if end < 0 and last == self._end:
            raise PickleFault("the pickle is cut short")
        if end < 0:
            raise PickleFault("the pickle is damaged: a name without an end")
        line = self._take(end + 1 - self.position)[:-1]
        return line.decode("utf-8")

    # Stack ------------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise PickleFault("the pickle is damaged: it takes more than it put down")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        """What lies above the topmost mark, which goes too."""
        stack = self._stack
        for depth in range(len(stack) - 1, -1, -1):
            if stack[depth] is _MARK:
                taken = stack[depth + 1 :]
                del stack[depth:]
                return taken
        raise PickleFault("the pickle is damaged: it takes more than it put down")

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise PickleFault("the pickle is damaged: it fills something that is no container")
        return self._stack[-1]

    # Operations -------------------------------------------------------------------------------

    def _protocol(self) -> None:
        version = self._unsigned(1)
        if version > 5:
            raise PickleFault(f"the pickle has the unknown protocol {version}")

    def _frame(self) -> None:
        self._take(8)  # a hint for readers of streams

    def _drop(self) -> None:
        self._pop()

    def _drop_to_mark(self) -> None:
        self._pop_to_mark()

    def _long(self, width: int) -> None:
        count = self._unsigned(width)
        if count > _LARGEST_INTEGER:
            raise PickleFault(f"the pickle holds an integer of {count} bytes")
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _text(self, width: int) -> None:
        self._push(self._take(self._unsigned(width)).decode("utf-8"))

    def _python2_text(self, width: int) -> None:
        # Python 2 wrote its byte strings so; latin-1 keeps every byte.
        self._push(self._take(self._unsigned(width)).decode("latin-1"))

    def _bytes(self, width: int) -> None:
        self._push(self._take(self._unsigned(width)))

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def _tuple_to_mark(self) -> None:
        self._push(tuple(self._pop_to_mark()))

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _extend(self) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._top(Pairs).items.append((key, value))

    def _set_items(self) -> None:
        flat = self._pop_to_mark()
        if len(flat) % 2:
            raise PickleFault("the pickle is damaged: a key without a value")
        self._top(Pairs).items.extend(zip(flat[::2], flat[1::2], strict=True))

    def _dict_to_mark(self) -> None:
        flat = self._pop_to_mark()
        self._push(Pairs())
        self._stack.append(_MARK)
        self._stack.extend(flat)
        self._set_items()

    def _put(self, width: int) -> None:
        self._memo[self._unsigned(width)] = self._peek()

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._peek()

    def _peek(self) -> Any:
        value = self._pop()
        self._push(value)
        return value

    def _get(self, width: int) -> None:
        slot = self._unsigned(width)
        if slot not in self._memo:
            raise PickleFault("the pickle is damaged: it recalls what it never kept")
        self._push(self._memo[slot])

    def _global(self) -> None:
        module = self._line()
        self._push(_look_up(module, self._line()))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleFault("the pickle is damaged: a name that is not text")
        self._push(_look_up(module, name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Callable) or not isinstance(arguments, tuple):
            raise PickleFault("refuses to call what is no function; only tensors are read")
        self._push(function.call(self, arguments))

    def _build(self) -> None:
        # A state dict carries its `_metadata` as attributes. They are dropped: nothing is ever
        # set on anything.
        self._pop()
        self._top(Pairs)

    def _persistent_id(self) -> None:
        self._push(self._storage(self._pop()))

    def _storage(self, saved: Any) -> Storage:
        """("storage", class, key, device, count[, view]) -> where it lies."""
        if not isinstance(saved, tuple) or len(saved) not in (5, 6) or saved[0] != "storage":
            raise PickleFault("the pickle refers to something that is no storage")
        kind, key, count = saved[1], saved[2], saved[4]
        if type(key) is int:
            key = str(key)
        if not isinstance(kind, DType) or not isinstance(key, str) or not _is_count(count):
            raise PickleFault("the pickle describes a storage in an unknown way")
        width = 1 if kind.name is None else itemsize(kind.name)
        begin, nbytes = 0, count * width
        known = self.storages.setdefault(key, (width, nbytes))
        if known[1] != nbytes:
            raise PickleFault(f"storage {shown(key)} is given two sizes, {known[1]} and {nbytes}")
        view = saved[5] if len(saved) == 6 else None
        if view is not None:  # (key of the view, offset, count): a part of the storage
            if not isinstance(view, tuple) or len(view) != 3 or not all(map(_is_count, view[1:])):
                raise PickleFault("the pickle describes a storage in an unknown way")
            begin, nbytes = view[1] * width, view[2] * width
            if begin + nbytes > known[1]:
                raise PickleFault(f"a view reaches beyond the end of storage {shown(key)}")
        return Storage(key, kind.name, begin, nbytes)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


# What a pickle may call -----------------------------------------------------------------------


def _counts(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > 64 or not all(map(_is_count, value)):
        raise PickleFault(f"a tensor has a {what} that is not a short row of counts")
    return tuple(value)


def _tensor(given: tuple[Any, ...], dtype: str | None) -> PickledTensor:
    """(storage, offset, shape, strides, ...) -> a tensor, if it lies within its storage."""
    storage, offset, shape, strides = given[:4]
    if not isinstance(storage, Storage) or not isinstance(dtype, str) or not _is_count(offset):
        raise PickleFault("a tensor is described in an unknown way")
    shape, strides = _counts(shape, "shape"), _counts(strides, "stride")
    if len(shape) != len(strides):
        raise PickleFault("a tensor has a shape and strides of different length")
    fault = shape_fault(shape, dtype)
    if fault is not None:
        raise PickleFault(f"a tensor {fault}")
    tensor = PickledTensor(storage, dtype, offset, shape, strides)
    width = itemsize(dtype)
    touched = extent(shape, strides)
    if touched and (offset + touched) * width > storage.nbytes:
        raise PickleFault(f"a tensor reaches beyond the end of storage {shown(storage.key)}")
    elements = 1
    for size in shape:
        elements *= size
    if elements * width > storage.nbytes + _FREE_EXPANSION:
        raise PickleFault(
            f"a tensor {list(shape)} repeats the {storage.nbytes} bytes of its storage too often"
        )
    return tensor


def _plain_bits(metadata: Any) -> None:
    """A conjugated or negated view says so in a dictionary; torch would change the values."""
    if isinstance(metadata, Pairs) and metadata.items:
        raise PickleFault("a tensor is a conjugated or negated view, which is not read")


def _rebuild_tensor(machine: PickleMachine, given: tuple[Any, ...]) -> PickledTensor:
    if len(given) != 4:
        raise PickleFault("a tensor is described in an unknown way")
    return _tensor(given, _type_of(given[0]))


def _rebuild_tensor_v2(machine: PickleMachine, given: tuple[Any, ...]) -> PickledTensor:
    """(storage, offset, shape, strides, requires_grad, hooks[, metadata])"""
    if len(given) not in (6, 7):
        raise PickleFault("a tensor is described in an unknown way")
    _plain_bits(given[6] if len(given) == 7 else None)
    return _tensor(given, _type_of(given[0]))


def _rebuild_tensor_v3(machine: PickleMachine, given: tuple[Any, ...]) -> PickledTensor:
    """(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])"""
    if len(given) not in (7, 8) or not isinstance(given[6], DType):
        raise PickleFault("a tensor is described in an unknown way")
    _plain_bits(given[7] if len(given) == 8 else None)
    return _tensor(given, given[6].name)


def _rebuild_parameter(machine: PickleMachine, given: tuple[Any, ...]) -> PickledTensor:
    """(tensor, requires_grad, hooks)"""
    if len(given) != 3 or not isinstance(given[0], PickledTensor):
        raise PickleFault("a parameter is described in an unknown way")
    return given[0]


def _type_of(storage: Any) -> str | None:
    return storage.dtype if isinstance(storage, Storage) else None


def _ordered_dict(machine: PickleMachine, given: tuple[Any, ...]) -> Pairs:
    made = Pairs()
    if not given:
        return made
    if len(given) != 1 or not isinstance(given[0], list):
        raise PickleFault("an OrderedDict is described in an unknown way")
    machine.charge(len(given[0]))  # or one long list could be copied time and again
    for item in given[0]:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise PickleFault("an OrderedDict is described in an unknown way")
        made.items.append((item[0], item[1]))
    return made


def _size(machine: PickleMachine, given: tuple[Any, ...]) -> tuple[int, ...]:
    return _counts(given[0] if len(given) == 1 else None, "size")


def _device(machine: PickleMachine, given: tuple[Any, ...]) -> Inert:
    return Inert("device")


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Callable("OrderedDict", _ordered_dict),
    ("torch", "Size"): _Callable("Size", _size),
    ("torch", "device"): _Callable("device", _device),
    ("torch._utils", "_rebuild_tensor"): _Callable("_rebuild_tensor", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable("_rebuild_tensor_v2", _rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Callable("_rebuild_tensor_v3", _rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Callable("_rebuild_parameter", _rebuild_parameter),
    ("torch.storage", "UntypedStorage"): DType(None),
    ("torch", "UntypedStorage"): DType(None),
    **{("torch", name): DType(dtype) for name, dtype in STORAGE_TYPES.items()},
    **{("torch", name): DType(dtype) for name, dtype in TORCH_TYPES.items()},
}


def _look_up(module: str, name: str) -> Any:
    known = _KNOWN.get((module, name))
    if known is None:
        named = shown(f"{module}.{name}")[1:-1]
        raise PickleFault(f"refuses to run {named} found in the pickle; only tensors are read")
    return known


# Opcode -> what it does. Absent on purpose: the text forms of protocol 0; INST, OBJ and NEWOBJ,
# which make objects of classes; EXT, a registry of classes; out-of-band buffers.
_Operation = Callable[[PickleMachine], None]
_OPERATIONS: dict[int, _Operation] = {
    0x80: PickleMachine._protocol,
    0x95: PickleMachine._frame,
    ord("("): lambda m: m._push(_MARK),
    ord("0"): PickleMachine._drop,
    ord("1"): PickleMachine._drop_to_mark,
    ord("2"): lambda m: m._push(m._peek()),  # DUP
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("J"): lambda m: m._push(struct.unpack("<i", m._take(4))[0]),
    ord("K"): lambda m: m._push(m._unsigned(1)),
    ord("M"): lambda m: m._push(m._unsigned(2)),
    0x8A: lambda m: m._long(1),
    0x8B: lambda m: m._long(4),
    ord("G"): lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
    ord("U"): lambda m: m._python2_text(1),
    ord("T"): lambda m: m._python2_text(4),
    ord("C"): lambda m: m._bytes(1),
    ord("B"): lambda m: m._bytes(4),
    0x8E: lambda m: m._bytes(8),
    0x8C: lambda m: m._text(1),
    ord("X"): lambda m: m._text(4),
    0x8D: lambda m: m._text(8),
    ord(")"): lambda m: m._push(()),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("t"): PickleMachine._tuple_to_mark,
    ord("]"): lambda m: m._push([]),
    ord("l"): lambda m: m._push(m._pop_to_mark()),
    ord("a"): PickleMachine._append,
    ord("e"): PickleMachine._extend,
    ord("}"): lambda m: m._push(Pairs()),
    ord("d"): PickleMachine._dict_to_mark,
    ord("s"): PickleMachine._set_item,
    ord("u"): PickleMachine._set_items,
    0x8F: lambda m: m._push([]),  # EMPTY_SET; order and repeats do no harm
    0x90: PickleMachine._extend,  # ADDITEMS
    0x91: lambda m: m._push(m._pop_to_mark()),  # FROZENSET
    ord("q"): lambda m: m._put(1),
    ord("r"): lambda m: m._put(4),
    0x94: PickleMachine._memoize,
    ord("h"): lambda m: m._get(1),
    ord("j"): lambda m: m._get(4),
    ord("c"): PickleMachine._global,
    0x93: PickleMachine._stack_global,
    ord("R"): PickleMachine._reduce,
    ord("b"): PickleMachine._build,
    ord("Q"): PickleMachine._persistent_id,
}
