"""Building kernels: sources, reasons, the disk cache. Needs NVRTC, no card."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from bsfa_compile.ops import compiler
from bsfa_compile.ops.compiler import Compiled, KernelUnavailable, Variant

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

KERNEL = (
    '#include "scale.cuh"\nextern "C" __global__ void f(float* x) { x[threadIdx.x] *= SCALE; }\n'
)
TRIPLE = Variant(source="f.cu", defines=(("FACTOR", 3),), entry="f")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources with one kernel and one header, and an empty cache."""
    folder = tmp_path / "cuda"
    (folder / "include").mkdir(parents=True)
    (folder / "f.cu").write_text(KERNEL)
    (folder / "include" / "scale.cuh").write_text("#define SCALE (FACTOR * 1.f)\n")
    monkeypatch.setattr(compiler, "SOURCES", folder)
    monkeypatch.setenv(compiler.CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.delenv(compiler.NO_JIT_ENV, raising=False)
    return folder


def entries() -> list[Path]:
    return sorted(compiler.cache_dir().glob("*"))


def test_headers_are_pasted_once_and_lines_keep_their_names(sources: Path) -> None:
    (sources / "include" / "outer.cuh").write_text('#include "scale.cuh"\n#define OUTER\n')
    (sources / "f.cu").write_text('#include "outer.cuh"\n#include "scale.cuh"\n\nWRONG\n')
    text = compiler.read_source("f.cu")
    assert text.count("#define SCALE") == 1
    with pytest.raises(KernelUnavailable, match=r"f\.cu\(4\): error"):
        compiler.compile_kernel(text, {"FACTOR": 1}, "sm_80")


def test_the_log_gives_registers_and_spills(sources: Path) -> None:
    compiled = compiler.cached(TRIPLE, "sm_80")
    assert list(compiled.functions) == ["f"]
    assert 0 < compiled.registers < 32
    assert compiled.spills == 0
    assert compiled.warnings == []
    assert compiled.cubin[:4] == b"\x7fELF"


def test_warnings_are_found() -> None:
    line = (
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions serialized"
    )
    assert Compiled(cubin=b"", log=f"ptxas info\n{line}\n").warnings == [line]


def test_a_built_kernel_is_read_back(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = compiler.cached(TRIPLE, "sm_80")
    monkeypatch.setattr(compiler, "compile_kernel", None)
    assert compiler.cached(TRIPLE, "sm_80") == built


def test_the_key_covers_source_header_macros_and_arch(sources: Path) -> None:
    compiler.cached(TRIPLE, "sm_80")
    compiler.cached(TRIPLE, "sm_90")
    compiler.cached(Variant(source="f.cu", defines=(("FACTOR", 4),), entry="f"), "sm_80")
    (sources / "include" / "scale.cuh").write_text("#define SCALE (FACTOR * 2.f)\n")
    compiler.cached(TRIPLE, "sm_80")
    (sources / "f.cu").write_text(KERNEL + "// changed\n")
    compiler.cached(TRIPLE, "sm_80")
    assert len(entries()) == 5


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"not json", None])
def test_a_damaged_entry_is_built_again(
    sources: Path, damage: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = compiler.cached(TRIPLE, "sm_80")
    (entry,) = entries()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-10] if damage is None else damage)
    again = compiler.cached(TRIPLE, "sm_80")
    assert again.cubin == built.cubin
    monkeypatch.setattr(compiler, "compile_kernel", None)
    assert compiler.cached(TRIPLE, "sm_80") == again


def test_an_unwritable_cache_costs_only_time(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compiler.CACHE_ENV, str(tmp_path / "file" / "below"))
    assert compiler.cached(TRIPLE, "sm_80").functions


def test_building_can_be_refused(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.NO_JIT_ENV, "1")
    with pytest.raises(KernelUnavailable, match="refused"):
        compiler.cached(TRIPLE, "sm_80")
    with pytest.raises(KernelUnavailable, match="refused"):
        compiler.cached(TRIPLE, "sm_80", jit=False)
    assert compiler.build_all("sm_80", [TRIPLE]) == 1
    assert compiler.cached(TRIPLE, "sm_80").functions


def _build(start: object) -> bytes:
    return compiler.cached(TRIPLE, "sm_80").cubin


def test_processes_may_build_the_same_kernel(sources: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert len(set(pool.map(_build, range(6)))) == 1
    assert len(entries()) == 1


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a")],
)
def test_arch(capability: tuple[int, int], arch: str) -> None:
    assert compiler.arch_for(capability) == arch


def test_a_newer_minor_falls_back_within_its_generation() -> None:
    assert compiler.arch_for((12, 9)).startswith("sm_12")


@pytest.mark.parametrize(("capability", "words"), [((7, 5), "8.0 or newer"), ((99, 0), "99.0")])
def test_an_unknown_card_is_a_reason(capability: tuple[int, int], words: str) -> None:
    with pytest.raises(KernelUnavailable, match=words):
        compiler.arch_for(capability)
