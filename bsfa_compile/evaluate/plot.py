"""Pareto plots: what each rule gains, in tiles or in speed, against what it loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bsfa_compile.evaluate.intervals import Estimate
from bsfa_compile.evaluate.outcome import Point

# One line of a plot: (gain, KL, change of NLL) of each setting of a rule.
Line = Sequence[tuple[float, Estimate, Estimate]]


def draw(title: str, panels: Mapping[str, Mapping[str, Line]], path: Path) -> None:
    """A row of plots for each panel (name -> rule -> line): KL, logarithmic, and change of NLL."""
    figure: Any = Figure(figsize=(11, 4.3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for row, (name, lines) in zip(grid, panels.items(), strict=True):
        for axes, which, label in zip(row, (1, 2), ("KL", "change of NLL"), strict=True):
            for rule, line in lines.items():
                points = sorted(line, key=lambda point: point[0])
                _line(axes, rule, [p[0] for p in points], [p[which] for p in points])
            axes.set_xlabel(name)
            axes.set_ylabel(f"{label}, nats per token")
            axes.grid(alpha=0.3)
        row[0].set_yscale("log")
        row[1].axhline(0, color="0.6", linewidth=0.8)
        row[1].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _line(axes: Any, rule: str, x: list[float], y: Sequence[Any]) -> None:
    means = [e.mean for e in y]
    # A single document has no interval to draw.
    below = [e.mean - e.low if e.n > 1 else 0.0 for e in y]
    above = [e.high - e.mean if e.n > 1 else 0.0 for e in y]
    axes.errorbar(x, means, yerr=[below, above], marker="o", markersize=4, capsize=2, label=rule)


def pareto(title: str, points: Sequence[Point], path: Path) -> None:
    """Tiles dropped and speed against loss, a line for each length."""
    dropped: dict[str, Line] = {}
    speed: dict[str, Line] = {}
    for length in dict.fromkeys(point.length for point in points):
        mine = [point for point in points if point.length == length]
        name = f"{length} tokens"
        dropped[name] = [(p.dropped, p.losses[0].kl, p.losses[0].delta_nll) for p in mine]
        speed[name] = [
            (p.dense_seconds / p.seconds, p.losses[0].kl, p.losses[0].delta_nll) for p in mine
        ]
    draw(title, {"tiles dropped": dropped, "speed, x dense": speed}, path)
