"""Bad arguments to what `pared` and its modules for models (quant, pruning, schedules, training, callbacks)
export, and to the methods of what they return: the table of test_bad_arguments for functions that take
models. Every bad value is refused by name, and leaves the model as it was."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from _bad_values import (
    ARRAY,
    FLAG,
    INTEGER,
    NOTHING,
    NUMBER,
    OBJECT,
    OPTIONAL_OBJECT,
    OPTIONAL_WORD,
    WORD,
    Call,
    Values,
    parameters,
    refusals,
)
from test_bad_arguments import own
from test_bad_input import X, fingerprint, good, loss_fn, network, one_thread, with_nan  # noqa: F401  (a fixture)
from torch import nn

import pared
from pared import callbacks, pruning, quant, schedules, training
from pared._checkpoint import Checkpoint
from pared._compress import Compressed
from pared._evaluate import Evaluation
from pared._search import BudgetPlan
from pared.pruning.distributed import Processes
from pared.pruning.targets import Target, collect


def evaluate(model: nn.Module) -> float:
    return 1.0


THINGS = {"an integer": 3, "a string": "unknown", "an object": object(), "an array": ARRAY}
MODEL = Values(
    {
        **THINGS,
        "None": None,
        "a class": nn.Linear,
        "a list": [3],
        "a state": network().state_dict(),
    }
)
INPUTS = Values({**THINGS, "none": [], "of another size": torch.zeros(2, 5), "a dict of numbers": {1: X}})
BATCHES = Values(
    {
        **THINGS,
        "none": [],
        "numbers": [1, 2],
        "NaN": with_nan(),
        "of another size": [torch.zeros(4, 5)],
        "of another kind": [torch.zeros(4, 8).tolist()],
        "of another dtype": [torch.zeros(4, 8, dtype=torch.int64)],
        "arrays": [ARRAY],
        "a class": list,
        "one batch": X,
    }
)
# Of one argument more than functions are called with.
CALLABLE = Values({**THINGS, "None": None, "of no argument": lambda: 1.0, "of four": lambda a, b, c, d: 1.0})
OPTIONAL_CALLABLE = CALLABLE.but("None")
LOSS = Values(
    {
        **OPTIONAL_CALLABLE.values,
        "a loss of torch": nn.CrossEntropyLoss(),
        "a class of torch": nn.MSELoss,
        "a function of torch": nn.functional.cross_entropy,
    }
)
FILTERS = Values(
    {
        "an integer": 3,
        "an object": object(),
        "an array": ARRAY,
        "bytes": b"0",
        "a name that is not there": "unknown.*",
        "no such type": nn.LSTM,
        "a broken expression": "re:(",
        "mixed": ["0", 3],
        "of one argument": lambda name: True,
    }
)
SHARE = Values({**NUMBER.values, "None": None, "one": 1.0, "percent": 90, "negative": -0.1})
SHARES = Values({**SHARE.values, "an unknown layer": {"unknown": 0.5}, "NaN by layer": {"0": float("nan")}})
AT_LEAST_0 = Values({**NUMBER.values, "None": None, "negative": -0.1})
# Python has integers of any size.
COUNT = Values({**INTEGER.but("2**70").values, "negative": -1})
LEVELS = Values(
    {
        **THINGS,
        "None": None,
        "none": [],
        "words": ["a"],
        "a NaN": [float("nan")],
        "one": [0.5, 1.0],
        "descending": [0.9, 0.5],
        "bools": [False, True],
    }
)
PATTERN = Values({**WORD.values, "blocks of nothing": "0x4", "more than all": "5:4", "words": "axb"})
INDENT = Values({**COUNT.but("None").values, "a string": "  ", "2**70": -(2**70)})
BITS = Values({**INTEGER.values, "one": 1, "seventeen": 17, "negative": -8})
DEVICE = Values({"an integer": 3, "an array": ARRAY, "unknown": "nodevice", "an object": object()})
PATH = Values(
    {"an integer": 3, "None": None, "an object": object(), "an array": ARRAY, "a text file": io.StringIO()}
)

BINS = Values({**COUNT.values, "no multiple of 4": 6, "2**70": 2**70})
NORM = Values({**INTEGER.values, "three": 3})
ABOVE_0 = Values({**AT_LEAST_0.values, "nothing": 0.0})
STEPS = Values({**COUNT.values, "nothing": 0})
OPTIMIZER = Values({**THINGS, "a class": torch.optim.SGD, "a list": [3]})
TENSOR = Values({**THINGS, "None": None, "a list": [1.0], "integers": torch.zeros(2, 5, dtype=torch.int64)})
LOGITS, LABELS = torch.zeros(4, 3), torch.arange(4) % 3

PRUNING = {
    "pattern": PATTERN,
    "importance": WORD,
    "scope": OPTIONAL_WORD,
    "data": BATCHES,
    "loss_fn": LOSS,
    "include": FILTERS,
    "exclude": FILTERS,
}
# Among the options of what these call.
OTHERS_HAVE_IT = {"unknown": Values({"an integer": 3, "None": None})}
ENDS = {"keep_first": COUNT, "keep_last": COUNT}
# What is looked at where it is needed.
NEEDS = {"data": {"importance": "wanda"}, "loss_fn": {"importance": "taylor", "data": good()}}


def on_a_model(function: Callable[..., Any], make: Callable[[], nn.Module] = network) -> Callable[..., Any]:
    """`function` on a model of its own, which has to be as it was when the call fails."""

    def call(**arguments: Any) -> None:
        if "model" in arguments:
            function(**arguments)
            return
        model = make()
        before = fingerprint(model)
        try:
            function(model=model, **arguments)
        except Exception as e:
            if fingerprint(model) != before:
                raise AssertionError("the model was changed") from e
            raise

    return call


GRID = quant.Grid(torch.ones(1), torch.zeros(1), 8)


def step(schedule: schedules.Schedule) -> Call:
    return Call(schedule, {"step": 3}, {"step": COUNT})


def ramp(cls: type, **more: Values) -> Call:
    return Call(
        cls,
        {"initial": 0.1, "final": 0.5, "begin": 0, "end": 9},
        {"initial": SHARE, "final": SHARE, "begin": COUNT, "end": COUNT, **more},
    )


def accelerated() -> nn.Module:
    return pared.accelerate(nn.Sequential(nn.Linear(8, 4)).eval(), X, min_speedup=0, progress=False)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def target() -> Target:
    return collect(network(), None, None, 0, 0)[0][0]


class Alone(Processes):
    """A job of one process."""

    def gather(self, value: object) -> list[Any]:
        return [value]

    def add_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class Attending(nn.Module):
    """With something that `as_linears` opens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


def statistics() -> pruning.Statistics:
    return pruning.Statistics("0", "weight", torch.zeros(12, 8))


def movement() -> training.Movement:
    model = network()
    moved = training.Movement(model)
    loss_fn(model, good()[0]).backward()
    moved.update()
    return moved


def fine_tune(**arguments: Any) -> None:
    """`FineTune.run` on a model of its own."""
    model = network()
    tune = training.FineTune(loss_fn, lambda p: torch.optim.SGD(p, lr=0.1), 1)
    given = {"model": model, "pruner": pared.Pruner(model, schedules.OneShot(0.0)), **arguments}
    tune.run(**given)


def scan() -> training.Sensitivity:
    return training.Sensitivity(1.0, (0.5, 0.9), {"0.weight": (0.9, 0.5)}, {"0.weight": 96})


def input_range() -> quant.InputRange:
    seen = quant.InputRange(target())
    seen.input(X)
    return seen


def quantized_layer() -> nn.Module:
    layer = nn.Linear(8, 4)
    pared.quantize(layer, [X], bits=8)
    return layer


# Results whose methods have rows. What a method says of its arguments does not depend on what is in them.
EVALUATION = pared.evaluate(network().eval(), good(), seconds=0.0)
PLAN = BudgetPlan("parameters", 1.0, 2.0, 1.0, 0.0, "", None, (), "unstructured", "magnitude")
COMPRESSED = Compressed(nn.Identity(), nn.Identity(), 1.0, 0.9, 1.0, 0.5, (), pared.Report(), PLAN)
REPORTS = (
    pruning.PruneReport("unstructured", "magnitude", "global", 0.5, ()),
    pruning.ChannelPlan("parameters", 1.0, 2.0, 1.0, 0.0, "", (), ()),
    pruning.ChannelReport("magnitude", "layer", 0.5, (), (), (), 2, 1, 0.0),
    pruning.LayerRemovalReport("block_influence", (), (), 2, 1),
)
ARGUMENTS = transformers.TrainingArguments("out", use_cpu=True, report_to=[])
TRAINED = network()
LIGHTNING = SimpleNamespace(optimizers=[], global_step=0)

CALLS: dict[str, Call] = {
    "prune": Call(
        on_a_model(pared.prune),
        {"sparsity": 0.5},
        {
            "model": MODEL,
            "sparsity": SHARES.but("None"),
            **PRUNING,
            **ENDS,
            "example_inputs": INPUTS,
            "tokens": COUNT.but("None"),
            "device": DEVICE,
            "precision": WORD,
        },
        {
            **NEEDS,
            "example_inputs": {"pattern": "auto"},
            "tokens": {"pattern": "auto"},
            "device": {"pattern": "auto", "tokens": 3},
            "precision": {"pattern": "auto", "tokens": 3},
        },
    ),
    "Pruner": Call(
        # The data is looked at when masks are chosen.
        on_a_model(lambda model, **options: pared.Pruner(model, **options).step()),
        {"schedule": schedules.OneShot(0.5)},
        {
            "model": MODEL,
            "schedule": CALLABLE,
            **PRUNING,
            **ENDS,
            "optimizer": OPTIMIZER,
            "update_every": STEPS,
            "allow_regrowth": FLAG,
        },
        NEEDS,
    ),
    "Pruner.load_state_dict": Call(
        lambda state: pared.Pruner(network(), schedules.OneShot(0.5)).load_state_dict(state),
        {"state": pared.Pruner(network(), schedules.OneShot(0.5)).state_dict()},
        {"state": Values({**THINGS, "None": None, "nothing": {}, "other keys": {"a": 1}})},
    ),
    "prune_channels": Call(
        on_a_model(pared.prune_channels),
        {"example_inputs": X, "ratio": 0.5},
        {
            "model": MODEL,
            "example_inputs": INPUTS,
            "ratio": SHARES,
            "scope": WORD,
            "round_to": COUNT,
            **{k: v for k, v in PRUNING.items() if k not in ("pattern", "scope")},
        },
        NEEDS,
    ),
    "prune_layers": Call(
        on_a_model(pared.prune_layers),
        {"example_inputs": X, "n": 0},
        {
            "model": MODEL,
            "example_inputs": INPUTS,
            "n": COUNT,
            **{k: v for k, v in PRUNING.items() if k not in ("pattern", "scope")},
        },
        {"data": {"importance": "change_rate"}},
    ),
    "quantize": Call(
        on_a_model(pared.quantize),
        {"data": good(), "bits": 8},
        {
            "model": MODEL,
            "data": Values({**BATCHES.values, "None": None}),
            "bits": Values(
                {
                    **WORD.but("an integer").values,
                    "one bit": 1,
                    "a bool": True,
                    "a float": 8.5,
                    "by layer": {"0": 99},
                }
            ),
            "method": WORD,
            "sparsity": SHARE.but("None"),
            "pattern": PATTERN,
            "symmetric": FLAG,
            "group": COUNT.but("None"),
            "scales": OPTIONAL_WORD,
            "activations": WORD,
            "observer": WORD,
            "bias_correction": FLAG,
            "max_error": AT_LEAST_0,
            "example_inputs": INPUTS,
            "damping": AT_LEAST_0,
            "loss_fn": LOSS,
            "include": FILTERS,
            "exclude": FILTERS,
            "resume": Values({"an integer": 3, "an object": object(), "an array": ARRAY}),
            "progress": FLAG,
        },
        {"pattern": {"sparsity": 0.5}, "example_inputs": {"bits": "auto"}, "max_error": {"bits": "auto"}},
    ),
    "accelerate": Call(
        on_a_model(pared.accelerate),
        {"example_inputs": X, "progress": False},
        {
            "model": MODEL,
            "example_inputs": Values({**INPUTS.values, "None": None}),
            "precision": WORD,
            "max_error": AT_LEAST_0.but("None"),
            "min_speedup": AT_LEAST_0,
            "formats": Values({**THINGS, "unknown": ["unknown"], "numbers": [1], "none": []}),
            "fuse": FLAG,
            "progress": FLAG.but("None"),
            "cache": Values({"an integer": 3, "an object": object(), "an array": ARRAY}),
        },
    ),
    "compress": Call(
        on_a_model(pared.compress),
        {"data": good(), "evaluate": evaluate, "sparsities": [0.5]},
        {
            "model": MODEL,
            "data": BATCHES,
            "evaluate": CALLABLE,
            "max_drop": AT_LEAST_0,
            "search": OPTIONAL_WORD,
            "sparsities": LEVELS,
            "fine_tune": OPTIONAL_CALLABLE,
            "quantize": Values({**THINGS, "unknown options": {"unknown": 3}}),
            "pattern": PATTERN,
            "importance": WORD.but("None"),
            "loss_fn": LOSS,
            "example_inputs": INPUTS,
            "precision": WORD,
            "include": FILTERS,
            "exclude": FILTERS,
            "checkpoint": Values({"an integer": 3, "an object": object(), "an array": ARRAY}),
        },
    ),
    "evaluate": Call(
        pared.evaluate,
        {"models": network().eval(), "data": good(), "seconds": 0.01},
        {
            "models": Values(
                {**THINGS, "None": None, "none": {}, "numbers": {"a": 3}, "by number": {1: network()}}
            ),
            "data": Values({**THINGS, "None": None, "none": [], "numbers": [1, 2]}),
            "score": OPTIONAL_CALLABLE,
            "example_inputs": INPUTS,
            "distortions": Values({**THINGS, "none callable": {"a": 3}, "by number": {1: torch.relu}}),
            "seconds": AT_LEAST_0,
        },
    ),
    "levels": Call(
        on_a_model(pared.levels),
        {"example_inputs": X, "sparsities": [0.5]},
        {
            "model": Values({**MODEL.values, "none": []}),
            "example_inputs": Values({**INPUTS.values, "None": None}),
            "sparsities": LEVELS,
            **PRUNING,
        },
        NEEDS,
    ),
    "Levels": Call(
        pared.Levels,
        {"models": [accelerated()], "sparsities": [0.5]},
        {"models": Values({**THINGS, "None": None, "none": [], "numbers": [3]}), "sparsities": LEVELS},
    ),
    "Levels.set_level": Call(
        lambda level: pared.Levels([accelerated()], [0.5]).set_level(level),
        {"level": 0},
        {"level": Values({**INTEGER.values, "too far": 1})},
    ),
    "Report": Call(pared.Report, {}, dict.fromkeys(parameters(pared.Report), NOTHING)),  # the package's own
    "Report.candidates": Call(
        lambda layer: pared.report(accelerated()).candidates(layer),
        {"layer": None},
        {"layer": Values({"an integer": 3, "unknown": "unknown", "an object": object()})},
    ),
    "Report.from_json": Call(
        pared.Report.from_json,
        {"text": pared.Report().to_json()},
        {"text": Values({**THINGS, "None": None, "a list": "[]", "other keys": '{"a": 1}'})},
    ),
    "Report.to_json": Call(
        lambda indent: pared.Report().to_json(indent),
        {"indent": 2},
        {"indent": INDENT},
    ),
    "report": Call(
        pared.report, {"model": accelerated()}, {"model": Values({**MODEL.values, "plain": network()})}
    ),
    "restore": Call(
        pared.restore, {"model": accelerated()}, {"model": Values({**MODEL.values, "plain": network()})}
    ),
    "save": Call(
        pared.save,
        {"model": accelerated(), "path": io.BytesIO()},
        {"model": MODEL, "path": PATH, "overwrite": FLAG},
    ),
    "load": Call(
        lambda model, path=None: pared.load(path or saved(), model),
        {"model": lambda: nn.Sequential(nn.Linear(8, 4))},
        {
            "path": PATH.but("None", "an array"),
            "model": Values(
                {
                    **MODEL.but("a class").values,
                    "of another model": lambda: nn.Linear(2, 2),
                    "of nothing": lambda: 3,
                }
            ),
        },
    ),
    "search_budget": Call(
        on_a_model(pared.search_budget),
        {"budget": 0.5, "levels": [0.0, 0.5, 0.9]},
        {
            "model": MODEL,
            "budget": Values({**NUMBER.values, "None": None, "nothing": 0.0, "percent": 50}),
            "cost": WORD,
            "levels": LEVELS,
            "evaluate": OPTIONAL_CALLABLE,
            "example_inputs": INPUTS,
            "precision": WORD,
            **{k: v for k, v in PRUNING.items() if k != "scope"},
            **ENDS,
        },
        {
            **NEEDS,
            "example_inputs": {"cost": "time"},
            "precision": {"cost": "time", "example_inputs": X},
            **{key: {"budget": 0.9} for key in ENDS},
        },
    ),
    "quant.distributions": Call(
        on_a_model(quant.distributions),
        {},
        {
            "model": MODEL,
            "data": BATCHES,
            "bits": BITS,
            "loss_fn": LOSS,
            "include": FILTERS,
            "exclude": FILTERS,
        },
        {"loss_fn": {"data": good()}},
    ),
    "quant.equalize": Call(on_a_model(quant.equalize, plain), {}, {"model": MODEL, "iterations": COUNT}),
    "quant.finish_qat": Call(
        on_a_model(lambda model: quant.prepare_qat(model) and quant.finish_qat(model)), {}, {"model": MODEL}
    ),
    "quant.int8_weight": Call(
        quant.int8_weight,
        {"layer": quantized_layer()},
        {"layer": Values({**MODEL.values, "plain": nn.Linear(8, 4)})},
    ),
    "quant.prepare_qat": Call(
        on_a_model(quant.prepare_qat),
        {},
        {"model": MODEL, "bits": BITS, "include": FILTERS, "exclude": FILTERS},
    ),
    "quant.quantized": Call(
        quant.quantized,
        {"module": quantized_layer()},
        {"module": MODEL, "parameter": Values({"an integer": 3, "unknown": "unknown", "an array": ARRAY})},
    ),
    "quant.simulate": Call(
        lambda model: quant.simulate(model).__enter__(), {"model": network()}, {"model": MODEL}
    ),
    "quant.smooth": Call(
        on_a_model(quant.smooth, normed),
        {"data": good()},
        {
            "model": MODEL,
            "data": Values({**BATCHES.values, "None": None}),
            "groups": Values({**THINGS, "unknown": {"unknown": ["0"]}, "numbers": {"1": 3}}),
            "alpha": Values({**NUMBER.values, "None": None, "negative": -0.1, "two": 2.0}),
            "loss_fn": LOSS,
        },
    ),
    "quant.ActivationGrid.round": Call(quant.ActivationGrid(0.1, 0, "int8").round, {"x": X}, {"x": TENSOR}),
    "quant.DistributionReport.to_json": Call(
        quant.DistributionReport(8, ()).to_json, {"indent": 2}, {"indent": INDENT}
    ),
    "quant.DistributionReport.to_html": Call(
        quant.DistributionReport(8, ()).to_html,
        {"path": "page.html"},
        {
            "path": PATH,
            "title": Values({"an integer": 3, "None": None, "an object": object(), "bytes": b"a"}),
        },
    ),
    "quant.ActivationGrid": Call(
        quant.ActivationGrid,
        {"scale": 0.1, "zero": 0, "dtype": "int8"},
        {"scale": ABOVE_0, "zero": Values({**INTEGER.values, "200": 200}), "dtype": WORD},
    ),
    "quant.Grid": Call(
        quant.Grid,
        {"scale": torch.ones(1), "zero": torch.zeros(1), "bits": 8},
        {"scale": TENSOR, "zero": TENSOR, "bits": BITS, "symmetric": FLAG},
    ),
    "quant.InputRange": Call(
        quant.InputRange,
        {"target": target()},
        {"target": Values({**MODEL.values, "a module": network()}), "pattern": NOTHING},  # an observer's
    ),
    "quant.InputRange.reduce": Call(
        lambda processes: input_range().reduce(processes),
        {"processes": Alone(None, 0, 1)},
        {"processes": MODEL},
    ),
    "quant.InputRange.bars": Call(
        lambda **options: input_range().bars(**options),
        {"most": 8, "zeros": True},
        {"most": STEPS, "zeros": FLAG},
    ),
    "quant.InputRange.squared_error": Call(
        lambda **options: input_range().squared_error(**options),
        {"low": -1.0, "high": 1.0, "bits": 8},
        {
            "low": Values({**NUMBER.values, "None": None}),
            "high": Values({**NUMBER.values, "None": None, "below low": -2}),
            "bits": BITS,
        },
    ),
    # What every observer has, and this one does not use.
    "quant.InputRange.begin": Call(
        lambda **seen: input_range().begin(**seen),
        {"batch": X, "samples": 4},
        dict.fromkeys(("batch", "samples"), NOTHING),
    ),
    "quant.InputRange.output": Call(lambda y: input_range().output(y), {"y": X}, {"y": NOTHING}),
    "quant.InputRange.gradient": Call(
        lambda **seen: input_range().gradient(**seen),
        {"g": X, "samples": 4},
        dict.fromkeys(("g", "samples"), NOTHING),
    ),
    "quant.Grid.codes": Call(GRID.codes, {"x": X}, {"x": TENSOR}),
    "quant.Grid.round": Call(GRID.round, {"x": X}, {"x": TENSOR}),
    "quant.QuantReport.from_dict": Call(
        quant.QuantReport.from_dict,
        {"data": quant.QuantReport("rtn", None, ()).to_dict()},
        {
            "data": Values(
                {
                    **THINGS,
                    "None": None,
                    "nothing": {},
                    "other keys": {"a": 1},
                    "no layers": {**quant.QuantReport("rtn", None, ()).to_dict(), "layers": [{"name": "a"}]},
                    "layers of numbers": {**quant.QuantReport("rtn", None, ()).to_dict(), "layers": [3]},
                }
            )
        },
    ),
    "quant.QuantReport.to_json": Call(quant.QuantReport("rtn", None, ()).to_json, {}, {"indent": INDENT}),
    "quant.QuantizedWeight.codes": Call(
        lambda matrix: quant.quantized(quantized_layer()).codes(matrix),
        {"matrix": torch.zeros(4, 8)},
        {"matrix": Values({**TENSOR.values, "of other rows": torch.zeros(3, 8), "a vector": torch.zeros(8)})},
    ),
    "quant.InputRange.input": Call(lambda x: input_range().input(x), {"x": X}, {"x": TENSOR}),
    "quant.InputRange.range": Call(
        lambda **options: input_range().range(**options),
        {"method": "percentile"},
        {"method": WORD, "bits": BITS, "share": Values({**SHARE.but("one").values, "too low": 0.4})},
    ),
    "quant.InputRange.grid": Call(
        lambda **options: input_range().grid(**options),
        {"method": "mse"},
        {"method": WORD, "bits": BITS, "symmetric": FLAG},
    ),
    "isa": Call(pared.isa, {}, {}),
    "kernels": Call(pared.kernels, {}, {}),
    "schedules.OneShot": Call(schedules.OneShot, {"sparsity": 0.5}, {"sparsity": SHARE, "at": COUNT}),
    "schedules.OneShot.__call__": step(schedules.OneShot(0.5)),
    "schedules.Linear.__call__": step(schedules.Linear(0.1, 0.5, 0, 9)),
    "schedules.Polynomial.__call__": step(schedules.Polynomial(0.1, 0.5, 0, 9)),
    "schedules.Exponential.__call__": step(schedules.Exponential(0.1, 0.5, 0, 9)),
    "schedules.Linear": ramp(schedules.Linear),
    "schedules.Exponential": ramp(schedules.Exponential),
    "training.FineTune": Call(
        training.FineTune,
        {"loss": loss_fn, "optimizer": optimizer, "steps": 3},
        {
            "loss": Values({**LOSS.values, "None": None}),
            "optimizer": CALLABLE.but("of four"),
            "steps": STEPS,
            "data": Values({"an integer": 3, "an object": object(), "one batch": X, "a class": list}),
            "scheduler": OPTIONAL_CALLABLE,
            "clip": ABOVE_0.but("None"),
            "every": STEPS,
        },
    ),
    "training.FineTune.run": Call(
        fine_tune,
        {"data": good(), "done": Checkpoint(None, {}), "name": "a"},
        {
            "model": MODEL,
            "pruner": Values({**MODEL.values, "a model": network()}),
            "data": Values(
                {"an integer": 3, "an object": object(), "one batch": X, "none": [], "a class": list}
            ),
            "done": Values({**THINGS, "None": None, "a folder": Path()}),
            "name": OBJECT.but("a string"),
        },
    ),
    "training.Movement.score": Call(
        lambda **seen: movement().score(**seen),
        {"module": network()[0], "statistics": statistics()},
        {
            "module": NOTHING,  # its weight is in the statistics
            "statistics": MODEL,
        },
    ),
    "training.Movement": Call(
        on_a_model(training.Movement), {}, {"model": MODEL, "include": FILTERS, "exclude": FILTERS}
    ),
    "training.Proximal": Call(
        on_a_model(training.Proximal),
        {"optimizer": optimizer(network()), "strength": 0.1},
        {
            "model": MODEL,
            "optimizer": OPTIMIZER,
            "strength": ABOVE_0,
            "penalty": WORD,
            "include": FILTERS,
            "exclude": FILTERS,
        },
    ),
    "training.RigL": Call(
        on_a_model(training.RigL),
        {"sparsity": 0.5},
        {
            "model": MODEL,
            "sparsity": SHARE,
            "optimizer": OPTIMIZER,
            "share": SHARE,
            "update_every": STEPS,
            "end": STEPS,
            "include": FILTERS,
            "exclude": FILTERS,
        },
    ),
    "training.SlimmingPenalty": Call(
        on_a_model(training.SlimmingPenalty),
        {},
        {"model": Values({**MODEL.values, "without norms": nn.Linear(2, 2)}), "strength": ABOVE_0},
    ),
    "training.Sensitivity.to_json": Call(
        lambda indent: scan().to_json(indent), {"indent": 2}, {"indent": INDENT}
    ),
    "training.Sensitivity.plot": Call(lambda path: scan().plot(path), {"path": "page.png"}, {"path": PATH}),
    "training.UntilReport.to_json": Call(
        training.UntilReport(1.0, 0.9, 0.5, 1.0, ()).to_json, {"indent": 2}, {"indent": INDENT}
    ),
    "training.allocate": Call(
        training.allocate,
        {"scan": scan(), "sparsity": 0.5},
        {"scan": Values({**THINGS, "None": None}), "sparsity": SHARE},
    ),
    "training.distillation_loss": Call(
        training.distillation_loss,
        {"student": LOGITS, "teacher": LOGITS, "labels": LABELS},
        {
            "student": TENSOR,
            "teacher": Values({**TENSOR.values, "of another shape": LOGITS[:3]}),
            "labels": Values(
                {
                    **THINGS,
                    "numbers": LOGITS,
                    "too few": LABELS[:2],
                    "too large": LABELS + 7,
                    "negative": LABELS - 4,
                    "by class": torch.zeros(4, 3, dtype=torch.int64),
                }
            ),
            "temperature": ABOVE_0,
            "alpha": Values({**AT_LEAST_0.values, "two": 2.0}),
        },
    ),
    "training.feature_loss": Call(
        training.feature_loss,
        {"student": [LOGITS, X], "teacher": [LOGITS, X]},
        {
            "student": Values({**THINGS, "None": None, "none": [], "numbers": [1.0, 2.0]}),
            "teacher": Values(
                {
                    **THINGS,
                    "None": None,
                    "none": [],
                    "numbers": [1.0, 2.0],
                    "too few": [LOGITS],
                    "of other shapes": [X, LOGITS],
                }
            ),
        },
    ),
    "training.prune_until": Call(
        on_a_model(training.prune_until),
        {"evaluate": evaluate, "rounds": 2},
        {
            "model": MODEL,
            "evaluate": CALLABLE,
            "max_drop": AT_LEAST_0,
            "retrain": OPTIONAL_CALLABLE,
            "start": SHARE,
            "rate": Values({**ABOVE_0.values, "one": 1.0}),
            "rounds": STEPS,
            "rewind": Values({**THINGS, "nothing": {}, "numbers": dict.fromkeys(network().state_dict(), 3)}),
            "optimizer": OPTIMIZER,
            **PRUNING,
            **OTHERS_HAVE_IT,
            "schedule": FLAG,
        },
        NEEDS,
    ),
    "training.sensitivity": Call(
        on_a_model(training.sensitivity),
        {"evaluate": evaluate, "ratios": [0.5]},
        {
            "model": MODEL,
            "evaluate": CALLABLE,
            "ratios": LEVELS,
            **{k: v for k, v in PRUNING.items() if k != "scope"},
            **OTHERS_HAVE_IT,
            "scope": FLAG,
        },
        NEEDS,
    ),
    "callbacks.TrainerPruner": Call(
        lambda **options: callbacks.TrainerPruner(**options),
        {"schedule": schedules.OneShot(0.5)},
        {
            "schedule": CALLABLE,
            "resume": PATH.but("None"),
            **OTHERS_HAVE_IT,
            "model": OPTIMIZER,
            "optimizer": OPTIMIZER,
        },
    ),
    "callbacks.LightningPruner": Call(
        lambda **options: callbacks.LightningPruner(**options),
        {"schedule": schedules.OneShot(0.5)},
        {"schedule": CALLABLE, **OTHERS_HAVE_IT, "model": OPTIMIZER, "optimizer": OPTIMIZER},
    ),
    "callbacks.LightningPruner.load_state_dict": Call(
        lambda state_dict: callbacks.LightningPruner(schedules.OneShot(0.5)).load_state_dict(state_dict),
        {"state_dict": {}},
        {"state_dict": Values({**THINGS, "a list": [3]})},
    ),
    "schedules.Polynomial": ramp(schedules.Polynomial, power=ABOVE_0),
    **{
        f"{type(report).__name__}.to_json": Call(report.to_json, {"indent": 2}, {"indent": INDENT})
        for report in (EVALUATION, PLAN, COMPRESSED)
    },
    "Evaluation.to_html": Call(
        EVALUATION.to_html,
        {"path": "page.html"},
        {"path": PATH, "title": Values({**OBJECT.but("a string").values})},
    ),
    **{
        f"Evaluation.{method}": Call(
            getattr(EVALUATION, method),
            {"value": 0.5},
            {"value": Values({**THINGS, "None": None, "a list": [1.0], "a bool": True}).but("an integer")},
        )
        for method in ("metric", "change")
    },
    **{
        f"pruning.{type(report).__name__}.to_json": Call(report.to_json, {"indent": 2}, {"indent": INDENT})
        for report in REPORTS
    },
    "pruning.Activation": Call(pruning.Activation, {}, {"statistic": WORD}),
    "pruning.Entropy": Call(pruning.Entropy, {}, {"bins": BINS}),
    "pruning.Magnitude": Call(pruning.Magnitude, {}, {"p": NORM}),
    "pruning.OutputWeight": Call(pruning.OutputWeight, {}, {"p": NORM}),
    "pruning.Random": Call(pruning.Random, {}, {"seed": INTEGER.but("2**70", "-2**70")}),
    "pruning.WoodFisher": Call(pruning.WoodFisher, {}, {"block": STEPS, "damping": ABOVE_0, "update": FLAG}),
    "pruning.MutualInformation": Call(
        pruning.MutualInformation,
        {},
        {"bins": BINS, "classes": STEPS, "labels": CALLABLE, "single": FLAG},
    ),
    **{
        f"pruning.{cls.__name__}": Call(
            cls,
            {},
            {"damping": AT_LEAST_0, "resume": PATH.but("None"), "progress": FLAG},
        )
        for cls in (pruning.SparseGPT, pruning.OBC)
    },
    **{
        f"pruning.{cls.__name__}": Call(cls, {}, {})
        for cls in (
            pruning.BNScale,
            pruning.ChangeRate,
            pruning.Fisher,
            pruning.GeometricMedian,
            pruning.Gradient,
            pruning.LAMP,
            pruning.Propagation,
            pruning.Taylor,
            pruning.Wanda,
        )
    },
    "pruning.as_linears": Call(on_a_model(pruning.as_linears, Attending), {}, {"model": MODEL}),
    "pruning.process_group": Call(
        lambda group: pruning.process_group(group).__enter__(),
        {"group": None},
        {"group": OPTIONAL_OBJECT},
    ),
    "pruning.threshold": Call(
        on_a_model(pruning.threshold),
        {"value": 0.1},
        {
            "model": MODEL,
            "value": ABOVE_0,
            "rule": WORD,
            "most": Values({**ABOVE_0.values, "one": 1.0}),
            "include": FILTERS,
            "exclude": FILTERS,
            **ENDS,
        },
    ),
    "pruning.prune_progressively": Call(
        on_a_model(pruning.prune_progressively),
        {"sparsity": 0.5, "data": good()},
        {
            "model": MODEL,
            "sparsity": SHARE,
            "data": Values({**BATCHES.values, "None": None, "used up": iter(good())}),
            "steps": COUNT,
            "lr": ABOVE_0,
            "damping": AT_LEAST_0,
            "resume": PATH.but("None"),
            "progress": FLAG,
            **{k: v for k, v in PRUNING.items() if k not in ("data", "scope")},
        },
    ),
    "pruning.search_channels": Call(
        on_a_model(pruning.search_channels),
        {"example_inputs": X, "budget": 0.9},
        {
            "model": MODEL,
            "example_inputs": Values({**INPUTS.values, "None": None}),
            "budget": Values({**NUMBER.values, "None": None, "nothing": 0.0, "percent": 50}),
            "cost": WORD,
            "levels": LEVELS,
            "round_to": STEPS,
            "evaluate": OPTIONAL_CALLABLE,
            **{k: v for k, v in PRUNING.items() if k not in ("pattern", "scope")},
        },
    ),
    "callbacks.TrainerPruner.on_train_begin": Call(
        lambda **given: callbacks.TrainerPruner(schedules.OneShot(0.5)).on_train_begin(**given),
        {
            "args": None,
            "state": transformers.TrainerState(),
            "control": None,
            "model": TRAINED,
            "optimizer": optimizer(TRAINED),
        },
        {
            "args": NOTHING,  # for its folder, where a training is resumed
            "state": MODEL,
            "control": NOTHING,
            "model": MODEL,
            "optimizer": Values({**OPTIMIZER.values, "None": None}),
        },
    ),
    # They act on what on_train_begin has checked.
    **{
        f"callbacks.TrainerPruner.{hook}": Call(
            getattr(callbacks.TrainerPruner(schedules.OneShot(0.5)), hook),
            dict.fromkeys(("args", "state", "control")),
            dict.fromkeys(("args", "state", "control"), NOTHING),
        )
        for hook in ("on_pre_optimizer_step", "on_optimizer_step", "on_train_end")
    },
    "callbacks.TrainerPruner.on_save": Call(
        callbacks.TrainerPruner(schedules.OneShot(0.5)).on_save,
        {"args": ARGUMENTS, "state": transformers.TrainerState(global_step=1), "control": None},
        {"args": MODEL, "state": MODEL, "control": NOTHING},
    ),
    "callbacks.LightningPruner.on_train_start": Call(
        lambda **given: callbacks.LightningPruner(schedules.OneShot(0.5)).on_train_start(**given),
        {"trainer": LIGHTNING, "pl_module": network()},
        {"trainer": MODEL, "pl_module": NOTHING},  # the Pruner's model
    ),
    **{
        f"callbacks.LightningPruner.{hook}": Call(
            getattr(callbacks.LightningPruner(schedules.OneShot(0.5)), hook),
            {"trainer": LIGHTNING, "pl_module": None, **dict.fromkeys(others)},
            dict.fromkeys(("trainer", "pl_module", *others), NOTHING),
        )
        for hook, others in (
            ("on_before_optimizer_step", ("optimizer",)),
            ("on_train_batch_end", ("outputs", "batch", "batch_idx")),
            ("on_train_end", ()),
        )
    },
}


def saved() -> io.BytesIO:
    file = io.BytesIO()
    pared.save(accelerated(), file)
    file.seek(0)
    return file


def public() -> dict[str, set[str]]:
    """Every function and class of `pared` and these modules, the classes with a report that they return, and
    the methods that take arguments."""
    things = {name: getattr(pared, name) for name in pared.__all__}
    for module in (quant, pruning, schedules, training, callbacks):
        prefix = module.__name__.partition(".")[2]
        things |= {f"{prefix}.{name}": getattr(module, name) for name in module.__all__}
    for module in [m for name, m in sys.modules.items() if name.startswith("pared.")]:
        for name, thing in vars(module).items():
            here = inspect.isclass(thing) and thing.__module__ == module.__name__
            if here and (hasattr(thing, "to_json") or hasattr(thing, "to_html")) and name not in INTERNAL:
                things.setdefault(name, thing)
    found: dict[str, set[str]] = {}
    seen: set[int] = set()
    for name, thing in things.items():
        if inspect.ismodule(thing) or name in NO_CALLS or id(thing) in seen:
            continue
        seen.add(id(thing))
        if name not in RESULTS:
            found[name] = parameters(thing)
        for method in dir(thing) if inspect.isclass(thing) else ():
            if (method.startswith("_") and method != "__call__") or method in MADE_OF_TORCH:
                continue
            if not own(thing, method) or (name.startswith("pruning.") and method in PROTOCOL):
                continue
            function = inspect.getattr_static(thing, method)
            if isinstance(function, property):
                assert function.fset is None, f"{name}.{method}: a row for what can be set"
            elif callable(getattr(thing, method)):
                taken = parameters(getattr(thing, method)) - {"self"}
                if taken:
                    found[f"{name}.{method}"] = taken
    return found


# Raised, not called; a type's other name; a type to check by.
NO_CALLS = ("FormatError", "schedules.Schedule", "pruning.Criterion", "pruning.Observer")
# Files' own, and a type of several reports.
INTERNAL = ("Entry",)
# Made by functions, for the user to read.
RESULTS = (
    *(f"quant.{name}" for name in ("Distribution", "DistributionReport", "QuantLayer", "QuantReport")),
    *(f"quant.{name}" for name in ("QuantizedWeight", "TensorDistribution")),
    *(f"pruning.{name}" for name in ("BlockReport", "ChannelPlan", "ChannelReport", "GroupPlan")),
    *(
        f"pruning.{name}"
        for name in ("LayerRemovalReport", "LayerReport", "ProgressiveReport", "PruneReport")
    ),
    "pruning.Statistics",
    *(f"training.{name}" for name in ("Round", "Sensitivity", "UntilReport")),
    "BudgetPlan",
    "Compressed",
    "Evaluation",
)
# What pared calls of a criterion, with what is its own. What a user's criterion returns: test_bad_user_code.
PROTOCOL = ("score", "observe", "measure", "compensate", "settle", "reconstruct")
# Called with what the model takes.
MADE_OF_TORCH = ("forward", "train")


def missing(table: dict[str, Call]) -> list[str]:
    found = []
    for name, wanted in public().items():
        if name not in table:
            found.append(name)
        else:
            found += [f"{name}({p})" for p in wanted if p not in table[name].kinds]
    return found


def test_everything_public_is_in_the_table() -> None:
    assert not missing(CALLS)


def test_what_is_missing_is_seen() -> None:
    one = dict(CALLS)
    del one["save"], one["Report.from_json"]
    one["load"] = one["load"]._replace(kinds={"path": PATH})
    assert sorted(missing(one)) == ["Report.from_json", "load(model)", "save"]


def test_a_new_method_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.RigL, "regrow", lambda self, share: None, raising=False)
    monkeypatch.setattr(Evaluation, "to_csv", lambda self, path: None, raising=False)
    monkeypatch.setattr(pruning.SparseGPT.__mro__[1], "invert", lambda self, damping: None, raising=False)
    assert sorted(missing(CALLS)) == [
        "Evaluation.to_csv",
        "pruning.OBC.invert",
        "pruning.SparseGPT.invert",
        "training.RigL.regrow",
    ]
    rate = property(lambda self: 1, lambda self, value: None)
    monkeypatch.setattr(pared.Pruner, "rate", rate, raising=False)
    with pytest.raises(AssertionError, match=r"Pruner\.rate: a row for what can be set"):
        missing(CALLS)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what calls write goes there


@pytest.mark.parametrize("name", CALLS)
def test_the_good_call_works(name: str) -> None:
    """So that what refuses the others is the bad value."""
    call = CALLS[name]
    call.function(**call.good)


@pytest.mark.filterwarnings("ignore")  # torch's, on arrays
@pytest.mark.parametrize("name", CALLS)
def test_every_bad_value_is_refused_by_name(name: str) -> None:
    faults = [f"{what}: {said}" for what, said in refusals(CALLS[name]) if said]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_numpy_are_taken(name: str) -> None:
    """Computed sparsities, steps and widths come as numpy's."""
    numbers = {
        id(kind): value
        for kinds, value in (
            ((COUNT, INDENT), np.int64(1)),
            ((STEPS,), np.int64(4)),
            ((BITS,), np.int64(8)),
            ((SHARE, SHARES, ABOVE_0, AT_LEAST_0, NUMBER), np.float32(0.5)),
        )
        for kind in kinds
    }
    call = CALLS[name]
    for parameter, kind in call.kinds.items():
        if id(kind) in numbers and parameter not in TOGETHER:
            given = {**call.good, **call.also.get(parameter, {}), parameter: numbers[id(kind)]}
            call.function(**given)


# Bounded by another argument, or by the model.
TOGETHER = ("end", "n")


def test_a_model_that_is_changed_is_seen() -> None:
    def half(model: nn.Module, ratio: float) -> None:
        model.eval()
        raise ValueError(f"ratio: expected a number, got {ratio!r}")

    found = [said for _, said in refusals(Call(on_a_model(half), {}, {"ratio": NUMBER}))]
    assert found == ["AssertionError: the model was changed"] * len(NUMBER.values)
