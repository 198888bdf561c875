"""The demo: its models and their pins, its texts, the matching of rules, and the whole of it."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import bsfa_compile as bsfa
from bsfa_compile.cli import app
from bsfa_compile.demo.judge import (
    by_counting,
    counters,
    dropped_tiles,
    match_dropped,
    wanted_tiles,
)
from bsfa_compile.errors import InputError, ModelUnavailableError
from bsfa_compile.evaluate import models as demo_models
from bsfa_compile.evaluate import texts
from bsfa_compile.evaluate.models import GEMMA, QWEN, PackagedModel, load
from bsfa_compile.evaluate.tilemap import DROPPED, INVISIBLE, KEPT, Caught, catching, kept_tiles
from bsfa_compile.ops import reference
from bsfa_compile.ops.tiles import Geometry
from tests.tiny import save_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `save_tiny`."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_the_whole_demo_on_a_tiny_model(tiny: Path, tmp_path: Path) -> None:
    options = "--tokens 1024 --scored 200 --facts 1 --new-tokens 3 --eps 0.2 --device cpu"
    result = CliRunner().invoke(
        app, ["demo", "--model", str(tiny), "--output", str(tmp_path), *options.split()]
    )
    assert result.exit_code == 0, result.output
    for words in ("budget", "paper", "2 attention sites rewritten", "Greedy continuation"):
        assert words in result.output
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")

    outcome = json.loads((tmp_path / "demo.json").read_text())
    ours, paper = outcome["rules"]
    sites = [f"model.layers.{n}.self_attn" for n in range(2)]
    for rule in (ours, paper):
        assert list(rule["kept"]) == sites
        assert rule["comparison"]["tokens"] == 400
        assert rule["comparison"]["kl"] > 0
        kept = torch.tensor([rule["kept"][site] for site in sites])
        assert 0.05 < rule["dropped"] < 0.95
        assert float(1 - kept.mean()) == pytest.approx(rule["dropped"], abs=1e-6)
        assert 0 <= kept.min() <= kept.max() <= 1
    assert outcome["calibrated_on"] != outcome["evaluated_on"]
    assert outcome["rewritten"] == 2
    assert outcome["left_dense"] == {}
    maps = {name: torch.tensor(m["tiles"]) for name, m in outcome["tile_maps"].items()}
    for states in maps.values():
        assert states.shape == (8, 16)
        assert bool((states.triu(2)[:, 2:] != KEPT).sum())
    assert torch.equal(maps["budget"] == INVISIBLE, maps["paper"] == INVISIBLE)


def test_other_models_are_loaded_by_folder(tiny: Path) -> None:
    loaded = load(str(tiny), tiny, CPU)
    assert loaded.prefix == ()
    assert loaded.decode(loaded.encode("A tile, kept.")) == "A tile, kept."
    assert not loaded.model.training


def test_a_missing_model_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_models, "installed", lambda _: False)
    for name, words in (
        (None, r"Qwen.* or Gemma.*pip install .*demo-qwen.* or .*demo-gemma"),
        ("gemma", r"Gemma 3 270M \(Gemma terms of use\) is not installed.*demo-gemma"),
        (str(tmp_path / "nothing"), "cannot be loaded"),
    ):
        with pytest.raises(ModelUnavailableError, match=words):
            load(name, tmp_path, CPU)


def fake_packages(folder: Path, contents: list[bytes]) -> PackagedModel:
    """Installed packages with parts of a file, whose code must not run."""
    for n, content in enumerate(contents):
        package = folder / f"weights_part{n}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('this must not run')")
        (package / "data" / "part.bin").write_bytes(content)
        info = folder / f"weights_part{n}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: weights-part{n}\nVersion: 1.2\n"
        )
    return PackagedModel(
        key="fake",
        title="Fake",
        licence="none",
        modules=tuple(f"weights_part{n}" for n in range(len(contents))),
        version="1.2",
        parts="data/*.bin",
        sha256=hashlib.sha256(b"".join(contents)).hexdigest(),
    )


def test_parts_are_joined_in_order_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = fake_packages(tmp_path, [b"one ", b"two ", b"three"])
    assert not demo_models.installed(packaged)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert demo_models.installed(packaged)
    assert not demo_models.installed(replace(packaged, version="1.3"))

    demo_models.assemble(packaged, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"one two three"

    (tmp_path / "weights_part1" / "data" / "part.bin").write_bytes(b"TWO ")
    with pytest.raises(ModelUnavailableError, match=f"pinned is {packaged.sha256}"):
        demo_models.assemble(packaged, tmp_path / "whole")
    (tmp_path / "weights_part1" / "data" / "part.bin").unlink()
    with pytest.raises(ModelUnavailableError, match="expected one part file"):
        demo_models.assemble(packaged, tmp_path / "whole")


def test_both_packaged_models_are_pinned() -> None:
    for packaged in (QWEN, GEMMA):
        assert len(packaged.sha256) == 64
        assert packaged.version
    assert len(QWEN.modules) == 6


def test_texts_are_apart_and_cut_to_length(tmp_path: Path) -> None:
    assert not set(texts.CALIBRATION) & set(texts.EVALUATION)
    shipped = {name: texts.shipped(name) for name in (*texts.CALIBRATION, *texts.EVALUATION)}
    seen = set().union(*(set(shipped[name].paragraphs) for name in texts.CALIBRATION))
    for name in texts.EVALUATION:
        assert not seen & set(shipped[name].paragraphs)

    def encode(text: str) -> list[int]:
        return [ord(c) for c in text]

    ids = shipped["emma"].tokens(encode, 5000, [1])
    assert ids.shape == (1, 5000)
    assert ids[0, 0] == 1
    assert "".join(map(chr, ids[0, 1:16].tolist())) == "Emma Woodhouse,"
    with pytest.raises(InputError, match="give a longer text"):
        shipped["emma"].tokens(encode, 10**6)

    mine = tmp_path / "mine.txt"
    mine.write_text("One.\n\nTwo.\n")
    assert texts.documents([mine], texts.EVALUATION)[0].paragraphs == ("One.", "Two.")
    mine.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="UTF-8"):
        texts.read(mine)


class Attention(nn.Module):
    """Causal self-attention on [1, 2, L, 16], as a module of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(3 * x, x, x, is_causal=True)


def local(length: int) -> Tensor:
    """Noise with a drift [1, 2, length, 16]: what is near is alike."""
    return torch.randn(1, 2, length, 16) * 0.5 + torch.randn(1, 2, length, 16).cumsum(2) * 0.1


def test_k_is_chosen_to_drop_as_many_tiles() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(Attention(), Attention()), [local(2048)]
    calibration = bsfa.calibrate(model, data, progress=False)
    solved = calibration.thresholds(bsfa.Budget(0.1))
    wanted = wanted_tiles(calibration, solved)

    def dropped_by(thresholds: bsfa.Thresholds) -> int:
        optimized = bsfa.apply(model, thresholds, dense_if_faster=False, inner="eager")
        with torch.no_grad():
            optimized(*data)
        held = counters(model)
        assert list(held) == ["0", "1"]
        return dropped_tiles(held)

    goal = dropped_by(solved)
    assert goal == pytest.approx(wanted, rel=0.01)
    assert goal > 200
    counted = dropped_by(calibration.thresholds(bsfa.TopK(by_counting(calibration, wanted))))
    matched = dropped_by(match_dropped(calibration, wanted, goal, dropped_by))
    assert matched == pytest.approx(goal, rel=0.1)
    assert abs(matched - goal) <= abs(counted - goal)


def test_the_search_for_k_follows_what_is_measured() -> None:
    torch.manual_seed(0)
    paper = bsfa.calibrate(Attention(), [local(2048)], progress=False)
    asked = []

    def dropped_by(thresholds: bsfa.Thresholds) -> int:
        asked.append(int(thresholds.target.removeprefix("TopK(k=").removesuffix(")")))
        return 400 - 10 * asked[-1]  # half as steep as counting has it

    found = match_dropped(paper, 250.0, 310, dropped_by)
    assert found.target == "TopK(k=9)"
    assert len(asked) == len(set(asked)) <= 3


@pytest.mark.parametrize(("gate", "shift"), [("relative", 2.0), ("absolute", 8.0)])
def test_tile_maps_are_the_references_decisions(gate: str, shift: float) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 600, 16) * 2, torch.randn(1, 2, 600, 16)
    values = torch.tensor([[-4.0], [-1.0], [0.0], [1.0]]) + shift
    thresholds = bsfa.Thresholds(values={"site": values}, gate=gate)
    states = kept_tiles(Caught(site="site", q=q, k=k, scale=None), thresholds)
    g = Geometry(q_len=600, k_len=600, is_causal=True)
    kept = reference.tile_mask(q, k, values, g, scale=0.25, gate=gate)
    assert states.shape == (4, 5, 10)
    assert torch.equal(states == KEPT, kept[0, :, :5])
    visible = torch.arange(10)[None, :] * 64 < (torch.arange(5)[:, None] + 1) * 128
    assert torch.equal(states != INVISIBLE, visible.expand(4, 5, 10))
    assert bool((states == DROPPED).any())


def test_the_middle_layer_without_a_mask_of_its_own_is_caught() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    model = nn.Sequential(Attention(), Masked(), Attention())
    x = torch.randn(1, 2, 64, 16)
    with catching(model, ["0", "1", "2"]) as caught:
        model(x)
    found = caught()
    assert found is not None
    assert found.site == "0"
    assert torch.equal(found.q, 3 * x)
    assert not any(module._forward_pre_hooks for module in model)
    with catching(model, ["1"]) as caught:
        model(x)
    assert caught() is None
