"""Calibration without tracing, for models that attend through attn_implementation="bsfa".

Tracing makes a model build the masks that its eager forward leaves out: gigabytes at 32k tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bsfa_compile.calibrate.observer import Observer
from bsfa_compile.passes.rewrite import Rule
from bsfa_compile.state import attends_by_itself, site_name

if TYPE_CHECKING:
    from bsfa_compile.huggingface.masks import Structure  # which imports transformers

_NAME = "_attn_implementation"
_watchers: list[EagerWatcher] = []


def attends_eagerly(model: nn.Module) -> bool:
    """Whether all of a model's attention goes through attn_implementation="bsfa"."""
    named = [m for m in model.modules() if hasattr(getattr(m, "config", None), _NAME)]
    return bool(named) and all(attends_by_itself(module) for module in named)


class EagerWatcher:
    """Observes the attention calls of a model; `sparse` and `dense` as of `watch.Watcher`."""

    def __init__(self, model: nn.Module, observer: Observer, rule: Rule) -> None:
        self.sparse: set[str] = set()
        self.dense: dict[str, str] = {}
        self._observer, self._rule = observer, rule
        self._names = {id(module): name for name, module in model.named_modules()}
        self._handles: dict[str, Tensor] = {}
        self._calls: Counter[int] = Counter()  # of attention, in this call of each module
        self._hooks: list[RemovableHandle] = []

    @contextmanager
    def watching(self) -> Iterator[EagerWatcher]:
        """Inside, calls of the model are observed."""
        _watchers.append(self)
        try:
            yield self
        finally:
            _watchers.remove(self)
            for hook in self._hooks:
                hook.remove()

    def saw(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        mask: Structure | None,
        reason: str | None,
        **score: Any,
    ) -> None:
        """A call; reason: why it cannot be sparse; score: softcap and scale."""
        if id(module) not in self._names:
            return
        if id(module) not in self._calls:
            self._hooks.append(module.register_forward_pre_hook(self._begin))
        name = site_name(self._names[id(module)], self._calls[id(module)])
        self._calls[id(module)] += 1
        if reason is not None or mask is None:
            self.dense.setdefault(name, reason or "")
            return
        self.sparse.add(name)
        if name not in self._handles:
            self._handles |= self._observer.open([name])
        rule = self._rule
        torch.ops.bsfa.observe_v1(
            q,
            k,
            mask.key_padding,
            None,
            mask.q_start,
            mask.is_causal,
            mask.window,
            score["softcap"],
            score["scale"],
            rule.sink_tiles,
            rule.block_q,
            rule.block_k,
            self._handles[name],
        )

    def _begin(self, module: nn.Module, _: object) -> None:
        self._calls[id(module)] = 0


def watched() -> bool:
    """Whether any model's calls are to be told."""
    return bool(_watchers)


def tell(module: nn.Module, *seen: Any, **score: Any) -> None:
    """Tell every watcher of a call, see `EagerWatcher.saw`."""
    for watcher in _watchers:
        watcher.saw(module, *seen, **score)
