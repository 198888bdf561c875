"""An evaluation on disk: evaluation.json, evaluation.md, pareto.png."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bsfa_compile.evaluate.outcome import Evaluation
from bsfa_compile.evaluate.plot import pareto
from bsfa_compile.evaluate.tables import markdown


def keep(evaluation: Evaluation, folder: Path) -> None:
    """Write the JSON alone, of a run that goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    evaluation.save(folder / "evaluation.json")


def publish(evaluation: Evaluation, folder: Path, console: Console) -> None:
    """Write JSON, Markdown and plots into the folder, and print the tables."""
    keep(evaluation, folder)
    text = markdown(evaluation)
    (folder / "evaluation.md").write_text(text, "utf-8")
    pareto(f"{evaluation.model}, {evaluation.device}", evaluation.points, folder / "pareto.png")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{folder}/evaluation.json, {folder}/evaluation.md, {folder}/pareto.png")
