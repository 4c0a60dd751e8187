"""What a pickle of `torch.save` says, worked out by a machine that cannot call anything.

Python's own unpickler calls what a pickle names, sets attributes, and allocates as much as a pickle
asks for. This one knows numbers, strings, lists, dictionaries and tensors, each an inert value, and
needs memory and time in proportion to the bytes that it reads.
The standard library decodes the opcodes (`pickletools.genops`, which runs none); calls after torch
2.13, torch/_utils.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gralora_convert.disk.specs import DTYPE_OF_TORCH, TensorFileError

RESAVE = "Save it again as safetensors: `safetensors.torch.save_file(tensors, path)`."
_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
_DTYPES: Mapping[str, str] = {
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.storage.{name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in DTYPE_OF_TORCH.items()},
    "torch.storage.UntypedStorage": "U8",
}
_WORD = 2**64
_NAMES = frozenset({
    "collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.nn.parameter.Parameter",
    "torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state", "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
})  # fmt: skip
# what torch.save writes of a DTensor (torch 2.13, _tensor.py, `_reduce_ex_internal`)
_DISTRIBUTED = frozenset({
    "torch._utils._rebuild_wrapper_subclass", "torch.distributed.tensor.DTensor",
    "torch.distributed._tensor.DTensor",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle describes it; `offset`, `shape` and `strides` are not checked."""

    dtype: str
    storage: str
    offset: object
    shape: object
    strides: object


@dataclass(frozen=True, slots=True)
class _Name:
    text: str


@dataclass(frozen=True, slots=True)
class _Dtype:
    dtype: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str


def unpickle(data: bytes, *, where: object) -> object:
    """The value that `data` describes: dictionaries, lists, tuples, numbers, strings and tensors.

    Raises:
        TensorFileError: it names anything else, or is no pickle.
    """
    return _Machine(data, where).run()


class _Machine:
    def __init__(self, data: bytes, where: object) -> None:
        self._data, self._where = data, where
        self._stack: list[object] = []
        self._below: list[list[object]] = []  # the stacks under each open mark
        self._memo: dict[object, object] = {}

    def run(self) -> object:
        import pickletools  # 4 ms, which only pickles need

        position: int | None = 0
        try:
            for opcode, argument, at in pickletools.genops(self._data):
                position = at
                operation = _OPERATIONS.get(opcode.name)
                if operation is None:
                    raise self._unsafe(f"it holds the opcode {opcode.name}")
                operation(self, argument)
            return self._pop()
        except (IndexError, KeyError, ValueError) as error:  # ValueError: of genops
            raise self._damaged(
                f"it makes no sense after byte {position} ({type(error).__name__})"
            ) from error

    def _unsafe(self, what: str) -> TensorFileError:
        message = f"is a pickle that holds more than tensors: {what}; it was not run"
        return TensorFileError(message, where=self._where, hint=RESAVE, reason="unsafe-pickle")

    def _damaged(self, what: str) -> TensorFileError:
        return TensorFileError(f"is a damaged pickle: {what}", where=self._where)

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        return self._stack.pop()

    def _above_mark(self) -> list[object]:
        values, self._stack = self._stack, self._below.pop()
        return values

    def string(self, text: str) -> None:
        text.encode()  # genops lets lone surrogates pass, which nothing can print
        self._push(text)

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def tuple_above_mark(self) -> None:
        values = tuple(self._above_mark())
        self._push(values)

    def tuple_of(self, length: int) -> None:
        values = [self._pop() for _ in range(length)]
        self._push(tuple(reversed(values)))

    def append(self, values: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise self._damaged("it appends to something that is no list")
        target.extend(values)

    def set_items(self, values: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise self._damaged("it sets items of something that is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, (str, int, float)) and key is not None:
                raise self._unsafe("a key of a dictionary is neither a string nor a number")
            if isinstance(key, int) and abs(key) >= _WORD:  # longer ones can be made to collide
                raise self._unsafe("a key of a dictionary is a number of more than 64 bits")
            if key in target:
                raise self._damaged(f"the key {str(key)[:200]!r} stands twice in one dictionary")
            target[key] = value

    def put(self, place: object) -> None:
        self._memo[place] = self._stack[-1]

    def get(self, place: object) -> None:
        self._push(self._memo[place])

    def name(self, module: object, name: object) -> None:
        text = f"{module}.{name}"
        if text in _DTYPES:
            self._push(_Dtype(_DTYPES[text]))
        elif text in _NAMES:
            self._push(_Name(text))
        elif text in _DISTRIBUTED:
            what = "of distributed tensors (DTensor): each process of a run saves its part"
            raise TensorFileError(
                f"is a pickle {what}",
                where=self._where,
                hint="In that run, save `full_tensor()` of each with safetensors.",
                reason="unsafe-pickle",
            )
        else:
            raise self._unsafe(f"it names {text}, which is no dense tensor")

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self._damaged("a name is no string")
        self.name(module, name)

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise self._unsafe("it calls something that is no function of torch.save")
        self._push(self._called(function.text, arguments))

    def build(self) -> None:
        """Attributes (`_metadata` of a state dict) are dropped."""
        self._pop()
        if not isinstance(self._stack[-1], (dict, PickledTensor)):
            raise self._unsafe("it sets attributes of something that has none")

    def persistent(self) -> None:
        match self._pop():
            case ("storage", _Dtype(dtype=dtype), str(key), _, int()):
                self._push(_Storage(dtype, key))
            case _:
                raise self._unsafe("it refers to something that is no storage")

    def _called(self, name: str, arguments: tuple[object, ...]) -> object:
        match name, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "torch.Size", (tuple(sizes),):
                return sizes
            case (
                "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor",
                (_Storage(dtype=dtype, key=key), offset, shape, strides, *rest),
            ):
                self._require_plain(rest[2:])  # after requires_grad and the backward hooks
                return PickledTensor(dtype, key, offset, shape, strides)
            case (  # an untyped storage; the dtype stands beside it (float8 and the like)
                "torch._utils._rebuild_tensor_v3",
                (_Storage(key=key), offset, shape, strides, _, _, _Dtype(dtype=dtype), *rest),
            ):
                self._require_plain(rest)
                return PickledTensor(dtype, key, offset, shape, strides)
            case (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                (PickledTensor() as tensor, *_),
            ):
                return tensor
            case (  # a tensor with attributes of its own; they are dropped
                "torch._tensor._rebuild_from_type_v2",
                (_Name(text=inner), _, tuple(of_inner), _),
            ) if inner != name:
                return self._called(inner, of_inner)
        raise self._unsafe(f"it calls {name} in a way that torch.save does not")

    def _require_plain(self, metadata: Sequence[object]) -> None:
        """Refuses the tensors whose values are not those of their storage."""
        if any(metadata):
            raise self._unsafe("a tensor is a negated or conjugated view")


_OPERATIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine._push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _Machine.string),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.tuple_above_mark(),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine._pop()]),
    "APPENDS": lambda machine, _: machine.append(machine._above_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine._pop(), machine._pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine._above_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda machine, _: machine.put(len(machine._memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent(),
}
