"""Which additions of a model can be computed by the convolution before them.

``torch.fx`` traces the forward of one block with the containers below it opened, so that a block of any class
is a list of calls and additions. A block in which anything else happens is left alone.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from dataclasses import replace as changed
from typing import Any

import torch
from torch import fx, nn

from pared._fusion import activation_of, is_passing
from pared.nn import Conv2d, FoldedBatchNorm2d, PackedModule, ResidualBlock
from pared.nn.residual import Call

__all__ = ["find_blocks", "residual_block"]

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (torch.relu, nn.functional.relu)
# Submodules of a block beyond which it is no block, but a model.
_MOST = 200


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with convolutions that may take an addition, innermost first."""
    found = []
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        inside = list(module.modules())
        plain = type(module).forward not in (nn.Sequential.forward, ResidualBlock.forward)
        if plain and 1 < len(inside) <= _MOST and any(_takes(m) for m in inside):
            found.append((name, module))
    return found


def _takes(module: nn.Module) -> bool:
    return isinstance(module, Conv2d) and module.activation is None


class _Opening(fx.Tracer):
    """Traces into containers; what computes is left alone."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, (torch.jit.ScriptModule, ResidualBlock, PackedModule)) or not m._modules


def residual_block(module: nn.Module) -> ResidualBlock | None:
    """The block with its additions in its convolutions; None where there is none that can be."""
    if module._forward_hooks or module._forward_pre_hooks or isinstance(module, ResidualBlock):
        return None
    steps = _steps(module)
    if steps is None or not any(s.module and (s.activation or s.residual is not None) for s in steps):
        return None
    watched = [tuple(name.split(".")) for name, _ in module.named_modules() if name]
    return ResidualBlock.from_module(module, steps, watched)


def _steps(module: nn.Module) -> list[Call] | None:
    """The calls that make up the forward; None where it is anything else."""
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if len(parameters) - len(defaults) != 1:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Opening().trace(module, concrete_args=defaults or None)
    except Exception:  # whatever a model's forward raises when it is given proxies
        return None
    return _Program(module).read(graph)


class _Program:
    """Calls, as they are read off a graph."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.steps: list[Call] = []
        self.value: dict[fx.Node, int] = {}  # number of what a node gives
        self.order: dict[fx.Node, int] = {}

    def read(self, graph: fx.Graph) -> list[Call] | None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if node.op == "output":
                result = node.args[0]
                return self.steps if isinstance(result, fx.Node) and self._is_last(result) else None
            if not self._take(node):
                return None
        return None

    def _is_last(self, node: fx.Node) -> bool:
        return self.value.get(node) == len(self.steps)

    def _take(self, node: fx.Node) -> bool:
        """Read one node; whether it is one of those that a block may have."""
        if _is_check(node):
            return True
        if node.op == "placeholder":
            if not self.value:
                self.value[node] = 0
                return True
            return all(_is_check(user) for user in node.users)  # a default, which the trace has put in
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if any(a not in self.value for a in operands):
            return False
        # An "alpha" of an addition is none of these.
        if len(operands) != len(node.args) or set(node.kwargs) - {"inplace"}:
            return False
        if node.op == "call_module":
            return len(operands) == 1 and self._call(node, operands[0])
        if _named(node, _ADDITIONS, ("add", "add_")):
            writes = node.target is not torch.add and node.target != "add"
            return len(operands) == 2 and self._add(node, operands, writes)
        if _named(node, _RELUS, ("relu", "relu_")):
            writes = node.target == "relu_" or bool(node.kwargs.get("inplace"))
            return len(operands) == 1 and self._activate(node, operands[0], "relu", writes)
        return False

    def _alone(self, node: fx.Node) -> bool:
        """Whether nothing else takes what a node gives, under whichever name."""
        value = self.value[node]
        return value > 0 and all(len(n.users) <= 1 for n, v in self.value.items() if v == value)

    def _overwrites(self, node: fx.Node, x: fx.Node) -> bool:
        """Whether something behind `node` takes `x`, which `node` may have written to."""
        value, at = self.value[x], self.order[node]
        same = (n for n, v in self.value.items() if v == value and n is not node)
        return any(self.order[user] > at for n in same for user in n.users)

    def _free(self, node: fx.Node) -> Call | None:
        """The step that gives it, where it is a convolution without anything behind it so far, and nothing
        else takes that."""
        step = self.steps[self.value[node] - 1] if self._alone(node) else None
        if step is None or step.module is None or step.activation is not None:
            return None
        return step if _takes(self.module.get_submodule(".".join(step.module))) else None

    def _call(self, node: fx.Node, x: fx.Node) -> bool:
        module = self.module.get_submodule(str(node.target))
        if isinstance(module, FoldedBatchNorm2d) or is_passing(module):
            self.value[node] = self.value[x]
            return True
        writes = bool(getattr(module, "inplace", False))
        activation = activation_of(module)
        if activation is not None:
            return self._activate(node, x, activation, writes)
        if writes and self._overwrites(node, x):
            return False
        return self._step(node, Call(tuple(str(node.target).split(".")), self.value[x]))

    def _step(self, node: fx.Node, call: Call) -> bool:
        self.steps.append(call)
        self.value[node] = len(self.steps)
        return True

    def _change(self, node: fx.Node, x: fx.Node, **changes: Any) -> bool:
        at = self.value[node] = self.value[x]
        self.steps[at - 1] = changed(self.steps[at - 1], **changes)
        return True

    def _add(self, node: fx.Node, operands: list[fx.Node], writes: bool) -> bool:
        """The convolution that came last takes the addition: the other operand is there by then."""
        # `y += x` is traced as `y + x`.
        if writes and self._overwrites(node, operands[0]):
            return False
        other, last = sorted(operands, key=self.value.__getitem__)
        if self.value[other] < self.value[last]:
            step = self._free(last)
            if step is not None and step.residual is None:
                return self._change(node, last, residual=self.value[other])
        return self._step(node, Call(None, self.value[operands[0]], self.value[operands[1]]))

    def _activate(self, node: fx.Node, x: fx.Node, name: str, writes: bool) -> bool:
        if writes and self._overwrites(node, x):
            return False
        if self._free(x) is not None:
            return self._change(node, x, activation=name)
        return self._step(node, Call(None, self.value[x], activation=name))


def _named(node: fx.Node, functions: tuple[Any, ...], methods: tuple[str, ...]) -> bool:
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )


def _is_check(node: fx.Node) -> bool:
    """What tracing with fixed arguments leaves behind: that they are what they were."""
    return node.op == "call_function" and node.target in (
        torch._assert,
        operator.eq,
        fx._symbolic_trace._assert_is_none,
    )
