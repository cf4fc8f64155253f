"""What a person sees of a search, and how they end it: a bar on a terminal, and Ctrl-C for the best plan so far."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

from torch_soap import _C
from torch_soap.runtime.comm import Comm

BAR = "{desc:<20} |{bar:24}| {n_fmt}/{total_fmt} simulations{postfix} [{elapsed}]"


class SearchProgress:
    """While it is entered the first Ctrl-C is only noted, the second ends the process' work as always. With processes all ranks enter it; rank 0 searches.

    A handler that the user's program has set for SIGINT stays, and off the main thread nothing is set either: there signals are theirs.

    Attributes:
        interrupted: Ctrl-C was pressed; the search should end with the best plan so far.
    """

    def __init__(self, comm: Comm | None) -> None:
        self.comm = comm
        self.interrupted = False
        self.before: Any = None
        self.bar: Any = None

    def __enter__(self) -> SearchProgress:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self.before = signal.signal(signal.SIGINT, self.note)
        if (self.comm is None or self.comm.rank == 0) and sys.stderr.isatty():
            self.bar = tqdm(total=1, file=sys.stderr, bar_format=BAR, leave=False, desc="plan")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
        if self.bar is not None:
            self.bar.close()

    def note(self, _signal: int, _frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def __call__(self, now: _C.Progress) -> bool:
        """The search's observer. False: it should end."""
        if self.bar is not None:
            self.bar.total, self.bar.n = now.budget, min(now.simulations, now.budget)
            self.bar.set_description_str(f"plan: {now.phase}", refresh=False)
            self.bar.set_postfix_str(f"best step {now.best_ns / 1e6:.3f} ms" if now.best_ns >= 0 else "nothing fits yet", refresh=False)
            self.bar.refresh()
        return not self.interrupted

    def doing(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"plan: {what}")

    def agreed(self) -> bool:
        """Whether it was interrupted on any rank, the same answer on all. Collective with processes."""
        if self.comm is not None:
            self.interrupted = any(v[0] for v in self.comm.gather_ints([int(self.interrupted)]))
        return self.interrupted

    def say_interrupted(self, simulations: int, step_ns: int, name: str) -> None:
        """A line on stderr, of rank 0."""
        if self.comm is not None and self.comm.rank > 0:
            return
        if self.bar is not None:
            self.bar.clear()
        print(
            f"[plan] interrupted: the best plan after {simulations} simulations is taken ({name}, predicted step {step_ns / 1e6:.3f} ms)",
            file=sys.stderr,
            flush=True,
        )
