"""Thresholds from and for other tools: the official BSFA files, and skip softmax configs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bsfa_compile.calibrate import Calibration
from bsfa_compile.calibrate.official import load_official
from bsfa_compile.calibrate.skip_softmax import load_skip_softmax, skip_softmax_config
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.errors import CalibrationError, InputError, ThresholdsError
from bsfa_compile.ops.tiles import Geometry

SITES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def official(**changes: Any) -> dict[str, Any]:
    values = torch.arange(2 * 2 * 3 * 5, dtype=torch.float32).view(2, 2, 3, 5)
    values[:, :, :, 0] = -math.inf
    content: dict[str, Any] = {
        "thresholds": values,
        "k_values": [8, 16],
        "max_num_blocks": 5,
        "num_layers": 2,
        "num_heads": 3,
        "q_block_size": 128,
        "k_block_size": 64,
        "aggregation_method": "mean",
        "shape_description": "[num_k_values, num_layers, num_heads, max_num_q_blocks]",
    }
    return {name: value for name, value in (content | changes).items() if value is not None}


def test_official_files_keep_their_meaning(tmp_path: Path) -> None:
    torch.save(official(), tmp_path / "t.inference.pt")
    made = load_official(tmp_path / "t.inference.pt", 16, SITES)
    assert (made.gate, made.sink_tiles, made.block_q, made.block_k) == ("absolute", 0, 128, 64)
    for layer, name in enumerate(SITES):
        assert torch.equal(made.values[name], official()["thresholds"][1, layer])


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_official_files_that_are_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "t.pt"
    for content, why in (
        (official(k_values=[8]), "k values"),
        (official(thresholds=torch.zeros(2, 3)), "must be"),
        (official(thresholds=None), "thresholds missing"),
        ([1, 2], "missing"),
        (official(k_values=_Evil()), "without running code"),
    ):
        torch.save(content, path)
        with pytest.raises(ThresholdsError, match=why):
            load_official(path, 8, SITES)
    assert not (tmp_path / "ran").exists()
    torch.save(official(), path)
    with pytest.raises(ThresholdsError, match="k=9"):
        load_official(path, 9, SITES)
    with pytest.raises(ThresholdsError, match="2 layers"):
        load_official(path, 8, SITES[:1])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ThresholdsError, match="damaged"):
        load_official(path, 8, SITES)
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "none", 8, SITES)


@pytest.fixture(scope="module", name="calibration")
def make_calibration(
    observed: Callable[..., SiteStatistics], inputs: Callable[..., tuple[Tensor, Tensor]]
) -> Calibration:
    g = Geometry(q_len=256, k_len=256, is_causal=True, block_q=16, block_k=8)
    sites = {}
    for seed, name in enumerate(SITES):
        q, k = inputs(seed, (1, 4, 2, 256, 256), torch.float32)
        sites[name] = observed(q * 0.7, k, g)
    return Calibration(sites=sites, samples=1)


def test_an_exported_config_gives_back_the_sparsity(
    calibration: Calibration, tmp_path: Path
) -> None:
    config = skip_softmax_config(calibration, targets=("Attention",))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "sparse_attention_config": config})
    )
    heads = dict.fromkeys(SITES, 4)
    factor = config["threshold_scale_factor"]["prefill"]
    found = []
    for sparsity in (0.1, 0.2, 0.3):
        made = load_skip_softmax(tmp_path, heads, sparsity=sparsity, length=256)
        expected = math.log(factor["a"]) + factor["b"] * sparsity - math.log(256)
        assert all(
            value.shape == (4, 1) and torch.allclose(value, torch.tensor(min(expected, 0.0)))
            for value in made.values.values()
        )
        dropped = calibration.told(made).dropped
        assert dropped == pytest.approx(sparsity, abs=0.06)
        found.append(dropped or 0.0)
    assert found == sorted(found) and len(set(found)) == 3
    longer = load_skip_softmax(config, heads, sparsity=0.2, length=512)
    middle = load_skip_softmax(config, heads, sparsity=0.2, length=256)
    gap = middle.values[SITES[0]] - longer.values[SITES[0]]
    assert torch.allclose(gap, torch.full((4, 1), math.log(2)))


def test_the_variants_of_configs_in_use() -> None:
    heads = dict.fromkeys(SITES, 2)
    scale = {"prefill": {"a": 7.93, "b": 8.61}, "decode": {"a": 0.12, "b": 9.85}}
    formula = {"formula": "a * exp(b * target_sparsity)"}
    group = {"sparse_algo": "softmax_skip", "targets": ["Attention"]}
    modelopt = {"config_groups": {"group_0": group}, "threshold_scale_factor": formula | scale}
    nested = {
        "config_groups": {
            "group_0": {
                "algorithm": "skip_softmax",
                "ignore": ["*layers.0*"],
                "threshold_scale_factor": formula | scale,
            }
        }
    }
    plain = {"config_groups": {"group_0": group}, "threshold_scale_factor": 7.93 * math.exp(4.305)}
    wanted = math.log(7.93) + 8.61 * 0.5 - math.log(4096)
    for config in (modelopt, nested, plain, {"sparse_attention_config": modelopt}):
        made = load_skip_softmax(config, heads, sparsity=0.5, length=4096)
        assert float(made.values[SITES[1]][0]) == pytest.approx(wanted, rel=1e-5)
        assert (SITES[0] in made.values) == (config is not nested)
    none = load_skip_softmax(plain | {"threshold_scale_factor": 0}, heads, sparsity=0, length=9)
    assert (none.values[SITES[0]] == -math.inf).all()


def test_other_configs_are_refused(tmp_path: Path) -> None:
    heads = dict.fromkeys(SITES, 2)
    good = {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 1.0, "b": 2.0}}
    for config, why in (
        ({"config_groups": {"g": {"algorithm": "dsa"}}}, "dsa"),
        ({"threshold_scale_factor": good | {"formula": "a + b"}}, "formula"),
        ({"threshold_scale_factor": {"prefill": {"a": 1.0}}}, "coefficients"),
        ({"threshold_scale_factor": {"prefill": {"a": -1.0, "b": 1.0}}}, "coefficients"),
        ({"threshold_scale_factor": "x"}, "number"),
        ({"sparse_attention_config": [1]}, "mapping"),
    ):
        with pytest.raises(ThresholdsError, match=why):
            load_skip_softmax(config, heads, sparsity=0.5, length=64)
    with pytest.raises(InputError, match="sparsity"):
        load_skip_softmax({}, heads, sparsity=2, length=64)
    with pytest.raises(InputError, match="length"):
        load_skip_softmax({}, heads, sparsity=0.5, length=0)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ThresholdsError, match="not calibrated"):
        load_skip_softmax(tmp_path, heads, sparsity=0.5, length=64)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ThresholdsError, match="JSON"):
        load_skip_softmax(tmp_path, heads, sparsity=0.5, length=64)
    empty = Calibration(sites={"a": SiteStatistics(2, block_q=16, block_k=8, sink_tiles=1)})
    with pytest.raises(CalibrationError, match="nothing to fit"):
        skip_softmax_config(empty)
