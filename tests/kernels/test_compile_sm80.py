"""Every variant of the portable kernel compiles, for every generation, within its registers."""

from __future__ import annotations

import itertools
import random

import pytest

from bsfa_compile.ops import kernels
from bsfa_compile.ops.compiler import KernelUnavailable, Variant, compile_kernel, read_source

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
SPILL_BYTES = 256  # stores and loads; nearly all on tiles that an edge of the mask cuts


def compile_and_check(arch: str, variants: list[Variant]) -> None:
    sources = {variant.source: read_source(variant.source) for variant in variants}
    for variant in variants:
        compiled = compile_kernel(sources[variant.source], dict(variant.defines), arch)
        assert variant.entry in compiled.functions
        assert compiled.spills <= SPILL_BYTES, (arch, variant, compiled.functions)
        assert not compiled.warnings


@pytest.mark.parametrize("arch", ARCHS)
def test_a_sample_compiles(arch: str) -> None:
    variants = kernels.sm80_variants(arch)
    sample = random.Random(arch).sample(variants, 5)
    for decide in (kernels.KEEP_ALL, kernels.RELATIVE, kernels.GIVEN):
        chosen = kernels.sm80_kernel(arch, bf16=True, d=128, dv=128, decide=decide, attend=True)
        sample.append(chosen.variant)
    sample.append(kernels.observe_kernel(arch, bf16=True, d=128).variant)
    sample += random.Random(arch).sample(kernels.observe_variants(arch), 2)
    compile_and_check(arch, sample)


@pytest.mark.variants
@pytest.mark.parametrize("arch", ARCHS)
def test_all_compile(arch: str) -> None:
    compile_and_check(arch, kernels.sm80_variants(arch) + kernels.observe_variants(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_head_dim_fits_every_card(arch: str) -> None:
    per_block = {"sm_80": 163, "sm_90a": 227, "sm_100": 227}.get(arch, 99) * 1024
    for d, dv, attend in itertools.product(range(8, 257, 24), range(8, 257, 24), (False, True)):
        kernel = kernels.sm80_kernel(
            arch, bf16=True, d=d, dv=dv, decide=kernels.RELATIVE, attend=attend
        )
        assert kernel.smem + 512 <= per_block  # 512: the gate's own maxima


def test_head_dims_beyond_256_are_a_reason() -> None:
    with pytest.raises(KernelUnavailable, match="head_dim 264"):
        kernels.sm80_kernel("sm_80", bf16=True, d=264, dv=64, decide=1, attend=True)
