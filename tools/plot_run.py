"""One picture of a run: loss, learning rate, balance of the router, load of every expert, throughput.

Reads RUN/metrics.jsonl, also while the run goes on, and writes RUN/plots/run.png or another file. Knows the record alone: no torch.

    python -m tools.plot_run runs/quickstart
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

from zaya.cli import Parser, replace_bytes
from zaya.metrics import Row, read_rows

BLUE, ORANGE, GREY, INK = "#2b6cb0", "#dd6b20", "#a0aec0", "#2d3748"
STYLE: dict[str, Any] = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": "#edf2f7", "axes.axisbelow": True,
    "legend.frameon": False, "figure.facecolor": "white",
}
PICTURES = (".png", ".svg", ".pdf")  # suffixes that --out may have
MAX_COLUMNS = 1000  # of the load picture: about its width in pixels; longer runs are averaged over neighbouring steps


def series(rows: list[Row], key: str) -> np.ndarray:
    """A column of the record; null (not a number, or unknown) becomes nan."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)


def smoothing_steps(values: np.ndarray) -> int:
    """Steps that a smoothed curve averages: a fortieth of the run."""
    return max(len(values) // 40, 1)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of each step and those before it, so that a curve does not change as the run goes on: of `smoothing_steps(values)`, at the
    start of as many as there are; nan counts as no observation."""
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    seen = np.concatenate([[0], np.cumsum(~np.isnan(values))])
    stop = np.arange(len(values)) + 1
    start = np.maximum(stop - smoothing_steps(values), 0)
    count = seen[stop] - seen[start]
    return np.where(count > 0, (sums[stop] - sums[start]) / np.maximum(count, 1), np.nan)


def plot_loss(ax: Axes, train: list[Row], evaluation: list[Row]) -> None:
    steps, loss = series(train, "step"), series(train, "loss")
    ax.plot(steps, loss, color=BLUE, alpha=0.3, linewidth=0.8)
    past = f", mean of the last {smoothing_steps(loss)} steps" if smoothing_steps(loss) > 1 else ""
    ax.plot(steps, smoothed(loss), color=BLUE, linewidth=1.8, label=f"training{past}")
    if evaluation:
        held_out = series(evaluation, "eval_loss")
        marker_size = 5 if len(evaluation) <= 50 else 2
        ax.plot(series(evaluation, "step"), held_out, "o-", color=ORANGE, markersize=marker_size, linewidth=1, clip_on=False,
                label=f"held out, last {held_out[-1]:.3f}")
    ax.set(title="Loss, nats per token")
    ax.legend(loc="upper right")


def plot_lr(ax: Axes, train: list[Row]) -> None:
    ax.plot(series(train, "step"), series(train, "lr"), color=BLUE, linewidth=1.8)
    ax.set(title="Learning rate", ylim=(0, None))
    ax.yaxis.set_major_formatter("{x:g}")


def plot_entropy(ax: Axes, train: list[Row]) -> None:
    steps = series(train, "step")
    ax.plot(steps, series(train, "router_entropy"), color=BLUE, linewidth=1.5, label="mean of the blocks")
    ax.plot(steps, series(train, "router_entropy_min"), color=ORANGE, linewidth=1, label="worst block")
    ax.set(title="Router entropy, H(p) / ln E (1 = even)", ylim=(0, 1.03))
    ax.legend(loc="lower right")


def plot_throughput(ax: Axes, train: list[Row]) -> None:
    speed = series(train, "tokens_per_second")
    ax.plot(series(train, "step"), speed, color=BLUE, linewidth=0.8, alpha=0.5)
    ax.set(title="Throughput, tokens per second")
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    known = speed[~np.isnan(speed)]
    if len(known):
        median = float(np.median(known))
        ax.axhline(median, color=ORANGE, linewidth=1, label=f"median {EngFormatter(places=1, sep='')(median)}")
        # Not to the fastest step: one that is much faster than nearly all is a fault of the clock.
        ax.set_ylim(0, max(1.4 * median, 1.1 * float(np.quantile(known, 0.95))) or None)
        ax.legend(loc="lower right")


def load_picture(train: list[Row]) -> np.ndarray:
    """Columns of steps (averaged down to MAX_COLUMNS), rows of block-major experts: p_e * E, so that 1 is an even share."""
    load = np.array([row["expert_load"] for row in train], dtype=float)  # steps x blocks x experts
    load = load.reshape(len(load), -1) * load.shape[2]
    return np.stack([part.mean(axis=0) for part in np.array_split(load, min(len(load), MAX_COLUMNS))], axis=1)


def plot_load(figure: Figure, ax: Axes, train: list[Row], height: float) -> None:
    blocks, experts = len(train[0]["expert_load"]), len(train[0]["expert_load"][0])
    picture = load_picture(train)
    first, last = train[0]["step"], train[-1]["step"]
    image = ax.imshow(picture, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, 3.0),
                      extent=(first - 0.5, last + 0.5, blocks * experts, 0))
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    for border in range(1, blocks):
        ax.axhline(border * experts, color="white", linewidth=2.5 if blocks <= 16 else 0.8)
    every = -(-blocks // 20)  # at most 20 names
    named = range(0, blocks, every)
    ax.yaxis.set_major_locator(FixedLocator([(block + 0.5) * experts for block in named]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticklabels([str(block) for block in named])
    ax.tick_params(axis="y", length=0)
    ax.set(title=f"Load of every expert: {blocks} blocks, one line for each of their {experts} experts", ylabel="block")
    bar = figure.colorbar(image, ax=ax, extend="max", extendfrac=0.03, pad=0.01, aspect=8 * height)
    bar.set_ticks([0, 0.5, 1, 2, 3], labels=["0 (idle)", "0.5", "1 (even)", "2", "3 x even"])
    bar.outline.set_visible(False)


def draw(title: str, train: list[Row], evaluation: list[Row]) -> Figure:
    lines = len(train[0]["expert_load"]) * len(train[0]["expert_load"][0])
    load_height = min(9.0, max(3.2, lines / 40))  # inches; 40 x 16 experts get the most
    with pyplot.style.context(STYLE):
        figure = pyplot.figure(figsize=(12, 6.4 + load_height), layout="constrained")
        rows = figure.add_gridspec(3, 1, height_ratios=[3.4, 2.4, load_height], hspace=0.06)
        upper, lower = rows[0].subgridspec(1, 1), rows[1].subgridspec(1, 3, wspace=0.05)
        loss, load = figure.add_subplot(upper[0]), figure.add_subplot(rows[2])
        plot_loss(loss, train, evaluation)
        panels: list[Callable[[Axes, list[Row]], None]] = [plot_entropy, plot_lr, plot_throughput]
        small = [figure.add_subplot(lower[column]) for column in range(3)]
        for panel, ax in zip(panels, small, strict=True):
            panel(ax, train)
        plot_load(figure, load, train, load_height)
        span = (train[0]["step"] - 0.5, train[-1]["step"] + 0.5)
        for ax in (loss, *small, load):
            ax.set_xlim(*span)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5 if ax in small else 10, integer=True))
        load.set_xlabel("step")
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    return figure


def check_rows(path: Path, train: list[Row]) -> None:
    """ValueError where there is nothing to draw, or something else than our record."""
    if not train:
        raise ValueError(f"{path} has no training step yet; nothing to draw")
    for row in train:
        missing = {"tokens", "lr", "tokens_per_second", "router_entropy", "router_entropy_min", "expert_load"} - row.keys()
        if missing:
            raise ValueError(f"{path}: the row of step {row['step']} lacks {', '.join(sorted(missing))}; it is not a record of zaya.train")
    if len({tuple(len(block) for block in row["expert_load"]) for row in train}) > 1:
        raise ValueError(f"{path}: expert_load changes its shape; the rows are of different models")


def headline(run: Path, train: list[Row], evaluation: list[Row]) -> str:
    last = train[-1]
    parts = [run.resolve().name, f"{last['step']:,} steps"]
    if last["tokens"] is not None:
        parts.append(f"{EngFormatter(places=1, sep='')(last['tokens'])} tokens")
    if evaluation and evaluation[-1]["eval_loss"] is not None:
        parts.append(f"held-out loss {evaluation[-1]['eval_loss']:.3f}")
    return "   ·   ".join(parts)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.plot_run", description="Draw a run's loss, schedule, router and throughput as one picture.")
    parser.add_argument("run", type=Path, help="the run's directory, which holds metrics.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help=f"the picture, {' or '.join(PICTURES)}, in a directory that exists (default: RUN/plots/run.png)")
    options = parser.parse_args(argv)
    out = options.out or options.run / "plots/run.png"
    try:
        parser.check_output("--out", options.out)
        if out.suffix.lower() not in PICTURES:
            raise ValueError(f"--out {out}: name a file that ends in {' or '.join(PICTURES)}")
        if not options.run.is_dir():
            raise ValueError(f"{options.run} is not a directory; name a run's, e.g. runs/quickstart")
        train, evaluation = read_rows(options.run / "metrics.jsonl")
        check_rows(options.run / "metrics.jsonl", train)
        figure = draw(headline(options.run, train, evaluation), train, evaluation)
        out.parent.mkdir(exist_ok=True)
        picture = io.BytesIO()
        figure.savefig(picture, format=out.suffix[1:].lower(), dpi=130)
        replace_bytes(out, picture.getvalue())
    except (ValueError, OSError) as error:
        return parser.refused(error, "write", out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
