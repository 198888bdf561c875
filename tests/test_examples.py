"""The examples run, and each skips something."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dynamo imports the module of a global it meets
    spec.loader.exec_module(module)
    return module.main


def test_quickstart() -> None:
    report = main_of("quickstart")()
    assert [site.name for site in report.sites] == [f"model.layers.{n}.self_attn" for n in range(2)]
    assert all(site.rewritten and (site.skipped or 0) > 0.05 for site in report.sites)


def test_compile_backend() -> None:
    dense, sparse = main_of("compile_backend")()
    change = float((sparse - dense).abs().max())
    assert 0 < change < 0.5 * float(dense.abs().max())


def test_exported_program() -> None:
    reports = main_of("exported_program")()
    assert len(reports) == 2
    for report in reports:
        assert len(report.sites) == 2
        assert all(site.rewritten and (site.skipped or 0) > 0.05 for site in report.sites)


def test_all_examples_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "quickstart",
        "compile_backend",
        "exported_program",
    }
    assert torch.is_grad_enabled()  # none leaves a global mode behind
