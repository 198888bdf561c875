"""Gradients of the operators in `library`, through the tiles that were kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bsfa_compile.errors import BsfaError


def _save(
    ctx: Any, tensors: tuple[Tensor, ...], mask: Sequence[Any], blocks: Any, last: Sequence[Any]
) -> None:
    padding, start, *ctx.mask = mask
    ctx.blocks, ctx.trailing = blocks, len(last)
    ctx.save_for_backward(*tensors, padding, start, last[0] if last else None)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, _, *config = inputs
    out, lse, tile_mask, counts = output
    ctx.mark_non_differentiable(tile_mask, counts)
    _save(ctx, (q, k, v, out, lse, tile_mask), config[:7], config[10:12], config[13:])


def attend_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, tile_mask, *config = inputs
    _save(ctx, (q, k, v, *output, tile_mask), config[:7], config[7:9], config[9:])


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor, others: int) -> tuple[Any, ...]:
    """Of q, k, v, then None for `others` arguments, then of the sinks if they were passed."""
    *saved, sinks = ctx.saved_tensors
    grads = torch.ops.bsfa.attend_backward_v1(grad_out, grad_lse, *saved, *ctx.mask, *ctx.blocks)
    of_sinks = None
    if sinks is not None and ctx.needs_input_grad[-1]:
        out, lse = saved[3:5]
        share = torch.exp(sinks[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        through_out = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)
        of_sinks = (share * (grad_lse - through_out)).sum(dim=(0, 2))
    return *grads, *[None] * others, *[of_sinks] * ctx.trailing


class _Attention(torch.autograd.Function):
    """Attention where a gradient is wanted. keys: what to dispatch to."""

    @staticmethod
    def forward(ctx: Any, keys: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, ...] = torch.ops.bsfa.attention_v1.default.redispatch(keys, *args)
        _attention_context(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor, *_: Any) -> tuple[Any, ...]:
        return None, *_gradients(ctx, grad_out, grad_lse, 14)


_DEVICES = {torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA}


def _wants_gradient(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> bool:
    sinks = rest[14] if len(rest) > 14 else None
    own = q.requires_grad or k.requires_grad or v.requires_grad
    return own or (sinks is not None and sinks.requires_grad)


def of_attention(run: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of attention, which `run` computes on any device.

    As `register_autograd` would make it, but a call that wants no gradient is not dispatched once
    more: that is 4 us of host time.
    """
    differentiable: Any = _Attention
    after, below = torch._C._after_autograd_keyset, torch._C._AutoDispatchBelowAutograd
    direct: dict[int, bool] = {}  # by keys: whether a device is all that is left to dispatch to

    def attention(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and _wants_gradient(*args):
            return differentiable.apply(keys & after, *args)
        raw = keys.raw_repr()
        if raw not in direct:
            direct[raw] = (keys & after).highestPriorityTypeId() in _DEVICES
        with below():
            if direct[raw]:
                return run(*args)
            return torch.ops.bsfa.attention_v1.default.redispatch(keys & after, *args)

    return attention


def of_attend(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, grad_out, grad_lse, 10)


def twice(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise BsfaError(
        "block-sparse attention cannot be differentiated twice; leave out create_graph=True."
    )
