"""A captured graph as the planner's OpGraph."""

from __future__ import annotations

from typing import Any

from torch_soap import _C
from torch_soap.capture.graph import Graph, Node, Ref

KINDS = {
    "op": _C.NodeKind.op,
    "param": _C.NodeKind.param,
    "buffer": _C.NodeKind.buffer,
    "const": _C.NodeKind.const,
    "feed": _C.NodeKind.feed,
    "return": _C.NodeKind.return_,
}


def attribute(value: Any) -> Any:
    """A plain value the planner can hold; other things (dtypes, memory formats) as text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        if all(isinstance(v, bool | int) for v in value):
            return [int(v) for v in value]
        if all(isinstance(v, int | float) for v in value):
            return [float(v) for v in value]
    return str(value)


def split_arguments(node: Node) -> tuple[list[str], dict[str, Any]]:
    """Schema names of the operands in the order of `node.inputs`, and the other arguments."""
    names: list[str] = []
    attrs: dict[str, Any] = {}
    for name, value in node.arg_names.items():
        if isinstance(value, Ref):
            names.append(name)
        elif isinstance(value, list | tuple) and any(isinstance(v, Ref) for v in value):
            names += [f"{name}[{i}]" for i, v in enumerate(value) if isinstance(v, Ref)]
        else:
            attrs[name] = attribute(value)
    if len(names) != len(node.inputs):  # arguments that the schema doesn't name
        names = [str(i) for i in range(len(node.inputs))]
    return names, attrs


def to_op_graph(graph: Graph) -> _C.OpGraph:
    out = _C.OpGraph()
    for value in graph.values:
        out.add_tensor(list(value.shape), str(value.dtype).removeprefix("torch."), value.dtype.itemsize, value.requires_grad)
    for index, node in enumerate(graph.nodes):
        names, attrs = split_arguments(node)
        if node.autocast is not None:  # part of what an operator is: two that differ in it aren't alike
            attrs["autocast"] = " ".join(map(str, node.autocast))
        out.add_node(
            kind=KINDS[node.kind],
            name=node.name,
            target=node.target,
            family=node.family,
            inputs=list(node.inputs),
            operand_names=names if node.kind == "op" else [],
            attrs=attrs,
            outputs=list(node.outputs),
            source=node.source,
            sample_dim=-1 if node.sample_dim is None else node.sample_dim,
            origin=index,
            no_grad=node.no_grad,
        )
    return out
