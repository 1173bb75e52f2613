"""How much a weight matters: the criteria, and the protocol that a user's own follows.

A criterion gives each weight a score; the units with the smallest scores are pruned. `NAMES` lists those that
are built in; each class says its formula and its source. Those that look at weights alone are here, the
others in `pared.pruning.criteria`. A plain callable ``module -> scores`` is accepted wherever a name is.

A criterion that needs data or gradients says what it wants to see of each tensor with ``observe(target,
pattern)``, which returns an `pared.pruning.calibration.Observer`; one that runs the model itself, or looks at
other layers, has ``measure(model, targets, data, loss_fn)``, which returns a dict by tensor name. Either
result is ``statistics.observed`` when `score` is called. In `pared.prune` a criterion may also change the
weights that stay: ``compensate(observed, dropped)`` returns the new weight, or None.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from pared._errors import choice_error, is_integer
from pared.pruning.patterns import Pattern
from pared.pruning.targets import Target

__all__ = [
    "NAMES",
    "SCOPES",
    "BuiltIn",
    "Criterion",
    "Importance",
    "Magnitude",
    "Random",
    "Statistics",
    "resolve",
    "selection_key",
    "spread_units",
]


SCOPES = ("global", "layer", "row")
KEYS = ("identity", "abs", "square", "abs_sum")
_METHODS = ("score", "observe", "measure", "compensate", "reconstruct")
_SCORES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Statistics:
    """What a criterion may look at besides the module.

    Attributes
    ----------
    layer : qualified name of the module, for example ``"encoder.fc1"``.
    parameter : name of the tensor in it, for example ``"weight"`` or ``"in_proj_weight"``.
    weight : the tensor as the forward pass uses it (masks of other tools applied), detached. Do not write
        to it.
    observed : what the criterion's observer (or ``measure``) returned; None without one.
    transposed : whether the weight is stored as [in, out] (transformers' Conv1D).
    blocks : whether units of more than one weight are scored, RxC.
    """

    layer: str
    parameter: str
    weight: torch.Tensor
    observed: Any = None
    transposed: bool = False
    blocks: bool = False


def spread_units(units: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """One score an output, [outputs], as scores of the weight's shape: each weight has its output's."""
    weight = statistics.weight
    shape = [1] * weight.ndim
    shape[1 if statistics.transposed else 0] = -1
    return units.to(weight.device).reshape(shape).expand(weight.shape)


def selection_key(criterion: Criterion) -> str:
    """The key by which scores are compared once those of blocks have been put together."""
    return "abs" if criterion.key == "abs_sum" else criterion.key


@runtime_checkable
class Criterion(Protocol):
    """An importance criterion.

    Attributes
    ----------
    name : what the report calls it.
    needs_data, needs_gradients : whether `score` reads activations or gradients from its statistics.
    scope : where scores may be compared when the user does not say: "global", "layer" or "row".
    key : how the selection reads a score: "identity" as it is, "abs" its absolute value, "square" its
        square; summed over a block. "abs_sum" is the absolute value of a block's sum. With "abs" and "square"
        the weight can be its own score: nothing is allocated.
    """

    name: str
    needs_data: bool
    needs_gradients: bool
    scope: str
    key: str

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        """Scores of the weight's shape, larger is more important; on the weight's device, floating point."""
        ...


class BuiltIn:
    """Base of the criteria that are built in: calling a method of the protocol with something else than
    `pared.prune` would raises ``TypeError`` or ``ValueError`` in the words of all arguments.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for method in _METHODS:
            if method in vars(cls):
                setattr(
                    cls,
                    method,
                    _checked(vars(cls)[method], hasattr(cls, "observe") or hasattr(cls, "measure")),
                )


# The rest of the arguments is the caller's data, or looked at where it is used.
_KINDS: dict[str, tuple[type, str]] = {
    "module": (nn.Module, "a torch module"),
    "model": (nn.Module, "a torch module"),
    "statistics": (Statistics, "pared.pruning.Statistics"),
    "target": (Target, "a Target"),
    "pattern": (Pattern, "a Pattern"),
    "dropped": (torch.Tensor, "a mask of what goes"),
}


def _checked(method: Callable[..., Any], observes: bool) -> Callable[..., Any]:
    """The method, which refuses arguments of other kinds, and statistics without what was observed."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name, got in given.items():
            if name in _KINDS and not isinstance(got, _KINDS[name][0]):
                raise TypeError(f"{name}: expected {_KINDS[name][1]}, got {type(got).__name__}")
        targets = given.get("targets", ())
        if not isinstance(targets, Sequence) or not all(isinstance(t, Target) for t in targets):
            raise TypeError(f"targets: expected a list of Targets, got {targets!r:.60}")
        seen = given["statistics"].observed if "statistics" in given else given.get("observed", given)
        if observes and seen is None:
            raise ValueError("observed: expected what observe() or measure() has gathered, got None")
        return method(*args, **kwargs)

    return call


def check_norm(p: object) -> int:
    """The p of an Lp norm. Raises ``ValueError`` unless it is 1 or 2."""
    if not is_integer(p) or p not in (1, 2):
        raise ValueError(f"p: expected 1 or 2, got {p!r:.60}")
    return int(p)


class Magnitude(BuiltIn):
    """``|w|``, and over a block the Lp norm: ``p=1`` the sum of ``|w|``, ``p=2`` the Euclidean norm."""

    name = "magnitude"
    needs_data = False
    needs_gradients = False
    scope = "global"
    key = "abs"

    def __init__(self, p: int = 1) -> None:
        if check_norm(p) == 2:
            self.name += " (p=2)"
            self.key = "square"  # orders norms as the root does

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        return statistics.weight


class Random(BuiltIn):
    """Uniform scores in [0, 1) that depend on `seed` and the layer's name alone.

    The same weights go first at every sparsity, so masks nest, and a resumed run repeats them.
    """

    name = "random"
    needs_data = False
    needs_gradients = False
    scope = "global"
    key = "identity"

    def __init__(self, seed: int = 0) -> None:
        if not is_integer(seed):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        self.seed = int(seed)

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        name = f"{self.seed}/{statistics.layer}/{statistics.parameter}".encode()
        generator = torch.Generator().manual_seed(zlib.crc32(name))
        scores = torch.rand(statistics.weight.shape, generator=generator, device="cpu")
        return scores.to(statistics.weight.device)


class _Callable:
    """A user's ``module -> scores``; a module with several weights may return a dict from name to scores."""

    needs_data = False
    needs_gradients = False
    scope = "global"
    key = "identity"

    def __init__(self, function: Callable[[nn.Module], object]) -> None:
        self.name = str(getattr(function, "__name__", type(function).__name__))
        self.function = function

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        result = self.function(module)
        if isinstance(result, Mapping):
            if statistics.parameter not in result:
                raise ValueError(
                    f"importance: expected {self.name} to score {statistics.parameter!r} of layer "
                    f"{statistics.layer!r}, got scores for {sorted(map(str, result))}"
                )
            result = result[statistics.parameter]
        return result  # type: ignore[return-value]  # checked by the caller, as any criterion's is


Importance: TypeAlias = "str | Criterion | Callable[[nn.Module], torch.Tensor | Mapping[str, torch.Tensor]]"

# Name -> (module, class, arguments). The criteria in other modules are imported when they are asked for.
_BUILT_IN: dict[str, tuple[str, str, tuple[object, ...]]] = {
    "magnitude": ("importance", "Magnitude", ()),
    "lamp": ("criteria", "LAMP", ()),
    "gradient": ("criteria", "Gradient", ()),
    "taylor": ("criteria", "Taylor", ()),
    "fisher": ("criteria", "Fisher", ()),
    "woodfisher": ("woodfisher", "WoodFisher", ()),
    "wanda": ("criteria", "Wanda", ()),
    "sparsegpt": ("reconstruct", "SparseGPT", ()),
    "obc": ("reconstruct", "OBC", ()),
    "activation": ("criteria", "Activation", ()),
    "apoz": ("criteria", "Activation", ("apoz",)),
    "entropy": ("criteria", "Entropy", ()),
    "mutual_information": ("criteria", "MutualInformation", ()),
    "output_weight": ("criteria", "OutputWeight", ()),
    "propagation": ("criteria", "Propagation", ()),
    "bn_scale": ("criteria", "BNScale", ()),
    "geometric_median": ("criteria", "GeometricMedian", ()),
    "change_rate": ("criteria", "ChangeRate", ()),
    "random": ("importance", "Random", ()),
}
NAMES = tuple(_BUILT_IN)


def resolve(importance: object) -> Criterion:
    """The criterion behind a name, an object that follows `Criterion`, or a callable."""
    if isinstance(importance, str):
        if importance not in _BUILT_IN:
            raise choice_error("importance", importance, _BUILT_IN, "a callable module -> scores")
        module, name, arguments = _BUILT_IN[importance]
        made = getattr(importlib.import_module(f"pared.pruning.{module}"), name)(*arguments)
        assert isinstance(made, Criterion)
        return made
    if not isinstance(importance, type):
        if hasattr(importance, "score"):
            required = ("name", "needs_data", "needs_gradients", "scope", "key")
            missing = [attribute for attribute in required if not hasattr(importance, attribute)]
            if missing:
                raise TypeError(
                    f"importance: expected a criterion with {', '.join(required)} and score(), got "
                    f"{type(importance).__name__} without {', '.join(missing)}"
                )
            _check_criterion(importance)
            assert isinstance(importance, Criterion)
            return importance
        if callable(importance):
            return _Callable(importance)
    got = f"the class {importance.__name__}" if isinstance(importance, type) else type(importance).__name__
    raise TypeError(
        f"importance: expected a name, a criterion object or a callable module -> scores, got {got}"
    )


def _check_criterion(criterion: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a user's criterion has attributes of the right kinds."""
    what = f"importance: expected a {type(criterion).__name__} with"
    if not isinstance(criterion.name, str):
        raise TypeError(f"{what} a string as name, got {criterion.name!r:.60}")
    for flag in ("needs_data", "needs_gradients"):
        if not isinstance(getattr(criterion, flag), bool):
            raise TypeError(f"{what} True or False as {flag}, got {getattr(criterion, flag)!r:.60}")
    for word, choices in (("scope", SCOPES), ("key", KEYS)):
        got = getattr(criterion, word)
        if not isinstance(got, str) or got not in choices:
            names = ", ".join(map(repr, choices))
            raise ValueError(f"{what} one of {names} as {word}, got {got!r:.60}")
    for method in _METHODS:
        if hasattr(criterion, method) and not callable(getattr(criterion, method)):
            raise TypeError(f"{what} a method {method}(), got {getattr(criterion, method)!r:.60}")


def checked_score(criterion: Criterion, module: nn.Module, statistics: Statistics) -> torch.Tensor:
    """The criterion's scores, or an error in the user's words when they do not fit the weight."""
    scores = criterion.score(module, statistics)
    weight = statistics.weight
    if scores is weight:
        return weight
    where = f"of layer {statistics.layer!r} ({statistics.parameter})"
    if not isinstance(scores, torch.Tensor):
        raise TypeError(
            f"importance: expected {criterion.name} to return a tensor {where}, got {type(scores).__name__}"
        )
    scores = scores.detach()
    if scores.shape != weight.shape:
        raise ValueError(
            f"importance: expected scores of shape {list(weight.shape)} {where}, got {list(scores.shape)} "
            f"from {criterion.name}"
        )
    if scores.device != weight.device:
        raise ValueError(
            f"importance: expected scores on {weight.device} {where}, "
            f"got {scores.device} from {criterion.name}"
        )
    if scores.dtype not in _SCORES or scores.layout != torch.strided:
        got = scores.dtype if scores.layout == torch.strided else scores.layout
        raise ValueError(
            f"importance: expected floating-point scores {where}, got {got} from {criterion.name}"
        )
    if bool(torch.isnan(scores).any()):
        raise ValueError(f"importance: expected scores without NaN {where}, got NaN from {criterion.name}")
    return scores
