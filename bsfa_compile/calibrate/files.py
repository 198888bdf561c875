"""Tensors and JSON in one safetensors file that notices when it was damaged. No pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from bsfa_compile.errors import BsfaError

_PREFIX = "bsfa_compile."


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().tobytes())
    return digest.hexdigest()


def save(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
) -> None:
    """Write CPU tensors and JSON `content`; the file appears whole or not at all."""
    text = json.dumps(content)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": _PREFIX + kind,
        "version": str(version),
        "content": text,
        "checksum": _checksum(plain, text),
    }
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to save into", str(target.parent))
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(plain, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], kind: str, version: int, error: type[BsfaError]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of `save`. Raises `error` for a damaged, foreign or wrongly versioned file.

    A file that is not there or cannot be read stays an OSError.
    """
    with open(path, "rb"):  # so that a missing file is not reported as a damaged one
        pass
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError, ValueError, OSError) as cause:
        raise error(
            f"{path}: not a safetensors file, or damaged ({cause}); wanted {_PREFIX}{kind}. "
            "Save it again from the calibration"
        ) from cause
    if metadata.get("format") != _PREFIX + kind:
        raise error(
            f"{path}: the format is {metadata.get('format')!r}, wanted {_PREFIX + kind!r}: "
            "this is a file of something else"
        )
    if metadata.get("version") != str(version):
        raise error(
            f"{path}: format version {metadata.get('version')!r}, this release reads {version}; "
            "use the release that wrote it, or calibrate again"
        )
    text = metadata.get("content", "")
    if metadata.get("checksum") != _checksum(tensors, text):
        raise error(f"{path}: the checksum does not fit the content: the file is damaged")
    content: dict[str, Any] = json.loads(text)
    return tensors, content
