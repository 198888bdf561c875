"""The operators as torch sees them: schema, fakes, autograd, compilers, autocast."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from bsfa_compile.errors import BsfaError
from bsfa_compile.ops import library
from bsfa_compile.ops.attention import block_sparse_attention
from bsfa_compile.ops.tiles import Geometry, pack
from tests.ops.cases import Case, assert_close, cases

CASES = {
    "causal": Case(kv_heads=2, geometry=Geometry(q_len=20, k_len=20, is_causal=True)),
    "softcap, values wider": Case(
        geometry=Geometry(q_len=17, k_len=30), softcap=4.0, value_dim=12, rule="absolute"
    ),
    "window in a cache": Case(
        geometry=Geometry(q_len=10, k_len=30, q_start=20, is_causal=True, window=12), groups=3
    ),
    "padding": Case(
        batch=2, geometry=Geometry(q_len=20, k_len=24, is_causal=True), padding=0.7, value_dim=4
    ),
    "window both ways": Case(geometry=Geometry(q_len=20, k_len=40, window=23), padding=0.8),
}
SMALL = {name: case.moved(block_q=8, block_k=4) for name, case in CASES.items()}
every_case = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())


def arguments(case: Case, dtype: torch.dtype, *, grad: bool) -> tuple[tuple[Any, ...], Tensor]:
    """All arguments of attention_v1, which drop some tiles, and the packed mask."""
    inputs = case.qkv(dtype)
    thresholds = case.thresholds(*inputs[:2], 0.5)
    assert thresholds is not None
    kept = case.reference(*inputs, thresholds)[2]
    g = case.geometry
    config = (case.rule, "exact", g.sink_tiles, g.block_q, g.block_k, False)
    tensors = tuple(x.requires_grad_(grad) for x in inputs)
    return (*tensors, thresholds, *case.mask_arguments(), *config), pack(kept)


@every_case
@pytest.mark.parametrize("grad", [False, True])
def test_attention_passes_opcheck(case: Case, grad: bool) -> None:
    values, _ = arguments(case, torch.float32, grad=grad)
    assert int(library.attention(*values)[3][:, 0].sum()) > 0
    torch.library.opcheck(library.attention, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_thresholds", [True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_opcheck_of_other_arguments(
    dtype: torch.dtype, with_thresholds: bool, as_tensor: bool
) -> None:
    values, _ = arguments(SMALL["causal"], dtype, grad=False)
    changed = list(values)
    changed[3] = changed[3] if with_thresholds else None
    changed[5] = torch.tensor(0) if as_tensor else None
    changed[-1] = True
    torch.library.opcheck(library.attention, tuple(changed))


@pytest.mark.parametrize("shape", [(0, 20), (20, 0), (1, 20)])
def test_opcheck_of_empty_inputs(shape: tuple[int, int]) -> None:
    case = Case(geometry=Geometry(q_len=shape[0], k_len=shape[1]), padding=0.9)
    q, k, v = case.qkv()
    config = ("relative", "auto", 1, 128, 64, False)
    values = (q, k, v, torch.zeros(2), *case.mask_arguments(), *config)
    torch.library.opcheck(library.attention, values)


@every_case
def test_the_other_operators_pass_opcheck(case: Case) -> None:
    values, words = arguments(case, torch.float32, grad=False)
    q, k, v, thresholds, *rest = values
    mask, blocks = rest[:7], rest[10:12]
    torch.library.opcheck(library.gate, (q, k, thresholds, *rest[:-1]))
    torch.library.opcheck(library.attend, (q, k, v, words, *mask, *blocks))
    differentiable = tuple(x.clone().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(library.attend, (*differentiable, words, *mask, *blocks))
    out, lse = library.attend(q, k, v, words, *mask, *blocks)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(
        library.attend_backward, (*grads, q, k, v, out, lse, words, *mask, *blocks)
    )


def test_site_marks_and_does_nothing() -> None:
    counters = torch.zeros(2, 2, dtype=torch.int64)
    assert library.site(torch.zeros(2, 1), counters) is None
    assert not counters.any()
    torch.library.opcheck(library.site, (torch.zeros(2, 1), counters))


def finite(lse: Tensor) -> Tensor:
    return torch.where(lse == -math.inf, 0.0, lse)


@every_case
def test_gradients_equal_finite_differences(case: Case) -> None:
    """Through out and lse, in float64, with tiles left out."""
    values, words = arguments(case, torch.float64, grad=True)
    rest, blocks = values[3:], values[-3:-1]
    assert int(library.attention(*values)[3][:, 0].sum()) > 0

    def whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = library.attention(q, k, v, *rest)
        return out, finite(lse)

    def over_mask(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = library.attend(q, k, v, words, *rest[1:8], *blocks)
        return out, finite(lse)

    torch.autograd.gradcheck(whole, values[:3], fast_mode=True)
    torch.autograd.gradcheck(over_mask, values[:3], fast_mode=True)


@given(cases(), st.floats(0, 1))
def test_gradients_equal_those_of_the_reference_over_the_same_tiles(
    case: Case, share: float
) -> None:
    q, k, v = (x.requires_grad_() for x in case.qkv(torch.float64))
    thresholds = case.thresholds(q.detach(), k.detach(), share)
    assume(thresholds is not None)
    out, lse, kept, counts = case.run(q, k, v, thresholds)
    assert int(counts[:, 0].sum()) > 0
    wanted, wanted_lse = case.attend(q, k, v, kept)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    seen = lse.detach() > -math.inf
    found = torch.autograd.grad((out * weights).sum() + lse[seen].sum(), (q, k, v))
    loss = (wanted * weights)[seen].sum() + wanted_lse[seen].sum()
    if not seen.any():
        assert not any(x.any() for x in found)
        return
    for x, y in zip(found, torch.autograd.grad(loss, (q, k, v)), strict=True):
        assert_close(x, torch.nan_to_num(y), 1e-9)


def test_skipped_tiles_have_no_gradient() -> None:
    case = Case(geometry=Geometry(q_len=8, k_len=64, block_q=8, block_k=4), groups=1)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    out, _, kept, _ = case.run(q, k, v, torch.full((1,), math.inf))
    out.sum().backward()
    assert k.grad is not None and v.grad is not None
    skipped = ~kept[0, 0, 0].repeat_interleave(4)
    assert skipped.sum() >= 32
    assert not k.grad[0, 0, skipped].any() and not v.grad[0, 0, skipped].any()
    assert bool(v.grad[0, 0, ~skipped].any(dim=-1).all())


def test_thresholds_and_counts_take_no_gradient() -> None:
    values, _ = arguments(SMALL["causal"], torch.float32, grad=True)
    thresholds = values[3].requires_grad_()
    out, lse, words, counts = library.attention(*values)
    assert out.requires_grad and lse.requires_grad
    assert not words.requires_grad and not counts.requires_grad
    (out.sum() + lse.sum()).backward()
    assert thresholds.grad is None
    assert values[0].grad.any()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_asks_for_a_gradient(mode: Any) -> None:
    """q, k, v or sinks, alone or together, if gradients are on; thresholds never."""
    values, _ = arguments(SMALL["causal"], torch.float32, grad=False)
    values = (*values, torch.zeros(values[0].shape[1]))
    plain = library.attention(*values)
    for i in (0, 1, 2, 3, len(values) - 1):
        given_values = list(values)
        given_values[i] = values[i].clone().requires_grad_()
        with mode():
            found = library.attention(*given_values)
        wanted = i != 3 and mode is torch.enable_grad
        assert [x.requires_grad for x in found] == [wanted, wanted, False, False]
        for a, b in zip(found, plain, strict=True):
            assert torch.equal(a, b)
    assert plain[3][:, 0].sum() > 0


def test_gradients_of_gradients_are_refused() -> None:
    values, _ = arguments(SMALL["causal"], torch.float32, grad=True)
    out = library.attention(*values)[0]
    (grad,) = torch.autograd.grad(out.sum(), values[0], create_graph=True)
    with pytest.raises(BsfaError, match="differentiated twice"):
        torch.autograd.grad(grad.sum(), values[1])


@pytest.mark.parametrize("dense_if_faster", [True, False])
def test_compiles_whole_and_once_for_all_lengths_and_starts(dense_if_faster: bool) -> None:
    frames = 0

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal frames
        frames += 1
        return gm.forward

    def step(q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor, start: int) -> Tensor:
        return block_sparse_attention(
            q,
            k,
            v,
            thresholds,
            is_causal=True,
            q_start=start,
            block_q=8,
            block_k=4,
            dense_if_faster=dense_if_faster,
        )

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    dropped = 0
    for q_len, start in ((24, 8), (16, 16), (32, 40)):
        geometry = Geometry(
            q_len=q_len,
            k_len=start + q_len,
            q_start=start,
            is_causal=True,
            block_q=8,
            block_k=4,
        )
        case = Case(kv_heads=2, geometry=geometry)
        q, k, v = case.qkv()
        thresholds = case.thresholds(q, k)
        assert thresholds is not None
        dropped += int(case.run(q, k, v, thresholds)[3][:, 0].sum())
        assert_close(compiled(q, k, v, thresholds, start), step(q, k, v, thresholds, start))
    assert frames == 1
    assert dropped > 0


@pytest.mark.slow
def test_compiles_with_inductor_and_gradients(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = SMALL["causal"]
    values, _ = arguments(case, torch.float32, grad=True)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse, _, counts = library.attention(q * 1.0, k, v, *values[3:])
        total: Tensor = (out.transpose(1, 2).flatten(2) ** 2).sum() + lse.sum() + counts.sum()
        return total

    wanted = torch.autograd.grad(loss(*values[:3]), values[:3])
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*values[:3]), values[:3])
    for x, y in zip(found, wanted, strict=True):
        assert_close(x, y.double(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_inputs_as_it_does_for_sdpa(dtype: torch.dtype) -> None:
    values, _ = arguments(SMALL["causal"], torch.float32, grad=False)
    with torch.autocast("cpu", dtype=dtype):
        out, lse, _, counts = library.attention(*values)
        dense = torch.nn.functional.scaled_dot_product_attention(
            values[0], values[1].repeat_interleave(2, 1), values[2].repeat_interleave(2, 1)
        )
    assert out.dtype == dense.dtype == dtype
    assert lse.dtype == torch.float32
    assert int(counts[:, 0].sum()) > 0
    lowered = library.attention(*(x.to(dtype) for x in values[:3]), *values[3:])
    assert torch.equal(out, lowered[0])
