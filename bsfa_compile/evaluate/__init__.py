"""What skipping costs: likelihood, KL divergence from the dense model, retrieval of facts."""

from bsfa_compile.evaluate.likelihood import Comparison, compare, pool, tail_logits
from bsfa_compile.evaluate.needles import Needle, NeedlePrompt, build_needles, retrieved

__all__ = [
    "Comparison",
    "Needle",
    "NeedlePrompt",
    "build_needles",
    "compare",
    "pool",
    "retrieved",
    "tail_logits",
]
