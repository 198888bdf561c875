"""The tiles of one head: its queries and keys caught in a dense run, then judged by each rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bsfa_compile.calibrate.thresholds import Thresholds
from bsfa_compile.evaluate.outcome import TileMap
from bsfa_compile.ops import library
from bsfa_compile.ops.tiles import Geometry, unpack

INVISIBLE, DROPPED, KEPT = range(3)


@dataclass(frozen=True, kw_only=True)
class Caught:
    """Inputs of one plainly causal attention call: q [1, H, L, D], k [1, Hkv, L, D]."""

    site: str
    q: Tensor
    k: Tensor
    scale: float | None


class _Mode(TorchFunctionMode):
    """Keeps the call of the site that comes first in `wanted`."""

    def __init__(self, wanted: Sequence[str]) -> None:
        super().__init__()
        self._rank = {site: n for n, site in enumerate(wanted)}
        self.inside: str | None = None
        self.caught: Caught | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention:
            site, self.inside = self.inside, None
            best = None if self.caught is None else self._rank[self.caught.site]
            plain = given.get("is_causal") and given.get("attn_mask") is None and len(args) == 3
            if plain and site is not None and (best is None or self._rank[site] < best):
                q, k, _ = args
                self.caught = Caught(site=site, q=q, k=k, scale=given.get("scale"))
        return func(*args, **given)


@contextmanager
def catching(model: nn.Module, sites: Sequence[str]) -> Iterator[Callable[[], Caught | None]]:
    """Inside, calls of the model are watched; afterwards the function gives what was caught.

    That is the plainly causal attention nearest to the middle of `sites`, module names; None if
    every one has a mask of its own, as sliding windows do.
    """
    middle = (len(sites) - 1) / 2
    mode = _Mode(sorted(sites, key=lambda site: abs(sites.index(site) - middle)))

    def watch(site: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            mode.inside = site

        return enter

    with ExitStack() as stack:
        for site in sites:
            handle = model.get_submodule(site).register_forward_pre_hook(watch(site))
            stack.callback(handle.remove)
        with mode:
            yield lambda: mode.caught


def kept_tiles(caught: Caught, thresholds: Thresholds) -> Tensor:
    """What thresholds do to every tile: int [heads, q blocks, key tiles] of the three states."""
    t, q, k = thresholds, caught.q, caught.k
    words, _ = library.gate(
        q,
        k,
        t.values[caught.site].to(q.device),
        *(None, None, 0, True, None, None, caught.scale),
        *(t.gate, t.precision, t.sink_tiles, t.block_q, t.block_k),
    )
    g = Geometry(
        q_len=q.shape[2], k_len=k.shape[2], is_causal=True, block_q=t.block_q, block_k=t.block_k
    )
    states = torch.where(unpack(words.cpu(), g.k_blocks)[0], KEPT, DROPPED)
    for i in range(g.q_blocks):
        first, stop = g.tiles(i)
        states[:, i, :first] = INVISIBLE
        states[:, i, stop:] = INVISIBLE
    return states[:, [i for i in range(g.q_blocks) if g.rows(i)[0] < g.rows(i)[1]]]


def typical_head(states: Tensor) -> int:
    """The head whose share of dropped tiles is the median of the heads."""
    dropped = (states == DROPPED).sum(dim=(1, 2))
    return int(dropped.sort().indices[len(dropped) // 2])


def tile_map(caught: Caught, states: Tensor, head: int) -> TileMap:
    """One head's tiles as data."""
    return TileMap(site=caught.site, head=head, tiles=states[head].tolist())
