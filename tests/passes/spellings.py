"""Attention in every spelling that people use, and what each means to the operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import toy

LENGTH, HEADS, DIM = 72, 2, 8
ROOT = math.sqrt(DIM)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
sdpa = F.scaled_dot_product_attention
SPELLINGS: dict[str, tuple[Attend, dict[str, Any]]] = {}


class Attention(nn.Module):
    """attend(q, k, v) [B, H, L, D] of projections of x [B, L, WIDTH], back as [B, L, WIDTH]."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(toy.WIDTH, 3 * toy.WIDTH)
        self.attend = attend
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(toy.heads, self.qkv(x).chunk(3, dim=-1))
        y = self.attend(3 * q, 3 * k, v)
        return y.transpose(1, 2).flatten(2)


def spelling(**meaning: Any) -> Callable[[Attend], Attend]:
    """Register a spelling; meaning: the arguments of the operator that say the same."""

    def register(attend: Attend) -> Attend:
        SPELLINGS[attend.__name__] = attend, meaning
        return attend

    return register


def shown(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def bias(q: Tensor, k: Tensor) -> Tensor:
    return torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype).masked_fill(~shown(q, k), -math.inf)


CAUSAL: dict[str, Any] = {"is_causal": True}


@spelling()
def positional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, None, 0.0, False)


@spelling(is_causal=True, scale=0.5)
def keywords(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(key=k, query=q, value=v, is_causal=True, scale=0.5, enable_gqa=True)


@spelling(**CAUSAL)
def bool_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, shown(q, k), dropout_p=0.0)


@spelling(**CAUSAL)
def float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=bias(q, k))


@spelling()
def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # inductor's patterns 1, 3, 28
    return torch.matmul(q, k.transpose(-2, -1)).div(ROOT).softmax(dim=-1).matmul(v)


@spelling(scale=0.4)
def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 2, 4
    weights = torch.matmul(q, k.transpose(-2, -1)).mul(0.4).softmax(dim=-1)
    return F.dropout(weights, p=0.0).matmul(v)


@spelling(**CAUSAL)
def mask_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 5, 6
    weights = torch.softmax((q @ k.transpose(-2, -1) / ROOT) + bias(q, k), dim=-1)
    return torch.dropout(weights, 0.0, True) @ v


@spelling()
def through_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 7, 8
    scores = (q @ k.permute(0, 1, 3, 2) / ROOT).to(torch.float64)
    weights = F.dropout(torch.softmax(scores, dim=-1), 0.1, training=False).to(q.dtype)
    return weights @ v.to(weights.dtype)


@spelling()
def scaled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 9, 10, 29
    q = q / ROOT
    return torch.softmax((q @ k.transpose(-2, -1)).to(torch.float64), dim=-1) @ v


@spelling()
def permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 11, 12
    q, k, v = (x.transpose(1, 2).permute(0, 2, 1, 3) for x in (q, k, v))
    return torch.matmul(q, k.transpose(-2, -1)).div(ROOT).softmax(dim=-1).matmul(v)


@spelling(scale=1.0)
def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 13
    q, k, v = (x.reshape(-1, LENGTH, DIM) for x in (q, k, v))
    weights = F.dropout(torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1), p=0.0)
    return torch.bmm(weights, v).view(-1, HEADS, LENGTH, DIM)


@spelling(**CAUSAL)
def mask_in_four_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 14, 16
    scores = torch.matmul(q, k.transpose(-2, -1)).div(ROOT) + bias(q, k)[None, None]
    return F.dropout(scores.softmax(dim=-1), 0.0).to(dtype=q.dtype).matmul(v)


@spelling(**CAUSAL)
def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 15, 17, 20
    scores = (q.div(ROOT)) @ k.transpose(-2, -1)
    low = torch.full((), -float("inf"), dtype=q.dtype)
    hidden = (shown(q, k) == 0).view(1, 1, LENGTH, LENGTH).expand_as(scores)
    return torch.softmax(scores.masked_fill(hidden, low), dim=-1) @ v


@spelling(**CAUSAL)
def chosen_by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 18, 19
    scores = torch.matmul(q, k.permute(0, 1, 3, 2))
    scores = scores.div(torch.full([], ROOT, dtype=scores.dtype))
    low = torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype)
    return F.dropout(torch.where(shown(q, k), scores, low).softmax(dim=-1), 0.0).matmul(v)


@spelling(is_causal=True, scale=1.0)
def of_t5(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 21, 22, 23, 25, 26, 27
    scores = torch.matmul(q, k.permute(0, 1, 3, 2))
    scores = (scores + bias(q, k)).type_as(q)
    return scores.double().softmax(dim=-1).type_as(q).matmul(v)


@spelling(is_causal=True, scale=1.0)
def of_mbart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 24
    b = q.shape[0]
    q, k, v = (x.reshape(b * HEADS, -1, DIM) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, LENGTH, -1) + bias(q, k)
    weights = F.softmax(scores.view(b * HEADS, LENGTH, -1), dim=-1)
    return torch.bmm(weights, v).reshape(b, HEADS, LENGTH, DIM)


@spelling(**CAUSAL)
def scaled_after_its_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # CodeGen
    return torch.softmax((q @ k.transpose(-1, -2) + bias(q, k)) / ROOT, dim=-1) @ v


@spelling(is_causal=True, softcap=5.0)
def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 5.0 * torch.tanh(q @ k.mT / (5.0 * ROOT))
    return (scores + bias(q, k)).softmax(-1) @ v


@spelling(**CAUSAL)
def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores /= ROOT
    scores += bias(q, k)
    scores.sub_(scores.amax(-1, keepdim=True))
    return torch.softmax(scores, -1) @ v


@spelling(**CAUSAL)
def in_place_by_statements(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3))
    scores.mul_(1 / ROOT)
    scores.masked_fill_(~shown(q, k), -math.inf)
    return scores.softmax(dim=3).matmul(v)


@spelling(**CAUSAL)
def of_torchs_documentation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    added = torch.zeros(q.size(-2), k.size(-2), dtype=q.dtype)
    added.masked_fill_(shown(q, k).logical_not(), float("-inf"))
    weights = torch.softmax(q @ k.transpose(-2, -1) * DIM**-0.5 + added.to(q.dtype), dim=-1)
    return torch.dropout(weights, 0.0, train=True) @ v


@spelling(**CAUSAL)
def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / ROOT + bias(q, k)
    out: Tensor = torch.einsum("bhqk,bhkd->bhqd", F.softmax(scores, dim=-1), v)
    return out


@spelling(**CAUSAL)
def einsum_of_sequences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("blhe,bshe->bhls", q, k)
    weights = torch.softmax(scores / ROOT + bias(q.transpose(1, 2), k.transpose(1, 2)), dim=-1)
    out: Tensor = torch.einsum("bhls,bshd->blhd", weights, v)
    return out.transpose(1, 2)


@spelling()
def einsum_with_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("... i d, ... j d -> ... i j", q / ROOT, k), dim=-1)
    out: Tensor = torch.einsum("...jd,...ij->...id", v, weights)
    return out


@spelling(**CAUSAL)
def rearranged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # as einops lays them out
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    q, k, v = (x.unflatten(-1, (HEADS, DIM)).permute(0, 2, 1, 3) for x in (q, k, v))
    scores = (q @ k.permute(0, 1, 3, 2)) * DIM**-0.5
    scores = scores.masked_fill(~shown(q, k), -torch.finfo(q.dtype).max)
    return F.softmax(scores, dim=-1) @ v


@spelling(**CAUSAL)
def keys_stored_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = k.flatten(0, 1).transpose(1, 2).contiguous().unflatten(0, (-1, HEADS))
    return F.softmax(q @ turned / ROOT + bias(q, k), dim=-1) @ v


@spelling(**CAUSAL)
def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(bias(q, k)[None], a, b.transpose(-1, -2), beta=1.0, alpha=1 / ROOT)
    weights = scores.unflatten(0, (-1, HEADS)).softmax(dim=-1)
    out: Tensor = torch.bmm(weights.flatten(0, 1), c).unflatten(0, (-1, HEADS))
    return out


@spelling(**CAUSAL)
def baddbmm_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # GPT-NeoX of old
    a, b = (x.flatten(0, 1) for x in (q, k))
    nothing = torch.zeros(a.shape[0], LENGTH, LENGTH, dtype=q.dtype)
    scores = nothing.baddbmm(batch1=a, batch2=b.transpose(1, 2), beta=0.0, alpha=1 / ROOT)
    return (scores.view(-1, HEADS, LENGTH, LENGTH) + bias(q, k)).softmax(-1) @ v


@spelling(**CAUSAL)
def of_x_transformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", q * DIM**-0.5, k)
    scores = scores.masked_fill(~shown(q, k), -torch.finfo(q.dtype).max)
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    out: Tensor = torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v)
    return out


@spelling()
def widths_before_lengths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # of diffusion models
    q, k, v = (x.transpose(2, 3).contiguous() for x in (q, k, v))
    weights = (torch.einsum("b h d i, b h d j -> b h i j", q, k) / ROOT).softmax(dim=-1)
    out: Tensor = torch.einsum("b h i j, b h d j -> b h d i", weights, v)
    return out.transpose(2, 3)


@spelling(**CAUSAL)
def operands_by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(input=q, other=k.transpose(dim0=-1, dim1=-2))
    scores = torch.div(scores, other=ROOT).where(shown(q, k), -math.inf)
    return torch.matmul(input=F.softmax(input=scores, dim=-1), other=v)


SINK = torch.tensor([0.5, 2.0], dtype=torch.float64)


@spelling(is_causal=True, sinks=SINK)
def sink_column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # GPT-OSS
    scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5 + bias(q, k)
    sinks = SINK.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    both = torch.cat([scores, sinks], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return torch.matmul(F.softmax(both, dim=-1)[..., :-1], v)
