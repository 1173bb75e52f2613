"""One pass over calibration data: batches, streaming observers, gradients. Nothing is kept but sums.

An `Observer` belongs to one tensor of the model and says in `events` what it wants to see; `collect` runs the
data through the model once and feeds all of them. While it does, the model is in eval mode (dropout off,
BatchNorm fixed) and its parameters, buffers, ``.grad`` and flags are the caller's again afterwards, whatever
happens.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from pared._errors import check_callable
from pared.pruning import distributed
from pared.pruning.distributed import Processes
from pared.pruning.patterns import Pattern
from pared.pruning.targets import Target

__all__ = [
    "InputNorms",
    "LossFn",
    "MeanGradient",
    "Observer",
    "StopForward",
    "batches",
    "collect",
    "columns",
    "forward",
    "frozen",
]

LossFn: TypeAlias = "Callable[[nn.Module, Any], torch.Tensor]"

INPUT, OUTPUT, GRADIENT, SAMPLE_GRADIENT = "input", "output", "gradient", "sample_gradient"
_EVENTS = frozenset({INPUT, OUTPUT, GRADIENT, SAMPLE_GRADIENT})

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What follows a layer without mixing its units: a unit's activation is what comes out of these.
_ELEMENTWISE = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
)


class Observer:
    """Streaming statistics of one tensor; override what `events` names.

    Attributes
    ----------
    events : of "input", "output", "gradient" and "sample_gradient".
    samples : how many samples have passed.
    """

    events: frozenset[str] = frozenset()
    samples: int = 0

    def begin(self, batch: Any, samples: int) -> None:
        """A batch is about to pass."""
        self.samples += samples

    def input(self, x: torch.Tensor) -> None:
        """What the layer receives: [n, in] for Linear, [n, channels, *space] for a convolution."""

    def output(self, y: torch.Tensor) -> None:
        """A unit's activations, as rows: [n, positions, units]."""

    def gradient(self, g: torch.Tensor, samples: int) -> None:
        """Gradient of the mean loss of `samples` samples, of the weight's shape."""

    def tensors(self) -> Sequence[torch.Tensor]:
        """What has been summed up so far; checked for NaN after every batch."""
        return ()

    def reduce(self, processes: Processes) -> None:
        """Take in what the observers of the other processes of a data-parallel job have seen.

        `samples` is summed up already. Called once, behind the last batch, by every process.
        """
        raise ValueError(
            f"importance: expected an observer with reduce() in a job of {processes.size} processes, got "
            f"{type(self).__name__}; inside pared.pruning.process_group(None) each process works for itself"
        )

    def result(self) -> Any:
        """What the criterion reads as ``statistics.observed``."""
        raise TypeError(f"importance: expected an observer with result(), got {type(self).__name__}")


def check_observer(observer: object, name: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless `observer`, of the criterion `name`, is an `Observer`."""
    if not isinstance(observer, Observer):
        raise TypeError(
            f"importance: expected observe() of {name!r} to return an Observer, got {type(observer).__name__}"
        )
    events: object = observer.events
    if not isinstance(events, frozenset | set) or not events <= _EVENTS:
        raise ValueError(
            f"importance: expected events of {type(observer).__name__} to be a set of "
            f"{', '.join(map(repr, sorted(_EVENTS)))}, got {events!r:.60}"
        )


class MeanGradient(Observer):
    """Gradient of the mean loss over all samples, however they came in batches."""

    events = frozenset({GRADIENT})

    def __init__(self, target: Target, pattern: Pattern) -> None:
        weight = target.tensor.detach()
        self.sum = torch.zeros_like(weight, dtype=accumulator(weight))

    def gradient(self, g: torch.Tensor, samples: int) -> None:
        self.sum.add_(g, alpha=samples)

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self.sum,)

    def reduce(self, processes: Processes) -> None:
        processes.add_(self.sum)

    def result(self) -> torch.Tensor:
        return self.sum / max(self.samples, 1)


def accumulator(weight: torch.Tensor) -> torch.dtype:
    """float32 for the narrow types, whose sums would stop growing."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class InputNorms(Observer):
    """Euclidean norm of every column of the layer's input matrix, over all tokens or positions.

    `result` broadcasts against the weight. A convolution's columns are input channels at one tap, of each
    group for itself.
    """

    events = frozenset({INPUT})

    def __init__(self, target: Target, pattern: Pattern) -> None:
        self.target = target
        self.sums: list[torch.Tensor] = []
        self.turn = 0

    def input(self, x: torch.Tensor) -> None:
        module = self.target.module
        x = x.to(accumulator(x)).square()
        if isinstance(module, _CONVOLUTIONS):
            over = [0, *range(2, x.ndim)]
            new = torch.stack([c.sum(over, dtype=torch.float64) for c in columns(module, x)], 1)
        else:
            new = x.sum(0, dtype=torch.float64)
        # The packed projection of an attention has three inputs, in turn.
        parts = 3 if self.target.parameter == "in_proj_weight" else 1
        if len(self.sums) < parts:
            self.sums.append(new)
        else:
            self.sums[self.turn % parts] += new
        self.turn += 1

    def tensors(self) -> Sequence[torch.Tensor]:
        return self.sums

    def reduce(self, processes: Processes) -> None:
        self.sums = processes.add(self.sums)

    def result(self) -> torch.Tensor:
        weight, target = self.target.weight, self.target
        if not self.sums:
            raise ValueError(f"data: expected batches that reach layer {target.layer!r}, got none that do")
        norms = [s.sqrt().to(accumulator(weight)) for s in self.sums]
        if len(norms) == 3:
            return torch.stack(norms).repeat_interleave(weight.shape[0] // 3, 0)
        if isinstance(target.module, _CONVOLUTIONS):
            groups = target.groups
            per_group = norms[0].reshape(groups, -1, *weight.shape[2:])
            return per_group.repeat_interleave(weight.shape[0] // groups, 0)
        return norms[0].unsqueeze(1) if target.transposed else norms[0].unsqueeze(0)


class StopForward(Exception):
    """Raised by a hook when the rest of the forward pass is not needed."""


def check_loss_fn(loss_fn: object, argument: str = "loss_fn") -> None:
    """Raise ``TypeError`` unless `loss_fn` can be called with (model, batch), or is None."""
    if loss_fn is None:
        return
    what = "(model, batch) -> scalar"
    # torch's own losses take two arguments as well.
    owner = loss_fn if isinstance(loss_fn, type) else type(loss_fn)
    if issubclass(owner, nn.modules.loss._Loss) or getattr(loss_fn, "__module__", "") == functional.__name__:
        name = getattr(loss_fn, "__name__", owner.__name__)
        raise TypeError(
            f"{argument}: expected a callable {what}, got {name}, which takes (output, target); write "
            "lambda model, batch: loss(model(batch[0]), batch[1])"
        )
    check_callable(argument, loss_fn, what)


def check_batches(data: object) -> None:
    """Raise ``TypeError`` where `data` cannot be gone through, or is one batch and not several."""
    if isinstance(data, type):
        raise TypeError(f"data: expected an iterable of batches, got the class {data.__name__}")
    if isinstance(data, torch.Tensor | Mapping):
        raise TypeError(
            f"data: expected an iterable of batches, got one {type(data).__name__}; for a single batch: "
            f"[batch]"
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(f"data: expected an iterable of batches, got {type(data).__name__}")


def batches(data: Any, why: str) -> Iterator[Any]:
    """The batches of `data`, at least one.

    Raises
    ------
    ValueError : `data` is None, or has no batch (left).
    TypeError : it cannot be iterated, or is one batch and not several.
    """
    if data is None:
        raise ValueError(f"data: expected batches, which {why} needs, got None")
    check_batches(data)
    count = 0
    for batch in data:
        count += 1
        yield batch
    if not count:
        raise ValueError(
            "data: expected at least one batch, got none; an iterator or a generator that was used before is "
            "exhausted"
        )


def check_samples(seen: int) -> None:
    """Raise ``ValueError`` where no batch had a sample in it."""
    if not seen:
        raise ValueError("data: expected batches with samples, got empty ones")


def batch_size(batch: Any) -> int:
    """First size of the batch's first tensor."""
    for leaf in pytree.tree_leaves(_plain(batch)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    raise ValueError(f"data: expected batches with a tensor of samples, got {type(batch).__name__} without")


def split(batch: Any) -> Iterator[Any]:
    """The batch's samples, one by one: every tensor with the batch's first size is cut."""
    batch, n = _plain(batch), batch_size(batch)

    def cut(i: int) -> Any:
        return pytree.tree_map_only(
            torch.Tensor, lambda t: t[i : i + 1] if t.ndim and t.shape[0] == n else t, batch
        )

    return (cut(i) for i in range(n))


def _plain(batch: Any) -> Any:
    """Tokenizers return a Mapping that is no dict, which tree functions take for a leaf."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def forward(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Any:
    """``loss_fn(model, batch)``, or the model's own output.

    A tensor is the model's argument; a dict its keyword arguments, without keys that it does not take; a
    tuple or list its positional arguments, or only the first where it does not take them all: ``(x, label)``.

    Raises
    ------
    TypeError : a batch that is none of these.
    ValueError : the model does not run with it. What a `loss_fn` raises is the user's, and comes as it is.
    """
    if loss_fn is not None:
        return loss_fn(model, batch)
    args, kwargs = arguments(model, batch)
    try:
        return model(*args, **kwargs)
    except (StopForward, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        if ": expected " in str(e):  # a hook of this package's, which says what is wrong
            raise
        raise ValueError(
            f"data: expected batches that the model runs with, got {type(e).__name__}: {e}"
        ) from e


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments of the model in a batch, as `forward` describes them."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    signature = inspect.signature(model.forward)
    if isinstance(batch, Mapping):
        kinds = {p.kind for p in signature.parameters.values()}
        if inspect.Parameter.VAR_KEYWORD in kinds:
            return (), dict(batch)
        return (), {k: v for k, v in batch.items() if k in signature.parameters}
    if isinstance(batch, tuple | list) and batch:
        try:
            signature.bind(*batch)
        except TypeError:
            return (batch[0],), {}
        return tuple(batch), {}
    raise TypeError(f"data: expected batches of tensors, tuples or dicts, got {type(batch).__name__}")


@contextmanager
def frozen(model: nn.Module, trained: Sequence[torch.Tensor] = ()) -> Iterator[None]:
    """The model in eval mode, `trained` (and nothing else of the model) with gradients; undone at the end."""
    training = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in trained}
    try:
        for m, _ in training:
            m.training = False
        for p, _ in flags:
            if p.is_floating_point():
                p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for m, was in training:
            m.training = was
        for p, flag in flags:
            if p.is_floating_point():
                p.requires_grad_(flag)


def columns(module: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """For each tap of a convolution the input values that it multiplies: views [n, channels, *positions].

    The taps of the padded input, in the order of ``weight.flatten(2)``.
    """
    assert isinstance(module, _CONVOLUTIONS)
    pad = module._reversed_padding_repeated_twice
    if any(pad):
        x = functional.pad(x, pad, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    space = x.shape[2:]
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(space, kernel, stride, dilation, strict=True)]
    for tap in itertools.product(*map(range, kernel)):
        window = [
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, dilation, stride, out, strict=True)
        ]
        every = slice(None)
        yield x[(every, every) + tuple(window)]  # noqa: RUF005  (Python 3.10 has no star in an index)


def _layer_input(module: nn.Module, x: Any) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(
            f"data: expected batches that give each {type(module).__name__} floating-point tensors, got {got}"
        )
    values: torch.Tensor = x.detach()
    if isinstance(module, _CONVOLUTIONS):
        return values.unsqueeze(0) if values.ndim == len(module.kernel_size) + 1 else values
    return values.reshape(-1, values.shape[-1])


def _units(module: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """[n, positions, units] of a layer's output."""
    y = y.detach()
    if isinstance(module, _CONVOLUTIONS):
        y = y.unsqueeze(0) if y.ndim == len(module.kernel_size) + 1 else y
        return y.flatten(2).transpose(1, 2)
    if y.ndim == 1:
        y = y.unsqueeze(0)
    return y.reshape(y.shape[0], -1, y.shape[-1])


class _Attention:
    """Inputs of the matrices of a MultiheadAttention, which calls no submodule.

    What its output projection receives is what the layer returns when that projection is the identity.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module
        self.wanted: dict[str, Observer] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(self.module.forward).bind(*args, **kwargs).arguments
        inputs = {part: bound[name] for part, name in (("q", "query"), ("k", "key"), ("v", "value"))}
        for name, observer in self.wanted.items():
            if name == "out_proj":
                observer.input(_layer_input(module, self._heads(args, kwargs)))
            elif name == "in_proj_weight":
                for x in inputs.values():
                    observer.input(_layer_input(module, x))
            else:
                observer.input(_layer_input(module, inputs[name[0]]))

    def _heads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        shadow = copy.copy(self.module)
        size = self.module.embed_dim
        identity = copy.copy(self.module.out_proj)
        weight = self.module.out_proj.weight
        identity._parameters = {
            "weight": nn.Parameter(torch.eye(size, dtype=weight.dtype, device=weight.device)),
            "bias": nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device)),
        }
        shadow._modules = {**self.module._modules, "out_proj": identity}
        with torch.no_grad():
            output = shadow.forward(*args, **kwargs)
        assert isinstance(output[0], torch.Tensor)
        return output[0]


class _Chains:
    """A layer's units as the next layer sees them: after BatchNorm, activation function and dropout
    modules.
    """

    def __init__(self) -> None:
        self.open: dict[int, tuple[torch.Tensor, nn.Module, Observer]] = {}

    def start(self, module: nn.Module, y: torch.Tensor, observer: Observer) -> None:
        self.open[id(y)] = (y, module, observer)

    def move(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if (entry := self._take(x)) is not None:
            self.open[id(y)] = (y, *entry[1:])

    def close(self, x: torch.Tensor) -> None:
        if (entry := self._take(x)) is not None:
            self._feed(entry)

    def close_all(self) -> None:
        while self.open:
            self._feed(self.open.popitem()[1])

    def _take(self, x: torch.Tensor) -> tuple[torch.Tensor, nn.Module, Observer] | None:
        entry = self.open.get(id(x))
        return self.open.pop(id(x)) if entry is not None and entry[0] is x else None

    def _feed(self, entry: tuple[torch.Tensor, nn.Module, Observer]) -> None:
        y, module, observer = entry
        observer.output(_units(module, y))


def _visible(target: Target) -> bool:
    """Whether hooks see what the tensor multiplies, and what comes out."""
    return isinstance(target.module, (nn.Linear, nn.MultiheadAttention, *_CONVOLUTIONS)) or target.transposed


def _attach(
    stack: ExitStack, model: nn.Module, targets: Sequence[Target], observers: Mapping[str, Observer], why: str
) -> _Chains:
    """Hooks that feed the observers of inputs and outputs, removed with `stack`."""
    chains = _Chains()
    attentions: dict[int, _Attention] = {}
    inside = {
        id(m.out_proj): m
        for m in model.modules()
        if isinstance(m, nn.MultiheadAttention)  # its output projection is never called as a module
    }

    def attention(module: nn.MultiheadAttention) -> _Attention:
        if id(module) not in attentions:
            hook = attentions[id(module)] = _Attention(module)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return attentions[id(module)]

    for target in targets:
        observer = observers[target.name]
        if not observer.events & {INPUT, OUTPUT}:
            continue
        if not _visible(target):
            raise ValueError(
                f"importance: expected layers whose inputs and outputs can be observed, which {why} needs, "
                f"got "
                f"{target.type} {target.layer!r}; leave it out with exclude"
            )
        for module, name in target.places:
            if INPUT in observer.events:
                if isinstance(module, nn.MultiheadAttention):
                    attention(module).wanted[name] = observer
                elif id(module) in inside:
                    attention(inside[id(module)]).wanted["out_proj"] = observer
                else:

                    def before(
                        m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], o: Observer = observer
                    ) -> None:
                        o.input(_layer_input(m, args[0] if args else next(iter(kwargs.values()))))

                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if OUTPUT in observer.events:
                if isinstance(module, nn.MultiheadAttention) or id(module) in inside:
                    raise ValueError(
                        f"importance: expected layers with units, which {why} needs, got {target.name!r} "
                        f"inside "
                        "a MultiheadAttention; leave it out with exclude"
                    )

                def after(m: nn.Module, args: Any, y: torch.Tensor, o: Observer = observer) -> None:
                    chains.start(m, y, o)

                stack.callback(module.register_forward_hook(after).remove)
    if any(OUTPUT in observers[t.name].events for t in targets):

        def passed(module: nn.Module, args: Any, y: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(y, torch.Tensor):
                chains.move(args[0], y)

        def consumed(module: nn.Module, args: Any) -> None:
            for x in args:
                if isinstance(x, torch.Tensor):
                    chains.close(x)

        for module in model.modules():
            if isinstance(module, _ELEMENTWISE):
                stack.callback(module.register_forward_hook(passed).remove)
            elif not any(True for _ in module.children()):
                stack.callback(module.register_forward_pre_hook(consumed).remove)
    if attentions:
        # The fused path of inference computes the layers without calling them.
        was = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, was)
    return chains


def checked_loss(
    loss: object, index: int, *, differentiable: bool, argument: str = "loss_fn"
) -> torch.Tensor:
    """A finite scalar, with a gradient where one is needed; `argument`: what the user calls the function."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.is_meta:
        got = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        got = "one on the meta device" if isinstance(loss, torch.Tensor) and loss.is_meta else got
        raise ValueError(
            f"{argument}: expected a scalar tensor from (model, batch), got {got} in batch {index}"
        )
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"data: expected batches with a finite loss, got {float(loss.detach())} in batch {index}"
        )
    if differentiable and not loss.requires_grad:
        raise ValueError(
            f"{argument}: expected a loss that depends on the model's weights, got one without a gradient in "
            f"batch "
            f"{index} (computed under no_grad, or detached?)"
        )
    return loss.reshape(())


def _check_finite(targets: Sequence[Target], observers: Mapping[str, Observer], index: int) -> None:
    for target in targets:
        observer = observers[target.name]
        tensors = observer.tensors()
        if not isinstance(tensors, Sequence) or not all(isinstance(t, torch.Tensor) for t in tensors):
            raise TypeError(
                f"importance: expected tensors() of {type(observer).__name__} to return a list of tensors, "
                f"got {tensors!r:.60}"
            )
        for tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"data: expected finite activations and gradients, got NaN or infinity at layer "
                    f"{target.layer!r} in batch {index}"
                )


def collect(
    model: nn.Module,
    targets: Sequence[Target],
    observers: Mapping[str, Observer],
    data: object,
    loss_fn: LossFn | None,
    why: str,
    *,
    stop_after: int | None = None,
) -> None:
    """Feed the observers (by tensor name) with one pass over `data`.

    Parameters
    ----------
    why : what needs the data, for messages.
    stop_after : leave each forward pass once so many input observers have been fed: nothing behind them is
        needed.

    Raises
    ------
    ValueError, TypeError : see the module; what is wrong, in which batch and at which layer.
    """
    events = frozenset().union(*(observers[t.name].events for t in targets))
    differentiable = bool(events & {GRADIENT, SAMPLE_GRADIENT})
    if differentiable and loss_fn is None:
        raise ValueError(
            f"loss_fn: expected a callable (model, batch) -> scalar, which {why} needs, got None"
        )
    graded = [t for t in targets if observers[t.name].events & {GRADIENT, SAMPLE_GRADIENT}]
    reached: set[str] = set()
    processes = distributed.current()
    with distributed.together(processes), ExitStack() as stack:
        stack.enter_context(frozen(model, [t.tensor for t in graded]))
        chains = _attach(stack, model, targets, observers, why)
        if stop_after is not None:
            _stop_behind(stack, targets, stop_after)
        seen = 0
        for index, batch in enumerate(batches(data, why)):
            size = batch_size(batch)
            if not size:
                continue
            seen += size
            for target in targets:
                observers[target.name].begin(batch, size)
            if differentiable:
                assert loss_fn is not None
                parts = list(split(batch)) if SAMPLE_GRADIENT in events else [batch]
                for part in parts:
                    reached |= _backward(model, part, loss_fn, graded, observers, index)
                    chains.close_all()
            else:
                with torch.no_grad():
                    try:
                        out = forward(model, batch, loss_fn)
                    except StopForward:
                        out = None
                if loss_fn is not None and out is not None:
                    checked_loss(out, index, differentiable=False)
                chains.close_all()
            _check_finite(targets, observers, index)
        if processes is None:
            check_samples(seen)
    if processes is not None:
        reached.update(*processes.gather(reached))
        samples = processes.total(*(observers[t.name].samples for t in targets))
        check_samples(max(samples))
        for target, n in zip(targets, samples, strict=True):
            observers[target.name].samples = n
            observers[target.name].reduce(processes)
    missed = [t.name for t in graded if t.name not in reached]
    if missed:
        raise ValueError(
            "loss_fn: expected a loss that depends on every selected weight, got no gradient of "
            + ", ".join(missed[:5])
            + "; leave them out with exclude"
        )


def _backward(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    graded: Sequence[Target],
    observers: Mapping[str, Observer],
    index: int,
) -> set[str]:
    """One backward pass; ``.grad`` of the model's parameters is not touched."""
    with torch.enable_grad():
        loss = checked_loss(loss_fn(model, batch), index, differentiable=True)
        gradients = torch.autograd.grad(loss, [t.tensor for t in graded], allow_unused=True)
    samples = batch_size(batch)
    reached = set()
    for target, g in zip(graded, gradients, strict=True):
        if g is not None:
            reached.add(target.name)
            observers[target.name].gradient(g.detach(), samples)
    return reached


def _stop_behind(stack: ExitStack, targets: Sequence[Target], count: int) -> None:
    seen = 0

    def reset_and_count(module: nn.Module, args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen >= count:
            seen = 0
            raise StopForward

    for target in targets:
        stack.callback(target.module.register_forward_pre_hook(reset_and_count).remove)
