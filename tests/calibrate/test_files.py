"""Thresholds and calibrations on disk: to the bit, and never a damaged file read as a good one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bsfa_compile.calibrate import (
    Budget,
    Calibration,
    Fingerprint,
    Sparsity,
    Thresholds,
    TopK,
    files,
)
from bsfa_compile.calibrate.quality import Proof
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.errors import BsfaError, CalibrationError, ThresholdsError
from bsfa_compile.ops.tiles import Geometry

PRINT = Fingerprint(structure="ab", weights="cd")


def test_a_folder_takes_them_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    made = Thresholds(values={"a": torch.zeros(2, 1)}, target="Budget(eps=0.1)", dropped=0.25)
    made.save(tmp_path)
    assert Thresholds.load(tmp_path).equal(made)
    assert repr(made) == (
        "Thresholds(1 sites, Budget(eps=0.1), gate relative, 25.0% of tiles dropped)"
    )
    with pytest.raises(FileNotFoundError, match=r"no such folder to save into.*/b'"):
        made.save(tmp_path / "b" / "t.safetensors")
    with pytest.raises(ThresholdsError, match=r"float32.*got list"):
        Thresholds(values={"a": [1.0]})  # type: ignore[dict-item]


@pytest.fixture(scope="module", name="calibration")
def make_calibration(
    observed: Callable[..., SiteStatistics], inputs: Callable[..., tuple[Tensor, Tensor]]
) -> Calibration:
    g = Geometry(q_len=96, k_len=96, is_causal=True, block_q=16, block_k=8)
    sites = {
        f"layers.{i}.attn{suffix}": observed(*inputs(i, dtype=torch.float32), g)
        for i, suffix in enumerate(("", "", "#1"))
    }
    return Calibration(
        sites=sites, samples=3, uncalled=("x",), dense={"y": "bias"}, fingerprint=PRINT
    )


@pytest.fixture(name="thresholds")
def make_thresholds(calibration: Calibration) -> Thresholds:
    return calibration.thresholds(Budget(0.05))


def test_thresholds_round_trip(calibration: Calibration, tmp_path: Path) -> None:
    for target in (Budget(0.05), Sparsity(0.05), TopK(2)):
        made = calibration.thresholds(target, precision="exact")
        made.save(tmp_path / "t.safetensors")
        again = Thresholds.load(tmp_path / "t.safetensors")
        assert again.equal(made) and list(again.values) == list(made.values)
        assert again.fingerprint == PRINT and again.lengths == (96,)
        assert again.target == repr(target) and again.precision == "exact"
        assert again.block_q == 16 and again.dropped == made.dropped
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_calibration_round_trip_and_targets_from_disk(
    calibration: Calibration, tmp_path: Path
) -> None:
    calibration.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert list(again.sites) == list(calibration.sites)
    assert all(again.sites[n].equal(site) for n, site in calibration.sites.items())
    assert (again.samples, again.uncalled, again.dense) == (3, ("x",), {"y": "bias"})
    assert again.thresholds(TopK(3)).equal(calibration.thresholds(TopK(3)))


def test_targets_choose_their_gate_and_tell_what_to_expect(calibration: Calibration) -> None:
    budget, paper = calibration.thresholds(Budget(0.05)), calibration.thresholds(TopK(3))
    assert (budget.gate, paper.gate) == ("relative", "absolute")
    assert calibration.thresholds(Budget(0.05), "absolute").gate == "absolute"
    assert budget.dropped is not None and budget.lost is not None
    assert 0 < budget.dropped < 1 and 0 < budget.lost <= 0.05
    told = calibration.predict(budget)
    assert list(told) == list(calibration.sites) and all(p.exact for p in told.values())
    mean = torch.stack([p.dropped for p in told.values()]).mean()
    assert budget.dropped == pytest.approx(float(mean))


def test_a_sparsity_out_of_reach_warns_and_says_what_it_gives(calibration: Calibration) -> None:
    with pytest.warns(UserWarning, match="at most"):
        most = calibration.thresholds(Sparsity(0.99))
    assert most.dropped is not None and 0 < most.dropped < 0.99
    assert most.dropped == calibration.thresholds(Budget(1.0)).dropped
    assert all((value <= 0).all() for value in most.values.values())


def test_calibrations_merge(calibration: Calibration) -> None:
    first = next(iter(calibration.sites))
    part = Calibration(sites={first: calibration.sites[first]}, samples=1, fingerprint=PRINT)
    for both in (calibration.merge(part), part.merge(calibration)):
        assert both.samples == 4 and both.uncalled == ("x",) and both.dense == {"y": "bias"}
        assert both.sites[first].samples == 2
    found = Calibration(sites={"x": calibration.sites[first]}, fingerprint=PRINT)
    assert calibration.merge(found).uncalled == ()
    with pytest.raises(CalibrationError, match="different models"):
        calibration.merge(Calibration(sites={}))
    with pytest.raises(CalibrationError, match="no attention"):
        Calibration(sites={}).thresholds(Budget(0.1))
    other = SiteStatistics(4, block_q=32, block_k=8, sink_tiles=1)
    with pytest.raises(CalibrationError, match="block_q"):
        Calibration(sites={**calibration.sites, "z": other})


@pytest.fixture(scope="module", name="good")
def make_good(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "t"
    calibration.thresholds(Budget(0.05)).save(path)
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_is_refused(
    good: bytes, tmp_path_factory: pytest.TempPathFactory, position: float, flip: int
) -> None:
    at = int(position * len(good))
    damaged = bytearray(good)
    damaged[at] ^= flip
    header_end = 8 + int.from_bytes(good[:8], "little")
    if at in range(header_end - 8, header_end) and damaged[at] in b" \t\r\n":
        return  # blank for blank after the header says the same
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(damaged)
    with pytest.raises(ThresholdsError):
        Thresholds.load(path)


@settings(max_examples=50, deadline=None)
@given(keep=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(
    good: bytes, tmp_path_factory: pytest.TempPathFactory, keep: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(good[: int(keep * len(good))])
    with pytest.raises(ThresholdsError, match="damaged"):
        Thresholds.load(path)


def test_foreign_files_and_versions_are_refused(
    thresholds: Thresholds, calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ThresholdsError, match="something else"):
        Thresholds.load(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ThresholdsError, match="not a safetensors file"):
        Thresholds.load(path)
    calibration.save(path)
    with pytest.raises(ThresholdsError, match=r"bsfa_compile\.calibration"):
        Thresholds.load(path)
    thresholds.save(path)
    with pytest.raises(CalibrationError, match=r"bsfa_compile\.thresholds"):
        Calibration.load(path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8 : 8 + size])["__metadata__"]
    save_file(load_file(path), path, metadata | {"version": "99"})
    with pytest.raises(ThresholdsError, match="version '99'"):
        Thresholds.load(path)
    for kind, load in (("thresholds", Thresholds.load), ("calibration", Calibration.load)):
        files.save(path, kind, 2, {}, {"sites": ["a"]})
        with pytest.raises(BsfaError, match="a field is missing"):
            load(path)
    with pytest.raises(FileNotFoundError):
        Thresholds.load(tmp_path / "missing")


def test_fields_that_older_releases_did_not_write_have_their_defaults(
    thresholds: Thresholds, tmp_path: Path
) -> None:
    proof = Proof(
        metric="nll",
        limit=0.01,
        measured=0.002,
        upper=0.004,
        tokens=512,
        skipped=0.6,
        holds=True,
        trials=3,
        also={"kl": 0.003},
    )
    proven, path = replace(thresholds, proof=proof), tmp_path / "t"
    proven.save(path)
    assert Thresholds.load(path).equal(proven)
    tensors, content = files.load(path, "thresholds", 2, ThresholdsError)
    del content["proof"]["also"]
    files.save(path, "thresholds", 2, tensors, content)
    assert Thresholds.load(path).equal(replace(proven, proof=replace(proof, also={})))
    for changed in (
        content | {"odd": 1},
        content | {"proof": content["proof"] | {"odd": 1}},
        content | {"proof": {"metric": "nll"}},
    ):
        files.save(path, "thresholds", 2, tensors, changed)
        with pytest.raises(ThresholdsError, match="a field is missing or unknown"):
            Thresholds.load(path)
    del content["proof"], content["fingerprint"], content["lengths"]
    files.save(path, "thresholds", 2, tensors, content)
    assert Thresholds.load(path).equal(replace(thresholds, fingerprint=None, lengths=()))


def test_bad_thresholds_are_refused() -> None:
    good = torch.zeros(2, 1)
    for bad in (good[:, 0], good.double(), good[:0], good * torch.nan):
        with pytest.raises(ThresholdsError, match=r"of 'a'"):
            Thresholds(values={"a": bad})
    with pytest.raises(ThresholdsError, match="gate"):
        Thresholds(values={"a": good}, gate="both")
    with pytest.raises(ThresholdsError, match="precision"):
        Thresholds(values={"a": good}, precision="fp8")
    with pytest.raises(ThresholdsError, match="block_q"):
        Thresholds(values={"a": good}, block_q=0)
