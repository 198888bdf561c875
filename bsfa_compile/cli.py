"""The command line: `bsfa demo`, `bsfa eval`, `bsfa report`, `bsfa build`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from bsfa_compile.errors import BsfaError, InputError
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
        from bsfa_compile.demo.run import Settings, run
        from bsfa_compile.evaluate.models import ModelUnavailableError
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


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@app.command("eval")
def evaluate(
    *,
    model: Annotated[
        str | None,
        typer.Argument(help="qwen, gemma, a folder or a hub name. Default: what is installed."),
    ] = None,
    thresholds: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Thresholds file; repeatable."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: budget=EPS, sparsity=FRACTION, topk=K. "
            "Default: budget=0.03 if no --thresholds."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "4096",
    tasks: Annotated[
        str, typer.Option(help='Synthetic tasks, comma-separated, or "all" or "none".')
    ] = "all",
    documents: Annotated[int, typer.Option(min=1, help="Documents of each genre.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 8,
    scored: Annotated[int, typer.Option(min=1, help="Last tokens of a document that count.")] = 512,
    text: Texts = None,
    calibration_text: Texts = None,
    seed: Annotated[int, typer.Option(help="Of prompts.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    inner: Annotated[
        str, typer.Option(help="What runs the rewritten graphs: eager, inductor.")
    ] = "eager",
    out: Annotated[Path, typer.Option(help="Where JSON, tables, plots and report go.")] = Path(
        "eval_output"
    ),
) -> None:
    """Judge thresholds beside dense: likelihood of prose and code, and long-context tasks.

    Each genre's and task's column comes with 95 % confidence intervals. On a CPU ask for little:
    --lengths 1024 --documents 1 --samples 2.
    """
    try:
        from bsfa_compile.evaluate.models import ModelUnavailableError
        from bsfa_compile.evaluate.publish import publish
        from bsfa_compile.evaluate.run import Settings, run
        from bsfa_compile.evaluate.targets import parse_targets
        from bsfa_compile.evaluate.tasks import TASKS
    except ImportError as error:
        raise fail(f'{error}: pip install "bsfa-compile[demo]"', ERROR) from error
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    default = "" if thresholds else "budget=0.03"
    wanted = {"all": tuple(TASKS), "none": ()}.get(tasks, _listed(tasks))
    try:
        try:
            sizes = tuple(int(length) for length in _listed(lengths))
        except ValueError as error:
            raise InputError(f"--lengths: wanted such as 4096,8192, got {lengths!r}") from error
        settings = Settings(
            model=model,
            thresholds=tuple(thresholds or ()),
            targets=tuple(parse_targets(targets or default)),
            lengths=sizes,
            tasks=wanted,
            documents=documents,
            samples=samples,
            scored=scored,
            text=tuple(text or ()),
            calibration_text=tuple(calibration_text or ()),
            seed=seed,
            device=torch.device(chosen),
            inner=inner,
        )
        evaluation, _ = run(settings, Console(stderr=True))
        publish(evaluation, out, Console())
    except ModelUnavailableError as error:
        raise fail(error, MODEL_UNAVAILABLE) from error
    except BsfaError as error:
        raise fail(error, ERROR) from error


@app.command()
def report(
    *,
    model: Annotated[
        str | None,
        typer.Argument(help="qwen, gemma, a folder or a hub name. Default: what is installed."),
    ] = None,
    thresholds: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Thresholds file.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="budget=EPS, sparsity=FRACTION or topk=K, if no --thresholds.")
    ] = "budget=0.03",
    length: Annotated[int, typer.Option(min=512, help="Tokens of every document.")] = 4096,
    documents: Annotated[int, typer.Option(min=1, help="Documents of each genre.")] = 2,
    scored: Annotated[int, typer.Option(min=1, help="Last tokens of a document that count.")] = 256,
    text: Texts = None,
    calibration_text: Texts = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="An .html page or .json data.")] = Path("report.html"),
) -> None:
    """One page about a model under thresholds: sites, heads, tiles, quality and speed."""
    try:
        from bsfa_compile.evaluate.models import ModelUnavailableError
        from bsfa_compile.evaluate.page import page
        from bsfa_compile.evaluate.run import Settings, run
        from bsfa_compile.evaluate.targets import parse_targets
    except ImportError as error:
        raise fail(f'{error}: pip install "bsfa-compile[demo]"', ERROR) from error
    try:
        if out.suffix not in (".html", ".json"):
            raise InputError(f"--out: wanted a name ending in .html or .json, got {out.name!r}")
        settings = Settings(
            model=model,
            thresholds=() if thresholds is None else (thresholds,),
            targets=tuple(parse_targets(target))[:1] if thresholds is None else (),
            lengths=(length,),
            tasks=(),
            documents=documents,
            scored=scored,
            text=tuple(text or ()),
            calibration_text=tuple(calibration_text or ()),
            device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        )
        evaluation, loaded = run(settings, Console(stderr=True))
        page(loaded, settings, evaluation).save(out)
        Console().print(str(out))
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
