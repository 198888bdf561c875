"""Run a model eagerly with the reference in the place of attention, thresholds by site."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from bsfa_compile.calibrate import Thresholds
from bsfa_compile.ops import reference
from bsfa_compile.ops.tiles import Geometry


class Oracle:
    """The reference in the place of SDPA.

    counts: site -> (dropped, candidates) so far. causal, windows: what the sites' masks are;
    padding bool [B, Lk].
    """

    def __init__(
        self,
        model: nn.Module,
        thresholds: Thresholds,
        *,
        causal: bool,
        windows: Mapping[str, int | None],
        padding: Tensor | None,
    ) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.thresholds, self.causal, self.windows = thresholds, causal, windows
        self.padding = padding
        self.counts: dict[str, tuple[int, int]] = {}
        self._stack: list[nn.Module] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> Tensor:
        """What is called instead of scaled_dot_product_attention."""
        name, t = self.names[self._stack[-1]], self.thresholds
        g = Geometry(
            q_len=q.shape[2],
            k_len=k.shape[2],
            is_causal=self.causal,
            window=self.windows[name],
            sink_tiles=t.sink_tiles,
            block_q=t.block_q,
            block_k=t.block_k,
        )
        scale = options.get("scale") or q.shape[-1] ** -0.5
        pad, softcap = self.padding, options.get("softcap")
        values = t.values[name].double()
        kept, every, least = (
            reference.tile_mask(
                q,
                k,
                bar.expand_as(values),
                g,
                key_padding_mask=pad,
                scale=scale,
                softcap=softcap,
                gate=t.gate,
            )
            for bar in (values, values.new_full((), -torch.inf), values.new_full((), torch.inf))
        )
        dropped, candidates = self.counts.get(name, (0, 0))
        dropped += int((every & ~kept).sum())
        candidates += int((every & ~least).sum())
        self.counts[name] = dropped, candidates
        out, _lse = reference.attention(
            q, k, v, kept, g, key_padding_mask=pad, scale=scale, softcap=softcap
        )
        return out

    def attend_eager(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """What is called instead of a Hugging Face model's written-out attention."""
        out = self.attend(q, k, v, scale=options["scaling"], softcap=options.get("softcap"))
        return out.transpose(1, 2).contiguous(), None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, eager calls of the model use the reference."""

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(module)

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            self._stack.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        with ExitStack() as patches:
            target = "torch.nn.functional.scaled_dot_product_attention"
            patches.enter_context(mock.patch(target, self.attend))
            for home in {sys.modules[type(module).__module__] for module in self.names}:
                if hasattr(home, "eager_attention_forward"):
                    written = mock.patch.object(home, "eager_attention_forward", self.attend_eager)
                    patches.enter_context(written)
            try:
                with torch.no_grad():
                    yield
            finally:
                for hook in hooks:
                    hook.remove()
