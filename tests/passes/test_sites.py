"""Which attention calls are taken, with which heads, and why others are left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.backend import Inner
from bsfa_compile.calibrate import Thresholds
from bsfa_compile.modules import compile_in_place
from bsfa_compile.ops import library
from bsfa_compile.passes.rewrite import Rule
from bsfa_compile.passes.sites import Site, find
from bsfa_compile.state import State
from tests import toy

LENGTH = 48
sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attend(nn.Module):
    """attend(q, k, v) of projections of x [B, L, WIDTH]: q has 4 heads, k and v have 2."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv = nn.Linear(toy.WIDTH, 32), nn.Linear(toy.WIDTH, 32)
        self.attend = attend
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=-1)
        return self.attend(toy.heads(3 * self.q(x), 4), toy.heads(3 * k, 2), toy.heads(v, 2))


def graph_of(module: nn.Module, *args: Tensor, **options: Any) -> fx.GraphModule:
    """What Dynamo makes of a call."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True, **options)(*args)
    return found[0]


def only_site(module: nn.Module, x: Tensor) -> Site:
    (site,) = find(graph_of(module, x))
    return site


def key_heads(site: Site) -> int:
    assert site.k is not None
    return int(site.k.meta["example_value"].shape[1])


def expanded(k: Tensor) -> Tensor:
    b, h, n, d = k.shape
    return k[:, :, None, :, :].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)


def unsqueezed(k: Tensor) -> Tensor:
    return k.unsqueeze(2).expand(-1, -1, 2, -1, -1).contiguous().flatten(1, 2)


def interleaved(k: Tensor) -> Tensor:
    return k.repeat_interleave(2, dim=1)


def interleaved_by_function(k: Tensor) -> Tensor:
    return torch.repeat_interleave(k, repeats=2, dim=-3)


def tiled(k: Tensor) -> Tensor:
    return k.repeat(1, 2, 1, 1)  # head 2 is head 0 again: not what grouped queries mean


def written_after(k: Tensor) -> Tensor:
    wide = expanded(k)
    k.mul_(0.5)
    return wide


def causal(repeat: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: sdpa(q, repeat(k.clone()), repeat(v.clone()), is_causal=True)


@pytest.mark.parametrize(
    ("repeat", "heads"),
    [
        (expanded, 2),
        (unsqueezed, 2),
        (interleaved, 2),
        (interleaved_by_function, 2),
        (tiled, 4),
        (written_after, 4),
    ],
)
def test_repeated_heads(repeat: Callable[[Tensor], Tensor], heads: int) -> None:
    module, x = Attend(causal(repeat)), toy.sample(LENGTH)
    dense = toy.run(module, x)
    site = only_site(module, x)
    assert site.reason is None
    assert key_heads(site) == heads
    values = {"(model)": torch.full((4, 1), -torch.inf)}
    bsfa.apply(module, Thresholds(values=values, **toy.BLOCKS), **toy.EAGER)
    assert torch.allclose(toy.run(module, x), dense)
    (report,) = bsfa.report(module).sites
    assert report.rewritten
    assert report.skipped == 0.0


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k[:, :1], v[:, :1], is_causal=True)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q[:, :2], k, v, None, 0.0, True, scale=0.7)


def longer_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """is_causal counts from the top left: query 0 sees key 0 only."""
    return sdpa(q[:, :2, :20], k, v, is_causal=True)


def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q[:, :2, :20], k, v)


def narrow_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q[:, :2], k, v[..., :3], is_causal=True)


def viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Relies on the strides of attention's output."""
    return sdpa(q[:, :2].contiguous(), k.contiguous(), v.contiguous()).view(-1, 8)


@pytest.mark.parametrize(
    "attend", [grouped, one_key_head, scaled, longer_keys, cross, narrow_values, viewed]
)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_supported_calls_give_what_attention_gives(attend: Any, inner: str) -> None:
    module, x = Attend(attend), toy.sample(LENGTH, batch=2)
    dense = toy.run(module, x)
    heads = 4 if attend in (grouped, one_key_head) else 2
    values = {"(model)": torch.full((heads, 1), -torch.inf)}
    options = {**toy.EAGER, "inner": inner}
    bsfa.apply(module, Thresholds(values=values, **toy.BLOCKS), fullgraph=True, **options)
    assert torch.allclose(toy.run(module, x), dense)
    (site,) = bsfa.report(module).sites
    assert site.rewritten


def one_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q[None], k[None], v[None])[0]


def one_row_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v


REFUSED: list[tuple[Callable[..., Tensor], str]] = [
    (lambda q, k, v: sdpa(q[:, :2, :1], k, v), "decode"),
    (lambda q, k, v: sdpa(q[:, 0], k[:, 0], v[:, 0]), "3 dimensions"),
    (lambda q, k, v: sdpa(q[:, :2], k, v, dropout_p=0.3), "dropout"),
    (lambda q, k, v: sdpa(q[:, :2, None], k[:, :, None], v[:, :, None]), "5 dimensions"),
    (lambda q, k, v: sdpa(q[:, :2], k[:1], v[:1]), "batch sizes"),
    (lambda q, k, v: sdpa(q[:, :2], k, v, scale=-0.3), "only positive"),
    (lambda q, k, v: sdpa(q[:, :2], k, v, scale=0.0), "only positive"),
    (lambda q, k, v: torch.vmap(one_row)(q[:, :2], k, v), "torch.func"),
    (lambda q, k, v: torch.vmap(one_row_written)(q[:, :2], k, v), "torch.func"),
]


@pytest.mark.parametrize(("attend", "reason"), REFUSED)
def test_unsupported_calls_say_why(attend: Callable[..., Tensor], reason: str) -> None:
    site = only_site(Attend(attend), toy.sample(LENGTH, batch=2))
    assert site.reason is not None
    assert reason in site.reason


def test_every_site_of_a_graph_is_listed_in_order_with_its_module() -> None:
    gm = graph_of(toy.Toy(3), toy.sample(LENGTH))
    assert [site.path.split(".")[-3:] for site in find(gm)] == [
        ["layers", str(i), "attn"] for i in range(3)
    ]
    assert all(site.ordinal == 0 for site in find(gm))


class Caching(nn.Module):
    """Writes keys into a cache, and attends under a mask that the graph builds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(toy.WIDTH, toy.WIDTH)
        self.double().eval()

    def forward(self, x: Tensor, cache: Tensor, start: Tensor) -> Tensor:
        q = toy.heads(self.q(x))
        index = start + torch.arange(x.shape[1])
        mask = torch.arange(cache.shape[2])[None, :] <= index[:, None]
        cache.index_copy_(2, index, q)
        start.add_(x.shape[1])
        return sdpa(q, cache, cache, attn_mask=mask)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_cache_writes_stay(inner: str) -> None:
    module = Caching()
    wanted_cache, wanted_start = torch.zeros(1, 2, 64, 8).double(), torch.tensor(0)
    cache, start = wanted_cache.clone(), wanted_start.clone()
    chunks = [toy.sample(16, seed=seed) for seed in range(3)]
    with torch.no_grad():
        wanted = [module(chunk, wanted_cache, wanted_start) for chunk in chunks]
    values = {"(model)": torch.full((2, 1), -torch.inf)}
    options = {**toy.EAGER, "inner": inner}
    bsfa.apply(module, Thresholds(values=values, **toy.BLOCKS), fullgraph=True, **options)
    with torch.no_grad():
        got = [module(chunk, cache, start) for chunk in chunks]
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b)
    assert torch.equal(cache, wanted_cache)
    assert int(start) == 48
    assert bsfa.report(module).sites[0].rewritten


def test_the_mask_is_deleted_and_the_cache_write_is_not() -> None:
    module, graphs = Caching(), []

    def inner(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    thresholds = Thresholds(values={"(model)": torch.full((2, 1), -torch.inf)}, **toy.BLOCKS)
    state = State(thresholds=thresholds, rule=Rule.of(thresholds))
    compile_in_place(module, state, cast(Inner, inner))
    with torch.no_grad():
        module(toy.sample(16), torch.zeros(1, 2, 64, 8).double(), torch.tensor(0))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert "index_copy_" in targets
    assert "add_" in targets
    assert not any("built-in function le" in target for target in targets)
    assert not any("scaled_dot_product" in target or "site_v1" in target for target in targets)


def test_the_operator_is_called_with_the_rule_of_the_thresholds() -> None:
    model = fx.symbolic_trace(toy.Toy(1))
    solved = Thresholds(
        values={toy.sites(1)[0]: torch.zeros(2, 1)},
        gate="absolute",
        precision="exact",
        sink_tiles=0,
        **toy.BLOCKS,
    )
    bsfa.apply(model, solved, example=toy.sample())
    (call,) = (node for node in model.graph.nodes if node.target is library.attention)
    assert call.args[-6:] == ("absolute", "exact", 0, 16, 8, True)
