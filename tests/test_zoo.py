"""Hugging Face models, traced with fullgraph=True in a fresh process, against the reference.

A representative part of the zoo; `make zoo` runs all of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.zoo import ZOO
from tests.zoo_table import DOCUMENT, measure

PROCESSES = 2  # each for its share of the models, so that test workers can take one each
PART = [name for name, entry in ZOO.items() if entry.ci]


class _Measured(dict[str, dict[str, Any]]):
    """What `tests.zoo_check` found, by model; measured when first asked for, by one test worker."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> dict[str, Any]:
        part = PART.index(name) % PROCESSES
        path = self.folder / f"zoo-{part}.json"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_text(json.dumps(measure(PART[part::PROCESSES])))
        self.update(json.loads(path.read_text()))
        return self[name]


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> _Measured:
    """The measurements, shared by the workers of this test run."""
    folder = tmp_path_factory.getbasetemp()
    return _Measured(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", PART)
def test_every_site_is_as_the_zoo_says(name: str, measured: _Measured) -> None:
    assert measured[name]["wrong"] == []


def test_the_document_lists_the_zoo() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    listed = [row.split("|")[1].strip() for row in rows][1:]
    assert listed == list(ZOO)
