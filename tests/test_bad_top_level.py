"""Bad arguments to what `pared` and its modules for models (quant, schedules, training, callbacks) export:
the table of test_bad_arguments for functions that take models. Every bad value is refused by name, and leaves
the model as it was."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _bad_values import (
    ARRAY,
    FLAG,
    INTEGER,
    NOTHING,
    NUMBER,
    OPTIONAL_WORD,
    WORD,
    Call,
    Values,
    parameters,
    refusals,
)
from test_bad_input import X, fingerprint, good, loss_fn, network, with_nan
from torch import nn

import pared
from pared import callbacks, quant, schedules, training
from pared.pruning.targets import collect


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def evaluate(model: nn.Module) -> float:
    return 1.0


THINGS = {"an integer": 3, "a string": "unknown", "an object": object(), "an array": ARRAY}
MODEL = Values(
    {**THINGS, "None": None, "a class": nn.Linear, "a list": [3], "a state": network().state_dict()}
)
INPUTS = Values({**THINGS, "none": [], "of another size": torch.zeros(2, 5), "a dict of numbers": {1: X}})
BATCHES = Values(
    {**THINGS, "none": [], "numbers": [1, 2], "NaN": with_nan(), "of another size": [ARRAY[:, :5]]}
)
CALLABLE = Values({**THINGS, "None": None})
OPTIONAL_CALLABLE = CALLABLE.but("None")
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
BITS = Values({**INTEGER.values, "one": 1, "seventeen": 17, "negative": -8})
DEVICE = Values({"an integer": 3, "an array": ARRAY, "unknown": "nodevice", "an object": object()})
PATH = Values(
    {"an integer": 3, "None": None, "an object": object(), "an array": ARRAY, "a text file": io.StringIO()}
)

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
    "loss_fn": OPTIONAL_CALLABLE,
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


def scan() -> training.Sensitivity:
    return training.Sensitivity(1.0, (0.5, 0.9), {"0.weight": (0.9, 0.5)}, {"0.weight": 96})


def input_range() -> quant.InputRange:
    targets, _ = collect(network(), None, None, 0, 0)
    seen = quant.InputRange(targets[0])
    seen.input(X)
    return seen


def quantized_layer() -> nn.Module:
    layer = nn.Linear(8, 4)
    pared.quantize(layer, [X], bits=8)
    return layer


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
            "loss_fn": OPTIONAL_CALLABLE,
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
            "loss_fn": OPTIONAL_CALLABLE,
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
        {"indent": NOTHING},  # json's
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
        {**NEEDS, "example_inputs": {"cost": "time"}, "precision": {"cost": "time", "example_inputs": X}},
    ),
    "quant.distributions": Call(
        on_a_model(quant.distributions),
        {},
        {
            "model": MODEL,
            "data": BATCHES,
            "bits": BITS,
            "loss_fn": OPTIONAL_CALLABLE,
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
            "loss_fn": OPTIONAL_CALLABLE,
        },
    ),
    "quant.ActivationGrid.round": Call(quant.ActivationGrid(0.1, 0, "int8").round, {"x": X}, {"x": TENSOR}),
    "quant.DistributionReport.to_json": Call(
        quant.DistributionReport(8, ()).to_json, {"indent": 2}, {"indent": NOTHING}
    ),
    "quant.DistributionReport.to_html": Call(
        quant.DistributionReport(8, ()).to_html,
        {"path": "page.html"},
        {
            "path": PATH,
            "title": Values({"an integer": 3, "None": None, "an object": object(), "bytes": b"a"}),
        },
    ),
    "quant.Grid.codes": Call(GRID.codes, {"x": X}, {"x": TENSOR}),
    "quant.Grid.round": Call(GRID.round, {"x": X}, {"x": TENSOR}),
    "quant.QuantReport.from_dict": Call(
        quant.QuantReport.from_dict,
        {"data": quant.QuantReport("rtn", None, ()).to_dict()},
        {"data": Values({**THINGS, "None": None, "nothing": {}, "other keys": {"a": 1}})},
    ),
    "quant.QuantReport.to_json": Call(quant.QuantReport("rtn", None, ()).to_json, {}, {"indent": NOTHING}),
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
    "schedules.Linear": ramp(schedules.Linear),
    "schedules.Exponential": ramp(schedules.Exponential),
    "training.FineTune": Call(
        training.FineTune,
        {"loss": loss_fn, "optimizer": optimizer, "steps": 3},
        {
            "loss": CALLABLE,
            "optimizer": CALLABLE,
            "steps": STEPS,
            "data": Values({"an integer": 3, "an object": object(), "one batch": X}),
            "scheduler": OPTIONAL_CALLABLE,
            "clip": ABOVE_0.but("None"),
            "every": STEPS,
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
        lambda indent: scan().to_json(indent), {"indent": 2}, {"indent": NOTHING}
    ),
    "training.Sensitivity.plot": Call(lambda path: scan().plot(path), {"path": "page.png"}, {"path": PATH}),
    "training.UntilReport.to_json": Call(
        training.UntilReport(1.0, 0.9, 0.5, 1.0, ()).to_json, {"indent": 2}, {"indent": NOTHING}
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
}


def saved() -> io.BytesIO:
    file = io.BytesIO()
    pared.save(accelerated(), file)
    file.seek(0)
    return file


def public() -> dict[str, set[str]]:
    """Every function and class of `pared` and these modules, and their methods that take arguments."""
    things = {name: getattr(pared, name) for name in pared.__all__}
    for module in (quant, schedules, training, callbacks):
        prefix = module.__name__.partition(".")[2]
        things |= {f"{prefix}.{name}": getattr(module, name) for name in module.__all__}
    found = {}
    for name, thing in things.items():
        if inspect.ismodule(thing) or name in NO_CALLS:
            continue
        if name not in RESULTS:
            found[name] = parameters(thing)
        for method in vars(thing) if inspect.isclass(thing) else ():
            function = getattr(thing, method)
            if f"{name}.{method}" in CALLED_BACK or method.startswith("on_"):  # by trainers
                continue
            if not method.startswith("_") and method not in MADE_OF_TORCH and callable(function):
                taken = parameters(function) - {"self"}
                if taken:
                    found[f"{name}.{method}"] = taken
    return found


# Raised, not called; a type's other name; in the table as pared.quantize.
NO_CALLS = ("FormatError", "schedules.Schedule", "quant.quantize")
# Made by functions, for the user to read.
RESULTS = (
    *(f"quant.{name}" for name in quant.__all__ if inspect.isclass(getattr(quant, name))),
    *(f"training.{name}" for name in ("Round", "Sensitivity", "UntilReport")),
)
# By pared alone, with what is its own.
CALLED_BACK = (
    "training.FineTune.run",
    "training.Movement.score",
    *(f"quant.InputRange.{name}" for name in ("reduce", "bars", "squared_error")),
)
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


def test_a_model_that_is_changed_is_seen() -> None:
    def half(model: nn.Module, ratio: float) -> None:
        model.eval()
        raise ValueError(f"ratio: expected a number, got {ratio!r}")

    found = [said for _, said in refusals(Call(on_a_model(half), {}, {"ratio": NUMBER}))]
    assert found == ["AssertionError: the model was changed"] * len(NUMBER.values)
