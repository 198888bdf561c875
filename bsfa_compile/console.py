"""What commands share: exit codes, and errors as one line on stderr."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.text import Text

from bsfa_compile.errors import InputError

ERROR = 1  # exit codes; 2 is wrong usage
MODEL_UNAVAILABLE = 3
NO_KERNELS = 4
NOT_HELD = 5


def usable_device(name: str | None) -> torch.device:
    """The device of --device, cuda or cpu if not given. Raises InputError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each from some build
        why = str(error).splitlines()[0]
        raise InputError(
            f"--device {name}: cannot be used here ({why}); wanted cpu, cuda or cuda:N"
        ) from error
    return device


def check_writable(folder: Path, option: str) -> None:
    """Raise InputError now, not after the work, if results could not be written into a folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(
            f"{option} {folder}: {there} is no folder that can be written into; pass another"
        )


def fail(message: object, code: int) -> typer.Exit:
    """Print an error to stderr; raise what this returns."""
    text = Text.assemble(("error:", "bold red"), f" {message}")
    Console(stderr=True).print(text, soft_wrap=True)
    return typer.Exit(code)
