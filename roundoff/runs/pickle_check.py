"""Looks through a pickle that torch.save wrote, before anything is built from it.

`torch.load(weights_only=True)` runs no code, but it trusts what a pickle says of sizes: it takes the memory that
`bytearray(10**11)` asks for, copies one dict a million times over, and in some versions reads past the end of a
record. Here the pickle is gone through with stand-ins for tensors, which take no memory.
"""

import pickletools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from roundoff.errors import BadFileError, printable

MAX_PICKLE_BYTES = 2**24
"""A vocabulary of a million words fits."""

MAX_VALUES = 2**22
MAX_CONTAINERS = 100_000
MAX_DIMENSIONS = 8

MAX_SHARING = 4
"""Tensors may claim this many times what their storages hold: tied weights share one, and so may a best model."""


class _Kind(NamedTuple):
    """The class of a storage."""

    name: str
    itemsize: int


class _Storage(NamedTuple):
    record: str
    kind: _Kind
    numel: int


class _Tensor:
    """Stands for a tensor."""


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict."""


_KINDS = {"Float": 4, "Half": 2, "BFloat16": 2, "Double": 8, "Long": 8, "Int": 4, "Byte": 1, "Bool": 1}
_ORDERED_DICT, _REBUILD_TENSOR = object(), object()
_GLOBALS: dict[str, object] = {
    "collections OrderedDict": _ORDERED_DICT,
    "torch._utils _rebuild_tensor_v2": _REBUILD_TENSOR,
    **{f"torch {name}Storage": _Kind(name, itemsize) for name, itemsize in _KINDS.items()},
}


class PickleCheck:
    """The machine that a pickle is a program for, with the instructions that torch.save uses and no others.

    Args:
        records: size in bytes of each storage in the file, by its name.
    """

    def __init__(self, records: Mapping[str, int]) -> None:
        self._records = records
        self._stacks: list[list[Any]] = [[]]  # a further one for each open MARK
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, _Storage] = {}
        self._containers = 0
        self._claimed = 0

    def run(self, pickle: bytes) -> None:
        """Raise BadFileError, or whatever a senseless pickle leads to, unless it may be handed to torch.load."""
        if len(pickle) > MAX_PICKLE_BYTES:
            raise BadFileError(f"its pickle has more than {MAX_PICKLE_BYTES} bytes")
        end = 0
        for count, (opcode, argument, position) in enumerate(pickletools.genops(pickle)):
            if count > MAX_VALUES:
                raise BadFileError(f"its pickle has more than {MAX_VALUES} instructions")
            if opcode.name not in _INSTRUCTIONS:
                raise BadFileError(f"its pickle has the instruction {opcode.name}, which torch.save does not use")
            _INSTRUCTIONS[opcode.name](self, argument)
            end = position or 0
        if end + 1 != len(pickle):
            raise BadFileError("its pickle ends early")
        if self._storages.keys() != self._records.keys():
            raise BadFileError("it holds tensors that its pickle does not name")
        if self._claimed > MAX_SHARING * sum(self._records.values()):
            raise BadFileError("its tensors claim more than it holds")

    def _push(self, value: Any) -> None:
        self._stacks[-1].append(value)

    def _push_container(self, value: Any) -> None:
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            raise BadFileError(f"it holds more than {MAX_CONTAINERS} dicts, lists and tensors")
        self._push(value)

    def _pop(self) -> Any:
        return self._stacks[-1].pop()

    def _pop_marked(self) -> list[Any]:
        return self._stacks.pop()

    def _integer(self, value: int) -> None:
        if not -(2**63) <= value < 2**63:  # larger ones could all have the same hash
            raise BadFileError("it holds an integer of more than 64 bits")
        self._push(value)

    def _protocol(self, version: int) -> None:
        if version != 2:
            raise BadFileError(f"its pickle is of protocol {version}, and torch.save writes 2")

    def _global(self, name: str) -> None:
        if name not in _GLOBALS:
            raise BadFileError(f"its pickle names '{printable(name.replace(' ', '.'), 60)}', which no model needs")
        self._push(_GLOBALS[name])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stacks[-1][-1]

    def _tuple(self, length: int) -> None:
        stack = self._stacks[-1]
        if len(stack) < length:
            raise BadFileError("its pickle is broken")
        items = tuple(stack[-length:])
        del stack[-length:]
        self._push_container(items)

    def _extend(self, items: list[Any]) -> None:
        target = self._stacks[-1][-1]
        if type(target) is not list:
            raise BadFileError("its pickle appends to what is no list")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._stacks[-1][-1]
        if type(target) not in (dict, _Ordered):
            raise BadFileError("its pickle sets an item of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise BadFileError(f"it holds a dict with a key of type {type(key).__name__}; str and int are allowed")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _persistent(self) -> None:
        word, kind, record, location, numel = self._pop()
        if word != "storage" or type(kind) is not _Kind or type(location) is not str or type(numel) is not int:
            raise BadFileError("its pickle refers to what is no storage")
        storage = _Storage(record, kind, numel)
        if self._records.get(record) != numel * kind.itemsize:
            raise BadFileError(f"storage {reprlib.repr(record)} has not the size that its pickle says")
        if self._storages.setdefault(record, storage) != storage:
            raise BadFileError(f"storage {reprlib.repr(record)} has two types")
        self._push(storage)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if function is _ORDERED_DICT and arguments == ():  # with arguments it would copy them
            self._push_container(_Ordered())
        elif function is _REBUILD_TENSOR:
            self._check_tensor(*arguments)
            self._push_container(_Tensor())
        else:
            raise BadFileError("its pickle calls what torch.save does not call")

    def _check_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any) -> None:
        if type(storage) is not _Storage or type(requires_grad) is not bool or hooks != {}:
            raise BadFileError("it holds a tensor that torch.save does not write")
        if type(size) is not tuple or type(stride) is not tuple:
            raise BadFileError("it holds a tensor that torch.save does not write")
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise BadFileError(f"it holds a tensor of {len(size)} dimensions and {len(stride)} strides")
        if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
            raise BadFileError("it holds a tensor with a size that is no whole number")
        numel, last = 1, offset
        for n, step in zip(size, stride, strict=True):
            numel *= n
            last += (n - 1) * step
        # Both: a stride of 0 lets one element pass for any number of them.
        if numel and (numel > storage.numel or last >= storage.numel):
            raise BadFileError(f"it holds a tensor of {numel} elements in a storage of {storage.numel}")
        self._claimed += numel * storage.kind.itemsize

    def _build(self) -> None:
        state, target = self._pop(), self._stacks[-1][-1]
        # torch copies the state into the OrderedDict's __dict__; that of a module's state_dict has one entry.
        if type(target) is not _Ordered or type(state) is not dict or state.keys() != {"_metadata"}:
            raise BadFileError("its pickle sets attributes that torch.save does not set")


_INSTRUCTIONS: dict[str, Callable[[PickleCheck, Any], object]] = {
    "PROTO": PickleCheck._protocol,
    "STOP": lambda check, _: check._pop(),
    "GLOBAL": PickleCheck._global,
    "REDUCE": lambda check, _: check._reduce(),
    "BUILD": lambda check, _: check._build(),
    "BINPERSID": lambda check, _: check._persistent(),
    "MARK": lambda check, _: check._stacks.append([]),
    "BINPUT": PickleCheck._put,
    "LONG_BINPUT": PickleCheck._put,
    "BINGET": lambda check, index: check._push(check._memo[index]),
    "LONG_BINGET": lambda check, index: check._push(check._memo[index]),
    "EMPTY_DICT": lambda check, _: check._push_container({}),
    "EMPTY_LIST": lambda check, _: check._push_container([]),
    "EMPTY_TUPLE": lambda check, _: check._push(()),
    "TUPLE": lambda check, _: check._push_container(tuple(check._pop_marked())),
    "TUPLE1": lambda check, _: check._tuple(1),
    "TUPLE2": lambda check, _: check._tuple(2),
    "TUPLE3": lambda check, _: check._tuple(3),
    "APPEND": lambda check, _: check._extend([check._pop()]),
    "APPENDS": lambda check, _: check._extend(check._pop_marked()),
    "SETITEM": lambda check, _: check._set_item(),
    "SETITEMS": lambda check, _: check._update(check._pop_marked()),
    "NONE": lambda check, _: check._push(None),
    "NEWTRUE": lambda check, _: check._push(True),
    "NEWFALSE": lambda check, _: check._push(False),
    "BININT": PickleCheck._integer,
    "BININT1": PickleCheck._integer,
    "BININT2": PickleCheck._integer,
    "LONG1": PickleCheck._integer,
    "BINFLOAT": PickleCheck._push,
    "BINUNICODE": PickleCheck._push,
}
