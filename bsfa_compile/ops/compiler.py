"""CUDA sources to cubins: NVRTC through cuda-core, and a cache on disk (`driver.py` launches).

Sources live in `ops/cuda`; they include nothing of CUDA's and are specialised by macros. Compiling
needs neither a card nor a driver. Whatever keeps a kernel from being had (no NVRTC, no cuda-core,
an unknown card, a compile error, building refused) is a `KernelUnavailable` with one clear reason.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsfa_compile.errors import BsfaError

SOURCES = Path(__file__).parent / "cuda"
CACHE_ENV = "BSFA_CACHE_DIR"  # where built kernels are kept
NO_JIT_ENV = "BSFA_NO_JIT"  # any value but 0: take kernels from the cache, never build one
FORMAT = 1  # of a cache entry

_INCLUDE = re.compile(r'^[ \t]*#include[ \t]+"([^"]+)"[^\n]*$', re.M)
_RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.S,
)
_WARNING = re.compile(r"^.*\(C7\d\d\d\).*$", re.M)


class KernelUnavailable(BsfaError, RuntimeError):
    """A kernel cannot be built or loaded here; the message is the reason dense attention runs."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel as it is built: a file under `ops/cuda`, its macros, its entry function."""

    source: str
    defines: tuple[tuple[str, int | str], ...]
    entry: str


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A cubin and what ptxas said of it."""

    cubin: bytes
    log: str

    @property
    def functions(self) -> dict[str, tuple[int, int]]:
        """Entry function -> (registers a thread, bytes spilled: stores + loads)."""
        return {
            m["name"]: (int(m["registers"]), int(m["stores"]) + int(m["loads"]))
            for m in _RESOURCES.finditer(self.log)
        }

    @property
    def registers(self) -> int:
        return max((r for r, _ in self.functions.values()), default=0)

    @property
    def spills(self) -> int:
        return max((s for _, s in self.functions.values()), default=0)

    @property
    def warnings(self) -> list[str]:
        """ptxas warnings of the C7xxx family (serialised wgmma, dropped setmaxnreg, ...)."""
        return _WARNING.findall(self.log)


def read_source(path: str) -> str:
    """A file under `ops/cuda` with its `#include "..."` lines replaced by the files, each once."""
    seen: set[str] = set()

    def expand(name: str, text: str) -> str:
        def paste(match: re.Match[str]) -> str:
            header = match[1]
            if header in seen:
                return ""
            seen.add(header)
            body = expand(header, (SOURCES / "include" / header).read_text())
            line = text.count("\n", 0, match.end()) + 2
            return f'#line 1 "{header}"\n{body}\n#line {line} "{name}"'

        return _INCLUDE.sub(paste, text)

    return expand(path, (SOURCES / path).read_text())


@functools.cache
def _nvrtc() -> tuple[Any, Any, tuple[int, int], tuple[int, ...]]:
    """(Program, ProgramOptions, NVRTC version, architectures it knows as 80, 90, ...)."""
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise KernelUnavailable(
            f"building CUDA kernels needs cuda-core ({error}): pip install bsfa-compile[cuda]"
        ) from error
    try:
        _, major, minor = nvrtc.nvrtcVersion()
        _, archs = nvrtc.nvrtcGetSupportedArchs()
    except Exception as error:  # cuda-pathfinder raises classes of its own per missing library
        raise KernelUnavailable(f"NVRTC cannot be loaded: {error}") from error
    return Program, ProgramOptions, (int(major), int(minor)), tuple(int(a) for a in archs)


def arch_for(capability: tuple[int, int]) -> str:
    """The architecture to build for: the card's own, else the nearest older of its generation."""
    major, minor = capability
    if capability == (9, 0):
        return "sm_90a"
    if major < 8:
        raise KernelUnavailable(
            f"the card has compute capability {major}.{minor}; the kernels need 8.0 or newer"
        )
    fitting = [a for a in _nvrtc()[3] if a // 10 == major and a % 10 <= minor]
    if not fitting:
        raise KernelUnavailable(
            f"NVRTC {'.'.join(map(str, _nvrtc()[2]))} cannot build for a card of compute "
            f"capability {major}.{minor}"
        )
    return f"sm_{max(fitting)}"


def compile_kernel(source: str, defines: Mapping[str, int | str], arch: str) -> Compiled:
    """Compile CUDA C++ text (see `read_source`) to a cubin. Pure: no card, no cache."""
    program, options, version, _ = _nvrtc()
    log = io.StringIO()
    settings = options(
        std="c++17",
        arch=arch,
        define_macro=[(name, str(value)) for name, value in defines.items()] or None,
        ptxas_options=["-v"],
    )
    try:
        code = program(source, "c++", settings).compile("cubin", logs=log)
    except Exception as error:  # cuda-core raises classes of several modules
        lines = f"{error}\n{log.getvalue()}".replace("\0", "").splitlines()
        first = next((line for line in lines if "error:" in line or ": error" in line), str(error))
        raise KernelUnavailable(
            f"NVRTC {version[0]}.{version[1]} cannot compile for {arch}: {first.strip()}"
        ) from error
    return Compiled(cubin=bytes(code.code), log=log.getvalue().replace("\0", ""))


def cache_dir() -> Path:
    """Where built kernels are kept: $BSFA_CACHE_DIR or the platform's cache folder."""
    if CACHE_ENV in os.environ:
        return Path(os.environ[CACHE_ENV])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "bsfa_compile"


def _read(path: Path) -> Compiled | None:
    """A cache entry, or None if it is missing or damaged."""
    try:
        head, _, cubin = path.read_bytes().partition(b"\n")
        entry = json.loads(head)
        intact = entry["sha256"] == hashlib.sha256(cubin).hexdigest()
        return Compiled(cubin=cubin, log=entry["log"]) if intact else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, compiled: Compiled) -> None:
    """Store a cache entry whole: written beside its place, then renamed over it."""
    entry = {"sha256": hashlib.sha256(compiled.cubin).hexdigest(), "log": compiled.log}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(json.dumps(entry).encode() + b"\n" + compiled.cubin)
        os.replace(file.name, path)
    except OSError:
        return  # a cache that cannot be written costs time at the next start, nothing else


def cached(variant: Variant, arch: str, *, jit: bool | None = None) -> Compiled:
    """The variant from the disk cache, else compiled and stored.

    `jit=False` refuses to compile; None follows $BSFA_NO_JIT.
    """
    source = read_source(variant.source)
    key = json.dumps([FORMAT, source, sorted(variant.defines), arch, _nvrtc()[2]])
    name = f"{Path(variant.source).stem}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    path = cache_dir() / f"{name}.cubin"
    found = _read(path)
    if found is not None:
        return found
    if jit is None:
        jit = os.environ.get(NO_JIT_ENV, "0") == "0"
    if not jit:
        raise KernelUnavailable(
            f"kernel {variant.source} for {arch} is not in {cache_dir()} and building is refused "
            f"({NO_JIT_ENV}); run `python -m bsfa_compile build`"
        )
    compiled = compile_kernel(source, dict(variant.defines), arch)
    _write(path, compiled)
    return compiled


def build_all(
    arch: str,
    variants: Sequence[Variant] | None = None,
    *,
    progress: Callable[[Variant, Compiled], None] | None = None,
) -> int:
    """Put every variant into the cache; None: all that `ops/kernels.py` lists for `arch`."""
    if variants is None:
        from bsfa_compile.ops.kernels import variants as all_variants  # it imports this module

        variants = all_variants(arch)
    for variant in variants:
        compiled = cached(variant, arch, jit=True)
        if progress is not None:
            progress(variant, compiled)
    return len(variants)
