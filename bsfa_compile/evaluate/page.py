"""The report of an evaluated model: sites, heads, tile maps, quality and speed in one page."""

from __future__ import annotations

from dataclasses import replace

import torch

import bsfa_compile as bsfa
from bsfa_compile.evaluate.models import LoadedModel
from bsfa_compile.evaluate.outcome import Evaluation, TileMap
from bsfa_compile.evaluate.run import Settings, pieces
from bsfa_compile.evaluate.tilemap import DROPPED, catching, kept_tiles, tile_map
from bsfa_compile.state import state_of


def page(loaded: LoadedModel, settings: Settings, evaluation: Evaluation) -> bsfa.Report:
    """The report of a model as `run` leaves it; reverts the model to catch its dense scores."""
    state = state_of(loaded.model)
    assert state is not None, "an evaluated model is optimized"
    told, thresholds = bsfa.report(loaded.model), state.thresholds
    bsfa.revert(loaded.model)
    return replace(told, evaluation=evaluation, tile_maps=_tile_maps(loaded, settings, thresholds))


@torch.no_grad()
def _tile_maps(
    loaded: LoadedModel, settings: Settings, thresholds: bsfa.Thresholds
) -> tuple[TileMap, ...]:
    """Of an early, the middle and a late site, the heads that drop least and most."""
    sites = [site for site in thresholds.values if "#" not in site]
    (piece, *_) = pieces(loaded, settings, "evaluation", settings.lengths[-1], count=1)
    found: list[TileMap] = []
    for part in (sites[: len(sites) // 3], sites, sites[-(len(sites) // 3) :]):
        if not part:
            continue
        with catching(loaded.model, part) as caught:
            loaded.model(input_ids=piece.input_ids, use_cache=False, logits_to_keep=1)
        held = caught()
        if held is not None and all(held.site != one.site for one in found):
            states = kept_tiles(held, thresholds)
            order = (states == DROPPED).sum(dim=(1, 2)).argsort().tolist()
            found += [tile_map(held, states, head) for head in dict.fromkeys((order[0], order[-1]))]
    return tuple(found)
