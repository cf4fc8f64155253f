"""Import: an exported fx graph becomes a `Graph` at concrete input sizes.

The fx graph is interpreted with fake tensors of the global shapes: symbolic sizes fold to ints, regions are inlined, in-place
operators become functional ones, operators are brought into canonical form. No user code runs and nothing is exported again, so a new
batch size costs milliseconds.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from torch_soap import functional
from torch_soap.capture import canonical, compound, unfold
from torch_soap.capture.alias import Aliases, View
from torch_soap.capture.canonical import INPLACE
from torch_soap.capture.fold import FOLD_NAMESPACE
from torch_soap.capture.graph import Graph, Node, Ref, refs
from torch_soap.capture.names import clean_path, last_line, name_nodes, prune
from torch_soap.capture.observe import CannotFold
from torch_soap.capture.opaque import OPAQUE_NAMESPACE, FunctionCall, ModuleCall
from torch_soap.random_ops import RANDOM_KERNELS, is_random

SKIPPED = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size", "_guards_fn"}

# Elementwise operators that lack torch's tag (operators.md).
POINTWISE = {
    "__and__", "__or__", "__xor__", "multiply", "divide", "subtract", "floor_divide", "real", "imag", "log_sigmoid", "hardswish", "clone", "to",
    "_to_copy", "detach", "softplus", "logit", "masked_fill", "where", "true_divide", "not_equal", "greater", "less", "dropout_mask",
    "running_average", "_prelu_kernel", "rewritten",
    "zeros_like", "ones_like", "full_like", "empty_like", "isnan", "isfinite", "isinf", "clip", "square", "float_power", "nan_to_num", "celu", "selu",
    "mse_loss", "l1_loss", "kl_div", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "relu6", "mish", "hardtanh", "leaky_relu", "elu", "rrelu", "fill", "addcmul", "addcdiv", "lerp", "sigmoid", "tanh",
}  # fmt: skip
NOT_POINTWISE = {"bernoulli", "dropout", "rand_like", "randn_like", "randint_like", "native_dropout", "rrelu"}

REWRITES = canonical.REWRITES | compound.REWRITES
SCALAR_OPERATORS = {
    "add": torch.ops.aten.add.Tensor, "sub": torch.ops.aten.sub.Tensor, "mul": torch.ops.aten.mul.Tensor, "truediv": torch.ops.aten.div.Tensor,
}  # fmt: skip


# Stands in a trace for batch norm's momentum=None, which torch computes from a number that a trace can't read.
CUMULATIVE = -1.0


class CaptureError(RuntimeError):
    """The graph can't be brought into functional form; the capture falls a rung. `path`: the module to blame, None if unknown."""

    def __init__(self, reason: str, path: str | None = None) -> None:
        super().__init__(reason)
        self.path = path

    def at(self, path: str) -> None:
        self.path = path if self.path is None else self.path


def op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return name if namespace in ("aten", "prims") else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target)).rstrip("_")


class Importer:
    """Builds one Graph. Handles are FakeTensors; `ids` maps a handle to its value."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.graph = Graph()
        self.mode = mode
        self.ids: dict[int, int] = {}
        self.keep: list[Any] = []  # handles stay alive so that their id() stays theirs
        self.aliases = Aliases(self)
        self.buffer_updates: list[tuple[int, torch.Tensor]] = []  # (argument, new value) of the call at hand
        self.buffers: dict[str, torch.Tensor] = {}  # handles by name
        self.stored: dict[str, dict[str, torch.Tensor]] = {}  # of repeated modules: handles of their parameters and buffers, by path and name
        self.rows_apart = False  # opaque modules may be split on the sample dim
        self.opaques: dict[str, FunctionCall | ModuleCall] = {}  # by name of the operator that stands for it in the trace
        self.path = ""
        self.source = ""
        self.no_grad = False
        self.autocast: tuple[str, torch.dtype, bool] | None = None
        self.num_random = 0
        self.rng_index: int | None = None

    # -- values ------------------------------------------------------------------------------------------------------
    def bind(self, tensor: torch.Tensor) -> int:
        value = self.graph.add_value(tensor)
        self.ids[id(tensor)] = value
        self.keep.append(tensor)
        return value

    def ref(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            if id(item) not in self.ids:
                raise CaptureError("a tensor constant that is neither a parameter nor a buffer")
            value = self.ids[id(item)]
            return Ref(value)
        if isinstance(item, list | tuple):
            return type(item)(self.ref(i) for i in item)
        if isinstance(item, torch.SymInt):
            return int(item)
        if isinstance(item, torch.SymFloat):
            return float(item)
        return item

    def source_node(self, kind: str, name: str, tensor: torch.Tensor, qualname: str, sample_dim: int | None = None) -> None:
        value = self.bind(tensor)
        self.graph.nodes.append(Node(name=name, kind=kind, outputs=(value,), qualname=qualname, sample_dim=sample_dim))

    def return_node(self, name: str, tensor: torch.Tensor, qualname: str, target: str = "", sample_dim: int | None = None) -> None:
        r = self.ref(tensor)
        self.graph.nodes.append(Node(name=name, kind="return", target=target, args=(r,), inputs=(r.value,), qualname=qualname, sample_dim=sample_dim))

    # -- operators ---------------------------------------------------------------------------------------------------
    def context(self) -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.set_grad_enabled(not self.no_grad))
        if self.autocast is not None:
            device, dtype, enabled = self.autocast
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        return stack

    def emit(self, target: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the call on fake tensors and appends its node. Returns the result handle(s)."""
        if is_random(fn) and fn not in RANDOM_KERNELS:
            raise CaptureError(f"{self.source}: {fn} draws random numbers that each rank would draw for itself", self.path)
        with self.context(), self.mode:
            result = fn(*args, **kwargs)
        if not isinstance(result, torch.Tensor | list | tuple):
            return result
        return self.append(target, fn, args, kwargs, result)

    def append(self, target: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """The node of a call with this result."""
        results = list(result) if isinstance(result, list | tuple) else [result]
        if any(r is a for r in results for a in args):  # the operator had nothing to do
            results = [r.view_as(r) if any(r is a for a in args) else r for r in results]
        node_args, node_kwargs = self.ref(tuple(args)), {k: self.ref(v) for k, v in kwargs.items()}
        names = self.schema_arguments(fn, target, node_args, node_kwargs)
        node = Node(
            name="",
            kind="op",
            target=target,
            family=self.family(fn, target),
            fn=fn,
            args=node_args,
            kwargs=node_kwargs,
            arg_names=names,
            inputs=tuple(refs((node_args, node_kwargs))),
            outputs=tuple(self.bind(r) for r in results),
            module_path=self.path,
            source=self.source,
            no_grad=self.no_grad,
            autocast=self.autocast,
        )
        node.rng_index = self.rng_index
        self.graph.nodes.append(node)
        if not isinstance(result, list | tuple):
            return results[0]
        return type(result)(results) if type(result) in (list, tuple) else tuple(results)

    @staticmethod
    def family(fn: Any, target: str) -> str:
        if target in NOT_POINTWISE:
            return ""
        tagged = isinstance(fn, torch._ops.OpOverload) and torch.Tag.pointwise in fn.tags
        return "pointwise" if tagged or target in POINTWISE else ""

    @staticmethod
    def schema_arguments(fn: Any, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if isinstance(fn, torch._ops.OpOverload):
            out = {}
            for i, argument in enumerate(fn._schema.arguments):
                if i < len(args):
                    out[argument.name] = args[i]
                elif argument.name in kwargs:
                    out[argument.name] = kwargs[argument.name]
                elif argument.has_default_value():
                    out[argument.name] = argument.default_value
            return out
        if inspect.isfunction(fn) and target not in ("view", "permute"):
            parameters = list(inspect.signature(fn).parameters.values())
            given = dict(zip([p.name for p in parameters], args, strict=False)) | kwargs
            return {p.name: given.get(p.name, p.default) for p in parameters if p.name in given or p.default is not p.empty}
        canonical = {
            "view": ("input", "size"),
            "permute": ("input", "dims"),
            "narrow": ("input", "dim", "start", "length"),
            "expand": ("input", "size"),
            "cat": ("tensors", "dim"),
            "full": ("size", "fill_value"),
        }
        return dict(zip(canonical.get(target, [str(i) for i in range(len(args))]), args, strict=False)) | kwargs

    def call(self, fx_node: torch.fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the exported graph."""
        name = op_name(target)
        # Every random operator of the trace has a number, active or not; what it is rewritten into shares it.
        self.rng_index = None
        if is_random(target):
            self.rng_index = self.num_random
            self.num_random += 1
        if name in SKIPPED:
            return None
        tensors = [a for a in _leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if not isinstance(target, torch._ops.OpOverload):
            if not tensors or name == "getattr":
                return target(*args, **kwargs)
            return self.scalar(name, args, fx_node)
        if target.namespace == OPAQUE_NAMESPACE:
            opaque = self.opaques[target._opname]
            self.rng_index = self.num_random if opaque.random else None
            made = self.emit("opaque", opaque, *args[0])
            self.describe_opaque(opaque)
            self.num_random += opaque.num_random  # so that what follows has the numbers that counter_rng gives it
            return [made] if isinstance(made, torch.Tensor) else made
        if name == "item":
            return args[0]
        if name.startswith("sym_"):
            return target(*args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "layout") or v not in (None, False, torch.strided)}
        schema = target._schema
        mutated = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        if name == "embedding_bag":
            return self.embedding_bag(target, args, kwargs)
        if name == "batch_norm":
            return self.batch_norm(target, args, kwargs)
        if name == "instance_norm":
            self.instance_statistics(target, args, kwargs)
        if mutated:
            return self.inplace(name, target, args, kwargs, mutated)
        return self.functional(name, target, args, kwargs)

    def describe_opaque(self, call: FunctionCall | ModuleCall) -> None:
        """What the rule of the node just made needs to know."""
        names = self.graph.nodes[-1].arg_names
        names["random"] = call.random
        dims = call.sample_dims() if self.rows_apart and isinstance(call, ModuleCall) else None
        if dims is not None:
            names["sample_in"], names["sample_out"] = dims

    def scalar(self, name: str, args: tuple[Any, ...], fx_node: torch.fx.Node) -> Any:
        """Python arithmetic on numbers read from tensors (`item`): they stay tensors of no dims."""
        if name in ("sym_float", "float", "sym_int"):
            return self.emit("to", torch.ops.aten.to.dtype, args[0], torch.int64 if name == "sym_int" else torch.float64)
        fn = SCALAR_OPERATORS.get(name)
        if fn is None:
            raise CaptureError(f"{self.source or fx_node.format_node()}: {name} of a tensor isn't an ATen operator")
        if not isinstance(args[0], torch.Tensor):
            args = (self.emit("full", torch.full, [], args[0], dtype=args[1].dtype if args[1].is_floating_point() else torch.float64), args[1])
        return self.emit(name.replace("true", ""), fn, *args)

    def functional(self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rewrite = None if self.autocast is not None and name in compound.WHOLE_UNDER_AUTOCAST else REWRITES.get(name)
        if rewrite is not None and not any(isinstance(a, torch.dtype) for a in args):
            kwargs.pop("device", None)
            result = rewrite(self, *args, **kwargs)
        else:
            result = self.emit(name, target, *args, **kwargs)
        return result

    def inplace(self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mutated: list[int]) -> Any:
        if "out" in kwargs and len(mutated) == 1:
            return self.into(name, target, args, dict(kwargs))
        base = name.removesuffix("_")
        if mutated != [0] or not name.endswith("_"):
            raise CaptureError(f"{self.source}: {target} writes its arguments")
        old = args[0]
        if base in INPLACE:
            new = INPLACE[base](self, *args, **kwargs)
        else:
            packet = getattr(torch.ops.aten, base, None)
            twin = getattr(packet, target._overloadname, None) if packet is not None else None
            if twin is None:
                raise CaptureError(f"{self.source}: {target} has no functional twin")
            new = self.functional(base, twin, args, kwargs)
            if new.dtype != old.dtype:
                new = self.emit("to", torch.ops.aten.to.dtype, new, old.dtype)
        return new

    def into(self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`out=`: the overload without it, and its result written."""
        out = kwargs.pop("out")
        wanted = [(a.name, str(a.type)) for a in target._schema.arguments if a.name != "out"]
        packet = getattr(torch.ops.aten, name)
        twins = [getattr(packet, o) for o in packet.overloads()]
        twin = next((t for t in twins if [(a.name, str(a.type)) for a in t._schema.arguments] == wanted), None)
        if twin is None:
            raise CaptureError(f"{self.source}: {target} has no functional twin")
        return INPLACE["copy"](self, out, self.functional(name, twin, args, kwargs))

    def made_by(self, tensor: torch.Tensor) -> Node | None:
        value = self.ids[id(tensor)]
        return next((n for n in self.graph.nodes if value in n.outputs), None)

    def embedding_bag(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Bags of equal length (offsets from an arange, as 2-D indices give) become one operator whose bags are rows."""
        names = [a.name for a in target._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        indices, offsets = given["indices"], given["offsets"]
        made = self.made_by(offsets)
        bags = offsets.shape[0]
        plain = made is not None and made.target == "arange" and bags > 0 and indices.shape[0] % bags == 0
        length = indices.shape[0] // bags if plain else 0
        plain = plain and made is not None and self.arange_step(made) == (0, length) and given.get("padding_idx") in (None, -1)
        if not plain or given.get("include_last_offset") or given.get("scale_grad_by_freq"):
            return self.functional("embedding_bag", target, args, kwargs)
        rows = REWRITES["view"](self, indices, [bags, length])
        scales = given.get("per_sample_weights")
        scales = None if scales is None else REWRITES["view"](self, scales, [bags, length])
        y = self.emit("embedding_bag_fixed", functional.embedding_bag_fixed, given["weight"], rows, scales, given.get("mode", 0), given.get("sparse", False))
        return (y, None, None, None)

    @staticmethod
    def arange_step(node: Node) -> tuple[int, int]:
        names = node.arg_names
        return int(names.get("start", 0)), int(names.get("step", 1))

    def batch_norm(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Training: y from x alone, and the running statistics as buffer values of their own."""
        names = [a.name for a in target._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        x: Any = given[names[0]]
        weight, bias, mean, var, training, momentum, eps = (cast(Any, given.get(n)) for n in names[1:8])
        if not training:
            return self.emit("batch_norm", torch.ops.aten.batch_norm.default, x, weight, bias, mean, var, False, 0.0, eps, False)
        fn: Any = torch.ops.aten.batch_norm.default
        call: tuple[Any, ...] = (x, weight, bias, None, None, True, 0.0, eps, False)
        running = mean is not None and var is not None
        if running:
            fn, call = functional.batch_norm_and_statistics, (x, weight, bias, eps, mean.dtype)
        if self.autocast is None:  # what fake tensors take 10 ms for: y is like x
            with self.mode:
                y = torch.empty_like(x).requires_grad_(not self.no_grad and any(t is not None and t.requires_grad for t in (x, weight, bias)))
                made = (y, torch.empty_like(mean), torch.empty_like(mean)) if running else y
            made = self.append("batch_norm", fn, call, {}, made)
        else:
            made = self.emit("batch_norm", fn, *call)
        if not running:
            return made
        y, batch_mean, batch_var = made
        old, self.no_grad = self.no_grad, True
        for index, buffer, new in ((3, mean, batch_mean), (4, var, batch_var)):
            if new.dtype != buffer.dtype:
                new = self.emit("to", torch.ops.aten.to.dtype, new, buffer.dtype)
            if momentum == CUMULATIVE:
                count = self.aliases.read(self.buffers[f"{self.path}.num_batches_tracked".removeprefix(".")])
                share = self.emit("reciprocal", torch.ops.aten.reciprocal.default, self.emit("to", torch.ops.aten.to.dtype, count, buffer.dtype))
            else:
                share = momentum
            self.buffer_updates.append((index, self.emit("running_average", functional.running_average, buffer, new, share)))
        self.no_grad = old
        return y

    def instance_statistics(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The running ones of an instance norm in training, which its schema doesn't say that it writes: means over the instances."""
        given = dict(zip([a.name for a in target._schema.arguments], args, strict=False)) | kwargs
        x: Any = given["input"]
        if given["running_mean"] is None or not given["use_input_stats"]:
            return
        share = max(given["momentum"], 0.0)  # None (CUMULATIVE) is 0 here, in torch too
        old, self.no_grad = self.no_grad, True
        space = list(range(2, x.dim()))
        mean = self.emit("mean", torch.ops.aten.mean.dim, x, [0, *space])
        var = self.emit("mean", torch.ops.aten.mean.dim, self.emit("var", torch.ops.aten.var.correction, x, space, correction=1), [0])
        for index, new in ((3, mean), (4, var)):
            self.buffer_updates.append((index, self.emit("running_average", functional.running_average, args[index], new, share)))
        self.no_grad = old

    # -- graphs ------------------------------------------------------------------------------------------------------
    def run(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> list[Any]:
        """Inlines an fx graph on handles (`Aliases`); returns the handles of its outputs, flattened in order."""
        env: dict[torch.fx.Node, Any] = {}
        feed = iter(inputs)
        for fx_node in gm.graph.nodes:
            if fx_node.op == "placeholder":
                env[fx_node] = next(feed)
            elif fx_node.op == "get_attr":
                env[fx_node] = _get_attr(gm, fx_node.target)
            elif fx_node.op == "output":
                return _leaves(torch.fx.node.map_arg(fx_node.args[0], lambda n: env[n]))
            else:
                args = torch.fx.node.map_arg(fx_node.args, lambda n: env[n])
                kwargs = dict(torch.fx.node.map_arg(fx_node.kwargs, lambda n: env[n]))
                stack = fx_node.meta.get("nn_module_stack")
                if stack:
                    self.path = clean_path(list(stack.values())[-1][0])
                self.source = last_line(fx_node.meta.get("stack_trace"))
                try:
                    env[fx_node] = self.step(fx_node, args, kwargs)
                except CannotFold:
                    raise
                except CaptureError as error:
                    error.at(self.path)
                    raise
                except Exception as error:  # fake tensors raise many types for what depends on data
                    text = str(error).strip().splitlines() or [type(error).__name__]
                    raise CaptureError(f"{self.source}: {fx_node.target}: {text[0]}", self.path) from error
        return []

    def step(self, fx_node: torch.fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        """One call: handles in, handles out."""
        target = fx_node.target
        if target is operator.getitem and isinstance(args[0], list | tuple):
            return args[0][args[1]]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self.region(target, args)
        if isinstance(target, torch._ops.OpOverload) and target.namespace == FOLD_NAMESPACE:
            return self.folded(target, args)
        self.buffer_updates = []
        result = self.call(fx_node, target, self.aliases.read(args), self.aliases.read(kwargs))
        for index, value in self.buffer_updates:
            self.aliases.write(args[index], value)
        if not isinstance(target, torch._ops.OpOverload):
            return self.aliases.fresh(result)
        written = [i for i, a in enumerate(target._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        if written and not self.buffer_updates and isinstance(result, torch.Tensor):
            handle = kwargs["out"] if "out" in kwargs else args[0]
            self.aliases.write(handle, result)
            return handle
        if any(r.alias_info is not None for r in target._schema.returns):
            return self.views(target, args, kwargs, result)
        return self.aliases.fresh(result)

    def views(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], values: Any) -> Any:
        """Handles of a view's results; an operator that may also copy says by its storage what it did."""
        with self.context(), self.mode:
            made = target(*args, **kwargs)
        several = isinstance(made, list | tuple)
        handles, results = (list(made), list(values)) if several else ([made], [values])
        out = []
        for i, (handle, value) in enumerate(zip(handles, results, strict=True)):
            if handle.untyped_storage()._cdata != args[0].untyped_storage()._cdata:
                out.append(self.aliases.copied(handle, value))
                continue
            entry = View(args[0], op_name(target), target, tuple(args[1:]), kwargs, i if several else None, 0, [tuple(h.shape) for h in handles])
            out.append(self.aliases.bind_view(handle, value, entry))
        return out if several else out[0]

    def folded(self, target: Any, args: tuple[Any, ...]) -> Any:
        """The markers around a repeated module, and what stands for its copies."""
        kind = target._opname.split("_")[0]
        if kind == "enter":
            return unfold.enter(self, *args)
        if kind == "leave":
            return unfold.leave(self, *args)
        region, path, _, inputs, outer = args
        return unfold.again(self, region, path, inputs, outer)

    def region(self, target: Any, args: tuple[Any, ...]) -> list[Any]:
        """Inlines a higher-order operator that only sets a mode."""
        if target.__name__ == "wrap_with_set_grad_enabled":
            old, self.no_grad = self.no_grad, not args[0]
            out = self.run(args[1], list(args[2:]))
            self.no_grad = old
            return out
        if target.__name__ == "wrap_with_autocast":
            device, dtype, enabled, _cache, body = args[:5]
            before, self.autocast = self.autocast, (device, dtype or torch.get_autocast_dtype(device), enabled)
            out = self.run(body, list(args[5:]))
            self.autocast = before
            return out
        raise CaptureError(f"{self.source}: higher-order operator {target.__name__}")

    def finish(self) -> Graph:
        prune(self.graph)
        name_nodes(self.graph)
        return self.graph


def _get_attr(gm: torch.nn.Module, path: str) -> Any:
    for part in path.split("."):
        gm = getattr(gm, part)
    return gm


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in _leaves(item)]
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in _leaves(item)]
    return [tree]


def fake_like(mode: FakeTensorMode, shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> torch.Tensor:
    tensor = FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.get_default_device())
    return tensor.requires_grad_(requires_grad) if dtype.is_floating_point or dtype.is_complex else tensor
