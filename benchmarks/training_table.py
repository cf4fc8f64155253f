"""Figures, table and chart of benchmarks/training_speed.py."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PEERS = ("DDP 25 MB", "DDP 100 MB", "FSDP2", "DTensor TP")
COLUMNS = ("one process", *PEERS, "hybrid", "ours", "limit")
SAMPLES = 2000  # of the bootstrap
REACHES, ENDS = 1.03, 1.08  # an interval of a ratio that holds begins below the first and ends below the second
LIMIT_BAR = 1.15
SIX = ("alexnet b8", "alexnet b32", "vgg16", "dlrm", "lstm", "gpt")  # whose geometric mean has a bar
LOCAL_STATISTICS = ("resnet50", "inception_v3", "unet")  # batch norms: of the whole batch in ours and in one process, of each rank's rows in the peers
WHAT = (
    "`python -m benchmarks.training_speed`: {}, revision {}. Forward, backward and optimizer in ms, medians. In each round every contender does one step "
    "in turn, in the same processes (one thread each), in an order drawn for each round; a step lasts from a barrier to a barrier. A peer, or one "
    "process, that takes more than 1.5 times as long as the best peer after five rounds leaves. Ratios are of pairs within rounds: median, with the 95 % "
    "interval of the bootstrap. They hold if the interval begins below 1.03 and ends below 1.08; those that don't are bold. Both sides use the backend "
    "that the row names, and what is set for a whole process (memory that is freed stays with it) is the same for all."
)
CONTENDERS = (
    "The loss is inside for all alike: DDP, FSDP2 and DTensor wrap a module that gives the loss, ours has `loss=`. DDP has a static graph and gradients "
    "that are views of its buckets (neither with sparse gradients). Processes feed their own rows; the tensor-parallel ones gather them in the step. "
    "*Hybrid*: written by hand (benchmarks/hybrids.py). *Limit*: our plan, with what came in a recorded step in place of communication. *One process*: "
    "all cores, the whole batch. Dropout is off. *Loss*: the largest difference of the first three losses to one process', over how far these have gone, "
    "of ours, then of the worst of the others. Batch norms' statistics (ResNet, Inception, U-Net) are the whole batch's in ours, as in one process, and "
    "each rank's own in DDP and FSDP2: these train otherwise."
)
HEAD = (*COLUMNS, "best peer / ours", "ours / best peer", "ours / hybrid", "ours / limit", "loss", "rounds")


def bootstrap(ratios: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(SAMPLES))
    return medians[int(0.025 * SAMPLES)], medians[int(0.975 * SAMPLES) - 1]


def paired(row: dict[str, Any], a: str, b: str) -> dict[str, Any] | None:
    """a / b in the rounds that both ran: median, its interval, how many, and whether a is not slower beyond noise."""
    times = [row["contenders"].get(n, {}).get("ms", []) for n in (a, b)]
    ratios = [x / y for x, y in zip(*times, strict=False) if x is not None and y is not None]
    if not ratios:
        return None
    low, high = bootstrap(ratios)
    return {"median": statistics.median(ratios), "low": low, "high": high, "rounds": len(ratios), "holds": low < REACHES and high < ENDS}


def medians(row: dict[str, Any]) -> dict[str, float]:
    return {n: statistics.median(ms) for n, c in row["contenders"].items() if (ms := [t for t in c.get("ms", []) if t is not None])}


def loss_errors(row: dict[str, Any]) -> dict[str, float]:
    """The largest difference of the first steps' losses to one process', over how far these have gone: a wrong gradient shows."""
    alone = row["contenders"].get("one process", {}).get("losses", [])
    if not alone:
        return {}
    gone = max(alone) - min(alone) or 1.0
    others = {n: c["losses"] for n, c in row["contenders"].items() if n not in ("limit", "one process")}
    return {n: max(abs(a - b) for a, b in zip(losses, alone, strict=True)) / gone for n, losses in others.items()}


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Of one launch. `best`: the peer with the least median."""
    ms = medians(row)
    best = min((n for n in PEERS if n in ms), key=lambda n: ms[n])
    return {
        "ms": ms,
        "least": {n: min(t for t in c["ms"] if t is not None) for n, c in row["contenders"].items() if n in ms},
        "best": best,
        "peer": paired(row, "ours", best),
        "hybrid": paired(row, "ours", "hybrid"),
        "limit": paired(row, "ours", "limit"),
        "one process": paired(row, "ours", "one process"),
        "gain": ms[best] / ms["ours"],
        "losses": loss_errors(row),
    }


def interval(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return text if ratio["holds"] else f"**{text}**"


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in rows if "contenders" in r]


def table(rows: list[dict[str, Any]]) -> list[str]:
    done = [(r, figures(r)) for r in whole(rows)]
    machines, revisions = (sorted({r[what] for r, _ in done}) for what in ("machine", "revision"))
    lines = [
        "# Training steps against DDP, FSDP2, tensor parallel and hybrids by hand",
        "",
        WHAT.format(", ".join(machines), ", ".join(revisions)),
        "",
        CONTENDERS,
    ]
    for key in dict.fromkeys((r["network"], r["ranks"], r["backend"]) for r, _ in done):
        network, ranks, backend = key
        lines += ["", f"## {ranks} ranks, {network}, {backend}", ""]
        lines += ["| model, rows of a rank | " + " | ".join(HEAD) + " |", "|---" * (len(HEAD) + 1) + "|"]
        here = [(r, f) for r, f in done if (r["network"], r["ranks"], r["backend"]) == key]
        for r, f in here:
            ms = [f"{f['ms'][n]:.0f}" if n in f["ms"] else "-" for n in COLUMNS]
            others = [e for n, e in f["losses"].items() if n != "ours"]
            loss = f"{f['losses'].get('ours', float('nan')):.0e}, {max(others, default=float('nan')):.0e}"
            limit = f["limit"]
            cells = [f"{f['gain']:.2f}", f"{interval(f['peer'])} {f['best']}", interval(f["hybrid"]), f"{limit['median']:.2f}" if limit else "-"]
            cells += [loss, str(f["peer"]["rounds"])]
            lines.append("| " + " | ".join([f"{r['model']}, {r['rows']}", *ms, *cells]) + " |")
        lines += ["", *summary(here)]
    failed = [r for r in rows if "contenders" not in r]
    lines += [f"\n{r['model']} on {r['ranks']} ranks, {r['network']}, {r['backend']}, failed: {last_line(r['failed'])}" for r in failed]
    lines += ["", "## Plans", "", *plans(whole(rows))]
    return lines


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1]


def summary(here: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    held = sum(f["peer"]["holds"] for _, f in here)
    hybrids = [f["hybrid"] for _, f in here if f["hybrid"]]
    gains = {r["model"]: f["gain"] for r, f in here}
    limits = [f["limit"]["median"] for _, f in here if f["limit"]]
    text = f"Not slower than the best peer: {held} of {len(here)}; than the hybrid: {sum(h['holds'] for h in hybrids)} of {len(hybrids)}; "
    text += f"within {LIMIT_BAR} of the limit: {sum(x <= LIMIT_BAR for x in limits)} of {len(limits)}. "
    six = [gains[m] for m in SIX if m in gains]
    if six:
        text += f"Best peer / ours, geometric mean of {len(six)} of the six with many parameters: {statistics.geometric_mean(six):.2f}. "
    alone = [r["model"] for r, f in here if f["one process"] and f["one process"]["low"] > 1]
    if alone:
        text += f"One process is faster here: {', '.join(alone)}. "
    left = [f"{r['model']}: {name} ({why})" for r, _ in here for name, why in r["left_out"].items()]
    return [text + (f"Left out: {'; '.join(left)}." if left else "")]


def plans(rows: list[dict[str, Any]]) -> list[str]:
    out = []
    for r in rows:
        ms = medians(r)["ours"]
        lines = "; ".join(line.strip() for line in r["plan"][:12]) + ("; ..." if len(r["plan"]) > 12 else "")
        where = f"{r['model']}, {r['ranks']} ranks, {r['network']}, {r['backend']}"
        out.append(f"- {where}: {r['chosen']}, predicted {r['predicted_ms']:.0f} ms (with AdamW), run {ms:.0f} ms: `{lines}`")
    return out


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Times of each launch over the best peer's, a panel for each network, number of ranks and backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = whole(rows)
    panels = list(dict.fromkeys((r["network"], r["ranks"], r["backend"]) for r in done))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(11, 2.6 * len(panels)), squeeze=False)
    bars = {"ours": "tab:blue", "limit": "lightsteelblue", "hybrid": "tab:orange", "one process": "lightgray"}
    for ax, (network, ranks, backend) in zip(axes[:, 0], panels, strict=True):
        here = [(r, figures(r)) for r in done if (r["network"], r["ranks"], r["backend"]) == (network, ranks, backend)]
        for i, (name, color) in enumerate(bars.items()):
            at = [(x + 0.2 * (i - 1.5), f["ms"][name] / f["ms"][f["best"]]) for x, (_, f) in enumerate(here) if name in f["ms"]]
            ax.bar([x for x, _ in at], [y for _, y in at], 0.2, color=color, label=name)
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(here)), [f"{r['model']}\n{f['best']}" for r, f in here], fontsize=7)
        ax.set_title(f"{ranks} ranks, {network}, {backend}", fontsize=9)
        ax.set_ylabel("time / best peer's", fontsize=8)
        ax.set_ylim(0, 2)
    axes[0, 0].legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def write(rows: list[dict[str, Any]]) -> list[str]:
    """training_speed.{md,json,png}; the lines of the first."""
    if not whole(rows):
        return [f"{r['model']}: {last_line(r['failed'])}" for r in rows]
    RESULTS.mkdir(exist_ok=True)
    lines = table(rows)
    (RESULTS / "training_speed.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "training_speed.json").write_text(json.dumps([{**r, **({"figures": figures(r)} if "contenders" in r else {})} for r in rows]) + "\n")
    chart(rows, RESULTS / "training_speed.png")
    return lines
