"""Calibration data in any shape users have it -> positional and keyword arguments of the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bsfa_compile.errors import CalibrationError, InputError

Call = tuple[tuple[Any, ...], dict[str, Any]]

_WANTED = (
    "one model input (a tensor, a tuple of positional arguments, a dict of keyword arguments) "
    "or an iterable of them (a list, a DataLoader, a dataset)"
)


class Samples:
    """The calls to calibrate with: iterate for (args, kwargs); `len` if the data know theirs.

    Iterating raises CalibrationError if the data turn out to be empty, and InputError for an
    element that is no model input, naming its index and type; of a list all are looked at when it
    is given, before any work. A generator can be read once. name: what messages call the data.
    """

    def __init__(self, data: Iterable[Any], name: str = "calib_data") -> None:
        self._data, self._name = data, name
        if _length(data) == 0:
            raise CalibrationError(self._empty)
        if isinstance(data, list):
            for index, element in enumerate(data):
                _call(element, f"{name}[{index}]")

    @property
    def _empty(self) -> str:
        return f"{self._name} is empty: pass at least one model input (a generator is read once)"

    def __len__(self) -> int:
        length = _length(self._data)
        if length is None:
            raise TypeError(f"{type(self._data).__name__} does not know its length")
        return length

    def read(self) -> Samples:
        """The same, all in memory. Raises CalibrationError if there is nothing."""
        return Samples(list(self._data), self._name)

    def split(self) -> tuple[Samples, Samples]:
        """(to calibrate on, held out): every fourth input is held out, at least one.

        Reads all data into memory. Raises CalibrationError for a single input.
        """
        every = list(self._data)
        if len(every) < 2:
            raise CalibrationError(
                "a Quality target is proven on inputs that calibration did not see, and there is "
                f"only {len(every)} input: pass held_out=..., or at least two inputs"
            )
        held = range(3, len(every), 4) if len(every) > 3 else [len(every) - 1]
        kept = [element for i, element in enumerate(every) if i not in held]
        return Samples(kept), Samples([every[i] for i in held])

    def __iter__(self) -> Iterator[Call]:
        empty = True
        for index, element in enumerate(self._data):
            empty = False
            yield _call(element, f"{self._name}[{index}]")
        if empty:
            raise CalibrationError(self._empty)


def samples(calib_data: object, name: str = "calib_data") -> Samples:
    """The model inputs in `calib_data`: one of them, or an iterable of them.

    A tensor is one positional argument, a tuple several, a mapping (HF BatchEncoding too) the
    keyword arguments. A list is an iterable; inside an iterable a list is what a DataLoader makes
    of a tuple. Raises InputError for anything else, CalibrationError if there is nothing.
    """
    if isinstance(calib_data, Samples):
        return calib_data
    if isinstance(calib_data, tuple | Mapping):
        return Samples([calib_data] if calib_data else [], name)
    if isinstance(calib_data, Tensor):
        return Samples([calib_data], name)
    if not isinstance(calib_data, str | bytes | nn.Module):
        if isinstance(calib_data, Iterable):
            return Samples(calib_data, name)
        if isinstance(calib_data, torch.utils.data.Dataset):
            return Samples(_MapStyle(calib_data), name)
    raise InputError(f"{name} must be {_WANTED}, got {type(calib_data).__name__}")


def move(call: Call, device: torch.device | str) -> Call:
    """The call with every tensor in it on `device`, in nested tuples, lists and dicts too."""
    args, kwargs = call
    return (
        tuple(_move(value, device) for value in args),
        {name: _move(value, device) for name, value in kwargs.items()},
    )


def device_of(model: nn.Module, default: torch.device | None = None) -> torch.device:
    """Where a module computes: the device of its first parameter or buffer.

    If accelerate brings the weights to a device only to use them, that device. The default, or
    the CPU, for a module that holds nothing.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    for value in itertools.chain(model.parameters(), model.buffers()):
        return value.device
    return torch.device("cpu") if default is None else default


class _MapStyle:
    """Iterates over a dataset that has only __getitem__ and __len__."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        return (self._dataset[index] for index in range(len(self)))


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # a generator, or a DataLoader over a stream
        return None


def _call(element: Any, where: str) -> Call:
    kind = type(element).__name__
    if isinstance(element, Tensor):
        return (element,), {}
    if isinstance(element, Mapping):
        odd = [name for name in element if not isinstance(name, str)]
        if odd:
            raise InputError(
                f"{where} is a {kind} with the key {odd[0]!r}; wanted the names of the model's "
                "arguments as keys"
            )
        call: Call = (), dict(element)
    elif isinstance(element, tuple | list):
        call = tuple(element), {}
    else:
        raise InputError(f"{where} is a {kind}; wanted {_WANTED}")
    if not _has_tensor(call):
        raise InputError(
            f"{where} is a {kind} without a tensor in it; convert its values to tensors first "
            '(a tokenizer does with return_tensors="pt", a Hugging Face dataset with '
            'with_format("torch"))'
        )
    return call


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _move(item, device) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(_move(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_move(item, device) for item in value)
    return value
