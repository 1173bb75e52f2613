"""Example inputs and model outputs: one form for the many that models take and give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

__all__ = ["Difference", "Example", "compare", "examples", "run", "tolerance"]


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Example:
    """One set of inputs: ``model(*args, **kwargs)``; `label` names it in messages."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    label: str

    def clone(self) -> Example:
        """With tensors of its own, for models that write to their inputs."""
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (self.args, dict(self.kwargs)))
        return Example(args, kwargs, self.label)


def examples(example_inputs: Any, device: torch.device = _CPU) -> list[Example]:
    """A tensor, a tuple (positional), a mapping (keywords), or a list of those, as a list of `Example`.

    Raises
    ------
    TypeError, ValueError : another type, an empty list, a tensor that is not on the model's device.
    """
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise ValueError("example_inputs: expected at least one input, got an empty list")
        found = [_example(e, f"example_inputs[{i}]") for i, e in enumerate(example_inputs)]
    else:
        found = [_example(example_inputs, "example_inputs")]
    for e in found:
        for t in pytree.tree_leaves((e.args, dict(e.kwargs))):
            if isinstance(t, Tensor) and t.device != device and (t.ndim or t.device.type != "cpu"):
                where = "the CPU" if device.type == "cpu" else str(device)
                raise ValueError(f"{e.label}: expected tensors on {where}, got one on {t.device}")
    return found


def _example(e: Any, label: str) -> Example:
    if isinstance(e, Tensor):
        return Example((e,), {}, label)
    if isinstance(e, Mapping):
        bad = [k for k in e if not isinstance(k, str)]
        if bad:
            raise TypeError(f"{label}: expected argument names (str) as keys, got {bad[0]!r}")
        return Example((), dict(e), label)
    if isinstance(e, tuple):
        return Example(e, {}, label)
    raise TypeError(
        f"{label}: expected a tensor, a tuple (positional arguments), a dict (keyword arguments) or a list "
        f"of those, got {type(e).__name__}"
    )


def forked_random(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers of the CPU and of `device` go on afterwards as if nothing had been."""
    return torch.random.fork_rng(devices=[] if device.type == "cpu" else [device.index])


def run(model: nn.Module, example: Example) -> Any:
    """The model's output, reproducibly: private inputs, a fixed seed, no gradients."""
    example = example.clone()
    leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
    device = next((t.device for t in leaves if isinstance(t, Tensor) and t.is_cuda), _CPU)
    with torch.no_grad(), forked_random(device):
        torch.manual_seed(0)
        return model(*example.args, **example.kwargs)


def first_run(model: nn.Module, example: Example) -> Any:
    """`run` of the user's own model, whose errors are about the inputs: ``ValueError`` that names them.

    Outputs without one finite number are an error too: nothing could be compared with them.
    """
    try:
        output = run(model, example)
    except Exception as e:
        raise ValueError(
            f"{example.label}: expected inputs that the model runs with, got {type(e).__name__}: {e}"
        ) from e
    found = [t for _, t in leaves(output) if isinstance(t, Tensor) and t.layout == torch.strided]
    floats = [t for t in found if t.is_floating_point() and t.numel()]
    if floats and not any(bool(t.isfinite().any()) for t in floats):
        raise ValueError(
            f"{example.label}: expected inputs for which the model gives finite outputs, got NaN or infinity "
            "alone"
        )
    return output


def check_filled(inputs: Sequence[Example]) -> None:
    """Raise ``ValueError`` where all the tensors of an example are empty."""
    for e in inputs:
        tensors = [t for t in pytree.tree_leaves((e.args, dict(e.kwargs))) if isinstance(t, Tensor)]
        if tensors and not any(t.numel() for t in tensors):
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            raise ValueError(f"{e.label}: expected tensors with elements, got {shapes:.60}")


def leaves(x: Any, path: str = "output", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value in an output, depth first, with the path to it."""
    if isinstance(x, Tensor) or x is None or isinstance(x, (bool, int, float, complex, str, bytes)):
        yield path, x
        return
    if id(x) in seen:
        return
    seen = seen | {id(x)}
    if isinstance(x, Mapping):
        for k, v in x.items():
            yield from leaves(v, f"{path}[{k!r}]", seen)
    elif isinstance(x, Sequence):
        for i, v in enumerate(x):
            yield from leaves(v, f"{path}[{i}]", seen)
    elif dataclasses.is_dataclass(x):
        for f in dataclasses.fields(x):
            yield from leaves(getattr(x, f.name), f"{path}.{f.name}", seen)
    elif hasattr(x, "__dict__"):  # for example the key-value cache of a transformer
        for k, v in vars(x).items():
            yield from leaves(v, f"{path}.{k}", seen)


@dataclass(frozen=True)
class Difference:
    """The largest difference between two outputs.

    Attributes
    ----------
    absolute : max |new - reference|.
    relative : the largest over the output's tensors of max |new - reference| / max |reference|.
    where : path of the tensor that it is in.
    eps : largest machine epsilon of the float tensors seen.
    """

    absolute: float
    relative: float
    where: str
    eps: float


def compare(reference: Any, new: Any) -> Difference:
    """Compare two outputs, tensors nested in any containers.

    A difference that has no size (another structure, shape, dtype, integer or NaN pattern) is infinite.
    """
    worst = Difference(0.0, 0.0, "output", 0.0)
    eps = 0.0
    a, b = list(leaves(reference)), list(leaves(new))
    if [p for p, _ in a] != [p for p, _ in b]:
        extra = {p for p, _ in a} ^ {p for p, _ in b}
        return Difference(math.inf, math.inf, min(extra, default="output"), 0.0)
    for (path, x), (_, y) in zip(a, b, strict=True):
        absolute, relative = _difference(x, y)
        if isinstance(x, Tensor) and x.dtype.is_floating_point:
            eps = max(eps, torch.finfo(x.dtype).eps)
        if relative > worst.relative:
            worst = Difference(absolute, relative, path, eps)
    return dataclasses.replace(worst, eps=eps)


def _difference(x: Any, y: Any) -> tuple[float, float]:
    bad = (math.inf, math.inf)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        if isinstance(x, Tensor) or isinstance(y, Tensor) or type(x) is not type(y):
            return bad
        return (0.0, 0.0) if x == y or (x != x and y != y) else bad
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device or x.layout != y.layout:
        return bad
    if x.numel() == 0:
        return 0.0, 0.0
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        return (0.0, 0.0) if torch.equal(x, y) else bad
    wide = torch.complex128 if x.dtype.is_complex else torch.float64
    x, y = x.detach().to_dense().to(wide), y.detach().to_dense().to(wide)
    finite = x.isfinite()
    if not torch.equal(finite, y.isfinite()) or not torch.equal(
        x[~finite].nan_to_num(7.0), y[~finite].nan_to_num(7.0)
    ):
        return bad
    x, y = x[finite], y[finite]
    if x.numel() == 0:
        return 0.0, 0.0
    absolute = float((x - y).abs().max())
    scale = float(x.abs().max())
    return absolute, absolute / scale if scale > 0 else (math.inf if absolute > 0 else 0.0)


def tolerance(layers: int, depth: int, eps: float) -> float:
    """Relative error allowed between two float32 evaluations of a model, by `Difference.relative`.

    ``8 * 2**-23 * sqrt(depth) * layers``, with `layers` accelerated layers whose longest reduction has
    `depth` terms: each layer's sums, taken in another order, differ by about ``sqrt(depth)`` roundings; they
    add up over the layers, and 8 leaves room for what the layers in between amplify. 16-bit outputs add their
    own rounding, ``4 * eps * sqrt(layers)``.
    """
    float32 = torch.finfo(torch.float32).eps
    allowed = 8.0 * float32 * math.sqrt(max(depth, 1)) * max(layers, 1)
    if eps > float32:
        allowed += 4.0 * eps * math.sqrt(max(layers, 1))
    return allowed


def compare_all(fast: nn.Module, inputs: list[Example], reference: list[Any]) -> Difference:
    differences = [compare(r, run(fast, e)) for r, e in zip(reference, inputs, strict=True)]
    return max(differences, key=lambda d: d.relative)


def run_hooked(model: nn.Module, inputs: Sequence[Example], handles: Sequence[RemovableHandle]) -> None:
    """Run the examples, and remove the hooks then."""
    try:
        for example in inputs:
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()


def one_pass(model: nn.Module, inputs: list[Example]) -> Callable[[], None]:
    mine = [e.clone() for e in inputs]  # a model may write to its inputs

    def call() -> None:
        for e in mine:
            model(*e.args, **e.kwargs)

    return call


def described(value: Any) -> str:
    """Inputs as far as their times depend on them: shapes of tensors, other values as they are."""

    def leaf(x: Any) -> Any:
        return f"{list(x.shape)} {x.stride()} {x.dtype}" if isinstance(x, Tensor) else x

    return repr(torch.utils._pytree.tree_map(leaf, value))
