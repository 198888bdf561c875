"""What commands share: exit codes, and errors as one line on stderr."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.text import Text

ERROR = 1  # exit codes; 2 is wrong usage
MODEL_UNAVAILABLE = 3
NO_KERNELS = 4
NOT_HELD = 5


def fail(message: object, code: int) -> typer.Exit:
    """Print an error to stderr; raise what this returns."""
    text = Text.assemble(("error:", "bold red"), f" {message}")
    Console(stderr=True).print(text, soft_wrap=True)
    return typer.Exit(code)
