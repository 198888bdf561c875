"""The outcome as one picture: what each head keeps, and the tiles of one head, rule by rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bsfa_compile.demo.outcome import Outcome, Rule
from bsfa_compile.evaluate.outcome import TileMap

COLOURS = ("#f2f2f2", "#f4c9a8", "#1f4e79")  # invisible, dropped, kept


def draw(outcome: Outcome, path: Path) -> None:
    """Write the picture as PNG."""
    rules = outcome.rules
    rows = 2 if outcome.tile_maps else 1
    figure: Any = Figure(figsize=(5.2 * len(rules), 4.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, len(rules), squeeze=False)
    for column, rule in enumerate(rules):
        image = _heads(grid[0][column], rule)
        if outcome.tile_maps:
            _tiles(grid[1][column], rule, outcome.tile_maps[rule.name])
    figure.colorbar(image, ax=list(grid[0]), label="kept fraction")
    figure.suptitle(f"{outcome.model}, {outcome.tokens} tokens")
    figure.savefig(path, dpi=110)


def _heads(axes: Any, rule: Rule) -> Any:
    """Sites x heads, coloured by kept fraction; sites with fewer heads end earlier."""
    most = max((len(heads) for heads in rule.kept.values()), default=1)
    rows = [heads + [float("nan")] * (most - len(heads)) for heads in rule.kept.values()]
    image = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    dropped, kl = 100 * rule.dropped, rule.comparison.kl
    axes.set_title(f"{rule.name}: {dropped:.0f} % of tiles dropped, KL {kl:.4f}")
    axes.set_xlabel("head")
    axes.set_ylabel("attention site")
    return image


def _tiles(axes: Any, rule: Rule, tile_map: TileMap) -> None:
    axes.imshow(
        tile_map.tiles, aspect="auto", vmin=0, vmax=2, interpolation="nearest",
        cmap=ListedColormap(COLOURS),
    )  # fmt: skip
    axes.set_title(f"{tile_map.site}, head {tile_map.head}\n{rule.name}", fontsize=9)
    axes.set_xlabel("key tile")
    axes.set_ylabel("query block")
    names = ("masked", "dropped", "kept")
    patches = [Patch(color=c, label=n) for c, n in zip(COLOURS, names, strict=True)]
    axes.legend(handles=patches, loc="upper right", fontsize=8)
