"""A report as one HTML page: no script, no network, light and dark."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from bsfa_compile.evaluate.intervals import Estimate
from bsfa_compile.evaluate.outcome import Evaluation

if TYPE_CHECKING:
    from bsfa_compile.evaluate.outcome import TileMap
    from bsfa_compile.report import Report, SiteReport

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --soft: #59636e; --line: #d5dae0;
  --kept: #1f4e79; --dropped: #f4c9a8; --masked: #eceff2; }
@media (prefers-color-scheme: dark) { :root { --back: #14181d; --text: #e3e7eb; --soft: #9aa4af;
  --line: #39424c; --kept: #79b4ee; --dropped: #7a4a2a; --masked: #20262d; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.2; } p, figcaption { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { display: inline-block; margin: 0 1.5rem 1rem 0; vertical-align: top; }
svg { display: block; max-width: 100%; } svg text { fill: var(--soft); font: 10px sans-serif; }
.kept { fill: var(--kept); } .dropped { fill: var(--dropped); } .masked { fill: var(--masked); }
.key { display: inline-block; width: .8em; height: .8em; border: 1px solid var(--line); }
"""


def render(report: Report) -> str:
    """The page. Everything in it is text or inline SVG; the data stand at its end as JSON."""
    parts = [_summary(report), _heat_map(report.sites), _sites(report.sites)]
    if report.tile_maps:
        parts.append(_tile_maps(report.tile_maps))
    if report.evaluation is not None:
        parts.append(_evaluation(report.evaluation))
    title = "Block-sparse attention"
    if report.evaluation is not None:
        title += f": {report.evaluation.model}"
    # "<" never occurs raw, so that no text of the data can end the element.
    data = report.to_json().replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + f'\n<script type="application/json" id="report">{data}</script></body></html>\n'
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are words and whose others are figures."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ["" if n < texts else ' class="n"' for n in range(len(row))]
        return "".join(
            f"<{tag}{k}>{escape(cell)}</{tag}>" for k, cell in zip(kinds, row, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", header)}</tr>\n{body}</table></div>'


def _summary(report: Report) -> str:
    sparse = sum(site.rewritten for site in report.sites)
    rows = [("attention sites", f"{sparse} of {len(report.sites)} block-sparse")]
    if report.target:
        rows.append(("thresholds for", report.target))
        rows.append(("gate", f"{report.gate}, precision {report.precision}"))
    if report.expected_skipped is not None and report.expected_lost is not None:
        told = f"{_percent(report.expected_skipped)} of tiles skipped, "
        rows.append(("calibration data", told + f"{report.expected_lost:.2%} softmax mass lost"))
    if report.skipped is not None:
        rows.append(("skipped so far", f"{_percent(report.skipped)} of tiles, mean over sites"))
    if report.idle is not None:
        rows.append(("why", report.idle))
    if report.proof is not None:
        rows.append(("held-out data", str(report.proof)))
    if report.calls:
        rows.append(("attention calls", ", ".join(f"{n} {k}" for k, n in report.calls.items())))
    if report.lengths or report.longest:
        rows.append(("lengths", report.told_lengths))
    return _table(("what", "found"), rows, texts=2)


def _heat_map(sites: Sequence[SiteReport]) -> str:
    """Kept fraction of every head: a row of squares for each site."""
    shown = [site for site in sites if site.heads]
    if not shown:
        return "<p>No attention has run sparse yet: run the model, then make the report again.</p>"
    size, left = 16, 7 * max(len(site.name) for site in shown) + 8
    most = max(len(site.heads) for site in shown)
    rows = []
    for y, site in enumerate(shown):
        rows.append(f'<text x="0" y="{y * size + 11}">{escape(site.name)}</text>')
        for x, skipped in enumerate(site.heads):
            at = f'x="{left + x * size}" y="{y * size}" width="{size - 1}" height="{size - 1}"'
            rows.append(
                f'<rect class="masked" {at}/><rect class="kept" fill-opacity="{1 - skipped:.3f}" '
                f"{at}><title>{escape(site.name)}, head {x}: {_percent(1 - skipped)} kept</title>"
                "</rect>"
            )
    picture = _svg(left + most * size, len(shown) * size, "".join(rows))
    return (
        "<h2>Kept tiles by site and head</h2>\n<p>The fuller a square, the more of the candidate "
        "tiles (visible, not always kept) the head kept in the runs so far; point at one for its "
        f'figure.</p>\n<div class="wide">{picture}</div>'
    )


def _svg(width: int, height: int, content: str, scale: float = 1) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width * scale:.0f}" '
        f'height="{height * scale:.0f}" role="img">{content}</svg>'
    )


def _sites(sites: Sequence[SiteReport]) -> str:
    rows = [
        (s.name, "sparse" if s.rewritten else "dense", s.reason or "", _percent(s.skipped))
        for s in sites
    ]
    return "<h2>Sites</h2>\n" + _table(("site", "attention", "why dense", "skipped"), rows, texts=3)


def _tile_maps(maps: Sequence[TileMap]) -> str:
    keys = ", ".join(
        f'<span class="key"><svg viewBox="0 0 1 1"><rect class="{name}" width="1" height="1"/>'
        f"</svg></span> {name}"
        for name in _STATES
    )
    figures = "".join(
        f"<figure>{_tiles(one.tiles)}<figcaption>{escape(one.site)}, head {one.head}</figcaption>"
        "</figure>"
        for one in maps
    )
    return (
        f"<h2>Tiles of some heads</h2>\n<p>{keys}. Rows are query blocks, columns key tiles."
        f"</p>\n{figures}"
    )


_STATES = ("masked", "dropped", "kept")


def _tiles(tiles: Sequence[Sequence[int]]) -> str:
    """One path for each state; equal neighbours in a row are one rectangle."""
    paths = ["", "", ""]
    for y, row in enumerate(tiles):
        x = 0
        for state, run in itertools.groupby(row):
            width = len(list(run))
            paths[state] += f"M{x} {2 * y}h{width}v2h-{width}z"  # a tile is twice as high as wide
            x += width
    drawn = "".join(
        f'<path class="{name}" d="{path}" shape-rendering="crispEdges"/>'
        for name, path in zip(_STATES, paths, strict=True)
    )
    width = max(len(row) for row in tiles)
    return _svg(width, 2 * len(tiles), drawn, scale=280 / width)


def _interval(value: Estimate, spec: str) -> str:
    if not math.isfinite(value.low):
        return f"{value.mean:{spec}}"
    return f"{value.mean:{spec}} [{value.low:{spec}}, {value.high:{spec}}]"


def _evaluation(e: Evaluation) -> str:
    """Loss on held-out documents, tasks, seconds."""
    losses, scores, seconds = [], [], []
    for point in e.points:
        where = (point.rule, f"{point.length}")
        for loss in point.losses:
            losses.append((
                *where, f"{loss.genre} ({loss.kl.n})", _percent(point.dropped),
                f"{loss.dense_nll:.3f}", _interval(loss.delta_nll, "+.4f"),
                _interval(loss.kl, ".2g"), _percent(loss.agreement),
            ))  # fmt: skip
        for score in point.scores:
            scores.append((*where, score.task, *(
                _interval(value, spec) for value, spec in
                ((score.dense, ".2f"), (score.sparse, ".2f"), (score.change, "+.2f"))
            )))  # fmt: skip
        ratio = point.dense_seconds / point.seconds
        seconds.append(
            (*where, f"{point.dense_seconds:.3g}", f"{point.seconds:.3g}", f"{ratio:.2f}")
        )
    header = ("rule", "tokens", "documents", "dropped", "dense NLL", "change", "KL", "same token")
    parts = ["<h2>Quality on held-out data</h2>", _table(header, losses, texts=3)]
    if scores:
        names = ("rule", "tokens", "task", "dense", "sparse", "change")
        parts += [f"<p>{e.samples} prompts of each task.</p>", _table(names, scores, texts=3)]
    moved = [point for point in e.points if point.layer_errors]
    if moved:
        columns = ["layer", *(f"{point.rule}, {point.length} tokens" for point in moved)]
        errors = [
            (site, *(f"{point.layer_errors.get(site, math.nan):.3f}" for point in moved))
            for site in moved[0].layer_errors
        ]
        parts += [
            "<p>How far the output of each attention layer moves: |sparse - dense| / |dense|, the "
            "layers before it sparse too.</p>",
            _table(columns, errors),
        ]
    told = json.dumps(e.versions, ensure_ascii=False).strip("{}").replace('"', "")
    parts += [
        f"<p>{escape(e.intervals)}.</p>",
        f"<h2>Seconds of a forward pass</h2>\n<p>{escape(e.device)}; {escape(told)}. The dense "
        f"model ran eagerly, the sparse one's graphs by {escape(e.inner)}.</p>",
        _table(("rule", "tokens", "dense", "sparse", "x dense"), seconds, texts=2),
    ]
    return "\n".join(parts)
