"""The command line: `bsfa demo`, `bsfa build`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from bsfa_compile.errors import BsfaError
from bsfa_compile.ops.compiler import Compiled, Variant, arch_for, build_all, cache_dir

ERROR = 1  # exit codes; 2 is wrong usage
MODEL_UNAVAILABLE = 3
NO_KERNELS = 4

app = typer.Typer(
    name="bsfa",
    help="Calibrated block-sparse attention for any traced PyTorch model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Texts = Annotated[
    list[Path] | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text; repeatable.")
]


def fail(message: object, code: int) -> typer.Exit:
    """Print an error to stderr; raise what this returns."""
    text = Text.assemble(("error:", "bold red"), f" {message}")
    Console(stderr=True).print(text, soft_wrap=True)
    return typer.Exit(code)


@app.command()
def demo(
    *,
    model: Annotated[
        str | None,
        typer.Option(help="qwen, gemma, a folder or a hub name. Default: what is installed."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of every text.")] = 2048,
    scored: Annotated[int, typer.Option(min=1, help="Last tokens of a text that count.")] = 1024,
    eps: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Softmax mass that may be lost.")
    ] = 0.03,
    facts: Annotated[
        int, typer.Option(min=1, max=16, help="Facts hidden in each evaluation text.")
    ] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to continue a text by.")] = 24,
    calibration_text: Texts = None,
    evaluation_text: Texts = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    output: Annotated[Path, typer.Option(help="Where the picture and JSON go.")] = Path(
        "demo_output"
    ),
) -> None:
    """Calibrate a trained model on some texts and judge it on others, against dense."""
    try:
        # What only the demo needs (matplotlib, gguf) is an extra; other commands do without.
        from bsfa_compile.demo.models import ModelUnavailableError
        from bsfa_compile.demo.run import Settings, run
    except ImportError as error:
        raise fail(f'{error}: pip install "bsfa-compile[demo]"', ERROR) from error
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        settings = Settings(
            model=model,
            tokens=tokens,
            scored=scored,
            eps=eps,
            facts=facts,
            new_tokens=new_tokens,
            calibration_texts=tuple(calibration_text or ()),
            evaluation_texts=tuple(evaluation_text or ()),
            device=torch.device(chosen),
            output=output,
        )
        run(settings, Console())
    except ModelUnavailableError as error:
        raise fail(error, MODEL_UNAVAILABLE) from error
    except BsfaError as error:
        raise fail(error, ERROR) from error


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
            built = build_all(name, progress=progress)
            console.print(f"{built} kernels for {name} in {cache_dir()}")
    except BsfaError as error:
        raise fail(error, NO_KERNELS) from error


def main() -> None:
    """Entry point of `bsfa` and `python -m bsfa_compile`."""
    app(prog_name="bsfa", args=sys.argv[1:])
