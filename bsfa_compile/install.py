"""Put the state of a model on its modules, and tell which module a site of a graph belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis

from bsfa_compile.calibrate.data import device_of
from bsfa_compile.errors import InputError
from bsfa_compile.passes.attach import Marks, announcer, attach, names, to_bits
from bsfa_compile.passes.sites import Site
from bsfa_compile.saving import follow
from bsfa_compile.state import Seen, State, ran_eager, remember, site_name, split_name

UNSEEN = (
    "a graph break separates the call of its module from its attention, so its thresholds do not "
    "reach the graph"
)


class Retrace(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """Tells Dynamo to trace the frame again, now that modules announce their buffers.

    Dynamo lets the first base pass through the backend call and forgets its speculations for the
    second, as it must: the hooks change the path that is traced.
    """


def module_id(site: Site) -> int | None:
    """id() of the site's module: Dynamo's stack keys are ids, "@n" appended for repeated calls."""
    digits = site.module.partition("@")[0]
    return int(digits) if digits.isdigit() else None


def mark_of(marks: Marks, site: Site) -> fx.Node | None:
    """The marker that announced the buffers of a site."""
    return marks.get((site.node.graph, site.module, site.path, site.ordinal))


def name_of(site: Site, known: Mapping[int, str], marked: bool) -> str:
    """The site's name in the model's words, else in the graph's.

    Attention outside any module of the graph is in the model's own forward if it is marked, and
    in the forward of some module that the graph does not tell if not.
    """
    number = module_id(site)
    if number is not None and number in known:
        return site_name(known[number], site.ordinal)
    if site.module == "" and not marked:
        return site.node.name
    return site_name(site.path, site.ordinal)


@torch.inference_mode(mode=False)
def install(model: nn.Module, state: State) -> None:
    """Put thresholds, counters and the announcing hook on the modules of a model.

    Raises InputError if a module is on the meta device, where its thresholds would be lost.
    """
    modules = dict(model.named_modules())
    by_module: dict[str, list[int]] = {}
    for name in state.thresholds.values:
        module_name, ordinal = split_name(name)
        by_module.setdefault(module_name, []).append(ordinal)
    default = device_of(model, torch.device("cpu"))
    state.names = {id(m): name for name, m in modules.items()}
    for module_name, ordinals in by_module.items():
        module = modules[module_name]
        device, buffers = device_of(module, default), {}
        if device.type == "meta":
            raise InputError(f"{module_name} has no weights yet (meta device): load them first")
        for n in range(max(ordinals) + 1):
            name = site_name(module_name, n)
            values = state.thresholds.values.get(name)
            if values is None:
                values = torch.full((1, 1), -torch.inf)
            thresholds, counters = names("thresholds", n), names("counters", n)
            buffers[thresholds] = to_bits(values, state.columns, device)
            buffers[counters] = torch.zeros(len(values), 2, dtype=torch.int64, device=device)
            if name in state.thresholds.values:
                state.homes[name] = (weakref.ref(module), thresholds, counters)
                state.sites.setdefault(name, Seen())
        pairs = tuple(
            (names("thresholds", n), names("counters", n)) for n in range(max(ordinals) + 1)
        )
        attach(module, buffers, announcer(pairs, ran_eager))
    remember(model, state)
    follow(model)
