"""Models as they are deployed: adapters, quantised or offloaded weights, remote code, dtypes."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Calibration, Thresholds
from tests import toy, zoo

PATHS = ("door", "graph")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


def llama(path: str) -> Any:
    model = zoo.build("llama")
    model.set_attn_implementation("bsfa" if path == "door" else "sdpa")
    return model


def opened(calibration: Calibration) -> Thresholds:
    """-inf everywhere: the operator runs and may drop nothing."""
    values = {n: torch.full((s.heads, 1), -torch.inf) for n, s in calibration.sites.items()}
    return Thresholds(values=values, **toy.BLOCKS)


def check(model: Any, given: dict[str, Any], path: str, limit: float = 1e-4) -> None:
    """Equal to itself at -inf, other and sparse at real thresholds, itself again when reverted."""
    wanted = zoo.output(model, given)
    calibration = bsfa.calibrate(model, given, **toy.BLOCKS, progress=False)
    assert len(calibration.sites) == 2 and not calibration.dense
    how: Any = {"compile": False, "dense_if_faster": False} if path == "door" else toy.EAGER
    bsfa.apply(model, opened(calibration), **how)
    assert torch.allclose(zoo.output(model, given), wanted, atol=limit)
    bsfa.apply(model, calibration.thresholds(bsfa.Budget(0.2)), **how)
    sparse = zoo.output(model, given)
    assert not torch.allclose(sparse, wanted, atol=limit)
    assert all(rate is not None and rate > 0 for rate in toy.skipped(model).values())
    assert bsfa.report(model).calls == {"sparse": 2}
    bsfa.revert(model)
    assert torch.equal(zoo.output(model, given), wanted)


@pytest.mark.parametrize("path", PATHS)
def test_lora(path: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(path), config).eval()
    given = zoo.left_padded(zoo.inputs("llama", 100), (0, 20))
    check(model, given, path)


@pytest.mark.parametrize("path", PATHS)
def test_adapters_added_after_optimize_keep_it_sparse(path: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, given = llama(path), zoo.inputs("llama", 100)
    how: Any = {"compile": False, "dense_if_faster": False} if path == "door" else toy.EAGER
    calibration = bsfa.calibrate(model, given, **toy.BLOCKS, progress=False)
    bsfa.apply(model, calibration.thresholds(bsfa.Budget(0.2)), **how)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    zoo.output(peft.get_peft_model(model, config).eval(), given)
    assert bsfa.report(model).calls == {"sparse": 2}
    assert all(rate is not None and rate > 0 for rate in toy.skipped(model).values())


@pytest.mark.parametrize("path", PATHS)
def test_int8_weights(path: str) -> None:
    quantisation = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = llama(path)
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    check(model, zoo.left_padded(zoo.inputs("llama", 100), (0, 20)), path)


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_weights_offloaded_by_accelerate(home: str, tmp_path: Path) -> None:
    """Its hooks break graphs everywhere: sparse through the door, dense with a reason elsewhere."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    where: dict[str, Any] = {"execution_device": torch.device("cpu")}
    offload = accelerate.cpu_offload
    if home == "disk":
        offload, where["offload_dir"] = accelerate.disk_offload, tmp_path
    given = zoo.left_padded(zoo.inputs("llama", 100), (0, 20))
    usual = llama("door")
    calibration = bsfa.calibrate(usual, given, **toy.BLOCKS, progress=False)
    solved = replace(calibration.thresholds(bsfa.Budget(0.2)), fingerprint=None)
    bsfa.apply(usual, solved, compile=False, dense_if_faster=False)
    wanted = zoo.output(usual, given)
    model = offload(llama("door"), **where)
    assert next(model.model.layers[0].parameters()).device.type == "meta"
    bsfa.apply(model, solved, compile=False, dense_if_faster=False)
    assert torch.allclose(zoo.output(model, given), wanted)
    assert bsfa.report(model).calls == {"sparse": 2}
    assert toy.skipped(model) == pytest.approx(toy.skipped(usual))
    again = bsfa.calibrate(bsfa.revert(model), given, **toy.BLOCKS, progress=False)
    assert list(again.sites) == list(calibration.sites)
    model = offload(llama("graph"), **where)
    again = bsfa.calibrate(model, given, progress=False)
    assert not again.sites and all("accelerate's hooks" in why for why in again.dense.values())


@pytest.mark.parametrize("hooks", ["every module", "every block"])
def test_device_map_over_several_devices(hooks: str) -> None:
    """As above; several devices are acted: accelerate's hooks are there, on one."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    given = zoo.inputs("llama", 100)
    for path in PATHS:
        torch._dynamo.reset()
        model = llama(path)
        if hooks == "every module":
            names = [n for n, m in model.named_modules() if n and not list(m.children())]
            accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), "cpu", force_hooks=True)
        else:
            for part in (model, *model.model.layers):
                hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
                accelerate.hooks.add_hook_to_module(part, hook)
        if path == "door":
            check(model, given, path)
            continue
        calibration = bsfa.calibrate(model, given, progress=False)
        assert not calibration.sites
        assert set(zoo.ZOO["llama"].sites) <= set(calibration.dense)
        assert all("input of the graph" in why for why in calibration.dense.values())
        assert all("accelerate's hooks" in why for why in calibration.dense.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card beside the CPU")
@pytest.mark.parametrize("how", ["offloaded", "computed there"])
@pytest.mark.parametrize("path", PATHS)
def test_layers_on_a_card_and_on_the_cpu(path: str, how: str) -> None:
    """A device_map that leaves the second layer on the CPU, or offloads it there.

    Rotary angles are float32 also in a double model and differ by their last bit between devices.
    """
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    close = functools.partial(torch.allclose, rtol=1e-5, atol=1e-5)
    plain = zoo.left_padded(zoo.inputs("llama", 150), (0, 20))
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in plain.items()}
    rows = given["attention_mask"].bool()
    values = {n: torch.full((4, 1), -0.02 - i) for i, n in enumerate(zoo.ZOO["llama"].sites)}
    solved = Thresholds(values=values, **toy.BLOCKS)
    usual = llama("door").double().cuda()
    dense = zoo.output(usual, given)[rows]
    bsfa.apply(usual, solved, compile=False, dense_if_faster=False)
    sparse, rates = zoo.output(usual, given)[rows], toy.skipped(usual)
    assert len(set(rates.values())) == 2  # each layer has thresholds of its own
    assert not close(sparse, dense)
    model = llama(path).double()
    if how == "offloaded":
        names = ("embed_tokens", "rotary_emb", "layers.0", "layers.1", "norm")
        places: dict[str, Any] = {"lm_head": 0} | {f"model.{n}": 0 for n in names}
        places["model.layers.1"] = "cpu"
        accelerate.dispatch_model(model, places, main_device=0)
    else:
        hook = accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True, place_submodules=True)
        accelerate.hooks.add_hook_to_module(model.cuda().model.layers[1], hook)
    if path == "door":
        bsfa.apply(model, solved, compile=False, dense_if_faster=False)
        assert close(zoo.output(model, given)[rows], sparse)
        assert bsfa.report(model).calls == {"sparse": 2}
        assert toy.skipped(model) == pytest.approx(rates)
    else:  # what the graphs show of it is dense, the first layer perhaps excepted
        values = {name: torch.full_like(v, -torch.inf) for name, v in values.items()}
        bsfa.apply(model, Thresholds(values=values, **toy.BLOCKS), **toy.EAGER)
        assert close(zoo.output(model, given)[rows], dense)
    bsfa.revert(model)
    assert close(zoo.output(model, given)[rows], dense)


@pytest.mark.parametrize("path", PATHS)
def test_gradient_checkpointing_trains_as_without(path: str) -> None:
    given = {"input_ids": zoo.inputs("llama", 64)["input_ids"]}
    grads = []
    for sparse, checkpointed in ((False, False), (True, False), (True, True)):
        model = llama(path).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if sparse:
            values = {n: torch.full((4, 1), -torch.inf) for n in zoo.ZOO["llama"].sites}
            how: Any = {"compile": False} if path == "door" else {"inner": "aot_eager"}
            bsfa.apply(model, Thresholds(values=values, **toy.BLOCKS), **how, dense_if_faster=False)
        model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
        if sparse and (path == "door" or not checkpointed):
            assert bsfa.report(model).coverage == 1.0
        elif sparse:  # the mask is made outside the checkpointed graph
            assert all("mask" in (site.reason or "") for site in bsfa.report(model).sites)
        torch._dynamo.reset()
    for dense, *others in zip(*grads, strict=True):
        for other in others:
            assert dense is not None and other is not None and torch.allclose(dense, other)


@pytest.mark.parametrize("path", PATHS)
def test_another_dtype_and_a_deep_copy_after_optimize(path: str) -> None:
    model, given = llama(path), zoo.inputs("llama", 100)
    calibration = bsfa.calibrate(model, given, **toy.BLOCKS, progress=False)
    how: Any = {"compile": False, "dense_if_faster": False} if path == "door" else toy.EAGER
    solved = calibration.thresholds(bsfa.Budget(0.2))
    dense = zoo.output(model, given)
    bsfa.apply(model, solved, **how)
    assert torch.equal(zoo.output(copy.deepcopy(model), given), dense)
    model.to(torch.bfloat16)
    zoo.output(model, given)
    assert all(rate is not None and rate > 0 for rate in toy.skipped(model).values())
    for name, values in solved.values.items():
        bits = model.get_submodule(name).get_buffer("bsfa_thresholds_0")
        assert torch.equal(bits.view(torch.float32)[:, : values.shape[1]], values)


REMOTE = """
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("path", PATHS)
def test_remote_code(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "own"
    model = zoo.build("llama")
    model.config.auto_map = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
    }
    model.save_pretrained(home)
    (home / "own.py").write_text(REMOTE)
    text = (home / "config.json").read_text()
    (home / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "own"'))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        home,
        trust_remote_code=True,
        attn_implementation="bsfa" if path == "door" else "sdpa",
    ).eval()
    assert "transformers_modules" in type(loaded).__module__
    check(loaded, zoo.inputs("llama", 100), path)


def test_the_recompile_limit_is_told_once_and_counted() -> None:
    """Mixed traffic that makes one graph for each length, past the limit."""
    model = toy.Toy()
    lengths = range(40, 52)
    options: dict[str, Any] = {"thresholds": toy.thresholds(toy.sites()), **toy.EAGER}
    compiled = torch.compile(model, backend="bsfa", options=options, dynamic=False)
    limit = {"recompile_limit": 8}
    with (
        torch._dynamo.config.patch(limit),
        pytest.warns(UserWarning, match="recompile limit") as caught,
        torch.no_grad(),
    ):
        for length in lengths:
            compiled(toy.sample(length))
    assert sum("outside the compiled graph" in str(w.message) for w in caught) == 1
    report = bsfa.report(model)
    assert report.calls["sparse"] >= 2 * 7
    assert report.calls["eager"] >= 2 * 3
    assert sum(report.calls.values()) == 2 * len(lengths)
    assert report.coverage is not None and 0 < report.coverage < 1
    assert "eager" in str(report)


def test_optimize_has_room_for_mixed_traffic() -> None:
    model = toy.Toy()
    bsfa.apply(model, toy.thresholds(toy.sites()), **toy.EAGER, dynamic=False)
    for length in range(40, 52):
        toy.run(model, toy.sample(length))
    assert bsfa.report(model).calls == {"sparse": 24}
