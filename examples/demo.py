"""The main job on real input: AlexNet on handwritten digits and a GPT on Python's own sources, each over 2 processes.

For each model: trains on the plan that torch_soap searched, the same model under DDP in turns with it, and afterwards in one
process; prints the plan, the step times and the differences, and writes out/<model>/{plan.json,report.html,trace.json,loss.png}.

    python examples/demo.py [--models alexnet,gpt] [--steps N] [--processes 2] [--out out]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import torch_soap
from torch_soap.backend import init_string
from torch_soap.trace import Event, chrome_trace, measured_events, simulated_events

ROOT = Path(__file__).resolve().parents[1]
ROWS = 8  # of each process
WARM_UP = 2  # steps that the medians leave out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="alexnet,gpt")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--plan", default=None, help="train on this plan (path or text) instead of a searched one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.steps, options.out, options.plan)
        return 0
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    for name in options.models.split(","):
        print(f"\n=== {name} on {options.processes} processes ===", flush=True)
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}", "-m", "examples.demo"]
        arguments = ["--worker", name, "--steps", str(options.steps), "--out", str(options.out)]
        code = subprocess.run([*run, *arguments, *(["--plan", options.plan] if options.plan else [])], cwd=ROOT, env=env).returncode
        if code:
            return code
    return 0


# -- on each process ---------------------------------------------------------------------------------------------------
@dataclass
class Task:
    """A model, its loss and `batch(step)`, the global batch of a step: inputs and targets."""

    model: torch.nn.Module
    loss: Callable[..., torch.Tensor]
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    learning_rate: float


@dataclass
class Training:
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds[WARM_UP:] or self.seconds)


def make_task(name: str, rows: int) -> Task:
    import torchvision

    from examples.data import digits, enlarge, library_sources
    from examples.gpt import GPT, next_byte_loss

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if name == "alexnet":
        images, labels = digits()
        order = torch.randperm(len(labels), generator=generator)

        def images_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            index = order.roll(-rows * step)[:rows]
            return enlarge(images[index]), labels[index]

        return Task(torchvision.models.alexnet(num_classes=10), torch.nn.functional.cross_entropy, images_of, 0.01)
    if name == "gpt":
        text, context = library_sources(), 128

        def text_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            g = torch.Generator().manual_seed(step)
            begins = torch.randint(len(text) - context - 1, (rows, 1), generator=g)
            window = text[begins + torch.arange(context + 1)]
            return window[:, :-1], window[:, 1:]

        return Task(GPT(layers=4, hidden=256, context=context), next_byte_loss, text_of, 0.02)
    raise ValueError(f"[demo] no model {name}; there are alexnet, gpt")


def optimizer_of(model: torch.nn.Module, task: Task) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=task.learning_rate, momentum=0.9)


def work(name: str, steps: int, out: Path, plan_text: str | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(init_string())  # for DDP too
    rank, world = dist.get_rank(), dist.get_world_size()
    say: Callable[..., None] = print if rank == 0 else lambda *_, **__: None
    task = make_task(name, ROWS * world)
    mine = slice(ROWS * rank, ROWS * (rank + 1))
    plain = copy.deepcopy(task.model)
    under_ddp = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(task.model))

    start = time.perf_counter()
    torch.manual_seed(0)
    inputs, targets = (t[mine] for t in task.batch(0))
    model = torch_soap.parallelize(task.model, (inputs, targets), loss=task.loss, plan=plan_text)
    plan = model.plan
    say(f"captured and planned in {time.perf_counter() - start:.1f} s\n\n{plan.explain()}\n", flush=True)

    ours, ddp = Training(), Training()
    optimizer, ddp_optimizer = optimizer_of(model, task), optimizer_of(under_ddp, task)
    bar = tqdm(total=steps, desc=name, unit="step", disable=rank != 0, file=sys.stdout, ncols=100)
    for step in range(steps):
        inputs, targets = (t[mine] for t in task.batch(step))
        last = step == steps - 1
        if last:
            record(model, True)
        turns = [(ours, optimizer, lambda x=inputs, y=targets: model(x, y)), (ddp, ddp_optimizer, lambda x=inputs, y=targets: task.loss(under_ddp(x), y))]
        for training, opt, forward in turns if step % 2 == 0 else turns[::-1]:
            one_step(training, opt, forward)
        bar.set_postfix(loss=f"{ours.losses[-1]:.4f}", ms=f"{1e3 * ours.seconds[-1]:.0f}", ddp_ms=f"{1e3 * ddp.seconds[-1]:.0f}")
        bar.update()
    bar.close()
    engine = next(iter(model._soap.engines.values()))[0]
    measured = measured_events(engine, model._soap.comm)
    state = model.state_dict()
    if rank == 0:
        single, parameters = one_process(plain, task, steps, world)
        finish(name, out / name, plan, ours, ddp, single, largest_difference(state, parameters), measured, simulated_events(engine.program, plan), say)
    dist.barrier()
    dist.destroy_process_group()


def record(model: torch.nn.Module, on: bool) -> None:
    for engine, _ in model._soap.engines.values():
        engine.trace = [] if on else None


def one_step(training: Training, optimizer: torch.optim.Optimizer, forward: Callable[[], torch.Tensor]) -> None:
    """Timed from a barrier to a barrier: the slowest process counts. The loss is the mean over the processes."""
    dist.barrier()
    start = time.perf_counter()
    loss = forward()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    dist.barrier()
    training.seconds.append(time.perf_counter() - start)
    total = loss.detach().clone()
    dist.all_reduce(total)
    training.losses.append(float(total) / dist.get_world_size())


def one_process(model: torch.nn.Module, task: Task, steps: int, threads: int) -> tuple[Training, dict[str, torch.Tensor]]:
    """The same training on the whole batch, drawing random numbers as the plan does."""
    torch.set_num_threads(threads)
    training, optimizer = Training(), optimizer_of(model, task)
    with torch_soap.counter_rng(model, seed=0):
        for step in tqdm(range(steps), desc="one process", unit="step", file=sys.stdout, ncols=100):
            start = time.perf_counter()
            inputs, targets = task.batch(step)
            loss = task.loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            training.seconds.append(time.perf_counter() - start)
            training.losses.append(float(loss.detach()))
    return training, model.state_dict()


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    return max((float((a[n].double() - b[n].double()).abs().max()), n) for n in b)


def finish(
    name: str,
    out: Path,
    plan: torch_soap.Plan,
    ours: Training,
    ddp: Training,
    single: Training,
    worst: tuple[float, str],
    measured: list[Event],
    simulated: list[Event],
    say: Callable[..., None],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    plan.save(out / "plan.json")
    (out / "trace.json").write_text(chrome_trace({"simulated": simulated, "measured": measured}))
    report = ""
    if plan.context is not None:  # a plan that was given was not priced here
        _, trace = plan.report(out / "report.html", title=name, timeline=measured, step_seconds=ours.seconds[WARM_UP:])
        trace.unlink()  # trace.json is the same
        report = "report.html (open in a browser), "
    predicted_ms = plan.predicted.get("step_time_ns", 0) / 1e6
    of_loss = max(abs(a - b) for a, b in zip(ours.losses, single.losses, strict=True))
    say(f"\nstep time, median of {len(ours.seconds) - WARM_UP}: {ours.median_ms:.0f} ms measured, {predicted_ms:.0f} ms predicted (with AdamW; this is SGD)")
    say(f"DDP in the same run: {ddp.median_ms:.0f} ms ({ddp.median_ms / ours.median_ms:.2f} times ours); one process: {single.median_ms:.0f} ms")
    say(f"largest difference to one process after {len(ours.losses)} steps: loss {of_loss:.1e}, parameters {worst[0]:.1e} ({worst[1]})")
    plot(name, out / "loss.png", {"torch_soap": ours.losses, "DDP (its own random numbers)": ddp.losses, "one process": single.losses})
    say(f"wrote {out}/plan.json, {report}trace.json (open in ui.perfetto.dev), loss.png", flush=True)


def plot(title: str, path: Path, curves: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (label, values), style in zip(curves.items(), ("-", ":", "--"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
