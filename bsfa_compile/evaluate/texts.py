"""Texts to calibrate on and, apart from them, texts to judge on.

The package ships the openings of four novels by Jane Austen (1814-1818, public domain), one
paragraph a line: two to calibrate, two others to evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from bsfa_compile.errors import InputError
from bsfa_compile.evaluate.needles import Encode

CALIBRATION = ("emma", "mansfield_park")
EVALUATION = ("northanger_abbey", "persuasion")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A named text of paragraphs."""

    name: str
    paragraphs: tuple[str, ...]

    def tokens(self, encode: Encode, length: int, prefix: Sequence[int] = ()) -> Tensor:
        """The first `length` tokens [1, length], `prefix` included; InputError if it is short."""
        ids = list(prefix)
        for paragraph in self.paragraphs:
            if len(ids) >= length:
                break
            ids += encode(f"{paragraph}\n")
        if len(ids) < length:
            raise InputError(
                f"text {self.name!r} has {len(ids)} tokens, {length} are wanted; "
                "ask for fewer tokens or give a longer text"
            )
        return torch.tensor([ids[:length]])


def shipped(name: str) -> Document:
    """One of the shipped texts, by name."""
    text = files("bsfa_compile.evaluate").joinpath("data", f"{name}.txt").read_text("utf-8")
    return Document(name=name.replace("_", " "), paragraphs=tuple(text.splitlines()))


def read(path: Path) -> Document:
    """A user's text file (UTF-8); paragraphs are its lines that are not empty."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path}: cannot be read as UTF-8 ({error})") from error
    lines = tuple(line for line in text.splitlines() if line.strip())
    return Document(name=path.stem, paragraphs=lines)


def documents(paths: Sequence[Path], default: Sequence[str]) -> list[Document]:
    """The user's texts if any were given, else the shipped ones."""
    return [read(path) for path in paths] or [shipped(name) for name in default]
