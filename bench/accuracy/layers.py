"""Held-out output error of every Linear layer of MiniLM, by criterion and pattern.

Each layer is pruned for itself on the dense model's activations: what Wanda and SparseGPT minimise is the
layer's output error; about accuracy this says nothing. Run it with::

    python -m bench.accuracy.layers [--tokens 64] [--texts 96] [--json layers.json]

Prints, for each pattern, the mean relative error by criterion and on how many layers
SparseGPT < Wanda < magnitude < random holds; and the error of GPTQ against round-to-nearest at 4 and 3 bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pared
from pared._demo import minilm
from pared.pruning import calibration, obs
from pared.pruning.patterns import parse_pattern
from pared.pruning.targets import Target
from pared.quant.grid import GridRounding, fit

CRITERIA = ("sparsegpt", "wanda", "magnitude", "random")
PATTERNS = ("unstructured", "4:8", "2:4")


class Recorded(calibration.Observer):
    """A layer's inputs, [tokens, in]."""

    events = frozenset({calibration.INPUT})

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def input(self, x: torch.Tensor) -> None:
        self.rows.append(x.clone())

    def result(self) -> torch.Tensor:
        return torch.cat(self.rows)


def inputs_of(model: nn.Module, layers: dict[str, nn.Linear], data: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What each layer receives."""
    targets = [Target(m, n, "weight", [n], [(m, "weight")]) for n, m in layers.items()]
    observers: dict[str, calibration.Observer] = {n: Recorded() for n in layers}
    calibration.collect(model, targets, observers, data, None, "the study")
    return {n: o.result() for n, o in observers.items()}


def relative(x: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> float:
    """``|x (new - old)^T| / |x old^T|``"""
    return float(torch.linalg.norm(x @ (new - old).t()) / torch.linalg.norm(x @ old.t()))


def pruned(layer: nn.Linear, x: torch.Tensor, criterion: str, pattern: str) -> torch.Tensor:
    """The weight of `layer` at 50 %, scores compared within each row."""
    copy = nn.Linear(layer.in_features, layer.out_features, bias=False)
    with torch.no_grad():
        copy.weight.copy_(layer.weight)
    scope = None if ":" in pattern else "row"
    pared.prune(copy, 0.5, pattern=pattern, importance=criterion, scope=scope, data=[x])
    return copy.weight.detach()


def rebuilt(w: torch.Tensor, inverse: obs.Inverse, pattern: str) -> torch.Tensor:
    """The same by SparseGPT, which shares one factor of the inverse among the patterns."""
    parsed = parse_pattern(pattern)
    width = parsed.cols if parsed.kind == "nm" else 1
    units = [(i, min(i + width, w.shape[1])) for i in range(0, w.shape[1], width)]
    return obs.sweep(w, inverse, units=units, sparsity=0.5, pattern=parsed)[0]


def study(
    layers: dict[str, nn.Linear],
    seen: dict[str, torch.Tensor],
    held_out: dict[str, torch.Tensor],
    advance: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """Errors by pattern, criterion and layer; and of rounding by bits and method."""
    errors: dict[str, dict[str, list[float]]] = {p: {c: [] for c in CRITERIA} for p in PATTERNS}
    rounding: dict[str, dict[str, list[float]]] = {
        str(b): {"gptq": [], "rtn": [], "tensor": []} for b in (8, 4, 3)
    }
    for name, layer in layers.items():
        advance(f"layers: {name}")
        w, x = layer.weight.detach(), held_out[name]
        h = seen[name].t() @ seen[name] * (2 / len(seen[name]))
        inverse = obs.invert(h, 0.01)
        for pattern in PATTERNS:
            for criterion in CRITERIA:
                if criterion == "sparsegpt":
                    new = rebuilt(w, inverse, pattern)
                else:
                    new = pruned(layer, seen[name], criterion, pattern)
                errors[pattern][criterion].append(relative(x, new, w))
        for bits in (8, 4, 3):
            grid = GridRounding(bits, symmetric=True, group=None, method="minmax")
            rounding[str(bits)]["gptq"].append(relative(x, obs.sweep(w, inverse, rounding=grid)[0], w))
            rounding[str(bits)]["rtn"].append(relative(x, fit(w, bits).round(w), w))
            whole = w.reshape(1, -1)
            rounding[str(bits)]["tensor"].append(
                relative(x, fit(whole, bits).round(whole).reshape(w.shape), w)
            )
    return {"layers": list(layers), "errors": errors, "rounding": rounding}


def ordered(errors: dict[str, list[float]]) -> float:
    """Share of the layers on which each criterion beats the next."""
    rows = list(zip(*(errors[c] for c in CRITERIA), strict=True))
    return sum(all(a < b for a, b in itertools.pairwise(r)) for r in rows) / len(rows)


def gain(rounding: dict[str, list[float]], method: str = "gptq", over: str = "rtn") -> float:
    """Geometric mean over the layers of one method's squared error to another's."""
    logs = [2 * math.log(a / b) for a, b in zip(rounding[method], rounding[over], strict=True)]
    return math.exp(sum(logs) / len(logs))


def load(
    texts: int, tokens: int, seed: int = 0
) -> tuple[nn.Module, dict[str, nn.Linear], list[Any], list[Any]]:
    """The encoder, its Linear layers, and batches of `texts` docstrings to calibrate and to measure on."""
    model, tokenizer = minilm.load()
    pairs = [p.body for p in minilm.corpus(minilm.library_files(), seed=seed)]

    def batches(part: Sequence[str]) -> list[Any]:
        return [minilm.tokenize(tokenizer, list(part[i : i + 16]), tokens) for i in range(0, len(part), 16)]

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return model, layers, batches(pairs[:texts]), batches(pairs[texts : 2 * texts])


SETTINGS = {"texts": 48, "tokens": 64}
LAYERS = 36
WORK = LAYERS  # calls of `advance` in `run`


def run(seed: int, advance: Callable[[str], object] = lambda what: None) -> dict[str, float]:
    """Mean errors, shares of layers in order, and ratios of rounding errors, of one seed."""
    model, layers, data, held_out = load(SETTINGS["texts"], SETTINGS["tokens"], seed)
    result = study(layers, inputs_of(model, layers, data), inputs_of(model, layers, held_out), advance)
    out: dict[str, float] = {}
    for pattern, errors in result["errors"].items():
        out |= {f"error, {c}, {pattern}": sum(own) / len(own) for c, own in errors.items()}
        out[f"in order, {pattern}"] = ordered(errors)
    for bits, rounding in result["rounding"].items():
        # Of the errors themselves, not of their squares.
        out[f"gptq to rtn, {bits} bits"] = math.sqrt(gain(rounding))
        out[f"worst channel to tensor, {bits} bits"] = max(
            a / b for a, b in zip(rounding["rtn"], rounding["tensor"], strict=True)
        )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=None, help="only the first so many")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    model, layers, data, held_out = load(args.texts, args.tokens)
    layers = dict(list(layers.items())[: args.layers])
    result = study(layers, inputs_of(model, layers, data), inputs_of(model, layers, held_out))
    print(
        f"{len(layers)} layers, {args.texts} texts of at most {args.tokens} tokens; relative held-out error"
    )
    print(f"{'':14}" + "".join(f"{c:>11}" for c in CRITERIA) + "    in order")
    for pattern, errors in result["errors"].items():
        means = "".join(f"{sum(errors[c]) / len(errors[c]):11.4f}" for c in CRITERIA)
        print(f"{pattern:14}{means}{ordered(errors):11.0%}")
    for bits, rounding in result["rounding"].items():
        print(f"{bits} bits: squared error of GPTQ / round-to-nearest {gain(rounding):.3f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
