"""The command line: `bsfa demo`, `eval`, `report`, `recheck`, `build`, `crossover`."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import torch
import typer
from rich.console import Console

from bsfa_compile import model_commands
from bsfa_compile.console import (
    ERROR,
    MODEL_UNAVAILABLE,
    NO_KERNELS,
    NOT_HELD,
    fail,
    usable_device,
)
from bsfa_compile.errors import BsfaError
from bsfa_compile.ops import crossover as crossovers
from bsfa_compile.ops import race
from bsfa_compile.ops.compiler import Compiled, Variant, arch_for, build_all, cache_dir

__all__ = ["ERROR", "MODEL_UNAVAILABLE", "NOT_HELD", "NO_KERNELS", "app", "main"]

app = typer.Typer(
    name="bsfa",
    help="Calibrated block-sparse attention for any traced PyTorch model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(model_commands.demo)
app.command("eval")(model_commands.evaluate)
app.command()(model_commands.report)
app.command()(model_commands.recheck)


@app.command()
def build(
    *,
    arch: Annotated[
        list[str] | None,
        typer.Option(help="sm_80, sm_90a, ...; repeatable. Default: this machine's card."),
    ] = None,
) -> None:
    """Compile the CUDA kernels ahead of time into the cache. Needs no card if --arch is given."""
    console = Console()

    def progress(variant: Variant, compiled: Compiled) -> None:
        console.print(f"{variant.source} {variant.entry}: {compiled.registers} registers")

    try:
        if not arch:
            if not torch.cuda.is_available():
                raise fail("there is no CUDA card here: pass --arch, such as sm_90a", NO_KERNELS)
            arch = [arch_for(torch.cuda.get_device_capability())]
        for name in arch:
            if not re.fullmatch(r"sm_\d+[af]?", name):
                raise fail(f"--arch: wanted such as sm_80 or sm_90a, got {name!r}", NO_KERNELS)
            built = build_all(name, progress=progress)
            console.print(f"{built} kernels for {name} in {cache_dir()}")
    except BsfaError as error:
        raise fail(error, NO_KERNELS) from error


@app.command()
def crossover(
    *,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contest.")] = 5,
) -> None:
    """Measure where sparse attention overtakes dense on this machine; later runs go by it.

    Leave the machine alone meanwhile: about a minute on a card, three on a CPU.
    """
    try:
        chosen = usable_device(device)
    except BsfaError as error:
        raise fail(error, ERROR) from error
    console, contests = Console(), []
    console.print(f"{crossovers.device_name(chosen)}, {torch.get_num_threads()} threads")
    for contest in race.measure(chosen, rounds=rounds):
        contests.append(contest)
        console.print(
            f"{contest.tokens:6d} tokens, {contest.skipped:4.0%} of the tiles skipped: "
            f"{contest.ratio:.2f} x SDPA"
        )
    found = race.decide(chosen, contests)
    path = crossovers.store(chosen, found)
    if found.tokens == crossovers.NEVER:
        told = "dense attention is always faster here"
    else:
        rate = f", heads that skip {found.skipped:.0%}" if found.skipped else ""
        told = f"sparse from {found.tokens} tokens on{rate}"
    console.print(f"{told}; stored in {path}", soft_wrap=True)


def main() -> None:
    """Entry point of `bsfa` and `python -m bsfa_compile`."""
    app(prog_name="bsfa", args=sys.argv[1:])
