"""The whole zoo, and docs/coverage.md from it: python -m tests.zoo_table [NAME...]."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.zoo import ZOO

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "coverage.md"
_INTRODUCTION = """# Coverage

What `bsfa.apply` makes of {count} architectures of transformers {transformers}, torch {torch}: tiny
models with random weights, on a CPU, in float64, traced as one graph each. `make zoo` measures this
table anew and fails if anything in it is not as `tests/zoo_*.py` say it must be.

- *sparse*: attention sites that became the operator. *dense*: sites that stay as they were,
  and why.
- *error*: the largest difference of the output at thresholds of -inf from the untouched model's,
  in its standard deviations; *padded*: the same with left padding, where the model takes any.
  gemma2, gptj and codegen compute their softmax in float32 whatever their weights are.
- *generate*: whether greedy generation with a cache gives the same tokens, padded and not. Steps
  of one token are dense by design.
- *door*: sites that are sparse without a graph, by `attn_implementation="bsfa"`, with the same
  checks of outputs and tokens; empty where the model's attention is not transformers' own.
- *skipped*: tiles dropped at thresholds that drop some, by the relative gate. Where masks are
  plain, the output there was compared with the reference's too, for both gates.

{sites} sites sparse, {dense} dense with a reason, none unexplained.

| architecture | kind | sparse | dense | error | padded | generate | door | skipped |
|---|---|---|---|---|---|---|---|---|
"""


def measure(names: list[str]) -> dict[str, dict[str, Any]]:
    """What `tests.zoo_check` finds, by model, in a fresh process."""
    command = [sys.executable, "-m", "tests.zoo_check", *names]
    ran = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    return {result.pop("name"): result for result in found}


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    entry = ZOO[name]
    reasons = Counter(found["dense"].values())
    dense = "; ".join(f"{n}: {why}" for why, n in reasons.items())
    rates = [rate for rate in found.get("sparse_relative", {}).get("skipped", {}).values()]
    same = [value for key, value in found.items() if key.startswith("same_tokens")]
    cells = (
        name,
        entry.family,
        str(len(found["calibrated"])),
        dense or "0",
        f"{found['error_plain']:.0e}",
        f"{found['error_padded']:.0e}" if "error_padded" in found else "",
        ("same" if all(same) else "DIFFERS") if same else "",
        str(len(found["door"])) if "door" in found else "",
        f"{sum(rates) / len(rates):.0%}" if rates else "",
    )
    return f"| {' | '.join(cells)} |"


def document(measured: dict[str, dict[str, Any]]) -> str:
    """The text of docs/coverage.md."""
    introduction = _INTRODUCTION.format(
        count=len(measured),
        transformers=version("transformers"),
        torch=version("torch"),
        sites=sum(len(found["calibrated"]) for found in measured.values()),
        dense=sum(len(found["dense"]) for found in measured.values()),
    )
    return introduction + "\n".join(row(*item) for item in measured.items()) + "\n"


def main(names: list[str]) -> int:
    """Measure, tell, and write the document if all of the zoo was asked for."""
    measured, failures, chosen = dict[str, Any](), 0, names or list(ZOO)
    for start in range(0, len(chosen), 8):
        found = measure(chosen[start : start + 8])
        measured |= found
        for name, facts in found.items():
            failures += bool(facts["wrong"])
            print(name, "; ".join(facts["wrong"]) or "as expected", flush=True)
    if not names and not failures:
        DOCUMENT.write_text(document(measured))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
