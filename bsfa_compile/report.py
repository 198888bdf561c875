"""report(model): every attention site, sparse or dense and why, and how much it skipped."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from bsfa_compile.calibrate.quality import Proof
from bsfa_compile.errors import InputError
from bsfa_compile.evaluate.outcome import Evaluation, TileMap, finite
from bsfa_compile.html import render
from bsfa_compile.ops import library
from bsfa_compile.passes.sites import find, owner
from bsfa_compile.state import Seen, State, site_name, state_of
from bsfa_compile.traced import name_of

UNCALLED = "the calibration data never called it"


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """One attention site.

    rewritten: whether it is block-sparse (until its graph is compiled: whether it will be).
    reason: why it is dense; for a rewritten site, why it is dense in some other graph (decoding,
    most often), None if it is nowhere. skipped: fraction of all candidate tiles skipped in the
    runs so far, candidates being the visible tiles that are not always kept; None before any run.
    heads: the same for every head; empty before any run.
    """

    name: str
    rewritten: bool
    reason: str | None
    skipped: float | None
    heads: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model: `str()` is a table, `to_json()` the same as data.

    target, gate, precision: what the thresholds were made for. expected_skipped, expected_lost:
    fraction of tiles and of softmax mass, as solved on the calibration data; None if unknown.
    proof: what a Quality target came to on held-out inputs, and whether it holds. calls: attention
    calls so far: "sparse", "decode" (dense by design), "dense" for another reason, and "eager":
    dense because their module ran outside the compiled graphs. longest: tokens of the longest input
    that ran sparse, 0 if none; lengths: those calibrated on, ascending; reach: the longest that the
    thresholds hold for, None if unknown or if nothing is dropped. dense_if_faster: whether sparse
    attention runs dense, skipping nothing, wherever that is faster. evaluation: what was measured
    of the model, by `bsfa eval` for one; tile_maps: the tiles of some heads.
    """

    sites: tuple[SiteReport, ...]
    target: str = ""
    gate: str = ""
    precision: str = ""
    expected_skipped: float | None = None
    expected_lost: float | None = None
    proof: Proof | None = None
    calls: Mapping[str, int] = field(default_factory=dict)
    longest: int = 0
    lengths: tuple[int, ...] = ()
    reach: int | None = None
    dense_if_faster: bool = False
    evaluation: Evaluation | None = None
    tile_maps: tuple[TileMap, ...] = ()

    @property
    def coverage(self) -> float | None:
        """Fraction of the calls, decoding apart, that ran sparse; None before any."""
        wanted = sum(n for name, n in self.calls.items() if name != "decode")
        return self.calls.get("sparse", 0) / wanted if wanted else None

    @property
    def skipped(self) -> float | None:
        """Mean of the sites' achieved skip rates; None before any run."""
        rates = [site.skipped for site in self.sites if site.skipped is not None]
        return sum(rates) / len(rates) if rates else None

    @property
    def told_lengths(self) -> str:
        """The longest input beside the lengths that the thresholds were made on, in words."""
        text = f"longest input {self.longest} tokens" if self.longest else "no input yet"
        if self.lengths:
            ends = sorted({self.lengths[0], self.lengths[-1]})
            text += f", calibrated on {' to '.join(map(str, ends))}"
        return text if self.reach is None else f"{text}, thresholds for up to {self.reach}"

    @property
    def idle(self) -> str | None:
        """Why nothing was skipped although something could have been, in words; else None."""
        if not (self.dense_if_faster and self.expected_skipped and self.skipped == 0.0):
            return None
        return (
            "nothing was skipped so far: dense_if_faster=True runs dense what is not faster sparse "
            "on this device at these lengths; dense_if_faster=False forces the rule"
        )

    def to_json(self) -> str:
        """All fields as JSON text; numbers that are not finite are null."""
        return json.dumps(finite(asdict(self)), indent=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page (.html), or the data (.json).

        Raises InputError for another suffix.
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix not in (".html", ".json"):
            raise InputError(f"a report is saved as .html or .json, got {target.name!r}")
        text = render(self) if suffix == ".html" else f"{self.to_json()}\n"
        target.write_text(text, "utf-8")

    def __str__(self) -> str:
        table = Table()
        table.add_column("site", overflow="fold")
        table.add_column("attention")
        table.add_column("skipped", justify="right")
        table.add_column("why dense", overflow="fold")
        for site in self.sites:
            skipped = "" if site.skipped is None else f"{site.skipped:.1%}"
            kind = "sparse" if site.rewritten else "dense"
            table.add_row(site.name, kind, skipped, site.reason or "")
        text = io.StringIO()
        Console(file=text, width=120).print(table)
        return f"{self._title()}\n{text.getvalue().rstrip()}"

    def _title(self) -> str:
        sparse = sum(site.rewritten for site in self.sites)
        parts = [f"{sparse} of {len(self.sites)} attention sites block-sparse"]
        if self.target:
            parts.append(f"{self.target}, gate {self.gate}, precision {self.precision}")
        if self.expected_skipped is not None and self.expected_lost is not None:
            parts.append(
                f"on the calibration data {self.expected_skipped:.1%} of tiles skipped, "
                f"{self.expected_lost:.2%} of softmax mass lost"
            )
        if self.proof is not None:
            parts.append(str(self.proof))
        if self.calls:
            told = ", ".join(f"{n} {name}" for name, n in self.calls.items())
            parts.append(f"attention calls: {told}")
        if self.lengths or self.longest:
            parts.append(self.told_lengths)
        if self.idle is not None:
            parts.append(self.idle)
        return "; ".join(parts)


def report(model: nn.Module | fx.GraphModule | ExportedProgram) -> Report:
    """The report of an optimized model, also of a loaded exported program.

    Reading counters from a GPU waits for it. Raises InputError for a model that was not optimized.
    """
    state = state_of(model) if isinstance(model, nn.Module | ExportedProgram) else None
    if state is not None:
        solved = state.thresholds
        return Report(
            sites=tuple(_of_state(state)),
            target=solved.target,
            gate=solved.gate,
            precision=solved.precision,
            expected_skipped=solved.dropped,
            expected_lost=solved.lost,
            proof=solved.proof,
            calls=dict(state.calls),
            longest=state.longest,
            lengths=solved.lengths,
            reach=solved.reach,
            dense_if_faster=state.rule.dense_if_faster,
        )
    if isinstance(model, fx.GraphModule | ExportedProgram):
        sites = tuple(_of_graph(model))
        if any(site.rewritten for site in sites):
            return Report(sites=sites)
    raise InputError(
        f"this {type(model).__name__} was not optimized: call optimize(model, data) or "
        "apply(model, thresholds) first; with torch.compile, run it once first"
    )


def _of_state(state: State) -> Iterator[SiteReport]:
    calibration = state.calibration
    dense = {} if calibration is None else dict(calibration.dense)
    uncalled = () if calibration is None else calibration.uncalled
    for name in dict.fromkeys((*state.sites, *dense, *uncalled)):
        seen = state.sites.get(name, Seen())
        reasons = list(seen.dense)
        if not seen.sparse and not reasons:
            reasons = [dense[name]] if name in dense else [UNCALLED] if name in uncalled else []
        held = state.buffers(name)
        yield SiteReport(
            name=name,
            rewritten=bool(seen.sparse) or (name in state.thresholds.values and not reasons),
            reason="; ".join(reasons) or None,
            skipped=None if held is None else _rate(held[1]),
            heads=() if held is None else _rates(held[1]),
        )


def _rate(counters: Tensor) -> float | None:
    """Dropped over candidates, over all heads: counters int64 [H, 2]."""
    dropped, candidates = counters.sum(dim=0).tolist()
    return dropped / candidates if candidates else None


def _rates(counters: Tensor) -> tuple[float, ...]:
    """`_rate` of every head; empty before any run."""
    counted = counters.tolist()
    seen = any(candidates for _, candidates in counted)
    return tuple(d / c if c else 0.0 for d, c in counted) if seen else ()


def _of_graph(model: fx.GraphModule | ExportedProgram) -> Iterator[SiteReport]:
    graph = model.graph
    gm = model.graph_module if isinstance(model, ExportedProgram) else model
    dense = {site.node: site for site in find(gm)}
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node in dense:
            why = dense[node].reason or "it was not optimized"
            yield SiteReport(name=name_of(dense[node]), rewritten=False, reason=why, skipped=None)
        elif node.op == "call_function" and node.target is library.attention:
            key, path = owner(node)
            name = site_name(path, calls.setdefault(key, 0)) if path else node.name
            calls[key] += 1
            counters = _counters(model, node)
            rate = None if counters is None else _rate(counters)
            heads = () if counters is None else _rates(counters)
            yield SiteReport(name=name, rewritten=True, reason=None, skipped=rate, heads=heads)


def _counters(model: fx.GraphModule | ExportedProgram, call: fx.Node) -> Tensor | None:
    """The buffer that the counts of an operator call are added to."""
    for part in call.users:
        for user in part.users:
            if user.target is torch.ops.aten.add_.Tensor and user.args[1] is part:
                holder = user.args[0]
                assert isinstance(holder, fx.Node), "the pass adds to a buffer"
                if isinstance(model, ExportedProgram):
                    name = model.graph_signature.inputs_to_buffers[holder.name]
                    held: Tensor = model.state_dict[name]
                    return held
                return model.get_buffer(str(holder.target))
    return None
