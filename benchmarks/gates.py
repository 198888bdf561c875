"""Which gate: every rule at the same shares of tiles dropped, against what it loses.

    python -m benchmarks.gates --lengths 2048,8192 --documents 4

Rules: the paper's (absolute maxima, an equal count kept in every head and query block), the same
with the sink tile kept, relative maxima by equal count, relative maxima by equal lost mass (the
default; thresholds at most 0), one threshold for all heads (as in BLASST), int8 instead
of exact decisions, and none or two sink tiles. One calibration for each number of sink tiles, on
texts of their own, gives the thresholds of all rules. Each is solved to drop the same number of
tiles of the calibration data; what it drops and loses is then measured on held-out prose and code
with facts hidden in them that are asked for at the end. Shares are of the tiles that no mask edge
cuts, sink tiles counted, so that equal shares are equally many tiles whatever the sink. Intervals
are the bootstrap's over documents. Writes JSON, Markdown and a plot for each length.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

import bsfa_compile as bsfa
from bsfa_compile.calibrate.statistics import EDGES, ZERO_EDGE
from bsfa_compile.evaluate import corpora
from bsfa_compile.evaluate.intervals import METHODS
from bsfa_compile.evaluate.judge import Judge, facts_found, losses, tiles, use
from bsfa_compile.evaluate.likelihood import float32_head
from bsfa_compile.evaluate.models import LoadedModel, load
from bsfa_compile.evaluate.outcome import Loss
from bsfa_compile.evaluate.plot import Line, draw
from bsfa_compile.evaluate.run import Settings, device_name, pieces, sample, versions
from bsfa_compile.evaluate.tables import interval, table
from bsfa_compile.ops.compiler import cache_dir

Solve = Callable[[bsfa.Calibration, float], bsfa.Thresholds]  # for so many tiles dropped


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule and how its thresholds are found."""

    name: str
    sink_tiles: int
    solve: Solve
    precision: str = "exact"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A rule at one length: `asked` and `dropped` are shares of all uncut tiles."""

    rule: str
    target: str
    length: int
    asked: float
    dropped: float
    losses: tuple[Loss, ...]
    found: float
    dense_found: float


def candidates(calibration: bsfa.Calibration) -> int:
    """Candidate tiles of the calibration data over all sites and heads."""
    return sum(site.candidates * site.heads for site in calibration.sites.values())


def by_count(gate: str) -> Solve:
    """The k whose thresholds are predicted to drop nearest to the tiles wanted."""

    def solve(calibration: bsfa.Calibration, wanted: float) -> bsfa.Thresholds:
        total = candidates(calibration)
        sites = calibration.sites.values()
        most = max(1, *(min(site.max_k, site.mid_sums.shape[3]) for site in sites))

        def made(k: int) -> bsfa.Thresholds:
            return calibration.thresholds(bsfa.TopK(k), gate)

        def dropped(k: int) -> float:
            return (made(k).dropped or 0.0) * total

        low, high = 1, most
        while high - low > 1:
            k = (low + high) // 2
            low, high = (k, high) if dropped(k) > wanted else (low, k)
        return made(min(low, high, key=lambda k: abs(dropped(k) - wanted)))

    return solve


def by_mass(calibration: bsfa.Calibration, wanted: float) -> bsfa.Thresholds:
    """Equal lost mass in every head."""
    share = min(wanted / max(candidates(calibration), 1), 1.0)
    return calibration.thresholds(bsfa.Sparsity(share), "relative")


def one_for_all(calibration: bsfa.Calibration, wanted: float) -> bsfa.Thresholds:
    """The same threshold for every head, ln(lambda), at most 0."""
    some = calibration.thresholds(bsfa.Budget(0.0), "relative")

    def made(edge: int) -> bsfa.Thresholds:
        values = {name: torch.full_like(v, float(EDGES[edge])) for name, v in some.values.items()}
        return replace(some, values=values, target=f"ln(lambda) = {float(EDGES[edge]):.3f}")

    def dropped(edge: int) -> float:
        predicted = calibration.predict(made(edge))
        return sum(
            float(predicted[name].dropped.sum()) * site.candidates
            for name, site in calibration.sites.items()
        )

    low, high = 0, ZERO_EDGE
    while high - low > 1:
        edge = (low + high) // 2
        low, high = (edge, high) if dropped(edge) < wanted else (low, edge)
    return made(min(low, high, key=lambda edge: abs(dropped(edge) - wanted)))


RULES = (
    Rule(name="paper", sink_tiles=0, solve=by_count("absolute")),
    Rule(name="paper + sink", sink_tiles=1, solve=by_count("absolute")),
    Rule(name="relative by count", sink_tiles=1, solve=by_count("relative")),
    Rule(name="relative by mass", sink_tiles=1, solve=by_mass),
    Rule(name="one lambda", sink_tiles=1, solve=one_for_all),
    Rule(name="by mass, int8", sink_tiles=1, solve=by_mass, precision="int8"),
    Rule(name="by mass, no sink", sink_tiles=0, solve=by_mass),
    Rule(name="by mass, two sinks", sink_tiles=2, solve=by_mass),
)


def compare_rules(
    loaded: LoadedModel,
    settings: Settings,
    length: int,
    asked: Sequence[float],
    facts: int,
    console: Console,
) -> list[Measured]:
    """Every rule at every share, at one length; starts from the untouched model."""
    data = pieces(loaded, settings, corpora.CALIBRATION, length, count=2)
    calibrations = {}
    for sinks in sorted({rule.sink_tiles for rule in RULES}):
        console.print(f"{length} tokens: calibrate, {sinks} sink tiles, {len(data)} documents")
        calibrations[sinks] = bsfa.calibrate(
            loaded.model, [sample(d.input_ids) for d in data], sink_tiles=sinks, progress=False
        )
    documents = pieces(
        loaded, settings, corpora.EVALUATION, length, count=settings.documents, facts=facts
    )
    console.print(f"{length} tokens: dense, {len(documents)} documents")
    judge = Judge(loaded, documents, (), settings.scored)
    found, whole = list[Measured](), 0
    for rule in sorted(RULES, key=lambda rule: rule.sink_tiles):
        calibration = calibrations[rule.sink_tiles]
        for share in asked:
            wanted = share * candidates(calibrations[0])
            thresholds = replace(rule.solve(calibration, wanted), precision=rule.precision)
            use(loaded.model, thresholds, settings.inner)
            judged = judge.documents()
            dropped, seen = tiles(loaded.model)
            whole = whole or seen  # the first rule has no sink tile: all uncut tiles
            found.append(
                Measured(
                    rule=rule.name,
                    target=thresholds.target,
                    length=length,
                    asked=share,
                    dropped=dropped / max(whole, 1),
                    losses=losses(judged),
                    found=facts_found(judged),
                    dense_found=judge.dense_found,
                )
            )
            loss = found[-1].losses[0]
            console.print(
                f"  {rule.name}: {found[-1].dropped:.3f} dropped, KL {loss.kl.mean:.5f}",
                highlight=False,
            )
    bsfa.revert(loaded.model)
    order = [rule.name for rule in RULES]
    return sorted(found, key=lambda one: (order.index(one.rule), one.asked))


def report(found: Sequence[Measured]) -> str:
    """Rules and shares against losses, as a Markdown table: all documents, then each genre."""
    genres = [loss.genre for loss in found[0].losses]
    header = ["rule", "asked", "dropped", "change of NLL", "KL", "same", "facts"]
    header += [f"KL, {genre}" for genre in genres[1:]]
    rows = [["dense", "", "", "", "", "", f"{100 * found[0].dense_found:.0f} %"]]
    rows[0] += [""] * len(genres[1:])
    for one in found:
        first = one.losses[0]
        rows.append([
            one.rule,
            f"{one.asked:.2f}",
            f"{one.dropped:.3f}",
            interval(first.delta_nll, "+.4f"),
            interval(first.kl, ".2g"),
            f"{100 * first.agreement:.1f} %",
            f"{100 * one.found:.0f} %",
            *(interval(loss.kl, ".2g") for loss in one.losses[1:]),
        ])  # fmt: skip
    return table(header, rows)


def lines(found: Sequence[Measured]) -> dict[str, Line]:
    """Rule -> what is drawn of it."""
    return {
        rule: [
            (one.dropped, one.losses[0].kl, one.losses[0].delta_nll)
            for one in found
            if one.rule == rule
        ]
        for rule in dict.fromkeys(one.rule for one in found)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="qwen, gemma, a folder or a hub name")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--dropped", default="0.3,0.5,0.7,0.85", help="shares of tiles asked for")
    parser.add_argument("--documents", type=int, default=4, help="of each genre")
    parser.add_argument("--facts", type=int, default=4, help="hidden in each document")
    parser.add_argument("--scored", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gates"))
    given = parser.parse_args()
    console = Console(stderr=True)
    settings = Settings(
        model=given.model,
        lengths=tuple(int(length) for length in given.lengths.split(",")),
        documents=given.documents,
        scored=given.scored,
        device=torch.device(given.device),
    )
    loaded = load(settings.model, cache_dir() / "models", settings.device)
    asked = [float(share) for share in given.dropped.split(",")]
    given.out.mkdir(parents=True, exist_ok=True)
    device, found, parts = device_name(settings.device), list[Measured](), list[str]()
    for length in settings.lengths:
        with torch.no_grad(), float32_head(loaded.model):
            mine = compare_rules(loaded, settings, length, asked, given.facts, console)
        found += mine
        title = f"{loaded.title}, {length} tokens, {device}"
        count = mine[0].losses[0].kl.n
        parts.append(f"## {title}\n\n{count} held-out documents.\n\n{report(mine)}")
        draw(title, {"share of tiles dropped": lines(mine)}, given.out / f"gates_{length}.png")
        # Written after every length: a run that is cut short has not been for nothing.
        (given.out / "gates.md").write_text("\n\n".join(parts) + f"\n\n{METHODS}.\n", "utf-8")
        plain = {"model": loaded.title, "device": device, "versions": versions(),
                 "measured": [asdict(one) for one in found]}  # fmt: skip
        (given.out / "gates.json").write_text(json.dumps(plain, indent=1) + "\n", "utf-8")
    console.print(f"{given.out}/gates.md, gates.json and a plot for each length")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
