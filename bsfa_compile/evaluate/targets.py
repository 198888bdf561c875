"""What to evaluate, from the command line: targets such as budget=0.03, or thresholds files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bsfa_compile.calibrate import Budget, Quality, Sparsity, Target, Thresholds, TopK
from bsfa_compile.errors import InputError

_KINDS: dict[str, Callable[[str], Target | Quality]] = {
    "budget": lambda value: Budget(float(value)),
    "sparsity": lambda value: Sparsity(float(value)),
    "topk": lambda value: TopK(int(value)),
    "nll": lambda value: Quality(nll=float(value)),
    "kl": lambda value: Quality(kl=float(value)),
}


def parse_targets(text: str, option: str = "--targets") -> list[Target | Quality]:
    """Targets from "budget=0.03,sparsity=0.7,nll=0.01". Raises InputError for anything else."""
    found = []
    for part in filter(None, text.split(",")):
        kind, _, value = part.strip().partition("=")
        try:
            found.append(_KINDS[kind](value))
        except (KeyError, ValueError) as error:
            why = f" ({error})" if kind in _KINDS else ""
            raise InputError(
                f"{option}: {part.strip()!r} is no target{why}; wanted budget=EPS, "
                "sparsity=FRACTION, topk=K, nll=NATS or kl=NATS, separated by commas"
            ) from error
    return found


def from_files(files: Sequence[Path]) -> dict[str, Thresholds]:
    """Rule name -> thresholds of a file."""
    rules = {}
    for path in files:
        try:
            rules[str(path) if path.stem in rules else path.stem] = Thresholds.load(path)
        except OSError as error:
            raise InputError(f"--thresholds {path}: cannot be read ({error})") from error
    return rules
