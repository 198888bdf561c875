"""Calibration over several processes equals calibration in one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes

import bsfa_compile as bsfa
from tests import toy

RANKS = 2


def _samples(rank: int) -> list[torch.Tensor]:
    return [toy.sample(96 + 32 * rank, seed=rank), toy.sample(64, seed=10 + rank)]


def _work(rank: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    model, group = toy.Toy(), dist.group.WORLD
    assert group is not None
    made = bsfa.calibrate(model, _samples(rank), **toy.BLOCKS, progress=False, group=group)
    made.save(folder / f"rank{rank}")
    dist.destroy_process_group()


def test_two_ranks_merge_to_what_one_sees(tmp_path: Path) -> None:
    start_processes(_work, args=(tmp_path,), nprocs=RANKS)
    data = [x for rank in range(RANKS) for x in _samples(rank)]
    wanted = bsfa.calibrate(toy.Toy(), data, **toy.BLOCKS, progress=False)
    for rank in range(RANKS):
        got = bsfa.Calibration.load(tmp_path / f"rank{rank}")
        assert (got.samples, got.fingerprint) == (len(data), wanted.fingerprint)
        assert list(got.sites) == list(wanted.sites) and got.lengths == wanted.lengths
        assert all(got.sites[name].equal(site) for name, site in wanted.sites.items())
    solved = got.thresholds(bsfa.Budget(0.1))
    assert solved.dropped is not None and solved.dropped > 0
