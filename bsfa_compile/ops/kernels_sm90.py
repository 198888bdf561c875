"""The Hopper kernels as they are built: which macros a call needs, how much shared memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bsfa_compile.ops.compiler import Variant

GROUP_KEYS = 256  # keys that one block of threads quantises
GROUP_META = 8  # floats, see cuda/sm90/quantise.cu
SLOT_KEYS = 128  # keys that the gate loads at a time
THREADS = 384  # of attention and resolve: a loader and two consumer warpgroups
_SMEM_LIMIT = 232448  # bytes a block of threads may ask for on sm_90
_BLOCK_Q, _BLOCK_K, _SLAB = 128, 64, 64  # a slab: 64 16-bit columns


@dataclass(frozen=True, kw_only=True)
class Mask:
    """What of the mask and score function is built into a kernel."""

    causal: bool
    window: bool
    padded: bool
    softcap: bool

    def defines(self) -> dict[str, int]:
        return {
            "CAUSAL": int(self.causal),
            "WINDOW": int(self.window),
            "PADDED": int(self.padded),
        }


@dataclass(frozen=True, kw_only=True)
class Built:
    """A variant and what its launch needs."""

    variant: Variant
    threads: int
    smem: int  # bytes of dynamic shared memory


def _variant(name: str, entry: str, defines: dict[str, int]) -> Variant:
    return Variant(source=f"sm90/{name}.cu", defines=tuple(defines.items()), entry=entry)


def row_bytes(d: int) -> int:
    """Bytes of a quantised row of K, the head dim padded."""
    return 64 if d <= 64 else 128 if d <= 128 else 256


def sum_keys(d: int, *, bf16: bool) -> Built:
    """Partial sums of K over keys."""
    defines = {"HEAD_DIM": d, "BF16": int(bf16)}
    return Built(variant=_variant("quantise", "sum_keys", defines), threads=256, smem=0)


def quantise_keys(d: int, *, bf16: bool) -> Built:
    """K to int8."""
    defines = {"HEAD_DIM": d, "BF16": int(bf16)}
    threads = 512 if row_bytes(d) == 256 else 256
    return Built(variant=_variant("quantise", "quantise_keys", defines), threads=threads, smem=0)


def gate(d: int, mask: Mask, *, bf16: bool, relative: bool, exact: bool = False) -> Built:
    """The int8 gate; exact: it says what int8 leaves undecided."""
    defines = {"HEAD_DIM": d, "BF16": int(bf16), "RELATIVE": int(relative)}
    defines |= {**mask.defines(), "SOFTCAP": int(mask.softcap), "EXACT": int(exact)}
    units = defines["UNITS"] = gate_units(d, mask)
    channels = -(-8 * row_bytes(d) // 1024) * 1024  # K's mean and spread
    smem = _ring(channels + units * _slabs(d) * _BLOCK_Q * 128, SLOT_KEYS * row_bytes(d))
    threads = 128 * (units + 1)
    return Built(variant=_variant("gate", "gate", defines), threads=threads, smem=smem)


def resolve(d: int, mask: Mask, *, bf16: bool, relative: bool) -> Built:
    """Decides in 16 bits what the int8 gate left open."""
    if not relative:  # no edge of the mask cuts such a tile
        mask = replace(mask, window=False, causal=mask.causal and mask.padded)
    defines = {"HEAD_DIM": d, "BF16": int(bf16), "RELATIVE": int(relative)}
    defines |= {**mask.defines(), "SOFTCAP": int(mask.softcap)}
    q = (2 if d <= 128 else 1) * _slabs(d) * _BLOCK_Q * 128
    smem = _ring(q, _slabs(d) * 2 * _BLOCK_K * 128)
    return Built(variant=_variant("resolve", "resolve", defines), threads=THREADS, smem=smem)


def exact_sinks(d: int, mask: Mask) -> bool:
    """Whether the relative gate of exact decisions reads the sink tiles in 16 bits."""
    return d <= (128 if mask.softcap else 192)


def _slabs(d: int) -> int:
    return -(-d // _SLAB)


def _ring(q: int, slot: int) -> int:
    """Shared memory of a gate: q bytes for Q, and slots of K, as many as fit up to 8."""
    return 1024 + q + min(8, (_SMEM_LIMIT - 1024 - q) // slot) * slot


def sum_chunk(k_len: int) -> int:
    """Keys whose sum one block of threads forms: few enough sums to add up again."""
    return max(512, -(-k_len // 32))


def gate_units(d: int, mask: Mask) -> int:
    """Units, q blocks of one head, that a block of threads of the gate works on at a time.

    A warpgroup each. Three keep the tensor cores busy whatever one of them does; wide heads leave
    shared memory for two, rich masks registers.
    """
    return 3 if d <= 128 and mask.window + mask.padded + mask.softcap <= 1 else 2


def attend(d: int, dv: int, mask: Mask, *, bf16: bool, listed: bool) -> Built:
    """Attention over a list of tiles, or over all."""
    defines = {"HEAD_DIM": d, "VALUE_DIM": dv, "BF16": int(bf16), "LIST": int(listed)}
    defines |= {**mask.defines(), "SOFTCAP": int(mask.softcap)}
    keys = (2 if max(d, dv) <= 128 else 1) * _BLOCK_K
    q = (2 if d <= 128 else 1) * -(-d // _SLAB) * _BLOCK_Q * 128
    smem = 1024 + q + 2 * keys * 128 * (-(-d // _SLAB) + -(-dv // _SLAB))
    return Built(variant=_variant("attend", "attend", defines), threads=THREADS, smem=smem)


def tally(mask: Mask, *, fill: bool) -> Built:
    """Counts what a tile mask drops, or fills it with all visible tiles."""
    defines = {**mask.defines(), "FILL": int(fill)}
    return Built(variant=_variant("tally", "tally", defines), threads=128, smem=0)


def sm90_variants() -> list[Variant]:
    """The specialisations worth building ahead: equal head dims, masks of common models."""
    masks = [
        Mask(causal=causal, window=window, padded=padded, softcap=softcap)
        for causal in (True, False)
        for window in (False, True)
        for padded in (False, True)
        for softcap in (False, True)
    ]
    found = []
    for bf16 in (True, False):
        for d in (64, 96, 128, 192, 256):
            found += [sum_keys(d, bf16=bf16), quantise_keys(d, bf16=bf16)]
            for mask in masks:
                for relative in (True, False):
                    found += [gate(d, mask, bf16=bf16, relative=relative)]
                    found += [gate(d, mask, bf16=bf16, relative=relative, exact=True)]
                    found += [resolve(d, mask, bf16=bf16, relative=relative)]
                found += [attend(d, d, mask, bf16=bf16, listed=x) for x in (True, False)]
    found += [
        tally(mask, fill=fill) for mask in masks if not mask.softcap for fill in (True, False)
    ]
    return list(dict.fromkeys(built.variant for built in found))
