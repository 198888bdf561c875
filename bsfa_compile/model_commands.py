"""The commands that run a trained model: `bsfa demo`, `eval`, `report`, `recheck`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bsfa_compile.console import (
    ERROR,
    MODEL_UNAVAILABLE,
    NOT_HELD,
    check_writable,
    fail,
    usable_device,
)
from bsfa_compile.errors import BsfaError, InputError, ModelUnavailableError

TARGETS = "budget=EPS, sparsity=FRACTION, topk=K; nll=NATS or kl=NATS per token are searched for."
Texts = Annotated[
    list[Path] | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text; repeatable.")
]
Model = Annotated[
    str | None,
    typer.Argument(help="qwen, gemma, qwen-1.5b, a folder or a hub name. Default: the installed."),
]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one.")]


@contextmanager
def _reported() -> Iterator[None]:
    """What goes wrong inside is one line and an exit code."""
    try:
        yield
    except ImportError as error:  # matplotlib, gguf: of an extra that other commands do without
        raise fail(f'{error}: pip install "bsfa-compile[demo]"', ERROR) from error
    except ModelUnavailableError as error:
        raise fail(error, MODEL_UNAVAILABLE) from error
    except (BsfaError, OSError) as error:
        raise fail(error, ERROR) from error


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def demo(
    *,
    model: Annotated[
        str | None,
        typer.Option(help="qwen, gemma, qwen-1.5b, a folder or hub name. Default: the installed."),
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
    device: Device = None,
    output: Annotated[Path, typer.Option(help="Where the picture and JSON go.")] = Path(
        "demo_output"
    ),
) -> None:
    """Calibrate a trained model on some texts and judge it on others, against dense."""
    with _reported():
        from bsfa_compile.demo.run import Settings, run

        check_writable(output, "--output")
        settings = Settings(
            model=model,
            tokens=tokens,
            scored=scored,
            eps=eps,
            facts=facts,
            new_tokens=new_tokens,
            calibration_texts=tuple(calibration_text or ()),
            evaluation_texts=tuple(evaluation_text or ()),
            device=usable_device(device),
            output=output,
        )
        run(settings, Console())


def evaluate(
    *,
    model: Model = None,
    thresholds: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Thresholds file; repeatable."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help=f"{TARGETS} Comma-separated. Default: budget=0.03, or --thresholds."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "4096",
    tasks: Annotated[
        str, typer.Option(help='Synthetic tasks, comma-separated, or "all" or "none".')
    ] = "all",
    documents: Annotated[int, typer.Option(min=1, help="Documents of each genre.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Prompts answered at a time.")] = 1,
    scored: Annotated[int, typer.Option(min=1, help="Last tokens of a document that count.")] = 512,
    text: Texts = None,
    calibration_text: Texts = None,
    seed: Annotated[int, typer.Option(help="Of prompts.")] = 0,
    device: Device = None,
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
    with _reported():
        from bsfa_compile.evaluate.publish import keep, publish
        from bsfa_compile.evaluate.run import Settings, run
        from bsfa_compile.evaluate.targets import parse_targets
        from bsfa_compile.evaluate.tasks import TASKS

        check_writable(out, "--out")
        default = "" if thresholds else "budget=0.03"
        wanted = {"all": tuple(TASKS), "none": ()}.get(tasks, _listed(tasks))
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
            batch=batch,
            scored=scored,
            text=tuple(text or ()),
            calibration_text=tuple(calibration_text or ()),
            seed=seed,
            device=usable_device(device),
            inner=inner,
        )
        evaluation, _ = run(settings, Console(stderr=True), lambda found: keep(found, out))
        publish(evaluation, out, Console())


def report(
    *,
    model: Model = None,
    thresholds: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Thresholds file.")
    ] = None,
    target: Annotated[str, typer.Option(help=f"If no --thresholds. {TARGETS}")] = "budget=0.03",
    length: Annotated[int, typer.Option(min=512, help="Tokens of every document.")] = 4096,
    documents: Annotated[int, typer.Option(min=1, help="Documents of each genre.")] = 2,
    scored: Annotated[int, typer.Option(min=1, help="Last tokens of a document that count.")] = 256,
    text: Texts = None,
    calibration_text: Texts = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="An .html page or .json data.")] = Path("report.html"),
) -> None:
    """One page about a model under thresholds: sites, heads, tiles, quality and speed."""
    with _reported():
        from bsfa_compile.evaluate.page import page
        from bsfa_compile.evaluate.run import Settings, run
        from bsfa_compile.evaluate.targets import parse_targets

        if out.suffix not in (".html", ".json"):
            raise InputError(f"--out: wanted a name ending in .html or .json, got {out.name!r}")
        check_writable(out.parent, "--out")
        wanted = parse_targets("" if thresholds else target, "--target")
        if not thresholds and len(wanted) != 1:
            raise InputError(f"--target: wanted one, such as budget=0.03, got {target!r}")
        settings = Settings(
            model=model,
            thresholds=() if thresholds is None else (thresholds,),
            targets=tuple(wanted),
            lengths=(length,),
            tasks=(),
            documents=documents,
            scored=scored,
            text=tuple(text or ()),
            calibration_text=tuple(calibration_text or ()),
            device=usable_device(device),
        )
        evaluation, loaded = run(settings, Console(stderr=True))
        out.parent.mkdir(parents=True, exist_ok=True)
        page(loaded, settings, evaluation).save(out)
        Console().print(str(out))


def recheck(
    *,
    model: Annotated[str, typer.Argument(help="qwen, gemma, a folder or a hub name.")],
    thresholds: Annotated[
        Path | None, typer.Option(help="File or folder. Default: those beside the model's weights.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=128, help="Tokens. Default: the longest calibrated.")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents of each genre.")] = 2,
    text: Texts = None,
    device: Device = None,
) -> None:
    """Do thresholds still keep their promise on this model, as after fine-tuning? 5 if not.

    A forward pass for each document tells what they drop and lose, beside what was promised where
    they were made.
    """
    with _reported():
        from bsfa_compile.evaluate.recheck import recheck_documents

        try:
            found = recheck_documents(
                model,
                thresholds or Path(model),
                length=length,
                documents=documents,
                text=tuple(text or ()),
                device=usable_device(device),
            )
        except OSError as error:
            raise InputError(
                f"no thresholds: {error}; pass --thresholds with a file that Thresholds.save wrote"
            ) from error
    Console().print(str(found), highlight=False, soft_wrap=True)
    if not found.holds:
        raise typer.Exit(NOT_HELD)
