"""Calls of the Hopper kernels on a card, and all that the reference says of them."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops import reference, sm90
from bsfa_compile.ops.call import Call, Gate, Result
from bsfa_compile.ops.tiles import mask_rows, mask_words, unpack
from tests.attention_case import AttentionCase, free_tiles, plant_sink

INF, NAN = math.inf, math.nan
CLOSE = {"int8": 1e-3, "exact": 1e-4}  # decisions may differ for statistics this near the threshold
FP16 = torch.float16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """A call and its gate."""

    rule: str = "relative"
    precision: str = "int8"
    threshold: float | None = -0.5  # None: dense
    columns: int = 0  # thresholds [H, columns], drawn at random up to twice `threshold`
    heads_first: bool = False  # [B, H, L, D] storage
    spread: float = 0.0  # channels of K are up to 2 ** +-spread times wider, Q's narrower


class Run:
    """A case on the card, its result, and what the reference needs."""

    def __init__(self, case: Case) -> None:
        self.case, self.g = case, case.geometry
        q, k, v = case.random_rows()
        k += 0.5 * torch.randn(1, 1, case.kv_heads, case.d)  # the mean that quantising removes
        plant_sink(q, k)
        if case.spread:
            width = torch.exp2(case.spread * (2 * torch.rand(case.kv_heads, case.d) - 1))
            k *= width
            q /= width.repeat_interleave(case.heads // case.kv_heads, dim=0)

        def place(x: Tensor) -> Tensor:
            x = x.to("cuda", case.dtype)
            return x.transpose(1, 2).contiguous() if case.heads_first else x.transpose(1, 2)

        self.q, self.k, self.v = place(q), place(k), place(v)
        self.padding = case.key_padding_mask()
        columns = max(case.columns, 1)
        self.thresholds = torch.full((case.heads, columns), case.threshold or 0.0)
        if case.columns:
            self.thresholds *= 2 * torch.rand(self.thresholds.shape)
            self.thresholds[0, 0] = -INF
        start = torch.tensor(case.q_start, device="cuda") if case.on_device else None
        self.call = Call(
            geometry=dataclasses.replace(self.g, q_start=0) if case.on_device else self.g,
            q_start_tensor=start,
            key_padding_mask=None if self.padding is None else self.padding.cuda(),
            scale=case.d**-0.5,
            softcap=case.softcap,
        )
        self.gate = None
        if case.threshold is not None:
            t = self.thresholds.cuda()
            self.gate = Gate(thresholds=t, rule=case.rule, precision=case.precision)

    def __call__(self) -> Result:
        assert sm90.reason(self.q, self.k, self.v, self.call, self.gate) is None
        return sm90.attention(self.q, self.k, self.v, self.call, self.gate)

    def poison(self) -> None:
        """Leave NaN and set bits where the next results will be put."""
        c, dv = self.case, self.v.shape[3]
        shapes = (c.batch * c.q_len * c.heads, dv), (c.batch * c.q_len * c.heads,)
        spoiled = [torch.full(s, NAN, device="cuda", dtype=c.dtype) for s in shapes[:1]]
        spoiled += [torch.full(shapes[1], NAN, device="cuda")]
        words = c.batch * c.heads * mask_rows(c.q_len) * mask_words(self.g.k_len)
        spoiled += [torch.full((words,), -1, device="cuda", dtype=torch.int32)]
        room = sm90.plan_of(self.q, self.k, self.v, self.call, self.gate).room
        spoiled += [torch.full((room,), 255, device="cuda", dtype=torch.uint8)]
        del spoiled

    def masks(self, *shifts: float) -> list[Tensor]:
        """The reference's tile masks with the thresholds moved by each shift."""
        q, k = self.q.cpu().float(), self.k.cpu().float()
        c = self.case
        precision = "exact" if c.threshold is None else c.precision
        return [
            reference.tile_mask(
                q,
                k,
                self.thresholds + shift,
                self.g,
                key_padding_mask=self.padding,
                scale=self.call.scale,
                softcap=c.softcap,
                gate=c.rule,
                precision=precision,
            )
            for shift in shifts
        ]

    def check(self) -> float:
        """Compare everything; returns the share of visible tiles that were dropped."""
        self.poison()
        result, c = self(), self.case
        kept = unpack(result.tile_mask.cpu(), self.g.k_blocks)
        (visible,) = self.masks(-INF)
        if c.threshold is None:
            assert torch.equal(kept, visible)
        else:
            close = CLOSE[c.precision]
            least, most = self.masks(close, -close)
            assert not (least & ~kept).any(), "dropped a tile that the rule keeps"
            assert not (kept & ~most).any(), "kept a tile that the rule drops"
        counts = result.counts.cpu()
        assert torch.equal(counts[:, 0], (visible & ~kept).sum((0, 2, 3)))
        assert torch.equal(counts[:, 1], self.candidates(visible))
        q, k, v = (x.cpu().double() for x in (self.q, self.k, self.v))
        scale, softcap = self.call.scale, c.softcap
        out, lse = reference.attention(
            q, k, v, kept, self.g, key_padding_mask=self.padding, scale=scale, softcap=softcap
        )
        assert result.out.transpose(1, 2).is_contiguous()
        seen = lse > -INF
        assert torch.equal(result.lse.cpu() > -INF, seen)
        torch.testing.assert_close(result.lse.cpu()[seen].double(), lse[seen], atol=1e-4, rtol=1e-5)
        error = (result.out.cpu().double() - out).norm()
        assert error <= 1.5 * self.low_precision_error(kept, out) + 1e-6 * out.norm()
        assert not result.out.cpu()[~seen].any()
        for again in (self(), self()):
            for a, b in zip(again, result, strict=True):
                assert torch.equal(a, b)
        return float((visible & ~kept).sum() / visible.sum())

    def candidates(self, visible: Tensor) -> Tensor:
        """Visible tiles of each head that are not always kept."""
        return free_tiles(self.g, visible, self.padding).sum((0, 2, 3))

    def low_precision_error(self, kept: Tensor, out: Tensor) -> Tensor:
        """What torch's attention errs by on the same tiles in the same dtype."""
        c, g = self.case, self.g
        rows = (g.q_start + torch.arange(g.q_len)) // g.block_q - g.first_block
        allowed = kept[:, :, rows][..., torch.arange(g.k_len) // g.block_k]
        allowed &= reference.visibility(g, self.padding, c.batch)[:, None]
        if c.softcap is not None:  # torch has none: rounding the weights is most of the error
            exact: Tensor = out.norm() * torch.finfo(c.dtype).eps
            return exact
        groups = c.heads // c.kv_heads
        k, v = (x.repeat_interleave(groups, 1) for x in (self.k, self.v))
        low = F.scaled_dot_product_attention(
            self.q, k, v, attn_mask=allowed.cuda(), scale=self.call.scale
        )
        error: Tensor = (low.cpu().double().nan_to_num() - out).norm()
        return error


# Under the relative gate, in int8 and exactly, each of these must drop something.
RELATIVE = [
    Case(),
    Case(threshold=0.0, q_len=1100, kv_heads=1),
    Case(threshold=0.2, q_len=700),
    Case(dtype=FP16, q_len=700),
    Case(d=64, q_len=900),
    Case(d=80, threshold=-0.3, q_len=700),
    Case(d=192, dv=128, threshold=0.0, q_len=700),
    Case(d=256, threshold=0.0, q_len=900),
    Case(q_start=77, q_len=500),
    Case(q_start=1000, q_len=130, on_device=True),
    Case(q_start=1000, q_len=1),
    Case(heads=3, kv_heads=3, q_len=700, batch=2),
    Case(heads=7, kv_heads=1, threshold=0.0, q_len=700),
    Case(heads=6, columns=3, q_len=700),
    Case(heads_first=True, q_len=600, k_len=500),
    Case(sinks=3, threshold=0.0, q_len=900),
    Case(causal=False, threshold=-0.1, q_len=300, k_len=777),
    Case(softcap=20.0, threshold=0.0, q_len=700),
    Case(padding=-70, batch=2, q_len=700),
    Case(spread=4.0, q_len=700),
    Case(spread=4.0, d=64, heads=6, q_len=700, dtype=FP16),
    Case(spread=4.0, d=80, q_len=700, heads_first=True),
    Case(spread=4.0, d=256, threshold=0.0, q_len=900),
    Case(spread=4.0, d=192, dv=128, threshold=0.0, q_len=700),
    Case(spread=4.0, softcap=20.0, threshold=0.0, q_len=700),
]
