"""Which modules can be computed by the layer before them: batch normalisation, and activations.

Two witnesses have to agree. The structure says that the output of one module goes into the next and nowhere
else: neighbours in an ``nn.Sequential``, or a graph that ``torch.fx`` traces of one module's forward with
everything below it as leaves (so that large models need not be traceable as a whole). And hooks, while the
example inputs run, see that the very tensor that comes out of the one goes into the other, in every call.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from pared._surgery import module_names, shared_copy
from pared.nn import Fused
from pared.nn._base import ACTIVATIONS
from pared.nn._fold import can_fold

__all__ = ["Fusion", "Step", "activation_of", "find_fusions", "leads_to"]


def activation_of(module: nn.Module) -> str | None:
    """The kernel's name of an activation module, or None.

    The classes of transformers, which has several of its own for each function, are known by their values.
    """
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if type(module).__module__ == "transformers.activations" and not module.state_dict():
        return _by_value(module)
    return None


def _by_value(module: nn.Module) -> str | None:
    x = torch.linspace(-12.0, 12.0, 4801, device="cpu")
    with torch.no_grad():
        y = module(x.clone())
    for name, function in ACTIVATIONS.items():
        # The nearest two, gelu and gelu_tanh, are 5e-4 apart.
        if (
            isinstance(y, Tensor)
            and y.shape == x.shape
            and torch.allclose(y, function(x), rtol=1e-5, atol=1e-6)
        ):
            return name
    return None


@dataclass
class Step:
    """A module behind a layer, and what the hooks saw of the way to it."""

    name: str
    module: nn.Module
    pending: Tensor | None = None
    passed: int = 0
    broken: bool = False

    def watch(self, before: nn.Module) -> list[RemovableHandle]:
        """Hooks on the module before and on this one."""

        def leaves(module: nn.Module, args: Any, output: Any) -> None:
            self.broken |= self.pending is not None
            self.pending = output

        def enters(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.broken |= self.pending is None or not args or args[0] is not self.pending
            self.pending = None
            self.passed += 1

        return [before.register_forward_hook(leaves), self.module.register_forward_pre_hook(enters)]

    def confirmed(self) -> bool:
        """Whether every call went from the module before into this one."""
        pending, self.pending = self.pending, None
        return self.passed > 0 and not self.broken and pending is None


@dataclass
class Fusion:
    """A layer and what may be fused into it: a batch normalisation, an activation, or both.

    Attributes
    ----------
    steps : the modules behind the layer, in order.
    successor : the layer that alone takes what comes out of the last step.
    """

    layer: nn.Module
    steps: list[Step] = field(default_factory=list)
    successor: Step | None = None

    def watch(self) -> list[RemovableHandle]:
        """Hooks for the time in which the example inputs run."""
        steps = [*self.steps, *([self.successor] if self.successor else [])]
        modules = [self.layer, *(s.module for s in self.steps)]
        return [h for before, s in zip(modules, steps, strict=False) for h in s.watch(before)]

    def settle(self) -> bool:
        """Keep the steps that every call confirmed; whether there are any, or a successor."""
        proposed = len(self.steps)
        self.steps = list(itertools.takewhile(Step.confirmed, self.steps))
        if self.successor and not (self.successor.confirmed() and len(self.steps) == proposed):
            self.successor = None
        return bool(self.steps or self.successor)


# In eval mode they return the very tensor that they are given.
_PASSING = (nn.Dropout, nn.Identity, Fused)


def is_passing(module: nn.Module) -> bool:
    """Whether a module in eval mode returns the very tensor that it is given."""
    return type(module) in _PASSING


def find_fusions(model: nn.Module, layers: set[int], norms: bool = True) -> dict[int, Fusion]:
    """id of a layer (one of `layers`) -> what can be fused into it.

    `norms`: batch normalisations too. All modules concerned occur once in the model and carry no hooks, which
    would see other values.
    """
    modules, following = dict(model.named_modules()), _following(model)
    found: dict[int, Fusion] = {}
    for name, layer in modules.items():
        if id(layer) not in layers:
            continue
        steps = []
        after = following.get(name)
        if norms and after is not None and can_fold(layer, modules[after]):
            steps.append(Step(after, modules[after]))
            after = following.get(after)
        if after is not None and activation_of(modules[after]) is not None:
            steps.append(Step(after, modules[after]))
        after = _next(modules, following, steps[-1].name if steps else name)
        successor = Step(after, modules[after]) if after and id(modules[after]) in layers else None
        if steps or successor:
            found[id(layer)] = Fusion(layer, steps, successor)
    return found


def leads_to(model: nn.Module, name: str, successor: str) -> bool:
    """Whether the structure says that the output of one module goes into the other and nowhere else."""
    return _next(dict(model.named_modules()), _following(model), name) == successor


def between(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules that the output of each of the named layers passes on its way to the next."""
    modules, following = dict(model.named_modules()), _following(model)
    found = []
    for name, successor in itertools.pairwise(names):
        after = following.get(name)
        while after is not None and after != successor:
            found.append(modules[after])
            after = following.get(after)
    return found


def _next(modules: dict[str, nn.Module], following: dict[str, str], name: str) -> str | None:
    after = following.get(name)
    while after is not None and is_passing(modules[after]):
        after = following.get(after)
    return after


def _following(model: nn.Module) -> dict[str, str]:
    """Name of a module -> the one that alone takes its output; both occur once, and carry no hooks."""
    names = module_names(model)
    single = {
        name
        for name, m in model.named_modules()
        if len(names[id(m)]) == 1 and not (m._forward_hooks or m._forward_pre_hooks)
    }
    following: dict[str, str] = {}
    for prefix, name, follower in _followers(model):
        a, b = (f"{prefix}.{n}" if prefix else n for n in (name, follower))
        if a in single and b in single:
            following[a] = b
    return following


def _followers(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """(prefix, a, b): in module `prefix`, the output of its submodule `a` goes into `b` and nowhere else."""
    scratch: nn.Module | None = None
    for prefix, parent in model.named_modules():
        if isinstance(parent, torch.jit.ScriptModule):
            continue  # compiled: nothing in it is replaced
        children = list(parent._modules)
        if not children:
            continue
        if type(parent).forward is nn.Sequential.forward:
            for a, b in itertools.pairwise(children):
                yield prefix, a, b
            continue
        if scratch is None:
            scratch = shared_copy(model)  # a forward that runs on proxies may leave some behind in attributes
        pairs = _trace(scratch.get_submodule(prefix))
        for a, b in pairs:
            yield prefix, a, b


class _Typed(fx.Proxy):
    """A value that knows its dtype, since models ask for it: ``if x.dtype == torch.float16``."""

    def __getattr__(self, k: str) -> Any:
        return cast(_Tracer, self.tracer).dtype if k == "dtype" else super().__getattr__(k)


class _Tracer(fx.Tracer):
    """Traces the forward of one module; what it calls is left alone.

    Parameters
    ----------
    dtype : of the module's own parameters; what a forward that asks for a dtype is told.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        floating = (p.dtype for p in module.parameters() if p.is_floating_point())
        self.dtype = next(floating, torch.float32)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Typed(node, self)

    def keys(self, obj: fx.Proxy) -> Any:
        """Of what is given to a call as ``**kwargs``: of forward's own there are none."""
        own = obj.node.op == "placeholder" and str(obj.node.target).startswith("**")
        return () if own else super().keys(obj)

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> set[tuple[str, str]]:
    """Pairs of submodules of which the second alone takes the first one's output; empty where fx cannot tell.
    The module is a copy to play with.

    A default argument takes a forward down either branch of ``if x is not None``: both are traced.
    """
    defaults = {
        name: p.default
        for name, p in inspect.signature(module.forward).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    kind = type(module)
    plain = inspect.unwrap(kind.forward)
    if plain is not kind.forward:
        # transformers wraps forward in a function of any arguments, which fx cannot see through. It does so
        # when a class is made: the function is put back behind that.
        module.__class__ = unwrapped = type(kind.__name__, (kind,), {})
        unwrapped.forward = plain  # type: ignore[attr-defined]
    pairs: set[tuple[str, str]] | None = None
    for concrete in [{}, defaults] if defaults else [{}]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = _Tracer(module).trace(module, concrete_args=concrete)
        except Exception:  # whatever a model's forward raises when it is given proxies
            return set()
        if any(isinstance(v, fx.Proxy) for m in module.modules() for v in vars(m).values()):
            return set()  # kept in an attribute: it has a user that the graph does not show
        found = _pairs(graph)
        pairs = found if pairs is None else pairs & found
    return pairs or set()


def _pairs(graph: fx.Graph) -> set[tuple[str, str]]:
    calls = [n for n in graph.nodes if n.op == "call_module"]
    targets = [n.target for n in calls]
    found = set()
    for node in calls:
        users = list(node.users)
        if (
            len(users) == 1
            and users[0].op == "call_module"
            and users[0].args == (node,)
            and not users[0].kwargs
            and targets.count(node.target) == targets.count(users[0].target) == 1
        ):
            found.add((str(node.target), str(users[0].target)))
    return found
