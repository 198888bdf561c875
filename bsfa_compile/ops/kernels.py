"""Which kernels exist, and which variant a card, a shape and a dtype get."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from bsfa_compile.ops.compiler import KernelUnavailable, Variant
from bsfa_compile.ops.kernels_sm90 import sm90_variants

HEAD_DIMS = (64, 96, 128, 192, 256)  # built; others are padded to the next
KIB = 1024
# Shared memory: (a multiprocessor, the most one block of threads may ask for), in KiB.
_SMEM = {80: (164, 163), 87: (164, 163), 90: (228, 227), 100: (228, 227), 103: (228, 227)}
_SMALL_SMEM = (100, 99)  # 8.6, 8.9, 12.x
_BLOCK_Q, _BLOCK_K = 128, 64

KEEP_ALL, RELATIVE, ABSOLUTE, GIVEN = range(4)  # DECIDE in cuda/sm80/attention.cu


@dataclass(frozen=True, kw_only=True)
class Sm80Kernel:
    """One specialisation of `cuda/sm80/attention.cu` and what its launch needs."""

    variant: Variant
    threads: int
    smem: int  # bytes


def arch_number(arch: str) -> int:
    """ "sm_90a" -> 90."""
    return int(arch.removeprefix("sm_").rstrip("af"))


def padded_head_dim(head_dim: int) -> int:
    """The built head dim that holds `head_dim` columns."""
    for built in HEAD_DIMS:
        if head_dim <= built:
            return built
    raise KernelUnavailable(f"head_dim {head_dim} is larger than {HEAD_DIMS[-1]}")


def _row_bytes(columns: int) -> int:
    """Bytes of a shared-memory row, see `Layout` in cuda/include/shared_tile.cuh."""
    return 2 * columns + (0 if columns % 64 == 0 else 16)


def sm80_kernel(
    arch: str,
    *,
    bf16: bool,
    d: int,
    dv: int,
    decide: int,
    attend: bool,
    softcap: bool = False,
    padded: bool = False,
) -> Sm80Kernel:
    """The portable kernel for head dims d (of q, k) and dv (of v).

    Four warps of 32 rows read K and V from shared memory half as often as eight of 16, but their
    accumulators fit only up to dv = 128, and one block of them cannot fill a multiprocessor.
    """
    per_sm, per_block = (x * KIB for x in _SMEM.get(arch_number(arch), _SMALL_SMEM))
    asked = d, dv if attend else d
    d, dv = padded_head_dim(d), padded_head_dim(dv)
    v_width = dv if attend else 0

    def bytes_for(k_stages: int, v_stages: int, q_registers: int) -> int:
        q = _BLOCK_Q * _row_bytes(max(d, v_width))
        kv = _BLOCK_K * (k_stages * _row_bytes(d) + v_stages * _row_bytes(v_width))
        return max(q, kv) if q_registers == 2 else q + kv

    def fits(blocks: int, *buffers: int) -> bool:
        smem = bytes_for(*buffers) + KIB  # and static shared memory
        return smem <= per_block and blocks * (smem + KIB) <= per_sm

    # warps, blocks on a multiprocessor, K and V buffers, Q_REGISTERS
    choices = [(8, 1, 2, 2, 0), (8, 1, 2, 1, 0), (8, 1, 1, 1, 0), (8, 1, 1, 1, 2)]
    if v_width <= 128:
        choices = [(4, 2, 2, 2, int(d == 64)), (4, 2, 2, 1, 0), *choices]
    if not attend:
        choices = [(4, 3, 2, 0, 0), *choices]
    fitting = [choice for choice in choices if fits(*choice[1:])]
    if not fitting:
        raise KernelUnavailable(
            f"head dims {d} and {dv} need {bytes_for(1, 1, 2) // KIB} KiB of shared memory; a "
            f"block of threads on {arch} has {per_block // KIB}"
        )
    warps, blocks, *buffers = fitting[0]
    k_stages, v_stages, q_registers = buffers
    defines: dict[str, int] = {
        "BF16": int(bf16),
        "D": d,
        "DV": dv,
        "WARPS": warps,
        "DECIDE": decide,
        "ATTEND": int(attend),
        "SOFTCAP": int(softcap),
        "PADDED": int(padded),
        "WHOLE": int(asked == (d, dv if attend else d)),
        "K_STAGES": k_stages,
        "V_STAGES": v_stages,
        "Q_REGISTERS": q_registers,
        "MIN_BLOCKS": blocks,
    }
    variant = Variant(source="sm80/attention.cu", defines=tuple(defines.items()), entry="attention")
    return Sm80Kernel(variant=variant, threads=32 * warps, smem=bytes_for(*buffers))


def observe_kernel(
    arch: str, *, bf16: bool, d: int, softcap: bool = False, padded: bool = False
) -> Sm80Kernel:
    """The kernel that measures tiles for calibration, for head dim d of q and k."""
    per_sm, per_block = (x * KIB for x in _SMEM.get(arch_number(arch), _SMALL_SMEM))
    asked, d = d, padded_head_dim(d)

    def bytes_for(stages: int) -> int:
        return (_BLOCK_Q + stages * _BLOCK_K) * _row_bytes(d)

    warps, blocks, stages = next(
        (warps, blocks, stages)
        for warps, blocks, stages in ((4, 3, 2), (4, 2, 2), (8, 1, 2), (8, 1, 1))
        if bytes_for(stages) + KIB <= per_block and blocks * (bytes_for(stages) + 2 * KIB) <= per_sm
    )
    defines: dict[str, int] = {
        "BF16": int(bf16),
        "D": d,
        "WARPS": warps,
        "SOFTCAP": int(softcap),
        "PADDED": int(padded),
        "WHOLE": int(asked == d),
        "K_STAGES": stages,
        "MIN_BLOCKS": blocks,
    }
    variant = Variant(source="sm80/observe.cu", defines=tuple(defines.items()), entry="observe")
    return Sm80Kernel(variant=variant, threads=32 * warps, smem=bytes_for(stages))


def observe_variants(arch: str) -> list[Variant]:
    """Every specialisation of the calibration kernel."""
    return [
        observe_kernel(arch, bf16=bf16, d=d, softcap=softcap, padded=padded).variant
        for bf16, d, softcap, padded in itertools.product(
            (True, False), HEAD_DIMS, (False, True), (False, True)
        )
    ]


PADDING = Variant(source="sm80/padding.cu", defines=(), entry="padding")


def sm80_variants(arch: str) -> list[Variant]:
    """Every specialisation of the portable kernel for equal head dims, and for 192 with 128."""
    modes = [(decide, True) for decide in (KEEP_ALL, RELATIVE, ABSOLUTE, GIVEN)]
    modes += [(decide, False) for decide in (RELATIVE, ABSOLUTE)]
    dims = [*((d, d) for d in HEAD_DIMS), (192, 128)]
    found = [PADDING]
    for bf16, (d, dv), softcap, padded, (decide, attend) in itertools.product(
        (True, False), dims, (False, True), (False, True), modes
    ):
        try:
            kernel = sm80_kernel(
                arch,
                bf16=bf16,
                d=d,
                dv=dv,
                decide=decide,
                attend=attend,
                softcap=softcap,
                padded=padded,
            )
        except KernelUnavailable:
            continue  # a head dim too large for the card: dense runs, with the reason
        found.append(kernel.variant)
    return found


def variants(arch: str) -> list[Variant]:
    """Every variant worth building ahead for `arch` ("sm_90a", "sm_80", ...)."""
    found = sm80_variants(arch) + observe_variants(arch)
    return found + sm90_variants() if arch == "sm_90a" else found
