"""What a training measures of itself, at negligible cost: each step's time, and now and then one step's parts.

[Note: sampled step] Every `SAMPLE_EVERY`-th step runs its segments operator by operator, each timed by the thread's own clock, and notes when each
instruction began and ended: one step in a hundred a tenth slower. What is computed is the same, to the bit. `torch_soap.health` compares
all of it with the prediction.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import fx

from torch_soap.measuring import own_clock

SAMPLE_EVERY = 100
FIRST_SAMPLE = 3  # the step that is sampled first: those before it warm up
KEPT_STEPS, KEPT_SAMPLES = 50, 5


class TimedRun(fx.Interpreter):
    """A segment's forward, node by node; adds the time of each operator of the plan to `times`."""

    def __init__(self, module: fx.GraphModule, times: dict[int, int], clock: Callable[[], int]) -> None:
        super().__init__(module)
        self.times, self.clock = times, clock

    def run_node(self, n: fx.Node) -> Any:
        begin = self.clock()
        out = super().run_node(n)
        node = n.meta.get("soap_node", -1)
        if node >= 0:
            self.times[node] = self.times.get(node, 0) + self.clock() - begin
        return out


class Sample:
    """One step of one engine.

    Attributes:
        operators: program node -> ns of its forward.
        instructions: position -> ns, of the thread's own time where it computes, of the wall's where it moves.
    """

    def __init__(self) -> None:
        self.operators: dict[int, int] = {}
        self.instructions: dict[int, int] = {}
        self.clock = own_clock()

    def run(self, module: fx.GraphModule, *arguments: Any) -> Any:
        return TimedRun(module, self.operators, self.clock).run(*arguments)


class Meter:
    """Of one parallelized module under one plan."""

    def __init__(self) -> None:
        self.steps: deque[int] = deque(maxlen=KEPT_STEPS)  # ns of forward and backward together
        self.samples: deque[tuple[Any, Sample]] = deque(maxlen=KEPT_SAMPLES)  # with their engine
        self.count = 0

    def begin(self, engine: Any) -> int:
        """Before a forward that a backward may follow: when it began."""
        self.count += 1
        engine.sample = Sample() if self.count % SAMPLE_EVERY == FIRST_SAMPLE else None
        return time.perf_counter_ns()

    def end_backward(self, engine: Any, forward_ns: int, begin_ns: int) -> None:
        """A sampled step isn't one of `steps`, nor is the first, which warms up."""
        if engine.sample is not None:
            self.samples.append((engine, engine.sample))
            engine.sample = None
        elif self.count > 1:
            self.steps.append(forward_ns + time.perf_counter_ns() - begin_ns)
