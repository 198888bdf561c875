"""attn_implementation="bsfa" for Hugging Face models; transformers is not imported until you do."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_HOME = "transformers.modeling_utils"  # where attention functions are registered
_DOOR = "bsfa_compile.huggingface.door"


class _WhenImported(MetaPathFinder):
    """Registers the implementation as soon as somebody imports `_HOME`; finds nothing itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of `_HOME` from the other finders, made to register after it has run."""
        if name != _HOME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                importlib.import_module(_DOOR)

            setattr(spec.loader, "exec_module", run_and_register)  # noqa: B010
        return spec


def register_when_imported() -> None:
    """Make "bsfa" an attention implementation of transformers, now or when it is imported."""
    if _HOME in sys.modules:
        importlib.import_module(_DOOR)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
