"""The loss a user accepts, and how it is measured: a model's outputs beside the dense model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bsfa_compile.calibrate.data import Call
from bsfa_compile.errors import InputError

_Z = 1.645  # one-sided 95 % of a normal distribution
_ROWS = 64  # positions whose whole vocabulary is normalised at a time, and that share a vote
_IGNORED = -100  # a label that does not count, as in transformers
_WORDS = {"nll": "ΔNLL", "kl": "KL", "error": "output error"}


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The end-to-end loss that is accepted, against dense attention; exactly one of:

    nll: nats per token by which the negative log-likelihood of held-out text may rise. kl: mean
    KL(dense || sparse) of the predictions, nats. error: |sparse - dense| / |dense| of the model's
    output, for models without a language head. scored: last positions of each held-out input that
    count; KL keeps scored x vocabulary float32 of each. Raises InputError for other values.
    """

    nll: float | None = None
    kl: float | None = None
    error: float | None = None
    scored: int = 1024

    def __post_init__(self) -> None:
        given = [name for name in _WORDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"Quality takes exactly one of nll, kl and error, got {given or 'none'}: for "
                "example Quality(nll=0.01)"
            )
        number = isinstance(self.limit, Real) and not isinstance(self.limit, bool)
        if not (number and 0 < self.limit < math.inf):
            raise InputError(f"Quality.{self.metric} must be above 0, got {self.limit!r}")
        if not isinstance(self.scored, int) or isinstance(self.scored, bool) or self.scored < 1:
            raise InputError(f"Quality.scored must be at least 1, got {self.scored!r}")

    @property
    def metric(self) -> str:
        """Which loss: "nll", "kl" or "error"."""
        return next(name for name in _WORDS if getattr(self, name) is not None)

    @property
    def limit(self) -> float:
        """How much of it."""
        value: float = getattr(self, self.metric)
        return value

    def __repr__(self) -> str:
        return f"Quality({self.metric}={self.limit})"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a Quality target came to on held-out inputs.

    metric, limit: the target. measured: the loss of these thresholds; upper: its 95 % confidence
    limit, which is what must not exceed the limit (equal to it for an output error). tokens:
    positions scored (values compared, for an output error). skipped: fraction of the held-out
    candidate tiles. holds: whether the limit held; if not, `measured`, `upper` and `skipped` are
    those of the mildest thresholds tried, and everything was left dense. trials: settings judged.
    also: mean losses in the language model's other metric, over no more than the last 256 positions
    of each input.
    """

    metric: str
    limit: float
    measured: float
    upper: float
    tokens: int
    skipped: float
    holds: bool
    trials: int
    also: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        loss = f"{_WORDS[self.metric]} {self.measured:+.4g}"
        if self.upper != self.measured:
            loss += f", with 95 % confidence at most {self.upper:.4g}"
        loss += "".join(f" ({_WORDS[name]} {mean:+.4g})" for name, mean in self.also.items())
        seen = f"over {self.tokens} held-out positions at {self.skipped:.1%} of tiles skipped"
        if self.metric == "error":
            seen = f"on held-out inputs at {self.skipped:.1%} of tiles skipped"
        if self.holds:
            return f"{loss}, {seen}: within {self.limit:g}"
        return f"NOT HELD, so all is dense: {loss}, {seen}; asked for {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss over several inputs: mean and its upper 95 % confidence limit, positions counted."""

    mean: float
    upper: float
    tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What is kept of a dense output: `values` on the CPU, at the positions `where`."""

    call: Call
    values: Tensor
    where: Tensor
    targets: Tensor


class Meter:
    """Measures one metric ("nll", "kl" or "error") of outputs against dense ones."""

    def __init__(self, metric: str, scored: int) -> None:
        self.metric, self.scored = metric, scored

    def prepare(self, forward: Callable[..., Any], call: Call) -> Call:
        """The call without what is not scored: no cache, and logits at the end only."""
        args, kwargs = call
        known = signature(forward).parameters
        more: dict[str, Any] = {}
        if "use_cache" in known:
            more["use_cache"] = False
        padded = kwargs.get("attention_mask")
        whole = not isinstance(padded, Tensor) or bool((padded != 0).all())
        if self.metric != "error" and "logits_to_keep" in known and "labels" not in kwargs:
            more["logits_to_keep"] = self.scored + 1 if whole else 0
        return args, {**more, **kwargs}

    @torch.no_grad()
    def reference(self, output: object, call: Call) -> Reference:
        """Keep of a dense output what later ones are compared with."""
        values = _main(output)
        if self.metric == "error":
            none = torch.empty(0)
            return Reference(call=call, values=values.cpu(), where=none, targets=none)
        where, targets = self._scored(values, call)
        picked = values[where.to(values.device)]
        if self.metric == "nll":
            kept = torch.cat([_nll(rows, at) for rows, at in _chunks(picked, targets)])
        else:
            kept = torch.cat([rows.float().log_softmax(-1).cpu() for rows in picked.split(_ROWS)])
        return Reference(call=call, values=kept.cpu(), where=where, targets=targets)

    @torch.no_grad()
    def losses(self, output: object, dense: Reference) -> Tensor:
        """float64: loss at each position [n]; for "error" [2]: squared error, squared norm."""
        values = _main(output)
        if self.metric == "error":
            given, wanted = values.cpu().double(), dense.values.double()
            return torch.stack([(given - wanted).square().sum(), wanted.square().sum()])
        picked = values[dense.where.to(values.device)]
        if self.metric == "nll":
            found = [_nll(rows, at) for rows, at in _chunks(picked, dense.targets)]
            return torch.cat(found).cpu().double() - dense.values.double()
        found = []
        for rows, p in zip(picked.split(_ROWS), dense.values.split(_ROWS), strict=True):
            kept = p.to(rows.device)
            gap = kept - rows.float().log_softmax(-1)
            # A class that both rule out (-inf - -inf) costs nothing.
            found.append((kept.exp() * gap.nan_to_num(0.0)).sum(-1, dtype=torch.float64).cpu())
        return torch.cat(found)

    def pool(self, losses: Sequence[Tensor]) -> Loss:
        """The loss over several inputs; a NaN among them makes it infinite."""
        if self.metric == "error":
            error, norm = torch.stack(list(losses)).sum(dim=0).tolist()
            ratio = math.sqrt(error / norm) if norm else math.inf * bool(error)
            value = math.inf if math.isnan(ratio) else ratio
            return Loss(mean=value, upper=value, tokens=0)
        every = torch.cat(list(losses))
        if not bool(every.isfinite().all()):
            return Loss(mean=math.inf, upper=math.inf, tokens=len(every))
        mean, upper = float(every.mean()), math.inf
        # Neighbouring tokens share their context: a run of them is one independent observation.
        run = max(1, min(_ROWS, len(every) // 16))
        votes = torch.stack([part.mean() for loss in losses for part in loss.split(run)])
        if len(votes) > 1:
            upper = mean + _Z * float(votes.std()) / math.sqrt(len(votes))
        return Loss(mean=mean, upper=upper, tokens=len(every))

    def _scored(self, logits: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Which positions count, and the tokens that they predict [n]; both on the CPU."""
        mask, tokens = call[1].get("attention_mask"), _tokens(call)
        sequence = logits.dim() == 3 and tokens is not None
        if self.metric == "nll" and not sequence:
            raise InputError(
                "Quality(nll=...) needs token ids (input_ids, or a first argument [B, L] of "
                f"integers) and logits [B, L, vocabulary], got logits {list(logits.shape)}; "
                "use Quality(kl=...) or Quality(error=...) for this model"
            )
        where = torch.ones(logits.shape[:-1], dtype=torch.bool)
        if not sequence or tokens is None:
            return where, torch.zeros(where.numel(), dtype=torch.int64)
        n = logits.shape[1]
        following = torch.nn.functional.pad(tokens, (0, 1), value=_IGNORED)[:, 1:][:, -n:]
        where = following != _IGNORED
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == tokens.shape[1]:
            real = torch.nn.functional.pad(mask.cpu() != 0, (0, 1))[:, 1:][:, -n:]
            where &= real
        later = where.flip(1).cumsum(1).flip(1)  # positions from here on that count
        where &= later <= self.scored
        if not bool(where.any()):
            raise InputError(
                f"no position can be scored: the logits are {list(logits.shape)}; give inputs of "
                "more than one token, without logits_to_keep=1"
            )
        return where, following[where]


def _tokens(call: Call) -> Tensor | None:
    """Token ids or labels [B, L] of a call, on the CPU; None if it has none."""
    args, kwargs = call
    for value in (kwargs.get("labels"), kwargs.get("input_ids"), *args[:1]):
        if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
            return value.cpu().long()
    return None


def _main(output: object) -> Tensor:
    """The tensor that counts: logits, last hidden state, or the first of floating point."""
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    found = next(_floats(output), None)
    if found is None:
        raise InputError(
            f"the model's output is a {type(output).__name__} without a tensor of floating point: "
            "there is nothing to measure quality by"
        )
    return found


def _floats(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(item)


def _chunks(rows: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(rows.split(_ROWS), targets.to(rows.device).split(_ROWS), strict=True)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
