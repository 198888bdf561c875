"""Cases of the emulated attention kernel: inputs, what the reference says, the comparison."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from bsfa_compile.ops import reference
from bsfa_compile.ops.tiles import BLOCK_K
from tests.attention_case import AttentionCase, plant_sink
from tests.kernels import emulated

INF = math.inf
FP16 = torch.float16
# An item is done again if a row's maximum exceeds that of its first step by so much: MOST and ROOM
# of attend.cu in natural-log units, in fp16 what rounds to infinity.
LIMIT = {torch.bfloat16: 126 * math.log(2), FP16: math.log(65520)}
OUT_ERROR = {torch.bfloat16: 4e-3, FP16: 1e-3}
LSE_ERROR = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """A call, the tiles it is given, and what its scores do."""

    heads: int = 2
    kv_heads: int = 1
    sink_logits: bool = False
    keep: float | None = None  # share of tiles that a mask keeps; None: no mask
    always: bool = True  # it keeps the first and the last tile of a row, as a gate does
    late: float = 0.0  # natural-log units that late keys score with some rows
    late_keys: int = 1
    side_by_side: int | None = None


class Run:
    """A case's inputs."""

    def __init__(self, case: Case) -> None:
        self.case, self.g, self.scale = case, case.geometry, case.d**-0.5
        q, k, v = case.random_rows()
        plant_sink(q, k)
        late = self.g.k_len * 6 // 10
        if case.late:
            q[:, ::50, ::3, 9] = 8.0
            q[:, :, 1, 9] = 8.0
            k[:, late : late + case.late_keys, :, 9] = case.late * case.d**0.5 / 8
        self.q, self.k, self.v = (x.to(case.dtype).transpose(1, 2) for x in (q, k, v))
        self.sinks = torch.randn(case.heads) + 3 if case.sink_logits else None
        self.padding = case.key_padding_mask()
        self.seen = reference.visibility(self.g, self.padding, case.batch)
        self.visible = self._visible()
        self.kept = self.visible
        if case.keep is not None:
            wanted = torch.rand(self.visible.shape) < case.keep
            wanted[..., late // BLOCK_K] |= case.late > 0
            if case.always:
                wanted |= self.visible & ~(self.visible.cumsum(-1) > 1)
                wanted |= self.visible & ~(self.visible.flip(-1).cumsum(-1) > 1).flip(-1)
            self.kept = self.visible & wanted

    def _visible(self) -> Tensor:
        """Tiles of which some score is seen: [B, H, q_blocks, k_blocks]."""
        g = self.g
        keys = torch.nn.functional.pad(self.seen, (0, -g.k_len % BLOCK_K))
        tiles = keys.unflatten(-1, (-1, BLOCK_K)).any(-1)
        rows = [tiles[:, slice(*g.rows(i))].any(1) for i in range(g.q_blocks)]
        return torch.stack(rows, 1)[:, None].repeat(1, self.case.heads, 1, 1)

    def __call__(self, edit: tuple[str, str] | None = None) -> emulated.Emulated:
        return emulated.attend(
            self.q,
            self.k,
            self.v,
            None if self.case.keep is None else self.kept,
            self.g,
            scale=self.scale,
            padding=self.padding,
            softcap=self.case.softcap,
            sinks=self.sinks,
            start_in_memory=self.case.on_device,
            side_by_side=self.case.side_by_side,
            seed=self.case.seed,
            edit=edit,
        )

    def again(self) -> int:
        """How many items' weights overflow where exponents are relative to the first step.

        That step holds the lowest tile and, unless heads are wide, the highest; the two highest
        where there is a causal window.
        """
        wide, window = max(self.case.d, self.case.dv or 0) > 128, self.g.window is not None
        if window and (wide or not self.g.is_causal):
            return 0  # such kernels follow the maxima of all items
        order = self.kept.long().cumsum(-1)
        first = self.kept & (order == 1)
        if window:
            first = self.kept & (order >= order[..., -1:] - 1)
        elif not wide:
            first |= self.kept & (order == order[..., -1:])
        s = reference.scores(self.q.double(), self.k.double(), self.scale, self.case.softcap)
        count = 0
        for i in range(self.g.q_blocks):
            rows = slice(*self.g.rows(i))
            highest, start = (
                s[:, :, rows].masked_fill(~self._allowed(tiles[:, :, i], rows), -INF).amax(-1)
                for tiles in (self.kept, first)
            )
            count += int((highest - start >= LIMIT[self.case.dtype]).any(-1).sum())
        return count

    def _allowed(self, tiles: Tensor, rows: slice) -> Tensor:
        """Scores of some query rows that lie in tiles [B, H, k_blocks] and are seen."""
        keys = tiles.repeat_interleave(BLOCK_K, -1)[..., : self.g.k_len]
        return keys[:, :, None] & self.seen[:, None, rows]

    def check(self, edit: tuple[str, str] | None = None) -> int:
        """Compares output, log-sum-exp and work; returns how many items were done again."""
        result = self(edit)
        out, lse = reference.attention(
            self.q.double(),
            self.k.double(),
            self.v.double(),
            self.kept,
            self.g,
            key_padding_mask=self.padding,
            scale=self.scale,
            softcap=self.case.softcap,
            sinks=self.sinks,
        )
        limit = OUT_ERROR[self.case.dtype]
        torch.testing.assert_close(result.lse.double(), lse, atol=LSE_ERROR, rtol=0)
        error = result.out.double() - out
        assert error.norm() <= limit * out.norm()
        assert (error.norm(dim=-1) <= 4 * limit * out.norm(dim=-1)).all(), "some row is wrong"
        again = result.items - int(self.kept.any(-1).sum())
        assert again == self.again()
        return again
