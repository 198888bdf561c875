"""optimize on graphs the user traced: GraphModule in place, ExportedProgram saved and loaded."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from tests import toy, zoo

ROOT = Path(__file__).parent.parent
LENGTHS = {"x": {1: torch.export.Dim("length", min=2, max=4096)}}


def symbolic() -> fx.GraphModule:
    return fx.symbolic_trace(toy.Toy())


def exported(strict: bool = False) -> ExportedProgram:
    args = (toy.sample(64),)
    return torch.export.export(toy.Toy(), args, dynamic_shapes=LENGTHS, strict=strict)


def callable_of(model: Any) -> Callable[[Tensor], Tensor]:
    module: nn.Module = model.module() if isinstance(model, ExportedProgram) else model
    return lambda x: toy.run(module, x)


@pytest.mark.parametrize("make", [symbolic, exported, lambda: exported(strict=True)])
def test_a_traced_program_is_optimized_as_the_module_is(make: Callable[[], Any]) -> None:
    model, x, module = make(), toy.sample(130), toy.Toy()
    dense = callable_of(model)(x)
    data = [x, toy.sample(96)]
    calibration = bsfa.calibrate(model, data, **toy.BLOCKS, progress=False)
    live = bsfa.calibrate(module, data, **toy.BLOCKS, progress=False)
    assert list(calibration.sites) == list(live.sites) == toy.sites()
    for name, site in live.sites.items():
        assert torch.equal(site.counts, calibration.sites[name].counts)
    solved = calibration.thresholds(bsfa.Budget(0.2))
    wanted, rates = toy.expected(module, solved, x)
    made = bsfa.apply(model, solved, dense_if_faster=False, example=x)
    assert type(made) is type(model)
    assert (made is model) == isinstance(model, fx.GraphModule)
    got = callable_of(made)(x)
    assert torch.allclose(got, wanted)
    assert not torch.allclose(got, dense)
    assert toy.skipped(made) == pytest.approx(rates)
    back = bsfa.revert(made)
    assert torch.equal(callable_of(back)(x), dense)


@pytest.mark.parametrize("make", [symbolic, exported])
def test_optimize_and_retarget_traced_programs(make: Callable[[], Any]) -> None:
    x = toy.sample(300)
    options: Any = {"gate": "absolute", "dense_if_faster": False, "progress": False}
    made = bsfa.optimize(make(), x, bsfa.Budget(0.0), **options)
    run = callable_of(made)
    dense = run(x)
    bsfa.retarget(made, bsfa.Sparsity(0.4))
    module = toy.Toy()  # the absolute gate keeps one sink tile unless told otherwise
    calibration = bsfa.calibrate(module, x, sink_tiles=1, progress=False)
    wanted, rates = toy.expected(module, calibration.thresholds(bsfa.Sparsity(0.4), "absolute"), x)
    got = run(x)
    assert torch.allclose(got, wanted)
    assert not torch.allclose(got, dense)
    assert toy.skipped(made) == pytest.approx(rates)


def test_a_graph_module_is_reverted_without_a_trace() -> None:
    model, x = symbolic(), toy.sample(300)
    code, keys, buffers = model.code, sorted(vars(model)), sorted(model._buffers)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bsfa.optimize(model, x, progress=False)
    assert model.code != code
    assert list(model.state_dict()) == list(state)
    assert bsfa.revert(model) is model
    assert model.code == code
    assert sorted(vars(model)) == keys
    assert sorted(model._buffers) == buffers
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_one_graph_serves_all_lengths() -> None:
    model, thresholds = symbolic(), toy.thresholds(toy.sites())
    bsfa.apply(model, thresholds, dense_if_faster=False, example=toy.sample(40, batch=2))
    for length, batch in ((40, 2), (97, 1), (130, 3)):
        x = toy.sample(length, batch)
        wanted, _ = toy.expected(toy.Toy(), thresholds, x)
        assert torch.allclose(toy.run(model, x), wanted)


def test_without_shapes_a_graph_module_needs_an_example() -> None:
    model, thresholds = symbolic(), toy.thresholds(toy.sites())
    dense = toy.run(model, toy.sample())
    bsfa.apply(model, thresholds)
    assert torch.equal(toy.run(model, toy.sample()), dense)
    assert all("shapes" in (site.reason or "") for site in bsfa.report(model).sites)
    with pytest.raises(bsfa.UnsupportedError, match="shapes"):
        bsfa.apply(model, thresholds, strict=True)


def test_thresholds_are_lifted_buffers_of_the_signature() -> None:
    program = exported()
    made = bsfa.apply(program, toy.thresholds(toy.sites()))
    made.validate()
    new = [s for s in made.graph_signature.input_specs if "bsfa_" in str(s.target)]
    assert len(new) == 4
    assert all(spec.kind is InputKind.BUFFER and spec.persistent for spec in new)
    assert {str(spec.target) for spec in new} <= set(made.state_dict)
    assert len(program.state_dict) + 4 == len(made.state_dict)
    assert not any("scaled_dot_product" in str(node.target) for node in made.graph.nodes)


LOAD = """
import sys, torch
import bsfa_compile as bsfa
program = torch.export.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(program.module()(x), sys.argv[3])
report = bsfa.report(program)
print([(site.name, site.rewritten, site.skipped) for site in report.sites])
"""


def test_an_optimized_program_is_saved_and_loaded_in_a_new_process(tmp_path: Path) -> None:
    program, x = exported(), toy.sample(200)
    made = bsfa.apply(program, toy.thresholds(toy.sites()), dense_if_faster=False)
    wanted = callable_of(made)(x)
    rates = toy.skipped(made)
    assert all(rate is not None and rate > 0 for rate in rates.values())
    torch.export.save(made, tmp_path / "made.pt2")
    torch.save(x, tmp_path / "x.pt")
    paths = [str(tmp_path / name) for name in ("made.pt2", "x.pt", "y.pt")]
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), wanted)
    assert all(repr(name) in ran.stdout for name in toy.sites())
    loaded = torch.export.load(tmp_path / "made.pt2")
    with pytest.raises(bsfa.BsfaError, match="original"):
        bsfa.revert(loaded)


def test_an_optimized_program_can_be_compiled_and_decomposed() -> None:
    program, x = exported(), toy.sample(150)
    made = bsfa.apply(program, toy.thresholds(toy.sites()), dense_if_faster=False)
    wanted = callable_of(made)(x)
    torch._dynamo.reset()
    compiled = torch.compile(made.module(), backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), wanted)
    lowered = made.run_decompositions()
    assert any("attention_v1" in str(node.target) for node in lowered.graph.nodes)
    assert torch.allclose(callable_of(lowered)(x), wanted)


class Bare(nn.Module):
    """Attention of q to two contexts, given as [batch, heads, length, head_dim]."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return F.scaled_dot_product_attention(2 * y, k, k)


def test_attention_of_the_inputs_themselves() -> None:
    torch.manual_seed(0)
    model = fx.symbolic_trace(Bare())
    q, k = torch.randn(1, 2, 96, 8).double(), torch.randn(1, 2, 80, 8).double()
    calibration = bsfa.calibrate(model, (q, k), **toy.BLOCKS, progress=False)
    names = ["scaled_dot_product_attention", "scaled_dot_product_attention_1"]
    assert list(calibration.sites) == names
    assert calibration.dense == {}
    solved = calibration.thresholds(bsfa.Sparsity(0.3), "absolute")
    bsfa.apply(model, solved, dense_if_faster=False, example=(q, k))
    for length, batch in ((96, 1), (50, 3)):
        longer = torch.randn(batch, 2, length, 8).double()
        with torch.no_grad():
            model(longer, torch.randn(batch, 2, 2 * length, 8).double())
    assert all(rate is not None and rate > 0 for rate in toy.skipped(model).values())


class Masked(nn.Module):
    """Attention under an additive causal mask that the graph builds, with repeated heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(toy.WIDTH, toy.WIDTH)
        self.kv = nn.Linear(toy.WIDTH, toy.WIDTH // 2)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k = toy.heads(3 * self.q(x)), toy.heads(3 * self.kv(x), 1)
        k = k.repeat_interleave(2, dim=1)
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        y = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


def test_masks_and_repeated_heads_in_a_symbolic_trace() -> None:
    module = Masked()
    model, x = fx.symbolic_trace(copy.deepcopy(module)), toy.sample(90)
    calibration = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False)
    assert calibration.dense == {}
    (name,) = calibration.sites
    values = {name: torch.tensor([[-0.1], [-0.2]])}
    bsfa.apply(model, Thresholds(values=values, **toy.BLOCKS), dense_if_faster=False, example=x)
    assert not any(node.target is torch.full for node in model.graph.nodes)
    for length in (90, 130):
        given = toy.sample(length)
        wanted, _ = toy.expected(module, Thresholds(values={"": values[name]}, **toy.BLOCKS), given)
        assert torch.allclose(toy.run(model, given), wanted)
    assert all(rate is not None and rate > 0 for rate in toy.skipped(model).values())


@pytest.mark.parametrize("name", ["llama", "bert", "mistral"])
def test_hugging_face_models_exported(name: str) -> None:
    module = zoo.build(name).double()
    given = zoo.inputs(name, 120)
    given = zoo.left_padded(given, (0, 40))
    dense = zoo.output(module, given)
    with torch.no_grad():
        program = torch.export.export(module, (), given)
    calibration = bsfa.calibrate(program, given, **toy.BLOCKS, progress=False)
    assert list(calibration.sites) == list(zoo.ZOO[name].sites)
    assert calibration.dense == {}
    open_ = {n: torch.full((s.heads, 1), -torch.inf) for n, s in calibration.sites.items()}
    made = bsfa.apply(program, Thresholds(values=open_, **toy.BLOCKS), dense_if_faster=False)
    made.validate()
    left = [str(n.target) for n in made.graph.nodes if n.op == "call_function"]
    assert not any("scaled_dot_product" in target for target in left)
    assert not any(target.startswith("aten.le") for target in left)  # the mask is gone
    rows = given["attention_mask"].bool()
    got = zoo.output(made.module(), given)
    assert torch.allclose(got[rows], dense[rows])
    assert all(site.skipped == 0.0 for site in bsfa.report(made).sites)
