"""Repeated modules are traced once: the first of its kind as it is, its copies as one operator each, which the importer replaces by the first
one's operators with the copy's inputs, parameters and path (`unfold.py`). The export isn't shown the copies' parameters (`Folding.hidden`).

Whether a module is a copy is told by running its code: each call of torch that it makes must be the first one's (`observe.py`). What differs, or
can't be told to be alike, raises CannotFold, and the capture begins anew without folding: the graph is the same either way.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from torch_soap.capture.observe import CannotFold, Record, Recorder, Replayer, Tensors, Unrecordable, meta_of, plain
from torch_soap.capture.structure import flatten

FOLD_NAMESPACE = "torch_soap_fold"
LEAST_MODULES = 4  # in a module that is worth it


@dataclass
class Leader:
    """A call that was traced, to which others are compared.

    Attributes:
        signature: of its arguments and of the modes around it.
        outputs: slots of the tensors among the leaves of its result, values of the others.
        made: numbers of the results among the outputs, each once.
        left: the token of the end of its operators.
    """

    path: str
    signature: Any
    record: Record = field(default_factory=Record)
    outputs: list[Any] = field(default_factory=list)
    out_spec: Any = None
    made: list[int] = field(default_factory=list)
    left: torch.Tensor | None = None


class Folding:
    """Intercepts the calls of repeated modules while one trace is made.

    Attributes:
        running: paths of the modules that are being called, the innermost last.
        groups: paths of modules that may be alike, by group.
        folded: how many calls became one operator.
        failed: why the trace can't be used, "" if it can.
        hidden: paths of the copies whose parameters the export isn't shown: all of a group but its first.
        exposed: the trace can't be used because of that, or may be.
    """

    def __init__(self, root: nn.Module, running: list[str], attributes: bool = False, hides: bool = True) -> None:
        self.running = running
        self.groups = repeated(root, attributes)
        self.modules = dict(root.named_modules())
        self.folded = 0
        self.failed = ""
        self.hidden = {path for paths in self.groups for path in paths[1:]} if hides else set[str]()
        self.exposed = False
        self.inside = False
        self.leaders: dict[int, list[Leader]] = defaultdict(list)
        self.kinds: list[Leader] = []  # those that can be followed
        if self.groups:
            self.define_operators()

    def define_operators(self) -> None:
        self.library = torch.library.Library(FOLD_NAMESPACE, "FRAGMENT")

        def define(name: str, signature: str, fake: Callable[..., Any]) -> Callable[..., Any]:
            name = f"{name}_{id(self):x}"
            self.library.define(name + signature)
            torch.library.register_fake(f"{FOLD_NAMESPACE}::{name}", fake, lib=self.library)
            op: Callable[..., Any] = getattr(getattr(torch.ops, FOLD_NAMESPACE), name).default
            return op

        def token(*_: Any) -> torch.Tensor:
            return torch.empty([])

        self.enter = define("enter", "(str path, Tensor[] inputs) -> Tensor", token)
        self.leave = define("leave", "(Tensor entered, Tensor[] outputs, Tensor[] outer) -> Tensor", token)
        signature = "(Tensor left, str path, int kind, Tensor[] inputs, Tensor[] outer) -> Tensor[]"
        self.again = define("again", signature, lambda _left, _path, kind, *_: self.results(kind))

    def by_path(self, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Of each module that may be folded, what of these is in it."""
        inside = {f"{p}.{n}": path for g in self.groups for path in g for p, m in self.modules[path].named_modules(prefix=path) for n, _ in tensors_of(m)}
        out: dict[str, dict[str, torch.Tensor]] = {path: {} for group in self.groups for path in group}
        for name, tensor in tensors.items():
            if name in inside:
                out[inside[name]][name.removeprefix(inside[name])] = tensor
        return out

    def check_hidden(self, constants: Iterable[Any]) -> None:
        """Raises CannotFold where a parameter that was hidden was read, and so became a constant of the trace."""
        hidden = [t for path in self.hidden for m in self.modules[path].modules() for t in m._parameters.values() if t is not None]
        if storages(hidden) & storages([t for t in constants if isinstance(t, torch.Tensor)]):
            self.exposed = True
            raise CannotFold("parameters of a copy that are read elsewhere")

    def within(self, path: str) -> Callable[[], str]:
        """Asks which module in the one at `path` is running."""
        return lambda: self.running[-1].removeprefix(path)

    def results(self, kind: int) -> list[torch.Tensor]:
        metas = [self.kinds[kind].record.metas[n] for n in self.kinds[kind].made]
        return [torch.empty_strided(m.sizes, m.strides, dtype=m.dtype, device=m.device) for m in metas]

    @contextlib.contextmanager
    def concealed(self, called: Callable[[], bool]) -> Iterator[None]:
        """Who walks over hidden parameters finds them only while the model is called: its own code does, and the export doesn't."""
        modules = [m for path in self.hidden for m in self.modules[path].modules()]
        before = [m._parameters for m in modules]
        try:
            for module in modules:
                module.__dict__["_parameters"] = Concealed(module._parameters, called)
            yield
        finally:
            for module, own in zip(modules, before, strict=True):
                if module._parameters != own:
                    own.clear()
                    own.update(module._parameters)
                module.__dict__["_parameters"] = own

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While tracing: calls of repeated modules come here."""
        replaced = []
        try:
            for group, paths in enumerate(self.groups):
                for path in paths:
                    module = self.modules[path]
                    replaced.append((module, module.__dict__.get("forward")))
                    module.__dict__["forward"] = self.intercept(group, path, module, module.forward)
            yield
        finally:
            for module, own in replaced:
                if own is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = own

    def intercept(self, group: int, path: str, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.failed:  # somebody has caught what was raised
                raise CannotFold(self.failed)
            if self.inside:
                return original(*args, **kwargs)
            self.inside = True
            try:
                return self.call(group, path, module, lambda: original(*args, **kwargs), (args, kwargs))
            except CannotFold as error:
                self.failed = f"{path}: {error}"
                raise
            finally:
                self.inside = False

        return forward

    def call(self, group: int, path: str, module: nn.Module, run: Callable[[], Any], arguments: Any) -> Any:
        leaves, spec = flatten(arguments)
        inputs = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
        try:
            signature = (spec, [about(leaf) for leaf in leaves], modes())
        except Unrecordable:
            return self.trace(path, run)
        stored = {f"{p}.{n}": t for p, m in module.named_modules() for n, t in tensors_of(m)}
        leader = next((known for known in self.leaders[group] if known.signature == signature), None)
        if leader is None:
            leader = Leader(path, signature)
            self.leaders[group].append(leader)
            return self.trace(path, lambda: self.lead(leader, run, inputs, stored))
        if leader.left is None:
            return self.trace(path, run)
        try:
            return self.follow(leader, path, run, inputs, stored)
        except Exception as error:  # of the module's code too: in a trace it wouldn't have met a stand-in
            raise CannotFold(str(error)) from error

    def trace(self, path: str, run: Callable[[], Any]) -> Any:
        """Runs what needs the module's own tensors in the trace."""
        if path in self.hidden:
            self.exposed = True
            raise CannotFold("it isn't like the first of its kind")
        return run()

    def lead(self, leader: Leader, run: Callable[[], Any], inputs: list[torch.Tensor], stored: dict[str, torch.Tensor]) -> Any:
        """Traced as it is, between two markers."""
        tensors = Tensors(inputs, stored)
        entered = self.enter(leader.path, inputs)
        with Recorder(leader.record, tensors, self.within(leader.path)):
            result = run()
        leaves, leader.out_spec = flatten(result)
        if leader.record.unrecordable:
            return result
        try:
            leader.outputs = [tensors.slot(leaf) if isinstance(leaf, torch.Tensor) else plain(leaf) for leaf in leaves]
        except Unrecordable as reason:
            leader.record.unrecordable = str(reason)
            return result
        leader.made = sorted({slot[1] for slot in leader.outputs if slot[0] == "result"})
        made = [tensors.by_slot["result", n] for n in leader.made]
        if storages(made) & storages([*inputs, *stored.values(), *tensors.outer]):
            leader.record.unrecordable = "an output that shares memory with an input"
            return result
        leader.record.outer = tensors.outer
        leader.left = self.leave(entered, made, tensors.outer)
        self.kinds.append(leader)
        return result

    def follow(self, leader: Leader, path: str, run: Callable[[], Any], inputs: list[torch.Tensor], stored: dict[str, torch.Tensor]) -> Any:
        """Its code runs, answered from the record; in the trace it is one operator."""
        tensors = Tensors(inputs, stored)
        replayer = Replayer(leader.record, tensors, self.within(path))
        last = next(traced(), None)
        with replayer:
            result = run()
        if replayer.different or replayer.position != len(leader.record.calls):
            raise CannotFold(replayer.different or f"{replayer.position} calls, not {len(leader.record.calls)}")
        if any(isinstance(n.target, torch._ops.OpOverload) and "sym_" not in n.name for n in itertools.takewhile(lambda n: n is not last, traced())):
            raise CannotFold("operators past torch's functions")
        leaves, spec = flatten(result)
        slots = [tensors.slot(leaf) if isinstance(leaf, torch.Tensor) else plain(leaf) for leaf in leaves]
        if spec != leader.out_spec or slots != leader.outputs:
            raise CannotFold("another output")
        outer = leader.record.outer
        if len(tensors.outer) != len(outer) or any(a is not b for a, b in zip(tensors.outer, outer, strict=True)):
            raise CannotFold("other tensors from outside")
        made = self.again(leader.left, path, self.kinds.index(leader), inputs, outer)
        for n, tensor in zip(leader.made, made, strict=True):
            with torch._C.DisableTorchFunction():
                tensor.requires_grad_(leader.record.metas[n].requires_grad)
        own = {id(tensors.by_slot["result", n]): tensor for n, tensor in zip(leader.made, made, strict=True)}
        output = replaced(result, own)
        replayer.tensors = None
        del result, leaves, tensors, own
        if any(t() is not None for t in replayer.made):
            raise CannotFold("a tensor that is kept beyond the call")
        self.folded += 1
        return output


class Concealed(dict[str, Any]):
    """A module's parameters, of which `items` gives none until `called` says yes."""

    def __init__(self, own: dict[str, Any], called: Callable[[], bool]) -> None:
        super().__init__(own)
        self.called = called

    def items(self) -> Any:
        return super().items() if self.called() else {}.items()


class Attributes:
    """What a trace may change, as it was before, so that the next one sees what that one saw: the modules' attributes, what is in their lists, dicts
    and sets, and the numbers and strings among the globals beside their classes. What code keeps elsewhere isn't put back."""

    OWN = frozenset(vars(nn.Module()))

    def __init__(self, root: nn.Module) -> None:
        self.saved = [(m, dict(vars(m)), [v for n, v in vars(m).items() if n not in self.OWN and type(v) in (list, dict, set)]) for m in root.modules()]
        beside = {type(m).__module__ for m in root.modules() if type(m).__module__.split(".")[0] != "torch"}
        spaces = [vars(sys.modules[name]) for name in beside if name in sys.modules]
        self.globals = [(space, {n: v for n, v in space.items() if type(v) in (bool, int, float, str)}) for space in spaces]
        self.contents = {id(c): (c, c.copy()) for _, _, containers in self.saved for c in containers}

    def restore(self) -> None:
        for module, attributes, _ in self.saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, before in self.contents.values():
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        for space, values in self.globals:
            space.update({n: v for n, v in values.items() if space.get(n) is not v})


def repeated(root: nn.Module, attributes: bool) -> list[list[str]]:
    """Paths of modules with the same classes, plain attributes and tensors inside, tensors that nobody else has. Groups don't lie in each other:
    those come first whose folding saves most.

    Args:
        attributes: all of them, also numbers that are in the module's path: places in a list, which the code may or may not use.
    """
    modules = list(root.named_modules())
    if len(list(root.named_modules(remove_duplicate=False))) > len(modules):  # modules with several paths
        return []
    owners = Counter(id(t) for _, m in modules for _, t in tensors_of(m))
    kinds = [(excluded(m, owners), kind_of(m), list(values_of(m))) for _, m in modules]
    alike: dict[Any, list[tuple[str, dict[Any, Any]]]] = defaultdict(list)
    for first, (path, _) in enumerate(modules):
        end = first + 1  # a module's own follow it
        while end < len(modules) and modules[end][0].startswith(path + "."):
            end += 1
        if path and end - first >= LEAST_MODULES and not any(out for out, _, _ in kinds[first:end]):
            inner = [(p.removeprefix(path).removeprefix("."), kind, own) for (p, _), (_, kind, own) in zip(modules[first:end], kinds[first:end], strict=True)]
            values = {(p, n): v for p, _, own in inner for n, v in own}
            alike[tuple((p, *kind) for p, kind, _ in inner)].append((path, values))
    groups: dict[Any, list[str]] = defaultdict(list)
    for key, members in alike.items():
        ignored = set() if attributes else places(members)
        for path, values in members:
            groups[(key, tuple(sorted((n, v) for n, v in values.items() if n not in ignored)))].append(path)
    taken: list[list[str]] = []
    for _, paths in sorted(groups.items(), key=lambda item: -(len(item[1]) - 1) * len(item[0][0])):
        known = [p for group in taken for p in group]
        if len(paths) > 1 and not any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in paths for b in known):
            taken.append(paths)
    return taken


def excluded(module: nn.Module, owners: Counter[int]) -> bool:
    """Of TorchScript, with tensors that others have too, or with statistics that each call writes."""
    writes = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.training
    return writes or isinstance(module, torch.jit.ScriptModule) or any(owners[id(t)] > 1 for _, t in tensors_of(module))


def tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Its own parameters and buffers."""
    return [(n, t) for n, t in itertools.chain(module._parameters.items(), module._buffers.items()) if t is not None]


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    return (type(module), tuple((n, tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad) for n, t in tensors_of(module)))


def values_of(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Plain attributes and sequences of them, spelled out."""
    for name, value in vars(module).items():
        with contextlib.suppress(Unrecordable):
            yield name, repr([plain(v) for v in value] if isinstance(value, tuple | list) else plain(value))


def places(members: list[tuple[str, dict[Any, Any]]]) -> set[Any]:
    """Attributes that are in each member a number in its path."""
    numbers = [{repr((int, int(p))) for p in path.split(".") if p.isdigit()} for path, _ in members]
    return {n for n in members[0][1] if all(values.get(n) in own for (_, values), own in zip(members, numbers, strict=True))}


def about(leaf: Any) -> Any:
    """What two arguments have in common that may stand for each other. Other objects are told apart by what the module does with them."""
    if isinstance(leaf, torch.Tensor):
        return meta_of(leaf).same
    try:
        return plain(leaf)
    except Unrecordable:
        return type(leaf)


def modes() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def storages(tensors: list[torch.Tensor]) -> set[int]:
    with torch._C.DisableTorchFunction():
        return {t.untyped_storage()._cdata for t in tensors}


def traced() -> Iterator[torch.fx.Node]:
    """What was traced so far, the last first."""
    mode = get_proxy_mode()
    if mode is None:
        raise CannotFold("nothing is being traced")
    return iter(reversed(mode.tracer.graph.nodes))


def replaced(item: Any, by: dict[int, torch.Tensor]) -> Any:
    """The same structure with other tensors; what holds none of them is the same object."""
    if isinstance(item, torch.Tensor):
        return by.get(id(item), item)
    leaves, spec = flatten(item)
    if not any(id(leaf) in by for leaf in leaves):
        return item
    kind = type(item)
    if kind in (list, tuple):
        return kind(replaced(i, by) for i in item)
    if kind is dict:
        return {k: replaced(v, by) for k, v in item.items()}
    return torch.utils._pytree.tree_unflatten([by.get(id(leaf), leaf) for leaf in leaves], spec)
