"""Every shape of calibration data gives the same calls, and bad data are named."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bsfa_compile.calibrate.data import device_of, move, samples
from bsfa_compile.errors import CalibrationError, InputError

IDS = torch.arange(6).reshape(3, 2)


def _calls(data: object) -> list[Any]:
    return list(samples(data))


class _Rows(Dataset[dict[str, Tensor]]):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index]}

    def __len__(self) -> int:
        return 3


class _Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(IDS)


def test_a_list_is_looked_at_before_any_work() -> None:
    with pytest.raises(InputError, match=r"held_out\[1\] is a str"):
        samples([IDS, "text"], "held_out")
    with pytest.raises(InputError, match='return_tensors="pt"'):
        samples([{"input_ids": [[1, 2]]}])
    used = iter(())
    with pytest.raises(CalibrationError, match=r"held_out is empty.*read once"):
        samples(used, "held_out").read()


def test_one_input() -> None:
    (args, kwargs), *rest = _calls(IDS)
    assert args[0] is IDS and not kwargs and not rest
    assert _calls((IDS, 3)) == [((IDS, 3), {})]
    for mapping in ({"input_ids": IDS}, UserDict({"input_ids": IDS})):
        assert _calls(mapping) == [((), {"input_ids": IDS})] and len(samples(mapping)) == 1


def test_many_inputs() -> None:
    as_list = _calls([IDS, (IDS, None), {"input_ids": IDS}, [IDS, IDS]])
    assert [len(args) for args, _ in as_list] == [1, 2, 0, 2]
    assert len(samples([IDS, IDS])) == 2
    assert len(_calls(tensor for tensor in IDS)) == 3
    with pytest.raises(TypeError, match="length"):
        len(samples(iter([IDS])))
    loader = DataLoader(TensorDataset(IDS, IDS), batch_size=2)
    assert len(samples(loader)) == 2
    assert [args[0].shape[0] for args, _ in _calls(loader)] == [2, 1]
    rows = _calls(_Rows())
    assert len(samples(_Rows())) == 3
    assert [kwargs["input_ids"].tolist() for _, kwargs in rows] == IDS.tolist()
    assert len(_calls(_Stream())) == len(_calls(DataLoader(_Stream(), batch_size=1))) == 3


@pytest.mark.parametrize("empty", [[], (), {}, DataLoader(TensorDataset(IDS[:0]))])
def test_empty_data(empty: object) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        samples(empty)
    with pytest.raises(CalibrationError, match="empty"):
        _calls(iter(()))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([IDS, "text"], r"calib_data\[1\] is a str"),
        ([3], r"calib_data\[0\] is a int"),
        ([{"input_ids": [1, 2]}], "with_format"),
        ([[1, 2]], "without a tensor"),
        ([{0: IDS}], "the key 0"),
        ("text", "got str"),
        (7, "got int"),
        (torch.nn.Linear(1, 1), "got Linear"),
    ],
)
def test_what_is_no_model_input_is_named(bad: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        _calls(bad)


class _Pair(NamedTuple):
    key: Tensor
    value: Tensor


def test_moving_reaches_nested_tensors() -> None:
    call = ((IDS, [IDS, 1], _Pair(IDS, IDS)), {"cache": {"k": (IDS,)}, "flag": True})
    (ids, pair, named), kwargs = move(call, "meta")
    assert ids.is_meta and pair[0].is_meta and pair[1] == 1 and named.value.is_meta
    assert kwargs["cache"]["k"][0].is_meta and kwargs["flag"] is True
    assert device_of(torch.nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of(torch.nn.Identity()).type == "cpu"
