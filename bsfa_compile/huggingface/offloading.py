"""Key-value caches that transformers offloads to the host, in compiled calls: without streams."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import skip_code


@functools.cache
def _without_streams(kind: Any) -> type[Any]:
    """A subclass of a Cache whose update copies on the current stream, so that it can be traced.

    torch 2.11 crashes after it traced streams: Dynamo keeps weak references to them, which
    torch.cuda.Stream does not clear when it goes (pytorch/pytorch#183403). An update that is not
    traced at all would break the graph in every layer, and part attention from its mask.
    """
    usual = kind.update

    def update(
        self: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        for layer in self.layers[layer_idx : layer_idx + 1]:
            layer.prefetch()
        states: tuple[Tensor, Tensor] = usual(self, keys, values, layer_idx, *args, **kwargs)
        self.offload(layer_idx, self.only_non_sliding)
        # Where a model that is not compiled takes the cache over, it expects the next layer there.
        self.prefetch(layer_idx + 1, self.only_non_sliding)
        return states

    fields = {
        "update": update,
        "offloading": property(lambda self: False),
        "prefetch_stream": property(lambda self: nullcontext()),
    }
    return type(kind.__name__, (kind,), fields)


def _offloaded(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The offloaded caches that a call is given; an EncoderDecoderCache holds two."""
    found = []
    for given in (kwargs.get("past_key_values"), *args):
        first = getattr(given, "self_attention_cache", None)
        if first is not None:
            both = (first, given.cross_attention_cache)
            found += [cache for cache in both if getattr(cache, "offloading", False)]
        elif getattr(given, "offloading", False):
            found.append(given)
    return found


skip_code(_offloaded.__code__)


def without_streams(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled call that traces no streams of an offloaded cache.

    During the call such a cache has a subclass of its class: copies to the host and back happen
    as they would, but do not overlap with computation.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        caches = _offloaded(args, kwargs)
        if not caches or torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        kinds: list[Any] = [type(cache) for cache in caches]
        try:
            for cache, kind in zip(caches, kinds, strict=True):
                cache.prefetch_stream.synchronize()  # what an update without tracing began
                cache.__class__ = _without_streams(kind)
            return compiled(*args, **kwargs)
        finally:
            for cache, kind in zip(caches, kinds, strict=True):
                cache.__class__ = kind

    # Where `generate` compiles the model's call, for static caches, it must not trace what is ours.
    skip_code(call.__code__)
    return call
