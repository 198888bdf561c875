"""A Quality target -> the fastest thresholds that hold it, proven on held-out inputs.

In three steps:

    probe    each site (or run of sites) sparse by itself: what its lost mass costs in loss
    spread   a loss over all heads, by those costs and the calibration's histograms
    judge    held-out inputs end to end, until the largest loss that holds is found
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rich.progress import Progress
from torch import Tensor

from bsfa_compile.calibrate.calibration import Calibration, check_request
from bsfa_compile.calibrate.data import Call, samples
from bsfa_compile.calibrate.quality import Meter, Proof, Quality, Reference
from bsfa_compile.calibrate.solve import Budget, solve
from bsfa_compile.calibrate.spread import Spread, costs
from bsfa_compile.calibrate.thresholds import Thresholds
from bsfa_compile.errors import CalibrationError, InputError
from bsfa_compile.trial import Model, Trial, dense_values, trying

_PROBE = Budget(0.1)  # enough to be seen in the loss, little enough to be on the way there
_PROBES = 32  # at most; neighbouring sites of a deeper model share one
_PROBE_SCORED = 1024  # positions: to rank sites takes fewer than to prove a loss
_ALSO_SCORED = 256  # and what is only told along, fewer still
_CLOSE = 0.85  # a loss this near its limit is near enough


def search(
    model: Model,
    calibration: Calibration,
    target: Quality,
    held_out: object,
    *,
    probe: Call | None = None,
    gate: str = "relative",
    precision: str = "auto",
    max_length: int | None = None,
    trials: int = 8,
    progress: bool = True,
) -> Thresholds:
    """The thresholds that drop most tiles of those that hold a Quality target.

    held_out: model inputs that calibration did not see, in any form `optimize` takes them; the
    target holds if the upper 95 % confidence limit of their loss does, so few tokens prove little.
    probe: (args, kwargs) to learn the sites' costs from; the first held-out input if not given.
    max_length: fit every setting over positions for inputs of up to so many tokens, see
    `Calibration.thresholds`. trials: how many settings are judged at most. Beside the dense run of
    each input this takes a forward pass of the probe for every site, 32 at most, and one of each
    held-out input per trial.

    The model runs in eval mode without gradients and is unchanged afterwards. `Thresholds.proof`
    says what was measured. If nothing that drops tiles holds, a warning says so and every
    threshold is -inf, which is dense. Raises CalibrationError without statistics or data,
    InputError for a wrong argument.
    """
    if not isinstance(target, Quality):
        raise InputError(
            f"target must be a Quality, got {target!r}: Calibration.thresholds solves the others"
        )
    check_request(target, gate, precision, max_length)
    if trials < 1:
        raise InputError(f"trials must be at least 1, got {trials}")
    if not calibration.sites:
        raise CalibrationError("no attention was observed: there is nothing to search for")
    calls = list(samples(held_out, "held_out"))
    first = calls[0] if probe is None else probe
    groups = _groups(list(calibration.sites))
    with trying(model) as trial, Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("searching", total=len(groups) + 1 + len(calls) * (trials + 1))
        meters = [Meter(target.metric, target.scored)]
        dense: list[list[Reference]] = []
        for call in calls:
            prepared = meters[0].prepare(trial.forward, call)
            output = trial.run(prepared)
            if not dense:
                meters += _others(target, output, prepared)
            dense.append([meter.reference(output, prepared) for meter in meters])
            bar.advance(task)

        # KL is steadier than likelihood, and its scale does not matter here.
        steady = Meter(
            "error" if target.metric == "error" else "kl", min(target.scored, _PROBE_SCORED)
        )
        base = _base(calibration, gate, precision)

        def shaped(values: Mapping[str, Tensor]) -> Thresholds:
            made = replace(base, values=values)
            return made if max_length is None else calibration.fitted(made, max_length)

        first = steady.prepare(trial.forward, first)
        wanted = steady.reference(trial.run(first), first)
        trial.set(shaped(base.values), first)  # makes room for the columns of a fit
        probes = []
        for values, loss in _probes(trial, steady, wanted, base, groups):
            probes.append((values, loss))
            bar.advance(task)
        spread = Spread(calibration.sites, costs(calibration.sites, probes, gate), gate)

        best, mildest, count = None, None, 0
        hunt = _Hunt(target, spread.most)
        while count < trials and (aim := hunt.next()) is not None:
            values = spread.thresholds(aim)
            found = _judge(trial, meters, dense, shaped(values), target)
            count += 1
            bar.advance(task, len(calls))
            hunt.told(aim, found)
            if found.holds and (best is None or found.skipped >= best[1].skipped):
                best = values, found
            if mildest is None or found.skipped <= mildest.skipped:
                mildest = found
    assert mildest is not None, "at least one trial was made"
    values, proof = best or (dense_values(base.values), mildest)
    proof = replace(proof, trials=count)
    if best is None:
        warnings.warn(f"{target}: {proof}. {_advice(proof)}", stacklevel=2)
    return calibration.told(replace(shaped(values), target=repr(target), proof=proof))


def spread_by(model: Model, calibration: Calibration, probe: Call, scored: int) -> Spread:
    """Relative thresholds spread over the heads by what each site's lost mass costs on a probe.

    A forward pass for every site; the model is unchanged.
    """
    base, steady = _base(calibration, "relative", "auto"), Meter("kl", scored)
    with trying(model) as trial:
        first = steady.prepare(trial.forward, probe)
        wanted = steady.reference(trial.run(first), first)
        trial.set(base, first)
        groups = _groups(list(calibration.sites))
        found = list(_probes(trial, steady, wanted, base, groups))
    return Spread(calibration.sites, costs(calibration.sites, found, "relative"), "relative")


def _probes(
    trial: Trial, meter: Meter, dense: Reference, base: Thresholds, groups: Sequence[list[str]]
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """The thresholds of each group of sites, and the loss with all others dense."""
    for names in groups:
        values = _only(base.values, names)
        trial.set(replace(base, values=dense_values(base.values) | values), dense.call)
        loss = meter.pool([meter.losses(trial.run(dense.call), dense)]).mean
        yield values, loss**2 if meter.metric == "error" else loss


class _Hunt:
    """Which predicted loss to try next: towards the largest whose measured loss holds."""

    def __init__(self, target: Quality, most: float) -> None:
        self._limit = target.limit**2 if target.metric == "error" else target.limit
        self._squared = target.metric == "error"
        self._most = most
        # (aim, upper) of the largest that held and of the smallest that did not.
        self._low, self._high = (0.0, 0.0), (math.inf, math.inf)
        self._next: float | None = min(self._limit, most)

    def next(self) -> float | None:
        """None if no other is worth a trial."""
        return self._next

    def told(self, aim: float, found: Proof) -> None:
        """Learn what an aim came to."""
        upper = found.upper**2 if self._squared else found.upper
        ratio = self._limit / upper if upper > 0 else math.inf
        if found.holds:
            self._low = max(self._low, (aim, upper))
        else:
            self._high = min(self._high, (aim, upper))
        (low, under), (high, over) = self._low, self._high
        near = found.holds and ratio < 1 / _CLOSE
        if near or (found.holds and aim >= self._most) or found.skipped == 0:
            self._next = None
        elif low and high < math.inf:
            # Where a straight line meets the limit: a likelihood may fall before it rises.
            rise = (0.95 * self._limit - under) / (over - under) if over < math.inf else 0.5
            inside = low + (high - low) * min(max(rise, 0.1), 0.9)
            self._next = inside if high > 1.05 * low else None
        else:
            step = aim * min(max(ratio * 0.95, 1 / 16), 16.0)
            self._next = min(step if not found.holds else max(step, aim * 1.5), self._most)


def _others(target: Quality, output: object, call: Call) -> list[Meter]:
    """What a language model's output can be judged by besides, over few positions."""
    if target.metric == "error":
        return []
    meter = Meter("kl" if target.metric == "nll" else "nll", min(target.scored, _ALSO_SCORED))
    try:
        meter.reference(output, call)
    except InputError:  # no tokens to predict
        return []
    return [meter]


def _judge(
    trial: Trial,
    meters: Sequence[Meter],
    dense: Sequence[Sequence[Reference]],
    thresholds: Thresholds,
    target: Quality,
) -> Proof:
    """The loss of thresholds over all held-out inputs; the first meter's is the target's."""
    trial.set(thresholds, dense[0][0].call)
    losses: list[list[Tensor]] = [[] for _ in meters]
    for references in dense:
        output = trial.run(references[0].call)
        for meter, reference, found in zip(meters, references, losses, strict=True):
            found.append(meter.losses(output, reference))
    loss, *others = (meter.pool(found) for meter, found in zip(meters, losses, strict=True))
    return Proof(
        metric=target.metric,
        limit=target.limit,
        measured=loss.mean,
        upper=loss.upper,
        tokens=loss.tokens,
        skipped=trial.skipped(),
        holds=loss.upper <= target.limit,
        trials=1,
        also={m.metric: one.mean for m, one in zip(meters[1:], others, strict=True)},
    )


def _base(calibration: Calibration, gate: str, precision: str) -> Thresholds:
    """The probes' thresholds, all sites at once."""
    values = solve(calibration.sites, _PROBE, gate)
    return calibration.wrapped(values, gate, precision, repr(_PROBE))


def _groups(names: Sequence[str]) -> list[list[str]]:
    """At most `_PROBES` runs of neighbouring sites."""
    size = math.ceil(len(names) / _PROBES)
    return [list(names[i : i + size]) for i in range(0, len(names), size)]


def _only(values: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: values[name] for name in names}


def _advice(proof: Proof) -> str:
    if proof.skipped == 0:
        return "No held-out tile could be dropped: give longer inputs"
    if proof.measured <= proof.limit:
        return "The loss itself is within the limit: more held-out text would tell it from noise"
    return "Accept a larger loss, or calibrate on inputs more like these"
