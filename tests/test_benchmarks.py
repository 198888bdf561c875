"""The comparison of rules and the judgement of a Quality, run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gates, quality
from benchmarks.rules import NAMES
from bsfa_compile.evaluate import corpora
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `save_tiny`."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(main: Any, monkeypatch: pytest.MonkeyPatch, options: list[object]) -> None:
    """A program's `main` with these options on the CPU."""
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, options), "--device", "cpu"])
    main()


def test_rules_drop_what_is_asked_in_the_order_given(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = ["by mass, no sink", "true mass", "by mass, no sink, 128 x 128", "paper + sink"]
    assert set(rules) < set(NAMES)
    run(
        gates.main, monkeypatch,
        ["--model", tiny, "--lengths", 1024, "--dropped", 0.5, "--documents", 1,
         "--calibration-documents", 1, "--facts", 1, "--scored", 128, "--out", tmp_path,
         "--rules", *rules],
    )  # fmt: skip
    found = json.loads((tmp_path / "gates.json").read_text())["measured"]
    assert [one["rule"] for one in found] == rules
    for one in found:
        assert one["dropped"] == pytest.approx(0.5, abs=0.08)
        assert [genre for genre, _, _ in one["by_document"]] == ["prose", "code"]
        kl = [value for _, _, value in one["by_document"]]
        assert one["losses"][0]["kl"]["mean"] == pytest.approx(sum(kl) / 2)
        assert sum(kl) > 0
    assert "| by mass, no sink, 128 x 128 | 0.50 |" in (tmp_path / "gates.md").read_text()


def test_thresholds_found_on_short_texts_are_judged_on_long_ones(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for n, text in enumerate(corpora.genre_texts("prose", "evaluation")[:1] * 3):
        files.append(tmp_path / f"{n}.txt")
        files[n].write_text("\n".join(text.paragraphs[n::3]))
    out = tmp_path / "quality.json"
    run(
        quality.main, monkeypatch,
        ["--model", tiny, "--length", 1280, "--found-at", 640, "--targets", "budget=0.2",
         "--nll", 0.05, "--search-scored", 300, "--scored", 200, "--trials", 2,
         "--sink-tiles", 0, "--documents", 1, 1, 1, "--calibration-text", files[0],
         "--search-text", files[1], "--text", files[2], "--out", out],
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert (found["about"]["length"], found["about"]["found_at"]) == (1280, 640)
    solved, fitted = found["Budget(eps=0.2)"], found["Budget(eps=0.2) fitted"]
    assert 0.05 < fitted["dropped"] <= solved["dropped"] < 1  # later rows keep more of a fit
    assert found["Quality(nll=0.05) auto"]["proof"]["tokens"] == 300
    assert found["Quality(nll=0.05) auto fitted"]["proof"] is None
    assert found["Quality(nll=0.05) auto"]["dropped"] > 0.05
