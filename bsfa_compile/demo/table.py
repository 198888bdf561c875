"""The outcome as tables for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bsfa_compile.demo.outcome import Outcome

BAR = 12


def show(console: Console, outcome: Outcome) -> None:
    """Print every table of the outcome."""
    console.print(render(outcome))


def render(outcome: Outcome) -> RenderableType:
    """All tables, in the order in which they tell the story."""
    parts = (_quality(outcome), _layers(outcome), _continuation(outcome), _seconds(outcome))
    return Group(*(Padding(part, (1, 0, 0, 0)) for part in parts))


def _table(title: str, *, header: bool = True, caption: str | None = None) -> Table:
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        show_header=header,
    )


def _quality(outcome: Outcome) -> Table:
    rules = outcome.rules
    meaning = "; ".join(f"{rule.name}: {rule.description}" for rule in rules)
    table = _table(
        f"{outcome.model}, {outcome.tokens} tokens\n"
        f"calibrated on {_names(outcome.calibrated_on)}; judged on {_names(outcome.evaluated_on)}",
        caption=f"{meaning}. dropped: share of the tiles that no mask edge cuts. NLL: nats per "
        f"token over the last {outcome.scored} tokens of each text. KL: divergence of the "
        "predictions from the dense model's. same: the likeliest token is dense's. facts: hidden "
        "in the text, asked for at its end.",
    )
    for column in ("rule", "dropped", "NLL", "change", "KL", "same", "facts"):
        table.add_column(column, justify="left" if column == "rule" else "right", no_wrap=True)
    found = f"{outcome.dense_found}/{rules[0].facts}"
    table.add_row("dense", "0.0 %", f"{rules[0].comparison.dense_nll:.3f}", "", "", "", found)
    for rule in rules:
        c = rule.comparison
        table.add_row(
            rule.name,
            f"{100 * rule.dropped:.1f} %",
            f"{c.dense_nll + c.delta_nll:.3f}",
            f"{c.delta_nll:+.4f} ± {c.delta_nll_se:.4f}",
            f"{c.kl:.4f}",
            f"{100 * c.agreement:.1f} %",
            f"{rule.found}/{rule.facts}",
        )
    return table


def _names(texts: list[str]) -> str:
    return ", ".join(texts)


def _layers(outcome: Outcome) -> Table:
    sites = [*outcome.rules[0].kept, *outcome.left_dense]
    start, stop = _common(sites)
    table = _table(
        f"Tiles kept by {sites[0][:start]}*{sites[0][len(sites[0]) - stop :]}: mean over heads "
        f"(least to most)\n{outcome.rewritten} attention sites rewritten, "
        f"{len(outcome.left_dense)} left dense"
    )
    table.add_column("*", no_wrap=True)
    for rule in outcome.rules:
        table.add_column(rule.name, no_wrap=True)

    def short(site: str) -> str:
        return site[start : len(site) - stop]

    for site in outcome.rules[0].kept:
        table.add_row(short(site), *(_kept(rule.kept[site]) for rule in outcome.rules))
    for site, reason in outcome.left_dense.items():
        table.add_row(short(site), Text(f"dense: {reason}", style="dim"))
    return table


def _common(names: list[str]) -> tuple[int, int]:
    """Lengths of the dotted names' common beginning and end, the dots to the rest included."""
    parts = [name.split(".") for name in names]
    if len(set(map(tuple, parts))) < 2:
        return 0, 0

    def shared(columns: Iterable[tuple[str, ...]]) -> int:
        same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
        return sum(len(column[0]) + 1 for column in same)

    return (
        shared(zip(*parts, strict=False)),
        shared(zip(*(part[::-1] for part in parts), strict=False)),
    )


def _kept(heads: list[float]) -> str:
    mean = sum(heads) / len(heads)
    bar = "█" * round(BAR * mean)
    return f"{bar:<{BAR}} {100 * mean:3.0f} % ({100 * min(heads):.0f}-{100 * max(heads):.0f})"


def _continuation(outcome: Outcome) -> Table:
    c = outcome.continuation
    table = _table(
        f"Greedy continuation: the first {c.same_tokens} of {c.tokens} tokens are the same",
        header=False,
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    sparse = outcome.rules[0].name
    for name, text in (("... text", c.prompt_end), ("dense", c.dense), (sparse, c.sparse)):
        table.add_row(name, Text(" ".join(text.split())))
    return table


def _seconds(outcome: Outcome) -> Table:
    table = _table(
        f"Seconds for a forward pass of {outcome.tokens} tokens\n"
        f"{outcome.device}, {outcome.threads} threads, torch {outcome.torch}",
        header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    for name, value in outcome.forward_seconds.items():
        table.add_row(name, f"{value:.1f}")
    return table
