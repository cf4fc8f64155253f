"""Who is to blame: the module that was running when tracing failed, and modules that draw Python's random numbers."""

from __future__ import annotations

import random
import sys
import traceback
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn


def python_random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    return (random.getstate(), None if state is None else (state[1].tobytes(), state[2]))


class Watch:
    """Context in which calls of `module`'s submodules are followed.

    Attributes:
        running: paths of the modules being called, outermost first; after an exception, those that it left.
        drew: innermost modules that drew from Python's or NumPy's generator; a trace would bake what they drew.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.running: list[str] = []
        self.drew: list[str] = []
        self._states: list[list[Any]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for path, module in self.module.named_modules():
            if path and type(module).__module__.startswith("torch.nn.modules.") and not module._modules:  # torch's own code draws nothing there
                self._hooks.append(module.register_forward_pre_hook(lambda _m, _a, path=path: self.running.append(path), prepend=True))
                self._hooks.append(module.register_forward_hook(lambda _m, _a, _r: self._pop()))
                continue
            self._hooks.append(module.register_forward_pre_hook(lambda _m, _a, path=path: self._enter(path), prepend=True))
            self._hooks.append(module.register_forward_hook(lambda _m, _a, _r: self._leave()))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, path: str) -> None:
        self.running.append(path)
        self._states.append([python_random_state(), False])

    def _pop(self) -> None:
        self.running.pop()

    def _leave(self) -> None:
        path = self.running.pop()
        state, known = self._states.pop()
        if python_random_state() != state:
            if not known:
                self.drew.append(path)
            if self._states:
                self._states[-1][1] = True


def user_line(error: BaseException) -> str:
    """`file:line` of the innermost frame that is neither torch's nor ours, and what is written there."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    outside = [f for f in frames if "contextlib" not in f.filename]
    return f"{outside[-1].filename}:{outside[-1].lineno}: {outside[-1].line}" if outside else ""


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
