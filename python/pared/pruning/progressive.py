"""`prune_progressively`: sub-network by sub-network, each rebuilt before the next is begun."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from pared._checkpoint import Checkpoint, fingerprint
from pared._errors import check_count, check_flag, check_number, check_path, check_positive
from pared._inputs import leaves
from pared._sparsity import weight_format
from pared._surgery import copy_model
from pared.pruning import distributed, obs, oneshot
from pared.pruning.calibration import LossFn, Observer, StopForward, batches, collect, forward, frozen
from pared.pruning.importance import Importance
from pared.pruning.masks import nonzeros, zero
from pared.pruning.reconstruct import _Order, _stage, check_repeatable, stages
from pared.pruning.report import PruneReport
from pared.pruning.targets import Filters, Target

__all__ = ["BlockReport", "ProgressiveReport", "prune_progressively"]


@dataclass(frozen=True)
class BlockReport:
    """One sub-network: relative squared error of its outputs on the data, against the dense one on the same
    inputs, with the masks alone and after the reconstruction."""

    name: str
    masked: float
    rebuilt: float


@dataclass(frozen=True)
class ProgressiveReport:
    """`prune` : as of `pared.prune`. `blocks` : one for each sub-network, in the order of execution."""

    prune: PruneReport
    blocks: tuple[BlockReport, ...]

    def __str__(self) -> str:
        lines = [f"{b.name}: error {b.masked:.3g} masked, {b.rebuilt:.3g} rebuilt" for b in self.blocks]
        return "\n".join([str(self.prune), *lines])


def prune_progressively(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    data: Iterable[Any],
    pattern: str = "unstructured",
    importance: Importance = "wanda",
    steps: int = 0,
    lr: float = 1e-3,
    damping: float = 0.01,
    loss_fn: LossFn | None = None,
    include: Filters = None,
    exclude: Filters = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ProgressiveReport:
    """Prune a model block by block, in place, and rebuild each block before the next one is begun.

    A block is a member of the outermost ModuleList or Sequential (a transformer's layer, a stage of a
    residual network), or a single layer. Its masks are chosen on the activations that the pruned blocks
    before it give; the weights that stay become the least-squares solution ``min |X W'^T - X W^T|^2`` under
    the mask (`pared.pruning.obs.least_squares`); with `steps` the whole block, biases and norms included,
    then follows the dense block's outputs by gradient descent. Luo, Wu and Lin, "ThiNet" (arXiv 1707.06342),
    for the least squares layer by layer; Li et al., "BRECQ" (arXiv 2102.05426), for blocks.

    Parameters
    ----------
    model, sparsity, pattern, importance, loss_fn, include, exclude : as in `pared.prune`; each layer has the
        same sparsity (each row, for criteria that compare within rows).
    data : batches that can be gone through several times.
    steps : of Adam for each block, one batch each; `lr` its learning rate.
    damping : added to the diagonal of X^T X, as a share of its mean.
    resume : a folder that keeps the blocks that are done; removed at the end.
    progress : whether a progress bar is shown.

    Returns
    -------
    ProgressiveReport

    Raises
    ------
    TypeError, ValueError : as `pared.prune`; gradient steps in a job of several processes. The model is then
        as it was.

    Notes
    -----
    Memory: one block's matrices, a copy of that block, one batch, and the old weights, which come back if
    anything fails.
    """
    steps = check_count("steps", steps, "steps", 0)
    lr, damping = check_positive("lr", lr), check_number("damping", damping)
    check_flag("progress", progress)
    if resume is not None:
        check_path("resume", resume, "or None")
    processes = distributed.current()
    if steps and processes is not None:
        raise ValueError(f"steps: expected 0 in a job of {processes.size} processes, got {steps}")
    plan = oneshot.make_plan(model, pattern, importance, None, data, loss_fn, include, exclude, 0, 0)
    share = oneshot.check_sparsity(sparsity, plan.pattern)
    if hasattr(plan.criterion, "reconstruct"):
        raise ValueError(f"importance: expected one that gives scores, got {plan.criterion.name!r}")
    for target in plan.targets:
        if any(weight_format(owner, parameter) != "plain" for owner, parameter in target.places):
            raise ValueError(
                f"model: expected plain weights, got masks of another tool on {target.name!r}; make them "
                "permanent first, for example with pared.prune(model, 0.0)"
            )
    check_repeatable(data, "'prune_progressively'")
    module = plan.model
    before = [nonzeros(t.weight) for t in plan.targets]
    with distributed.together(processes), torch.no_grad():
        order = _Order(module, plan.targets, next(iter(batches(data, "'prune_progressively'"))), loss_fn)
    settings = {"method": "progressive", "sparsity": share, "pattern": str(plan.pattern), "steps": steps}
    settings |= {
        "importance": plan.criterion.name,
        "lr": lr,
        "damping": damping,
        "model": fingerprint(module),
    }
    done = Checkpoint(resume if processes is None or processes.rank == 0 else None, settings)
    old: dict[str, dict[str, torch.Tensor]] = {}
    blocks: list[BlockReport] = []
    try:
        with Progress(disable=not progress) as bar:
            task = bar.add_task("blocks", total=len(plan.targets))
            for stage in stages(module, plan.targets, order, 2**62):
                name = _stage(module, stage[0].layer)
                block = module.get_submodule(name) if name else module
                old[name] = {k: v.detach().clone() for k, v in block.state_dict().items()}
                item = done.get(name)
                if processes is not None:
                    item = processes.gather(item)[0]
                if item is not None:
                    block.load_state_dict(item.tensors)
                    blocks.append(BlockReport(name, item.values["masked"], item.values["rebuilt"]))
                else:
                    run = _Block(module, block, data, loss_fn)
                    own = dataclasses.replace(
                        plan, targets=stage, scope="layer" if plan.scope == "global" else plan.scope
                    )
                    found = _rebuild(own, run, share, data, loss_fn, order, steps, lr, damping)
                    blocks.append(BlockReport(name, *found))
                    done.put(name, {"masked": found[0], "rebuilt": found[1]}, block.state_dict())
                bar.advance(task, len(stage))
    except BaseException:
        for name, state in old.items():
            (module.get_submodule(name) if name else module).load_state_dict(state)
        raise
    done.finish()
    return ProgressiveReport(oneshot.make_report(plan, share, before), tuple(blocks))


def _rebuild(
    plan: oneshot.Plan,
    run: _Block,
    share: float,
    data: object,
    loss_fn: LossFn | None,
    order: _Order,
    steps: int,
    lr: float,
    damping: float,
) -> tuple[float, float]:
    """Prune and rebuild one block; its errors before and after the reconstruction."""
    targets = plan.targets
    masks = oneshot.choose_masks(plan, oneshot.observe(plan, data, loss_fn), share)
    observers: dict[str, Observer] = {t.name: obs.Hessian(t) for t in targets}
    last = None
    if all(order.calls[id(t.module)] and len(t.places) == 1 for t in targets):
        last = sum(order.calls[i] for i in {id(t.module) for t in targets})
    collect(plan.model, targets, observers, data, loss_fn, "'prune_progressively'", stop_after=last)
    dense = [t.weight.clone() for t in targets]
    for target, mask in zip(targets, masks, strict=True):
        zero(target.tensor, ~mask)
    masked = run.error()
    for target, mask, w in zip(targets, masks, dense, strict=True):
        _solve(target, mask, w, observers.pop(target.name).result(), damping)
    if steps:
        run.train(targets, masks, steps, lr)
    return masked, run.error()


def _solve(
    target: Target, mask: torch.Tensor, dense: torch.Tensor, hessians: list[torch.Tensor], damping: float
) -> None:
    matrices = obs.Matrices(target)
    parts = zip(matrices.split(dense), matrices.split(mask), hessians, strict=True)
    new = matrices.join([obs.least_squares(w.to(h.dtype), h, m, damping=damping) for w, m, h in parts])
    if not bool(torch.isfinite(new).all()):
        raise ValueError(
            f"data: expected inputs from which layer {target.layer!r} can be rebuilt, got weights that are "
            "not finite; give more samples or a larger damping"
        )
    if (processes := distributed.current()) is not None:
        new = processes.first_(new.contiguous())
    with torch.no_grad():
        target.tensor.copy_(new)
    zero(target.tensor, ~mask)


class _Block:
    """A block, its dense copy, and the inputs that the model gives it."""

    def __init__(self, model: nn.Module, block: nn.Module, data: object, loss_fn: LossFn | None) -> None:
        self.model, self.block, self.data, self.loss_fn = model, block, data, loss_fn
        self.dense = copy_model(block).eval()

    def inputs(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """One batch's arguments at a time; what lies behind the block is not run."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args, kwargs))
            raise StopForward

        for batch in batches(self.data, "'prune_progressively'"):
            handle = self.block.register_forward_pre_hook(take, with_kwargs=True)
            try:
                with torch.no_grad():
                    forward(self.model, batch, self.loss_fn)
            except StopForward:
                pass
            finally:
                handle.remove()
            yield from found
            found.clear()

    def error(self) -> float:
        lost = total = 0.0
        processes = distributed.current()
        with distributed.together(processes), frozen(self.model), torch.no_grad():
            for args, kwargs in self.inputs():
                for a, b in zip(
                    _floats(self.dense(*args, **kwargs)), self._outputs(args, kwargs), strict=True
                ):
                    lost += float((a - b).double().square().sum())
                    total += float(a.double().square().sum())
        if processes is not None:
            lost, total = processes.add_(
                torch.tensor([lost, total], dtype=torch.float64, device="cpu")
            ).tolist()
        return lost / total if total else 0.0

    def _outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        return _floats(self.block(*args, **kwargs))

    def train(self, targets: Sequence[Target], masks: Sequence[torch.Tensor], steps: int, lr: float) -> None:
        trained = [p for p in self.block.parameters() if p.is_floating_point()]
        kept = [p.grad for p in trained]  # the caller's
        with frozen(self.model, trained), torch.enable_grad():
            optimizer = torch.optim.Adam(trained, lr=lr)
            taken = 0
            while taken < steps:
                for args, kwargs in self.inputs():
                    with torch.no_grad():
                        want = _floats(self.dense(*args, **kwargs))
                    got = self._outputs(args, kwargs)
                    parts = [nn.functional.mse_loss(b, a) for a, b in zip(want, got, strict=True)]
                    loss = torch.stack(parts).sum()
                    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                    for p, g in zip(trained, gradients, strict=True):
                        p.grad = g
                    optimizer.step()
                    for target, mask in zip(targets, masks, strict=True):
                        zero(target.tensor, ~mask)
                    taken += 1
                    if taken == steps:
                        break
        for p, own in zip(trained, kept, strict=True):
            p.grad = own


def _floats(output: Any) -> list[torch.Tensor]:
    return [t for _, t in leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
