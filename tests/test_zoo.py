"""Hugging Face models, traced with fullgraph=True in a fresh process, against the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.zoo import ZOO

ROOT = Path(__file__).parent.parent
LIMIT = 1e-9  # of the output's standard deviation: models and operator run in float64
PROCESSES = 2  # each for its share of the models, so that test workers can take one each
SPARSE = [name for name, entry in ZOO.items() if entry.sites]
DENSE = [name for name, entry in ZOO.items() if entry.dense]


def _measure(names: list[str]) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.zoo_check", *names]
    ran = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    return {result.pop("name"): result for result in found}


class _Measured(dict[str, dict[str, Any]]):
    """What `tests.zoo_check` found, by model; measured when first asked for, by one test worker."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> dict[str, Any]:
        part = list(ZOO).index(name) % PROCESSES
        path = self.folder / f"zoo-{part}.json"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_text(json.dumps(_measure(list(ZOO)[part::PROCESSES])))
        self.update(json.loads(path.read_text()))
        return self[name]


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> _Measured:
    """The measurements, shared by the workers of this test run."""
    folder = tmp_path_factory.getbasetemp()
    return _Measured(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_the_operator_replaces_every_site(name: str, measured: _Measured) -> None:
    found, sites = measured[name], list(ZOO[name].sites)
    assert found["calibrated"] == sites
    assert found["rewritten"] == sites
    assert found["dense_reasons"] == {}
    assert found["calls_plain"] == len(sites)
    for reason in found["reasons"].values():
        assert reason is None or reason.startswith("decode")


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_dense_thresholds_change_nothing(name: str, measured: _Measured) -> None:
    found = measured[name]
    assert found["error_plain"] < (1e-5 if name == "gemma2" else LIMIT)  # its softmax is float32
    assert found["error_reverted"] == 0.0
    if "error_padded" in found:
        assert found["error_padded"] < LIMIT
        assert found["calls_padded"] == len(ZOO[name].sites)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SPARSE if ZOO[n].generates])
def test_generation_is_the_same(name: str, measured: _Measured) -> None:
    found = measured[name]
    assert found["same_tokens_plain"]
    assert found["same_tokens_padded" if ZOO[name].pads else "same_tokens_plain"]
    runs = 1 + ZOO[name].pads
    assert found["calls_generate"] == runs * len(ZOO[name].sites)  # prefill; decoding is dense


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["relative", "absolute"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_is_what_the_reference_says(name: str, gate: str, measured: _Measured) -> None:
    found = measured[name][f"sparse_{gate}"]
    assert found["skipped"] == pytest.approx(found["wanted"])
    assert any(rate > 0 for rate in found["skipped"].values())
    assert found["change"] > 1e-3
    assert found["error"] < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_what_is_not_understood_stays_dense(name: str, measured: _Measured) -> None:
    found = measured[name]
    assert list(found["dense_reasons"]) == list(ZOO[name].dense)
    assert found["calibrated"] == []
    assert found["error_untouched"] == 0.0
