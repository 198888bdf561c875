"""Masks that a model keeps as buffers: read when the graph is built, watched afterwards."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from bsfa_compile.ops.held import Band, band
from tests import toy, zoo
from tests.oracle import Oracle

INF = float("inf")
MOST = 160
Attend = Callable[[Any, Tensor, Tensor, Tensor, int], Tensor]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Kept(nn.Module):
    """Attention under the buffer `mask`, by `attend`."""

    def __init__(self, mask: Tensor, attend: Attend) -> None:
        super().__init__()
        self.qkv = nn.Linear(toy.WIDTH, 3 * toy.WIDTH)
        self.register_buffer("mask", mask)
        self.register_buffer("low", torch.tensor(-1e4))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = toy.heads(q), toy.heads(k), toy.heads(v)
        return self.attend(self, 3 * q, 3 * k, v, x.shape[1]).transpose(1, 2).flatten(2)


def ones() -> Tensor:
    return torch.tril(torch.ones(MOST, MOST))


def scores(q: Tensor, k: Tensor) -> Tensor:
    found: Tensor = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
    return found


def nano_gpt(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    s = scores(q, k).masked_fill(self.mask[:, :, :n, :n] == 0, -INF)
    return F.softmax(s, dim=-1) @ v


def old_gpt2(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    nd, ns = q.shape[2], k.shape[2]
    shown = self.mask[:, :, ns - nd : ns, :ns].bool()
    return F.softmax(torch.where(shown, scores(q, k), self.low.to(q.dtype)), dim=-1) @ v


def filled_in_place(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    s = scores(q, k)
    s.masked_fill_(self.mask.bool()[:n, :n], -INF)
    return torch.softmax(s, dim=-1) @ v


def sdpa(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:n, :n])


def sdpa_of_one(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[0, 0, :n, :n].bool())


def in_a_window() -> Tensor:
    return ones().bool() & ~ones().tril(-60).bool()


def additive() -> Tensor:
    return torch.full((MOST, MOST), -INF).triu(1)


KEPT: dict[str, tuple[Tensor, Attend, int | None]] = {
    "nanoGPT": (ones().view(1, 1, MOST, MOST), nano_gpt, None),
    "GPT-2": (ones().byte().view(1, 1, MOST, MOST), old_gpt2, None),
    "hidden where 1": (torch.ones(MOST, MOST).triu(1), filled_in_place, None),
    "bool": (ones().bool(), sdpa, None),
    "additive": (additive(), sdpa, None),
    "window": (in_a_window(), sdpa, 60),
    "one of 4-D": (ones()[None, None], sdpa_of_one, None),
}


def model(mask: Tensor, attend: Attend) -> toy.Toy:
    return toy.Toy(1, attention=lambda: Kept(mask.clone(), attend))


def wanted(window: int | None, x: Tensor) -> Tensor:
    """The output of the sparse `model`, by the reference."""
    plain = toy.Toy(1, attention=lambda: Kept(ones(), causal))
    given = toy.thresholds(toy.sites(1))
    oracle = Oracle(
        plain, given, causal=True, windows=dict.fromkeys(given.values, window), padding=None
    )
    with oracle.running():
        output: Tensor = plain(x)
    return output


def causal(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def reasons(module: Any) -> list[str | None]:
    return [None if s.rewritten else s.reason for s in bsfa.report(module).sites]


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, None) for name in KEPT), ("nanoGPT", True), ("GPT-2", True)]
)
def test_a_mask_kept_as_a_buffer(name: str, dynamic: bool | None) -> None:
    mask, attend, window = KEPT[name]
    module = model(mask, attend)
    x = toy.sample(130)
    calibration = bsfa.calibrate(module, x, **toy.BLOCKS, progress=False)
    assert list(calibration.sites) == toy.sites(1)
    assert calibration.dense == {}
    bsfa.apply(module, toy.thresholds(toy.sites(1)), **toy.EAGER, dynamic=dynamic)
    for length in (130, 71):
        x = toy.sample(length)
        assert torch.allclose(toy.run(module, x), wanted(window, x))
    assert reasons(module) == [None]
    assert all(rate is not None and rate > 0 for rate in toy.skipped(module).values())
    assert set(bsfa.report(module).calls) == {"sparse"}


def test_gpt_neo_keeps_a_triangle_and_a_window() -> None:
    config = GPTNeoConfig(
        vocab_size=97,
        hidden_size=64,
        num_heads=4,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        window_size=40,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    module, ids = GPTNeoForCausalLM(config).double().eval(), torch.randint(97, (2, 150))
    given = {"input_ids": ids, "use_cache": False}
    wanted = zoo.output(module, given)
    calibration = bsfa.calibrate(module, given, **toy.BLOCKS, progress=False)
    assert calibration.dense == {}
    for threshold in (-INF, -0.02):
        values = {name: torch.full((4, 1), threshold) for name in calibration.sites}
        bsfa.apply(module, Thresholds(values=values, **toy.BLOCKS), **toy.EAGER)
        got = zoo.output(module, given)
        assert torch.allclose(got, wanted, atol=1e-6) == (threshold == -INF)
    assert all((rate or 0) > 0 for rate in toy.skipped(module).values())


def applied(mask: Tensor, attend: Attend, **options: Any) -> toy.Toy:
    """A model made sparse that has run once."""
    module = toy.Toy(attention=lambda: Kept(mask.clone(), attend), **options)
    bsfa.apply(module, toy.thresholds(toy.sites()), **toy.EAGER)
    toy.run(module, toy.sample(130))
    return module


def test_a_mask_that_is_written_to_later_is_seen() -> None:
    module, x = applied(*KEPT["nanoGPT"][:2]), toy.sample(130)
    sparse = toy.run(module, x)
    module.get_buffer("layers.1.attn.mask")[0, 0, 100, 3] = 0.0
    changed = toy.Toy(attention=lambda: Kept(ones()[None, None], nano_gpt))
    changed.get_buffer("layers.1.attn.mask")[0, 0, 100, 3] = 0.0
    with pytest.warns(UserWarning, match="changed"):
        assert torch.allclose(toy.run(module, x), toy.run(changed, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(toy.run(module, x), toy.run(changed, x))  # told once
    report = bsfa.report(module)
    assert report.calls["dense"] == 4
    assert all("changed" in (site.reason or "") for site in report.sites)
    module.get_buffer("layers.1.attn.mask")[0, 0, 100, 3] = 1.0
    assert torch.equal(toy.run(module, x), sparse)
    module.get_buffer("layers.1.attn.mask")[0, 0, 100, 3] = 0.0
    bsfa.apply(module, toy.thresholds(toy.sites()), **toy.EAGER)
    toy.run(module, x)
    assert reasons(module)[0] is None
    assert "table of the model" in (reasons(module)[1] or "")


def test_a_mask_that_is_replaced_is_read_again() -> None:
    module, x = applied(*KEPT["nanoGPT"][:2]), toy.sample(130)
    sparse = toy.run(module, x)
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    module.get_submodule("layers.0.attn").mask = ones()[None, None].double()
    assert torch.equal(toy.run(module, x), sparse)
    module.get_submodule("layers.0.attn").mask = torch.ones_like(ones())[None, None].double()
    with pytest.warns(UserWarning, match="changed"):
        assert not torch.allclose(toy.run(module, x), sparse)


def test_layers_with_other_masks_that_share_a_graph() -> None:
    module, x = toy.Toy(attention=lambda: Kept(ones(), sdpa), broken=True), toy.sample(130)
    module.get_buffer("layers.1.attn.mask").copy_(in_a_window())
    off = {name: torch.full((toy.HEADS, 1), -INF) for name in toy.sites()}
    for name in toy.sites():
        attn = module.get_submodule(name)
        attn.mask = module.get_buffer(f"{name}.mask").bool()
    before = toy.run(module, x)
    bsfa.apply(module, Thresholds(values=off, **toy.BLOCKS), **toy.EAGER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.allclose(toy.run(module, x), before)


def one_wrong() -> Tensor:
    mask = ones()[None, None]
    mask[0, 0, 150, 2] = 0.0
    return mask


def alibi() -> Tensor:
    distance = torch.arange(MOST)[None, :] - torch.arange(MOST)[:, None]
    return (0.1 * distance).masked_fill(distance > 0, -INF)


def learned() -> Kept:
    found = Kept(additive(), sdpa)
    del found.mask
    found.mask = nn.Parameter(additive())
    return found


def writes(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    self.mask[0, 0, 5, 2] = 0.0
    return nano_gpt(self, q, k, v, n)


def strided(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[: 2 * n : 2, :n].bool())


def scaled(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    s = q @ k.transpose(-2, -1) / -self.low
    return F.softmax(s, dim=-1) @ v


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Kept(one_wrong(), nano_gpt), "table of the model"),
        (lambda: Kept(alibi(), sdpa), "table of the model"),
        (learned, "learned"),
        (lambda: Kept(ones()[None, None], writes), "table of the model"),
        (lambda: Kept(torch.ones(2 * MOST, MOST).tril(), strided), "a part of a larger one"),
        (lambda: Kept(ones(), scaled), "by a tensor"),
        (lambda: Kept(ones().tril(-1), sdpa_bool), "before the first key"),
    ],
)
def test_tables_that_are_no_mask_stay_dense(make: Callable[[], Kept], why: str) -> None:
    module, x = toy.Toy(1, attention=make), toy.sample(130)
    before = toy.run(copy.deepcopy(module), x)
    calibration = bsfa.calibrate(module, x, **toy.BLOCKS, progress=False)
    assert not calibration.sites
    assert all(why in reason for reason in calibration.dense.values())
    assert list(calibration.dense) == toy.sites(1)
    bsfa.apply(module, toy.thresholds(toy.sites(1)), **toy.EAGER)
    got = toy.run(module, x)
    assert torch.equal(got.nan_to_num(), before.nan_to_num())
    assert all(why in (reason or "") for reason in reasons(module))


def sdpa_bool(self: Any, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:n, :n].bool())


class Tracer(fx.Tracer):
    """torch.fx.symbolic_trace cannot slice a buffer by a length that it does not know."""

    proxy_buffer_attributes = True


def symbolic(module: nn.Module) -> Any:
    return fx.GraphModule(module, Tracer().trace(module))


def exported(module: nn.Module) -> Any:
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=MOST - 1)}}
    return torch.export.export(module, (toy.sample(64),), dynamic_shapes=shapes)


@pytest.mark.parametrize("trace", [symbolic, exported])
@pytest.mark.parametrize("name", ["nanoGPT", "additive"])
def test_masks_kept_by_traced_programs(name: str, trace: Callable[..., Any]) -> None:
    mask, attend, window = KEPT[name]
    program, x = trace(model(mask, attend)), toy.sample(130)
    calibration = bsfa.calibrate(program, x, **toy.BLOCKS, progress=False)
    assert calibration.dense == {}
    solved = toy.thresholds(list(calibration.sites))
    made = bsfa.apply(program, solved, dense_if_faster=False, example=x)
    module = made if isinstance(made, fx.GraphModule) else made.module()
    assert torch.allclose(toy.run(module, x), wanted(window, x))
    assert all(rate is not None and rate > 0 for rate in toy.skipped(made).values())
    if not isinstance(made, fx.GraphModule):
        made.validate()
        file = io.BytesIO()
        torch.export.save(made, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        assert torch.allclose(toy.run(loaded, x), wanted(window, x))
    kept = next(b for n, b in module.named_buffers() if n.endswith("mask"))
    kept[..., 9, 3] = 1 - kept[..., 9, 3]
    with pytest.raises(bsfa.BsfaError, match="changed since"):
        toy.run(module, x)


@given(st.data())
def test_a_band_is_read_back_exactly(data: st.DataObject) -> None:
    rows, columns = (data.draw(st.integers(2, 9)) for _ in range(2))
    lower = data.draw(st.none() | st.integers(2 - rows, 0))
    upper = data.draw(st.none() | st.integers(0, columns - 2))
    on, off = data.draw(st.sampled_from([(1.0, 0.0), (0.0, -INF), (0.0, -1e9), (True, False)]))
    gap = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    inside = torch.ones_like(gap, dtype=torch.bool)
    inside &= gap >= (gap.min() if lower is None else lower)
    inside &= gap <= (gap.max() if upper is None else upper)
    table = torch.where(inside, torch.tensor(on), torch.tensor(off))
    found = band(table[None, None])
    if inside.all():
        assert found is None
        return
    assert found == Band(lower=lower, upper=upper, on=on, off=off)
    r, c = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    table[r, c] = 7.0 if table.is_floating_point() else ~table[r, c]
    assert band(table) != found
