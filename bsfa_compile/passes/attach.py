"""State on a model's modules: buffers, and the hook that shows them to a compiler.

Dynamo compiles one graph for many layers, so what differs between layers must be an *input* of
the graph: a buffer of the attention module, announced by a forward pre-hook that calls the marker
bsfa::site_v1(thresholds, counters) while the module is being traced. The backend reads the
marker and takes it out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bsfa_compile.ops import library
from bsfa_compile.passes.sites import graphs, owner

PREFIX = "bsfa_"


@dataclass(frozen=True)
class Announce:
    """A forward pre-hook: shows pairs of buffers, by name, to whoever traces the module.

    Made by `announcer`, which gives equal modules the same object: Dynamo guards on its identity,
    and layers that share a graph must pass that guard.
    """

    pairs: tuple[tuple[str, str], ...]
    eager: Callable[[nn.Module], None] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            if not _one_token(module, args, kwargs):
                for first, second in self.pairs:
                    library.site(getattr(module, first), getattr(module, second))
        elif self.eager is not None:
            self.eager(module)


def _one_token(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a module of transformers decodes: its hidden states are [batch, 1, width].

    Its attention is dense then, and buffers that nobody needs cost time at every token.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    single = isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[1] == 1
    return single and hasattr(getattr(module, "config", None), "_attn_implementation")


@functools.cache
def announcer(
    pairs: tuple[tuple[str, str], ...], eager: Callable[[nn.Module], None] | None = None
) -> Announce:
    """The hook for these pairs of buffers; `eager` is called when nothing traces the module."""
    return Announce(pairs, eager)


def names(kind: str, ordinal: int) -> str:
    """The name of a buffer: bsfa_thresholds_0, bsfa_counters_0, bsfa_observer_0."""
    return f"{PREFIX}{kind}_{ordinal}"


def attach(module: nn.Module, buffers: Mapping[str, Tensor], hook: Announce) -> None:
    """Register buffers, not part of the state_dict, and the hook, in place of any of ours."""
    detach(module)
    for name, value in buffers.items():
        module.register_buffer(name, value, persistent=False)
    module.register_forward_pre_hook(hook, with_kwargs=True)


def detach(module: nn.Module) -> None:
    """Remove our buffers and hooks from one module; nothing else changes."""
    for name in [n for n in module._buffers if n.startswith(PREFIX)]:
        delattr(module, name)
    hooks = module._forward_pre_hooks
    for key in [k for k, hook in hooks.items() if isinstance(hook, Announce)]:
        del hooks[key]
        del module._forward_pre_hooks_with_kwargs[key]


@dataclass(frozen=True)
class Load:
    """The state that one module carried."""

    module: nn.Module
    buffers: Mapping[str, Tensor]
    hook: Announce


def unload(model: nn.Module) -> list[Load]:
    """Take our state off every module of a model; `reload` puts it back."""
    taken = []
    for module in model.modules():
        hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, Announce)]
        buffers = {n: b for n, b in module._buffers.items() if n.startswith(PREFIX)}
        detach(module)
        if hooks:
            ours = {n: b for n, b in buffers.items() if b is not None}
            taken.append(Load(module, ours, hooks[0]))
    return taken


def reload(taken: Sequence[Load]) -> None:
    """Inverse of `unload`."""
    for load in taken:
        attach(load.module, load.buffers, load.hook)


def attached(module: nn.Module) -> bool:
    """Whether a module carries our state."""
    return any(isinstance(hook, Announce) for hook in module._forward_pre_hooks.values())


def to_bits(thresholds: Tensor, columns: int, device: torch.device) -> Tensor:
    """Thresholds [H, n] as a buffer int32 [H, columns]: the bits of float32.

    As integers they survive model.to(bfloat16). The last column is repeated: it holds for all
    later q blocks.
    """
    missing = columns - thresholds.shape[1]
    wide = torch.cat([thresholds, thresholds[:, -1:].expand(-1, missing)], dim=1)
    return wide.to(torch.float32).contiguous().view(torch.int32).to(device, copy=True)


Marks = dict[tuple[fx.Graph, str, str, int], fx.Node]


def markers(gm: fx.GraphModule) -> Marks:
    """The marker calls of a graph and its sub-graphs, by graph, module key, path and ordinal."""
    found: Marks = {}
    for part in graphs(gm):
        seen: dict[tuple[str, str], int] = {}
        for node in part.graph.nodes:
            if node.op == "call_function" and node.target is library.site:
                key, path = owner(node)
                found[part.graph, key, path, seen.setdefault((key, path), 0)] = node
                seen[key, path] += 1
    return found


def erase(gm: fx.GraphModule, found: Sequence[fx.Node]) -> None:
    """Take markers out of the graphs again."""
    for node in found:
        node.graph.erase_node(node)
    for part in graphs(gm):
        part.recompile()
