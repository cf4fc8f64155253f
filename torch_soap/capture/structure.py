"""Nested inputs and outputs: flattened by torch's pytree, which is told of the containers that it doesn't know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree


def _mapping_flatten(x: Any) -> tuple[list[Any], Any]:
    return list(x.values()), list(x.keys())


def _register(cls: type) -> None:
    if dataclasses.is_dataclass(cls):
        torch.export.register_dataclass(cls)
        return
    pytree.register_pytree_node(
        cls,
        _mapping_flatten,
        lambda values, keys: cls(zip(keys, values, strict=True)),
        flatten_with_keys_fn=lambda x: ([(pytree.MappingKey(k), v) for k, v in x.items()], list(x.keys())),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


def register_containers(tree: Any) -> None:
    """Registers dataclasses and dict-like classes (HF's ModelOutput is both) met in `tree`."""
    if isinstance(tree, torch.Tensor | str | bytes | int | float | complex | type(None)):
        return
    cls = type(tree)
    if cls not in pytree.SUPPORTED_NODES and (dataclasses.is_dataclass(cls) or issubclass(cls, Mapping)):
        _register(cls)
    if cls in pytree.SUPPORTED_NODES or isinstance(tree, tuple):
        for leaf in pytree.tree_leaves(tree, is_leaf=lambda x: x is not tree):
            if leaf is not tree:
                register_containers(leaf)


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    register_containers(tree)
    return pytree.tree_flatten(tree)


def leaf_names(tree: Any) -> list[str]:
    """A name for each leaf: its keys joined by dots ("0", "logits", "past.1")."""
    register_containers(tree)
    paths, _ = pytree.tree_flatten_with_path(tree)
    return [".".join(_key(k) for k in path) or "0" for path, _ in paths]


def input_names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    return (leaf_names(args) if args else []) + (leaf_names(kwargs) if kwargs else [])


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
