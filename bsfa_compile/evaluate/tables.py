"""An evaluation as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bsfa_compile.evaluate.intervals import Estimate
from bsfa_compile.evaluate.outcome import Evaluation, Point


def markdown(evaluation: Evaluation) -> str:
    """The whole evaluation: for every length what each rule loses, then what tasks say."""
    e = evaluation
    versions = ", ".join(f"{name} {value}" for name, value in e.versions.items())
    parts = [f"# {e.model}\n\n{e.device}; {versions}; seed {e.seed}."]
    parts += [f"Searched for {name}: {proof}." for name, proof in e.proofs.items()]
    for length, documents in e.documents.items():
        points = [point for point in e.points if point.length == length]
        parts.append(
            f"## {length} tokens\n\nDocuments: {', '.join(documents)}; the last {e.scored} tokens "
            f"of each are scored.\n\n{loss_table(points)}"
        )
        if any(point.layer_errors for point in points):
            parts.append(f"Output of the attention layers:\n\n{layer_table(points)}")
        if points and points[0].scores:
            parts.append(f"{e.samples} prompts of each task.\n\n{score_table(points)}")
    parts.append(
        "dropped: share of the candidate tiles (visible, not always kept). NLL, perplexity and the "
        "change of NLL: of the documents' scored tokens, nats. KL: of the predictions from "
        "dense. same: the likeliest token is dense's. Error of a layer: |sparse - dense| / |dense| "
        "of what its attention module returns, the layers before it sparse too. x dense: speed of "
        f"a forward pass against the eager dense model, graphs run by {e.inner!r}. Tasks: share of "
        "the expected words in the greedy answer; the question stands in the sparse pass, decoding "
        "is dense.\n\n"
        f"{e.intervals}."
    )
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but the first column to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(value: Estimate, spec: str) -> str:
    """The mean and its interval: "0.5 [0.4, 0.6]"; the mean alone if nothing is known of it."""
    if not math.isfinite(value.low):
        return f"{value.mean:{spec}}"
    return f"{value.mean:{spec}} [{value.low:{spec}}, {value.high:{spec}}]"


def loss_table(points: Sequence[Point]) -> str:
    """Rules and genres against what they lose."""
    header = ("rule", "documents", "dropped", "x dense", "NLL", "ppl", "change", "KL", "same")
    rows = []
    if points:
        for loss in points[0].losses:
            ppl = f"{math.exp(loss.dense_nll):.3f}"
            rows.append(("dense", loss.genre, "0.0 %", "1.00", f"{loss.dense_nll:.3f}", ppl,
                         "", "", ""))  # fmt: skip
    for point in points:
        for loss in point.losses:
            nll = loss.dense_nll + loss.delta_nll.mean
            rows.append((
                point.rule,
                f"{loss.genre} ({loss.kl.n})",
                f"{100 * point.dropped:.1f} %",
                f"{point.dense_seconds / point.seconds:.2f}",
                f"{nll:.3f}",
                f"{math.exp(nll):.3f}",
                interval(loss.delta_nll, "+.4f"),
                interval(loss.kl, ".2g"),
                f"{100 * loss.agreement:.1f} %",
            ))  # fmt: skip
    return table(header, rows)


def layer_table(points: Sequence[Point]) -> str:
    """Relative error of the attention modules' outputs on the first document."""
    header = ("rule", "median error", "largest", "layer")
    rows = []
    for point in points:
        ranked = sorted(point.layer_errors.items(), key=lambda pair: pair[1])
        if ranked:
            (_, median), (worst, most) = ranked[len(ranked) // 2], ranked[-1]
            rows.append((point.rule, f"{median:.3f}", f"{most:.3f}", worst))
    return table(header, rows)


def score_table(points: Sequence[Point]) -> str:
    """Tasks against rules, dense first."""
    header = ["task", "dense", *(f"{point.rule} | change" for point in points)]
    rows = []
    for n, score in enumerate(points[0].scores):
        row = [score.task, interval(score.dense, ".2f")]
        for point in points:
            mine = point.scores[n]
            row += [interval(mine.sparse, ".2f"), interval(mine.change, "+.2f")]
        rows.append(row)
    return table([cell for name in header for cell in name.split(" | ")], rows)
