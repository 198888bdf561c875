"""What was done to a model: remembered beside it, so that the model itself carries only buffers."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bsfa_compile.calibrate.calibration import Calibration
from bsfa_compile.calibrate.fingerprint import unwrap
from bsfa_compile.calibrate.thresholds import ROOT, Thresholds
from bsfa_compile.errors import UnsupportedError
from bsfa_compile.ops import library
from bsfa_compile.ops.held import CHANGED
from bsfa_compile.passes.eligible import DECODE
from bsfa_compile.passes.rewrite import Rule

UNCALIBRATED = "it has no thresholds: calibration never reached it as a supported site"
# At eight times the length, three octaves, two and three times what was asked for is lost
# (docs/method.md). A fourth more, a third of an octave, costs less than documents differ by.
_TOLERANCE = 1.25
Home = nn.Module | torch.export.ExportedProgram  # what holds a site's buffers


def site_name(module: str, ordinal: int) -> str:
    """The name of a site: its module's, "#1" for the second attention call in it, and so on."""
    return f"{module or ROOT}#{ordinal}" if ordinal else module or ROOT


def split_name(name: str) -> tuple[str, int]:
    """Inverse of `site_name`: (qualified name of the module, ordinal)."""
    module, _, ordinal = name.partition("#")
    return "" if module == ROOT else module, int(ordinal or 0)


@dataclass(kw_only=True, eq=False)
class Seen:
    """One site over all graphs compiled so far: in how many it is sparse, and why dense."""

    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)


def kind(reason: str | None) -> str:
    """What a call with this reason to be dense counts as in `State.calls`."""
    return "sparse" if reason is None else "decode" if reason == DECODE else "dense"


@dataclass(kw_only=True, eq=False)
class State:
    """An optimized model, without a reference that would keep it alive.

    sites: by name, in the model's order, as calibration and the compiled graphs saw them.
    homes: site -> (what holds its buffers, the names of thresholds and counters in it).
    names: qualified names of the model's modules, by id.
    longest: tokens of the longest input that ran sparse. beyond: whether it was said that inputs
    are longer than the thresholds hold for.
    calls: attention calls that ran "sparse", "decode" (dense by design), "dense" for another
    reason, and "eager": dense because their module ran outside the compiled graphs.
    """

    thresholds: Thresholds
    rule: Rule
    calibration: Calibration | None = None
    strict: bool = False
    sites: dict[str, Seen] = field(default_factory=dict)
    homes: dict[str, tuple[weakref.ref[Home], str, str]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    previous: object = None  # how the model was compiled before
    warned: bool = False
    told: bool = False
    longest: int = 0
    beyond: bool = False
    calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.given = self.thresholds  # `thresholds` changes when the model is retargeted

    @property
    def columns(self) -> int:
        """Columns of the thresholds buffers: enough for any target of the calibration."""
        wide = [values.shape[1] for values in self.thresholds.values.values()]
        if self.calibration is not None:
            wide += [len(site.reached) for site in self.calibration.sites.values()]
        return max(wide, default=1)

    def record(self, found: Iterable[tuple[str, str | None]]) -> None:
        """Note the sites of a compiled graph: (name, reason to be dense or None).

        Raises UnsupportedError if strict and one is dense for another reason than decoding.
        """
        found = list(found)
        for name, reason in found:
            seen = self.sites.setdefault(name, Seen())
            if reason is None:
                seen.sparse += 1
            else:
                seen.dense[reason] += 1
        if self.strict:
            refuse({name: reason for name, reason in found if reason is not None})

    def ran(self, name: str, reason: str | None) -> None:
        """Note a call of a site that no graph holds: why it was dense, None if it was not."""
        seen = self.sites.setdefault(name, Seen())
        self.calls[kind(reason)] += 1
        if reason is None:
            seen.sparse += 1
        else:
            seen.dense[reason] += 1

    def met(self, tokens: int, keys: int) -> None:
        """Note a sparse call: tokens of the input so far, and the most keys that a row of it sees.

        Says once if these are more than the thresholds hold for.
        """
        self.longest = max(self.longest, tokens)
        reach = None if self.beyond else self.thresholds.reach
        if reach is not None and keys > _TOLERANCE * reach:
            self.beyond = True
            warnings.warn(
                f"inputs of {tokens} tokens; thresholds were made on up to {reach}: the loss that "
                f"was asked for does not hold beyond that; pass max_length={tokens} to optimize or "
                "Calibration.thresholds (a fit over positions), or calibrate on inputs that long",
                stacklevel=3,
            )

    def unfit(self, name: str, heads: object) -> str | None:
        """Why there are no thresholds for a site with so many query heads; None if there are."""
        values = self.thresholds.values.get(name)
        if values is None:
            known = {} if self.calibration is None else self.calibration.dense
            return known.get(name, UNCALIBRATED)
        if len(values) != heads:
            return f"its thresholds are for {len(values)} heads, and here it has {heads}"
        return None

    def warn_eager(self, what: str) -> None:
        """Say once that attention runs dense because its module runs outside a compiled graph."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{what} runs outside the compiled graph, so its attention is dense: a graph "
                "break around it (accelerate's hooks make one), torch.compiler.disable, a direct "
                "call of model.forward, the recompile limit "
                "(torch._dynamo.config.recompile_limit), or a backend of torch.compile other than "
                '"bsfa"',
                stacklevel=3,
            )

    def changed(self, names: Iterable[str]) -> None:
        """Note a call of a graph whose assumptions fail: it runs dense, not compiled. Say so once.

        Raises UnsupportedError if strict.
        """
        names = list(names)
        for name in names:
            self.ran(name, CHANGED)
        if self.strict:
            refuse(dict.fromkeys(names, CHANGED))
        if not self.told:
            self.told = True
            warnings.warn(
                f"{names[0]}: {CHANGED}; where that is so, attention runs dense and not compiled: "
                "call bsfa_compile.apply or optimize again after changing a mask",
                stacklevel=3,
            )

    def buffers(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(thresholds int32 [H, columns], counters int64 [H, 2]) of a site, where they are now."""
        home, *names = self.homes.get(name, (None, "", ""))
        owner = None if home is None else home()
        if owner is None:
            return None
        held = owner._buffers if isinstance(owner, nn.Module) else owner.state_dict
        thresholds, counters = (held.get(n) for n in names)
        return None if thresholds is None or counters is None else (thresholds, counters)


def refuse(dense: Mapping[str, str]) -> None:
    """Raise UnsupportedError that lists every site and reason, decoding apart; if there is one."""
    reasons = {name: reason for name, reason in dense.items() if reason != DECODE}
    if reasons:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        raise UnsupportedError(
            f"strict=True, and {len(reasons)} attention sites must stay dense:\n{lines}\n"
            "Pass strict=False to leave these dense"
        )


_STATES: weakref.WeakKeyDictionary[object, State] = weakref.WeakKeyDictionary()


def remember(model: object, state: State) -> None:
    """Tie a state to a model (or exported program) and to the modules that carry its buffers."""
    _STATES[model] = state
    for home, *_ in state.homes.values():
        owner = home()
        if owner is not None:
            _STATES[owner] = state


def forget(model: object) -> None:
    """Untie what `remember` tied."""
    state = _STATES.pop(model, None)
    for key in [k for k, v in _STATES.items() if v is state]:
        del _STATES[key]


def state_of(model: object) -> State | None:
    """The state of a model, also behind torch.compile(model); None if it was not optimized."""
    return _STATES.get(unwrap(model) if isinstance(model, nn.Module) else model)


def known_modules() -> dict[int, nn.Module]:
    """Modules tied to any state, by id."""
    return {id(m): m for m in _STATES if isinstance(m, nn.Module)}


def attends_by_itself(module: nn.Module) -> bool:
    """Whether transformers calls our attention function for it: attn_implementation="bsfa"."""
    config = getattr(module, "config", None)
    if config is None:
        return False
    # What the property reads, which takes 2 us at every layer of every token.
    quick = vars(config).get("_attn_implementation_internal") == "bsfa"
    return quick or getattr(config, "_attn_implementation", None) == "bsfa"


def ran_eager(module: nn.Module) -> None:
    """Called when a module that should be inside a compiled graph runs by itself."""
    state = _STATES.get(module)
    if state is not None and not attends_by_itself(module):
        state.calls["eager"] += 1
        state.warn_eager(state.names.get(id(module), type(module).__name__))


def _owners(buffer: Tensor) -> Iterator[tuple[State, str]]:
    """The states and sites that a buffer belongs to."""
    for state in set(_STATES.values()):
        for name in state.homes:
            held = state.buffers(name) or ()
            if any(one.data_ptr() == buffer.data_ptr() for one in held):
                yield state, name


def _ran_unread(counters: Tensor) -> None:
    """Called where a graph runs a site that another backend than ours compiled."""
    for state, name in _owners(counters):
        state.calls["eager"] += 1
        state.warn_eager(name)


def _met(thresholds: Tensor, tokens: int, keys: int) -> None:
    """Called where a graph that the user traced runs a sparse site."""
    for state, _ in _owners(thresholds):
        state.met(tokens, keys)


library.when_unread.append(_ran_unread)
library.when_met.append(_met)
