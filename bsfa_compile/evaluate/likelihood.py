"""Next-token likelihood of a causal language model, and how far a sparse one moves from dense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bsfa_compile.errors import InputError

ROWS = 64  # positions whose whole vocabulary is normalised at a time


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A sparse model against the dense one over the same scored tokens; nats per token.

    `delta_nll_se` is the standard error of `delta_nll`, the tokens taken as independent.
    `kl` is KL(dense || sparse); `agreement` the share of positions whose likeliest token is the
    same.
    """

    tokens: int
    dense_nll: float
    delta_nll: float
    delta_nll_se: float
    kl: float
    agreement: float


@torch.no_grad()
def tail_logits(model: nn.Module, input_ids: Tensor, last: int) -> Tensor:
    """Logits that predict the last `last` tokens of one document: [last, vocabulary].

    input_ids [1, L] with L > last. The model is called as a Hugging Face causal language model;
    `logits_to_keep` spares the output head on the positions that are not scored. The dtype is the
    model's: see `float32_head`.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise InputError(f"input_ids: expected one document [1, L], got {list(input_ids.shape)}")
    if not 0 < last < input_ids.shape[1]:
        raise InputError(
            f"last: expected between 1 and {input_ids.shape[1] - 1} for a document of "
            f"{input_ids.shape[1]} tokens (the first token is never predicted), got {last}"
        )
    logits: Tensor = model(input_ids=input_ids, use_cache=False, logits_to_keep=last + 1).logits
    return logits[0, -(last + 1) : -1]


@contextmanager
def float32_head(model: Any) -> Iterator[None]:
    """Inside, a half-precision model's output head gives float32 logits.

    Rounding logits to bfloat16 alone is a KL divergence of about 1e-3, as much as a good rule
    costs. Enter it before the model is rewritten, so that both models are judged through it.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return

    def widen(linear: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.float()
        return nn.functional.linear(inputs[0].float(), linear.weight.float(), bias)

    handle = head.register_forward_hook(widen)
    try:
        yield
    finally:
        handle.remove()


def compare(dense: Tensor, sparse: Tensor, targets: Tensor) -> Comparison:
    """Compare logits [n, vocabulary] of two models that predict the same `targets` [n].

    The tensors may live on different devices; the arithmetic is the sparse logits'.
    """
    if dense.shape != sparse.shape or targets.shape != dense.shape[:1] or len(targets) == 0:
        raise InputError(
            "compare: expected two logits tensors [n, vocabulary] and targets [n], n > 0, got "
            f"{list(dense.shape)}, {list(sparse.shape)} and {list(targets.shape)}"
        )
    nll, delta, kl, same = [], [], [], []
    for first in range(0, len(targets), ROWS):
        rows = slice(first, first + ROWS)
        p = torch.log_softmax(dense[rows].to(sparse.device).float(), dim=-1)
        q = torch.log_softmax(sparse[rows].float(), dim=-1)
        at = targets[rows, None].to(p.device)
        nll.append(-p.gather(1, at)[:, 0].double())
        delta.append((p.gather(1, at) - q.gather(1, at))[:, 0].double())
        kl.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
    difference = torch.cat(delta)
    n = len(difference)
    return Comparison(
        tokens=n,
        dense_nll=float(torch.cat(nll).mean()),
        delta_nll=float(difference.mean()),
        delta_nll_se=float(difference.std() / math.sqrt(n)) if n > 1 else math.inf,
        kl=float(torch.cat(kl).mean()),
        agreement=float(torch.cat(same).mean()),
    )


def pool(comparisons: Sequence[Comparison]) -> Comparison:
    """One comparison over several documents, each weighed by its scored tokens."""
    if not comparisons:
        raise InputError("pool: expected at least one comparison, got none")
    total = sum(c.tokens for c in comparisons)

    def mean(values: Sequence[float]) -> float:
        return sum(c.tokens * v for c, v in zip(comparisons, values, strict=True)) / total

    return Comparison(
        tokens=total,
        dense_nll=mean([c.dense_nll for c in comparisons]),
        delta_nll=mean([c.delta_nll for c in comparisons]),
        delta_nll_se=math.sqrt(sum((c.tokens * c.delta_nll_se) ** 2 for c in comparisons)) / total,
        kl=mean([c.kl for c in comparisons]),
        agreement=mean([c.agreement for c in comparisons]),
    )
