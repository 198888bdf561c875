"""The dial, counters and canary of an optimized model; thresholds saved beside its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import hub

import bsfa_compile as bsfa
from bsfa_compile.calibrate.thresholds import FILE_NAME
from tests import toy


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_request_has_its_own_target() -> None:
    model, x = toy.Toy(), toy.sample(160)
    calibration = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False)
    few, many = (calibration.thresholds(bsfa.Budget(eps)) for eps in (0.005, 0.3))
    bsfa.apply(model, few, **toy.EAGER)
    usual, rates = toy.run(model, x), toy.skipped(model)
    counters.clear()
    with bsfa.retargeted(model, many):
        assert all(rate is None for rate in toy.skipped(model).values())
        other, more = toy.run(model, x), toy.skipped(model)
        assert bsfa.report(model).target == many.target
    assert toy.skipped(model) == rates and bsfa.report(model).target == few.target
    assert all((more[name] or 0) > (rates[name] or 0) > 0 for name in rates)
    assert torch.equal(toy.run(model, x), usual) and not torch.equal(other, usual)
    with pytest.raises(RuntimeError, match="stop"), bsfa.retargeted(model, many):
        raise RuntimeError("stop")
    assert torch.equal(toy.run(model, x), usual)
    assert counters["stats"]["unique_graphs"] == 0
    bsfa.reset_counters(model)
    assert all(rate is None for rate in toy.skipped(model).values())
    with pytest.raises(bsfa.ThresholdsError, match="not optimized"):
        bsfa.reset_counters(toy.Toy())


def test_what_the_dial_cannot_take_is_said() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="no attention was found"):
        bsfa.optimize(model, torch.zeros(1, 2), **toy.EAGER, progress=False)
    with pytest.raises(bsfa.ThresholdsError, match="no attention of this model is sparse"):
        bsfa.retarget(model, bsfa.Budget(0.1))
    for wrong in (0.03, "t.safetensors"):
        with pytest.raises(bsfa.InputError, match="must be Budget, TopK, Sparsity or Thresholds"):
            bsfa.retarget(model, wrong)  # type: ignore[arg-type]


def test_a_model_fitted_for_longer_inputs_stays_fitted() -> None:
    model, x = toy.Toy(), toy.sample(400)
    bsfa.optimize(model, x, bsfa.Budget(0.3), max_length=4096, **toy.EAGER, progress=False)
    bsfa.retarget(model, bsfa.Budget(0.1))
    held = model.get_buffer("layers.0.attn.bsfa_thresholds_0").view(torch.float32)
    assert held.shape == (toy.HEADS, 4096 // 128) and (held.diff(dim=1) <= 0).all()
    assert (held[:, -1] < held[:, 0]).any()
    bsfa.revert(model)
    calibration = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False)
    for found in (
        calibration.thresholds(bsfa.Budget(0.3), max_length=1000),
        bsfa.search(
            model, calibration, bsfa.Quality(error=0.1), x, max_length=1000, progress=False
        ),
    ):
        bsfa.apply(model, found, **toy.EAGER)
        toy.run(model, toy.sample(1000))
        assert all(toy.skipped(model).values()) and found.curves is not None
        assert found.proof is None or (found.proof.holds and found.proof.skipped > 0)


def test_a_canary_sees_the_drift_and_changes_nothing() -> None:
    model, x = toy.Toy(), toy.sample(160)
    dense = toy.run(model, x)
    thresholds = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False).thresholds(bsfa.Budget(0.1))
    bsfa.apply(model, thresholds, **toy.EAGER)
    usual, rates = toy.run(model, x), toy.skipped(model)
    bsfa.reset_counters(model)
    counters.clear()
    told: list[bsfa.Drift] = []
    with bsfa.Canary(model, every=2, told=told.append) as canary:
        for _ in range(4):
            assert torch.equal(toy.run(model, x), usual)
    assert [drift.call for drift in told] == [0, 2] and canary.drifts == told
    wanted = float((usual - dense).norm() / dense.norm())
    assert wanted > 0 and told[0].error == pytest.approx(wanted, rel=1e-6)
    assert toy.skipped(model) == pytest.approx(rates)
    assert counters["stats"]["unique_graphs"] == 0
    toy.run(model, x)
    assert len(told) == 2
    with pytest.raises(bsfa.InputError, match="every"):
        bsfa.Canary(model, every=0)
    with pytest.raises(bsfa.InputError, match="optimize"):
        bsfa.Canary(toy.Toy())


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
    return model


def test_thresholds_travel_with_the_checkpoint(tmp_path: Path) -> None:
    model, ids = _llama(), torch.randint(0, 64, (1, 256))
    calibration = bsfa.calibrate(model, {"input_ids": ids}, **toy.BLOCKS, progress=False)
    bsfa.apply(model, calibration.thresholds(bsfa.Budget(0.3)), **toy.EAGER)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    rates = toy.skipped(model)
    assert any(rate for rate in rates.values())
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE_NAME).stat().st_size < 4096
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    bsfa.apply(again, tmp_path, **toy.EAGER)
    with torch.no_grad():
        got = again(input_ids=ids, use_cache=False).logits
    assert torch.allclose(got, wanted, atol=1e-5) and toy.skipped(again) == pytest.approx(rates)
    bsfa.revert(model)
    model.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / FILE_NAME).exists()
    with pytest.raises(FileNotFoundError):
        bsfa.apply(model, tmp_path / "dense")


def test_thresholds_travel_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sent = _llama(), dict[str, bsfa.Thresholds]()
    x = {"input_ids": torch.randint(0, 64, (1, 256))}
    solved = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False).thresholds(bsfa.Budget(0.3))
    bsfa.apply(model, solved, **toy.EAGER)

    def upload(folder: str, *_: object, **__: object) -> None:
        assert Path(folder, "model.safetensors").is_file()
        sent["here"] = bsfa.Thresholds.load(folder)

    api = SimpleNamespace(create_repo=lambda repo, **_: SimpleNamespace(repo_id=repo))
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: MagicMock())
    monkeypatch.setattr(model, "_upload_modified_files", upload)
    model.push_to_hub("me/mine")
    for name, values in sent["here"].values.items():
        assert torch.equal(values, solved.values[name])


def test_a_fine_tune_is_warned_of_and_can_be_rechecked() -> None:
    model, x = toy.Toy(), toy.sample(160)
    thresholds = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False).thresholds(
        bsfa.Budget(0.05)
    )
    same = bsfa.recheck(model, x, thresholds, progress=False)
    assert same.holds and same.dropped == pytest.approx(thresholds.dropped) and same.dropped > 0
    with torch.no_grad():
        for layer in model.layers:
            layer.get_parameter("attn.qkv.weight").mul_(0.3)  # flat attention: much more is lost
    with pytest.warns(UserWarning, match="recheck"):
        bsfa.apply(model, thresholds, **toy.EAGER)
    tuned = bsfa.recheck(model, toy.sample(640), progress=False)
    assert not tuned.holds and tuned.lost > same.lost and "calibrate again" in str(tuned)
    with pytest.raises(bsfa.ThresholdsError, match="not optimized"):
        bsfa.recheck(toy.Toy(), x, progress=False)
