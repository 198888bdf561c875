"""The crossover from dense to sparse: shipped, measured, stored, obeyed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bsfa_compile import cli
from bsfa_compile.ops import crossover, race
from bsfa_compile.ops.attention import block_sparse_attention
from bsfa_compile.ops.crossover import NEVER, SHIPPED, Crossover
from bsfa_compile.ops.library import attention
from bsfa_compile.ops.race import Contest

CPU = torch.device("cpu")
_read = crossover._stored


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder that is read."""
    monkeypatch.setenv("BSFA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(crossover, "_stored", _read)
    crossover.of.cache_clear()
    yield tmp_path / crossover.FILE_NAME
    crossover.of.cache_clear()


def dropped(tokens: int) -> int:
    """Tiles that a call drops whose rule drops every tile it may."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, tokens, 8).unbind(0)
    rule = ("relative", "auto", 1, 128, 64, True)
    mask = (None, None, 0, True, None, None, None)
    *_, counts = attention(q, k, v, torch.full((2, 1), torch.inf), *mask, *rule)
    return int(counts[:, 0].sum())


def test_what_is_shipped_holds_until_something_is_stored(cache: Path) -> None:
    assert crossover.of(CPU) == SHIPPED["cpu"]
    assert dropped(512) == 0
    found = Crossover(tokens=256, skipped=0.5)
    assert crossover.store(CPU, found) == cache
    assert crossover.of(CPU) == found
    assert dropped(512) > 0 and dropped(192) == 0
    crossover.store(CPU, replace(found, tokens=NEVER))
    assert dropped(4096) == 0


def test_other_devices_stay_in_the_file(cache: Path) -> None:
    cache.write_text(json.dumps({"Some Card": {"tokens": 7, "skipped": 0.0}}))
    crossover.store(CPU, Crossover(tokens=9))
    assert set(json.loads(cache.read_text())) == {"Some Card", crossover.device_name(CPU)}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"tokens": 1, "else": 2}}', '{"a": 3}'])
def test_a_damaged_file_is_told_and_not_used(cache: Path, text: str) -> None:
    cache.write_text(text)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert crossover.of(CPU) == SHIPPED["cpu"]


def contests(device: str, *rows: tuple[int, float, float]) -> Crossover:
    given = [Contest(tokens=n, skipped=skipped, ratio=ratio) for n, skipped, ratio in rows]
    return race.decide(torch.device(device), given)


def test_the_decision() -> None:
    cuda = [(512, 0.2, 1.3), (1024, 0.2, 0.9), (2048, 0.2, 1.0), (4096, 0.2, 1.2)]
    assert contests("cuda", *cuda) == Crossover(tokens=2048)
    assert contests("cuda", (512, 0.2, 1.2), (1024, 0.2, 0.8)).tokens == NEVER
    cpu = [(1024, 0.5, 0.8), (1024, 0.9, 1.0), (2048, 0.5, 0.85), (2048, 0.9, 1.25)]
    assert contests("cpu", *cpu) == Crossover(tokens=2048, skipped=0.7)
    assert contests("cpu", (1024, 0.5, 1.1), (1024, 0.9, 1.4)).skipped == 0.5
    assert contests("cpu", (1024, 0.5, 0.5), (1024, 0.9, 0.8)).tokens == NEVER


def test_the_command_measures_and_stores(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = replace(race._COURSES["cpu"], heads=2, kv_heads=1, lengths=(512, 768), skips=(0.5,))
    monkeypatch.setitem(race._COURSES, "cpu", course)
    result = CliRunner().invoke(cli.app, ["crossover", "--device", "cpu", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    rates = [float(line.split(",")[1].split("%")[0]) for line in result.output.splitlines()[1:3]]
    assert all(15 < rate < 40 for rate in rates)
    (stored,) = json.loads(cache.read_text()).values()
    assert Crossover(**stored) == crossover.of(CPU)


def test_the_functions_own_calls_follow_the_rule_by_default(cache: Path) -> None:
    """Only `dense_if_faster` gives the crossover a say."""
    crossover.store(CPU, Crossover(tokens=NEVER))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 512, 8).unbind(0)
    sparse = block_sparse_attention(q, k, v, torch.full((2,), torch.inf), is_causal=True)
    dense = block_sparse_attention(q, k, v, is_causal=True)
    assert not torch.allclose(sparse, dense)
