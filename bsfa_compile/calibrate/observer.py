"""The operator that watches attention, bsfa::observe_v1, and the registry behind its handles.

    with Observer() as observer:
        handles = observer.open(["model.layers.0.self_attn", ...])   # int64 [2] tensors
        ...  # run a graph in which each site calls observe_v1(q, k, ..., handle)
    observer.statistics                                              # site -> SiteStatistics

The operator returns nothing. It counts the call in its handle, so that no compiler removes it,
and is not for CUDA graphs: a replay would observe nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from bsfa_compile.calibrate.measure import measure
from bsfa_compile.calibrate.operators import watching
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.errors import CalibrationError
from bsfa_compile.ops.tiles import Geometry


@dataclass(kw_only=True)
class _Slot:
    """One open site. `calls` counts calls that brought statistics; decoding steps do not.

    doubts: how its attention may differ from what was understood of it, each with a number on the
    site's device that is more than 0 if it does. Read at the end: reading waits for the device.
    """

    name: str
    max_k: int
    calls: int = 0
    doubts: dict[str, Tensor] = field(default_factory=dict)
    statistics: SiteStatistics | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_slots: dict[int, _Slot] = {}  # by the number in handle[0], while the observer is open
_next_id = itertools.count(1)


class Observer:
    """Opens handles for sites and holds their statistics; close it, or use it in a `with`.

    max_k: the largest k that TopK can ask for later; 0 remembers no midpoints.
    """

    def __init__(self, *, max_k: int = 128) -> None:
        self._max_k = max_k
        self._mine: dict[int, _Slot] = {}

    def open(
        self, names: Iterable[str], *, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """A handle for each site, int64 [2] = (observer id, calls seen).

        Raises CalibrationError if a name is open already.
        """
        handles = {}
        for name in names:
            if any(slot.name == name for slot in self._mine.values()):
                raise CalibrationError(f"site {name!r} is observed already: site names are unique")
            slot = _Slot(name=name, max_k=self._max_k)
            number = next(_next_id)
            self._mine[number] = _slots[number] = slot
            handles[name] = torch.tensor([number, 0], dtype=torch.int64, device=device)
        return handles

    @property
    def mismatches(self) -> dict[str, str]:
        """Sites whose attention `verify` found other than understood, and how it differs."""
        found = {}
        for slot in self._mine.values():
            for why, doubt in slot.doubts.items():
                if slot.name not in found and float(doubt) > 0:
                    found[slot.name] = why.format(float(doubt))
        return found

    @property
    def calls(self) -> dict[str, int]:
        """Calls that brought statistics, for every open site: 0 for one that never ran."""
        return {slot.name: slot.calls for slot in self._mine.values()}

    @property
    def statistics(self) -> dict[str, SiteStatistics]:
        """Statistics on the CPU of the sites that ran, in the order in which they were opened."""
        found = {}
        for slot in self._mine.values():
            with slot.lock:
                if slot.statistics is not None:
                    found[slot.name] = slot.statistics.to("cpu")
        return found

    def close(self) -> None:
        """Make the handles invalid. What was observed stays readable; closing twice is fine."""
        for number in self._mine:
            _slots.pop(number, None)

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _slot_of(handle: Tensor) -> _Slot:
    slot = _slots.get(int(handle[0]))
    if slot is None:
        raise CalibrationError(
            "a graph that is still being observed ran after its observer was closed: "
            "revert the model or trace it again"
        )
    return slot


def doubts(handle: Tensor) -> dict[str, Tensor]:
    """What tells whether the site of a handle was misread, see `_Slot`; to be added to."""
    return _slot_of(handle).doubts


def _observe(
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    q_start_tensor: Tensor | None,
    q_start: int,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    sink_tiles: int,
    block_q: int,
    block_k: int,
    handle: Tensor,
) -> None:
    """Add a call to the statistics of its site: q [B, H, Lq, D], k [B, Hkv, Lk, D].

    key_padding_mask bool [B, Lk], True for a real key. q_start_tensor, 0-d, overrides q_start.
    Decoding steps (one query row) and empty calls are not calibrated and not counted.
    """
    slot = _slot_of(handle)
    if q.shape[2] < 2 or 0 in q.shape or 0 in k.shape:
        return
    geometry = Geometry(
        q_len=q.shape[2],
        k_len=k.shape[2],
        q_start=q_start if q_start_tensor is None else int(q_start_tensor),
        is_causal=is_causal,
        window=window,
        sink_tiles=sink_tiles,
        block_q=block_q,
        block_k=block_k,
    )
    with slot.lock, torch.no_grad():
        into = _statistics_of(slot, q, geometry)
        added = measure(
            q.detach(),
            k.detach(),
            geometry,
            key_padding_mask=key_padding_mask,
            softcap=softcap,
            scale=q.shape[3] ** -0.5 if scale is None else scale,
            into=into,
        )
        if added or into.refused:
            slot.statistics = into
        if added:
            slot.calls += 1
            handle[1] += 1


def _statistics_of(slot: _Slot, q: Tensor, geometry: Geometry) -> SiteStatistics:
    fresh = SiteStatistics(
        q.shape[1],
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        sink_tiles=geometry.sink_tiles,
        max_k=slot.max_k,
        device=q.device,
    )
    known = slot.statistics
    if known is None:
        return fresh
    if known.config != fresh.config:
        raise CalibrationError(
            f"site {slot.name!r} was called with {fresh.config} after {known.config}: "
            "one site has one number of heads and one tile shape"
        )
    return known if known.counts.device == q.device else known.to(q.device)


watching(
    "observe_v1",
    "Tensor q, Tensor k, Tensor? key_padding_mask, Tensor? q_start_tensor, SymInt q_start, "
    "bool is_causal, SymInt? window, float? softcap, float? scale, int sink_tiles, int block_q, "
    "int block_k",
    _observe,
)
