"""What a module's Python code asks of torch: recorded at one call, and answered from the record at calls of its copies.

Python code sees tensors only through what torch answers. Where a copy asks the same of torch, in the same order, it gets the same answers, asks
the same next, and so would be traced to the same operators: by induction over the calls, whatever the code reads besides (attributes, hooks,
closures, globals), for it does run.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PLAIN = (bool, int, str, complex, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format)
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
PURE = {torch._assert}  # takes no tensor, but has no effect either

Slot = tuple[str, Any]


class CannotFold(RuntimeError):
    """Copies of a module aren't alike after all, or can't be told to be: the module is captured without folding."""


class Unrecordable(RuntimeError):
    """The module asks torch for something that a record can't answer: neither it nor its copies are folded."""


@dataclass
class Meta:
    """What torch knows of a tensor but for its values. `same` is equal for tensors that it treats alike; `example`: sizes and strides in numbers."""

    sizes: Any
    strides: Any
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    same: tuple[Any, ...]

    @functools.cached_property
    def example(self) -> tuple[list[int], list[int]]:
        return number(self.sizes), number(self.strides)


@dataclass
class Call:
    """One call of a torch function, tensors by their slots. `inside`: the innermost module that was running, which names the operators."""

    fn: Callable[..., Any]
    asked: Any
    answer: Any
    inside: str


@dataclass
class Record:
    """One call of a module.

    Attributes:
        metas: of each new tensor that torch gave.
        outer: tensors that were neither given to the module nor are in it.
        unrecordable: why it can't be replayed, "" if it can.
    """

    calls: list[Call] = field(default_factory=list)
    metas: list[Meta] = field(default_factory=list)
    outer: list[torch.Tensor] = field(default_factory=list)
    unrecordable: str = ""


class Tensors:
    """The slots of the tensors in one call: inputs, results and those from outside by number, parameters and buffers by name."""

    def __init__(self, inputs: Sequence[torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
        self.slots: dict[int, Slot] = {}
        self.by_slot: dict[Slot, torch.Tensor] = {}  # keeps them alive, so that their id() stays theirs
        self.outer: list[torch.Tensor] = []
        for i, tensor in enumerate(inputs):
            self.add(("input", i), tensor)
        for name, tensor in stored.items():
            self.add(("stored", name), tensor)

    def add(self, slot: Slot, tensor: torch.Tensor) -> None:
        self.slots.setdefault(id(tensor), slot)
        self.by_slot[slot] = tensor

    def slot(self, tensor: torch.Tensor) -> Slot:
        if id(tensor) not in self.slots:
            self.add(("outer", len(self.outer)), tensor)
            self.outer.append(tensor)
        return self.slots[id(tensor)]

    def encode(self, item: Any) -> Any:
        """Something that is equal exactly for equal arguments, tensors being equal by slot."""
        if isinstance(item, torch.Tensor):
            return self.slot(item)
        kind = type(item)
        if kind in (list, tuple, torch.Size):
            return (kind, *[self.encode(i) for i in item])
        if kind is dict:
            return (kind, *[(self.encode(k), self.encode(v)) for k, v in item.items()])
        return plain(item)


def plain(item: Any) -> Any:
    kind = type(item)
    if isinstance(item, SYMBOLIC):
        return (kind, item.node.expr)
    if kind is float:
        return (kind, item.hex())
    if kind is slice:
        return (kind, plain(item.start), plain(item.stop), plain(item.step))
    if kind in PLAIN or isinstance(item, torch.dtype):
        return (kind, item)
    raise Unrecordable(f"a {kind.__name__} as argument or result")


def meta_of(tensor: torch.Tensor) -> Meta:
    with torch._C.DisableTorchFunction():
        if tensor.layout != torch.strided:
            raise Unrecordable(f"a tensor with layout {tensor.layout}")
        sizes, strides, rest = tensor.shape, tensor.stride(), (tensor.dtype, tensor.device, tensor.requires_grad)
        flags = (tensor.is_conj(), tensor.is_neg(), plain(tensor.storage_offset()))
    return Meta(sizes, strides, *rest, (tuple(map(plain, sizes)), tuple(map(plain, strides)), *flags, *rest))


def number(sizes: Sequence[Any]) -> list[int]:
    """Of symbolic sizes those of the example that is traced."""
    if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes):
        raise Unrecordable("a size that depends on data")
    return [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in sizes]  # type: ignore[arg-type]


def check(fn: Callable[..., Any], tensors: bool) -> None:
    """Raises Unrecordable for functions that may have effects or a state of their own: not torch's, or without tensors."""
    if isinstance(fn, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = fn.name() if isinstance(fn, torch._ops.OpOverload) else fn._qualified_op_name
        if name.split("::")[0] not in ("aten", "prims"):
            raise Unrecordable(f"the operator {name}")
    elif isinstance(fn, types.FunctionType) and fn.__module__.split(".")[0] != "torch":
        raise Unrecordable(f"{fn.__module__}.{fn.__qualname__}, which is not torch's")
    if not tensors and fn not in PURE:
        raise Unrecordable(f"{called(fn)} without tensors")


def called(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__name__", fn))


def tensors_in(item: Any) -> Iterator[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for i in item:
            yield from tensors_in(i)
    elif isinstance(item, dict):
        yield from tensors_in(list(item.values()))


class Recorder(TorchFunctionMode):
    """Notes each call and its answer."""

    def __init__(self, record: Record, tensors: Tensors, inside: Callable[[], str]) -> None:
        super().__init__()
        self.record = record
        self.tensors = tensors
        self.inside = inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.record.unrecordable:
            return func(*args, **kwargs)
        try:
            asked = self.tensors.encode((tuple(args), kwargs))
        except Unrecordable as reason:
            self.record.unrecordable = str(reason)
            return func(*args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception:
            self.record.unrecordable = "an exception, which the module may have caught"
            raise
        try:
            check(func, any(True for _ in tensors_in((args, kwargs, result))))
            self.record.calls.append(Call(func, asked, self.answer(result), self.inside()))
        except Unrecordable as reason:
            self.record.unrecordable = str(reason)
        return result

    def answer(self, result: Any) -> Any:
        """A template of the result: ("old", slot) and ("new", number) for tensors, (type, ...) for sequences, ("is", value) for others."""
        if isinstance(result, torch.Tensor):
            known = self.tensors.slots.get(id(result))
            meta = meta_of(result)
            if known is None:
                _ = meta.example
                self.tensors.add(("result", len(self.record.metas)), result)
                self.record.metas.append(meta)
                return ("new", len(self.record.metas) - 1)
            if known[0] == "result" and self.record.metas[known[1]].same != meta.same:
                raise Unrecordable("a tensor that changes its shape")
            return ("old", known)
        kind = type(result)
        if kind in (list, tuple) or kind.__module__ == "torch.return_types":
            return (kind, *[self.answer(r) for r in result])
        for value in result if kind is torch.Size else (result,):
            plain(value)
        return ("is", result)


class StandIn(torch.Tensor):
    """A result in a replayed call. Operators that don't go through torch's functions, and so not to the replayer, are refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise CannotFold(f"{func} was called past torch's functions")


class Replayer(TorchFunctionMode):
    """Answers each call from the record, if it is the call recorded there.

    Attributes:
        different: the first difference, "" if there was none; the module may have caught what was raised.
        made: every tensor that was given as an answer.
    """

    def __init__(self, record: Record, tensors: Tensors, inside: Callable[[], str]) -> None:
        super().__init__()
        self.record = record
        self.tensors: Tensors | None = tensors
        self.inside = inside
        self.position = 0
        self.different = ""
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.tensors is None:
            raise RuntimeError("[capture] a replay that is over")
        if not self.different:
            self.different = self.difference(self.tensors, func, (tuple(args), kwargs or {}), self.inside())
        if self.different:
            raise CannotFold(self.different)
        self.position += 1
        return self.answered(self.tensors, self.record.calls[self.position - 1].answer)

    def difference(self, tensors: Tensors, func: Any, given: Any, inside: str) -> str:
        if self.position == len(self.record.calls):
            return f"one more call: {called(func)}"
        call = self.record.calls[self.position]
        try:
            asked = tensors.encode(given)
        except Unrecordable as reason:
            return str(reason)
        if func != call.fn or asked != call.asked:
            return f"call {self.position} is {called(func)}{asked}, not {called(call.fn)}{call.asked}"
        return "" if inside == call.inside else f"call {self.position} is in the module {inside!r}, not {call.inside!r}"

    def answered(self, tensors: Tensors, template: Any) -> Any:
        kind, *items = template
        if kind == "is":
            return items[0]
        if kind == "old":
            return tensors.by_slot[items[0]]
        if kind == "new":
            m = self.record.metas[items[0]]
            sizes, strides = m.example
            about = {"dtype": m.dtype, "device": m.device, "requires_grad": m.requires_grad}
            tensor: torch.Tensor = torch.Tensor._make_wrapper_subclass(StandIn, sizes, strides, **about)
            self.made.append(weakref.ref(tensor))
            tensors.add(("result", items[0]), tensor)
            return tensor
        made = [self.answered(tensors, i) for i in items]
        return made if kind is list else kind(made)
