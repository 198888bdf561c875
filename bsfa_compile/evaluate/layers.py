"""How far the output of every attention layer moves from dense, all layers being sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def _telling(
    model: nn.Module, sites: Sequence[str], tell: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside, `tell` is given the first tensor that each module in `sites` returns."""

    def watch(site: str) -> Callable[..., None]:
        def left(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                tell(site, first)

        return left

    with ExitStack() as stack:
        for site in sites:
            handle = model.get_submodule(site).register_forward_hook(watch(site))
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def outputs(model: nn.Module, sites: Sequence[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """What the modules in `sites` return in a run of the untraced model, in main memory."""
    found: dict[str, Tensor] = {}

    def tell(site: str, output: Tensor) -> None:
        found[site] = output.cpu()

    with _telling(model, sites, tell):
        run()
    return found


@torch.no_grad()
def errors(
    model: nn.Module, dense: Mapping[str, Tensor], run: Callable[[], object]
) -> dict[str, float]:
    """|sparse - dense| / |dense| of each site's output, Frobenius norms, in the same run."""
    found: dict[str, Tensor] = {}

    def tell(site: str, output: Tensor) -> None:
        kept = dense[site].to(output.device)
        gap = torch.linalg.vector_norm(output - kept, dtype=torch.float32)
        found[site] = gap / torch.linalg.vector_norm(kept, dtype=torch.float32)

    with _telling(model, list(dense), tell):
        run()
    return {site: float(error) for site, error in found.items()}
