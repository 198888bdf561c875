"""Which gate: every rule at the same shares of tiles dropped, against what it loses.

    python -m benchmarks.gates --lengths 2048,8192 --documents 4

Rules (rules.py): the paper's (absolute maxima, an equal count kept in every head and query block),
the same with the sink tile kept, relative maxima by equal count, relative maxima by equal lost mass
("by mass, no sink" is the default; thresholds at most 0), one threshold for all heads (as in
BLASST), int8 instead of exact decisions, none or two sink tiles, other tile shapes, lost mass
spread by what it costs in each site (as for a Quality), and an oracle that knows every tile's
softmax mass (oracle.py).
Thresholds come from texts of their own, one calibration for each number of sink tiles and tile
shape, and are solved to drop the same share of the calibration data; what they drop and lose is
then measured on held-out prose and code with facts hidden in them that are asked for at the end.
Shares are of the scores in 128 x 64 tiles that no mask edge cuts, sink tiles counted, so that equal
shares are equally many scores whatever the sink and the shape. Intervals are the bootstrap's over
documents. Rules are measured in the order given; JSON is written after every measurement, Markdown
and a plot after every length. The model runs without torch.compile.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import bsfa_compile as bsfa
from benchmarks.oracle import attending
from benchmarks.rules import BARE, COST, NAMES, ORACLE, RULES, Rule, Setting, by_cost, candidates
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
from bsfa_compile.ops.tiles import BLOCK_K


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A rule at one length: `asked` and `dropped` are shares of the scores in uncut tiles.

    by_document: (genre, change of NLL, KL) of each, in the same order for every rule.
    """

    rule: str
    target: str
    length: int
    asked: float
    dropped: float
    losses: tuple[Loss, ...]
    by_document: tuple[tuple[str, float, float], ...]
    found: float
    dense_found: float


def compare_rules(
    loaded: LoadedModel,
    settings: Settings,
    length: int,
    asked: Sequence[float],
    given: argparse.Namespace,
    console: Console,
) -> Iterator[Measured]:
    """Every rule at every share, at one length; starts from the untouched model."""
    count = given.calibration_documents
    data = [
        sample(piece.input_ids)
        for piece in pieces(loaded, settings, corpora.CALIBRATION, length, count=count)
    ]
    documents = pieces(
        loaded, settings, corpora.EVALUATION, length, count=settings.documents, facts=given.facts
    )
    console.print(f"{length} tokens: dense, {len(documents)} documents, {len(data)} to calibrate")
    judge = Judge(loaded, documents, (), settings.scored)
    calibrations: dict[Setting, bsfa.Calibration] = {}

    def calibrated(setting: Setting) -> bsfa.Calibration:
        if setting not in calibrations:
            calibrations[setting] = bsfa.calibrate(
                loaded.model,
                data,
                **asdict(setting),
                max_k=max(128, length // BLOCK_K),  # so that counts reach every share
                progress=False,
            )
        return calibrations[setting]

    def measured(
        rule: str, target: str, share: float, dropped: Callable[[], float], tile: float = 1.0
    ) -> Measured:
        judged = judge.documents()
        found = Measured(
            rule=rule,
            target=target,
            length=length,
            asked=share,
            dropped=dropped() * tile / (uncut / len(data) * len(documents)),
            losses=losses(judged),
            by_document=tuple(
                (one.genre, one.comparison.delta_nll, one.comparison.kl) for one in judged
            ),
            found=facts_found(judged),
            dense_found=judge.dense_found,
        )
        loss = found.losses[0]
        console.print(
            f"  {rule}: {found.dropped:.3f} dropped, KL {loss.kl.mean:.5f}, "
            f"change of NLL {loss.delta_nll.mean:+.5f}",
            highlight=False,
        )
        return found

    probe = {"input_ids": data[0]["input_ids"]}
    solve = by_cost(loaded.model, probe, settings.scored)
    rules = {rule.name: rule for rule in (*RULES, Rule(name=COST, solve=solve, setting=BARE))}
    uncut = candidates(calibrated(BARE))
    for name in given.rules:
        if name == ORACLE:
            bsfa.revert(loaded.model)
            watch = [functools.partial(loaded.model, **call) for call in data]
            with attending(loaded.model, watch) as oracle:
                for share in asked:
                    oracle.solve(share * uncut)
                    yield measured(name, "", share, lambda: float(oracle.dropped))
            continue
        rule = rules[name]
        tile = rule.setting.scores / BARE.scores
        for share in asked:
            thresholds = rule.solve(calibrated(rule.setting), share * uncut / tile)
            thresholds = replace(thresholds, precision=rule.precision)
            use(loaded.model, thresholds, settings.inner)
            dropped = functools.partial(_dropped, loaded.model)
            yield measured(name, thresholds.target, share, dropped, tile)
    bsfa.revert(loaded.model)


def _dropped(model: Any) -> float:
    return tiles(model)[0]


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
    parser.add_argument("--rules", nargs="+", default=list(NAMES), choices=NAMES, metavar="RULE")
    parser.add_argument("--dropped", default="0.3,0.5,0.7,0.85", help="shares of tiles asked for")
    parser.add_argument("--documents", type=int, default=4, help="of each genre")
    parser.add_argument("--calibration-documents", type=int, default=2, help="of each genre")
    parser.add_argument("--text", type=Path, nargs="*", default=(), help="to judge on")
    parser.add_argument("--calibration-text", type=Path, nargs="*", default=())
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
        text=tuple(given.text),
        calibration_text=tuple(given.calibration_text),
        device=torch.device(given.device),
    )
    loaded = load(settings.model, cache_dir() / "models", settings.device)
    loaded.model.set_attn_implementation("bsfa")
    asked = [float(share) for share in given.dropped.split(",")]
    given.out.mkdir(parents=True, exist_ok=True)
    device, found, parts = device_name(settings.device), list[Measured](), list[str]()
    for length in settings.lengths:
        mine = []
        with torch.no_grad(), float32_head(loaded.model):
            for one in compare_rules(loaded, settings, length, asked, given, console):
                mine.append(one)
                found.append(one)
                # A run that is cut short has not been for nothing.
                plain = {"model": loaded.title, "device": device, "versions": versions(),
                         "measured": [asdict(each) for each in found]}  # fmt: skip
                (given.out / "gates.json").write_text(json.dumps(plain, indent=1) + "\n", "utf-8")
        title = f"{loaded.title}, {length} tokens, {device}"
        count = mine[0].losses[0].kl.n
        parts.append(f"## {title}\n\n{count} held-out documents.\n\n{report(mine)}")
        draw(title, {"share of tiles dropped": lines(mine)}, given.out / f"gates_{length}.png")
        (given.out / "gates.md").write_text("\n\n".join(parts) + f"\n\n{METHODS}.\n", "utf-8")
    console.print(f"{given.out}/gates.md, gates.json and a plot for each length")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
