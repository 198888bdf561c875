"""Every Hopper kernel compiles without a card: no warning of ptxas, next to no spilled register."""

from __future__ import annotations

import pytest

from bsfa_compile.ops import kernels_sm90 as built
from bsfa_compile.ops.compiler import Variant, compile_kernel, read_source
from bsfa_compile.ops.kernels_sm90 import Mask, sm90_variants

pytest.importorskip("cuda.core", reason="building kernels needs cuda-core")

PLAIN = Mask(causal=True, window=False, padded=False, softcap=False)
RICH = Mask(causal=False, window=True, padded=True, softcap=True)
SMEM_LIMIT = 232448  # bytes a block of threads may have on sm_90


def check(variant: Variant) -> None:
    compiled = compile_kernel(read_source(variant.source), dict(variant.defines), "sm_90a")
    # C7508 setmaxnreg dropped; C7510, C7511, C7514, C7515, C7518 wgmma serialised.
    assert compiled.warnings == []
    assert variant.entry in compiled.functions
    defines = dict(variant.defines)
    # Three registers, once an item, in lists for wide heads with padding.
    few = variant.entry == "attend" and defines["PADDED"] and defines["HEAD_DIM"] == 256
    assert compiled.functions[variant.entry][1] <= (12 if few else 0)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("mask", [PLAIN, RICH], ids=["plain", "rich"])
def test_main_variants(d: int, mask: Mask) -> None:
    check(built.gate(d, mask, bf16=True, relative=True).variant)
    check(built.gate(d, mask, bf16=True, relative=True, exact=True).variant)
    check(built.resolve(d, mask, bf16=True, relative=True).variant)
    check(built.attend(d, d, mask, bf16=True, listed=True).variant)


@pytest.mark.parametrize("bf16", [True, False])
def test_other_kernels(bf16: bool) -> None:
    check(built.sum_keys(128, bf16=bf16).variant)
    check(built.quantise_keys(128, bf16=bf16).variant)
    check(built.gate(128, PLAIN, bf16=bf16, relative=False).variant)
    check(built.gate(128, PLAIN, bf16=bf16, relative=False, exact=True).variant)
    check(built.resolve(128, RICH, bf16=bf16, relative=False).variant)
    check(built.attend(128, 128, PLAIN, bf16=bf16, listed=False).variant)
    check(built.attend(192, 128, PLAIN, bf16=bf16, listed=True).variant)
    check(built.tally(RICH, fill=bf16).variant)


def test_shared_memory_fits() -> None:
    for d in range(8, 257, 8):
        for mask in (PLAIN, RICH):
            assert built.gate(d, mask, bf16=True, relative=True).smem <= SMEM_LIMIT
            assert built.resolve(d, mask, bf16=True, relative=True).smem <= SMEM_LIMIT
            for dv in (8, 64, 128, 256):
                assert built.attend(d, dv, mask, bf16=True, listed=True).smem <= SMEM_LIMIT


@pytest.mark.variants
@pytest.mark.parametrize(
    "variant", sm90_variants(), ids=lambda v: "-".join(str(x) for _, x in v.defines)
)
def test_every_variant(variant: Variant) -> None:
    check(variant)
