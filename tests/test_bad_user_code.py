"""What users give to be called or read (criteria, schedules, metrics, losses, training steps, data, example
inputs, models) and that returns, yields or holds what it should not: the argument is named, and the model is
as it was. What their code raises itself comes as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_bad_input import X, fingerprint, good, loss_fn, network, one_thread  # noqa: F401  (a fixture)
from torch import nn

import pared
from pared import callbacks, pruning, quant, schedules, training


def one(model: nn.Module) -> float:
    return 1.0


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def fault(call: Callable[[nn.Module], object], argument: str) -> str:
    """What is wrong with what the call says, empty where it names `argument` and changes nothing."""
    model = network()
    before = fingerprint(model)
    said = "nothing"
    try:
        call(model)
    except (ValueError, TypeError) as e:
        said = str(e)
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    if not re.fullmatch(rf"(?s){argument}(\[[^\]]+\])?: expected .*, got .*", said):
        return said
    return "" if fingerprint(model) == before else f"{said}, and the model was changed"


def check(argument: str, cases: dict[str, Callable[[nn.Module], object]]) -> None:
    assert cases
    said = {name: fault(call, argument) for name, call in cases.items()}
    assert not {name: text for name, text in said.items() if text}


def test_the_checker_sees_silence_other_words_and_changes() -> None:
    def other(model: nn.Module) -> None:
        raise ValueError("evaluate: expected a number, got None")

    def changes(model: nn.Module) -> None:
        model.eval()
        raise ValueError("data: expected batches, got None")

    assert fault(one, "data") == "nothing"
    assert "evaluate" in fault(other, "data")
    assert "changed" in fault(changes, "data")


# ---------------------------------------------------------------- criteria


class Mine:
    """A criterion whose attributes a case replaces."""

    name, needs_data, needs_gradients, scope, key = "mine", False, False, "layer", "identity"

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def score(self, module: nn.Module, statistics: pruning.Statistics) -> torch.Tensor:
        return statistics.weight.abs()


class Seen(pruning.Observer):
    """An observer whose attributes a case replaces."""

    events = frozenset({"input"})

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def result(self) -> int:
        return 1


def by(**attributes: Any) -> Callable[[nn.Module], object]:
    data = good() if attributes.get("needs_data") is True else None
    return lambda model: pared.prune(model, 0.5, importance=Mine(**attributes), data=data)


def test_my_own_criterion_works() -> None:
    for attributes in ({}, {"needs_data": True, "observe": lambda target, pattern: Seen()}):
        by(**attributes)(network())


def test_attributes_of_a_criterion() -> None:
    bad = {
        "name": (3, None),
        "needs_data": ("no", None, 1),
        "needs_gradients": ("no", None),
        "scope": ("model", None, [], np.ones(3)),
        "key": ("size", None, 3),
        "score": (3, None),
        "observe": (3,),
        "measure": ("a",),
        "compensate": (3,),
    }
    cases = {f"{k}={v!r:.9}": by(**{k: v}) for k, values in bad.items() for v in values}
    check("importance", cases)
    # The others look at them too.
    others = {
        "Pruner": lambda m: pared.Pruner(m, schedules.OneShot(0.5), importance=Mine(key="size")),
        "prune_channels": lambda m: pared.prune_channels(m, X, 0.5, importance=Mine(key="size")),
        "search_budget": lambda m: pared.search_budget(m, 0.5, importance=Mine(key="size")),
    }
    check("importance", others)


def test_scores() -> None:
    bad: dict[str, Callable[[torch.Tensor], object]] = {
        "None": lambda w: None,
        "an array": lambda w: w.numpy(),
        "a number": lambda w: 1.0,
        "one for the layer": lambda w: w.sum(),
        "the other way round": lambda w: w.t(),
        "integers": lambda w: w.long(),
        "bools": lambda w: w > 0,
        "complex": lambda w: w.to(torch.complex64),
        "8 bits": lambda w: w.to(torch.float8_e4m3fn),
        "sparse": lambda w: w.to_sparse(),
        "meta": lambda w: w.to("meta"),
        "NaN": lambda w: w * torch.nan,
        "of another tensor": lambda w: {"bias": w},
    }

    def returns(make: Callable[[torch.Tensor], object]) -> Callable[[nn.Module], Any]:
        return lambda layer: make(layer.weight.detach())

    for name, make in bad.items():
        importance = returns(make)
        check(
            "importance",
            {
                f"prune, {name}": lambda m: pared.prune(m, 0.5, importance=importance),  # noqa: B023
                f"channels, {name}": lambda m: pared.prune_channels(m, X, 0.5, importance=importance),  # noqa: B023
                f"progressive, {name}": lambda m: pruning.prune_progressively(
                    m,
                    0.5,
                    data=good(),
                    importance=importance,  # noqa: B023
                ),
            },
        )
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    for value in (None, "a", [1.0], float("nan"), torch.ones(2), True):
        with pytest.raises((TypeError, ValueError), match="importance: expected a number for block '0', got"):
            pared.prune_layers(model, X, 0, importance=lambda name, module, v=value: v)


def test_observers() -> None:
    def watched(**attributes: Any) -> Callable[[nn.Module], object]:
        return by(needs_data=True, observe=lambda target, pattern: Seen(**attributes))

    def instead(observer: object) -> Callable[[nn.Module], object]:
        return by(needs_data=True, observe=lambda target, pattern: observer)

    check(
        "importance",
        {
            "None": instead(None),
            "an object": instead(object()),
            "without a result": instead(pruning.Observer()),
            "unknown events": watched(events=frozenset({"inputs"})),
            "a word": watched(events="input"),
            "no events": watched(events=None),
            "a number of tensors": watched(tensors=lambda: 3),
            "no tensors": watched(tensors=lambda: [1.0]),
        },
    )


def test_measures_and_compensation() -> None:
    measures = {repr(v): by(measure=lambda *a, v=v: v) for v in (None, 3, [1], {}, {"0.weight": X})}
    check("importance", measures)
    bad: dict[str, Callable[[torch.Tensor], object]] = {
        "a number": lambda gone: 3,
        "a list": lambda gone: [1.0],
        "of another shape": lambda gone: torch.ones(2),
        "integers": lambda gone: torch.ones(gone.shape, dtype=torch.int64),
        "NaN": lambda gone: torch.full(gone.shape, torch.nan),
        "meta": lambda gone: torch.ones(gone.shape, device="meta"),
    }
    check("importance", {k: by(compensate=lambda seen, gone, v=v: v(gone)) for k, v in bad.items()})
    by(compensate=lambda seen, gone: None)(network())  # without an observer there is nothing to hand over


def test_labels() -> None:
    bad: tuple[Any, ...] = (None, "a", [0.5] * 4, [-1] * 4, [0], object(), torch.rand(4))
    check(
        "data",
        {
            f"{v!r:.30}": lambda m, v=v: pared.prune(
                m, 0.5, importance=pruning.MutualInformation(labels=lambda batch: v), data=good()
            )
            for v in bad
        },
    )


# ---------------------------------------------------------------- schedules, metrics, training


def test_schedules() -> None:
    values: tuple[Any, ...] = (None, "0.5", float("nan"), -0.1, 1, True, 0.5j, [0.5], np.array([0.5, 0.5]))
    tensors = (torch.ones(2), torch.tensor(True), torch.tensor(0.5, device="meta"), torch.tensor(torch.nan))
    cases: dict[str, Callable[[nn.Module], object]] = {
        f"{v!r:.40}": lambda m, v=v: pared.Pruner(m, lambda step: v).step() for v in (*values, *tensors)
    }
    cases["of no argument"] = lambda m: pared.Pruner(m, lambda: 0.5)  # type: ignore[arg-type, misc]
    cases["of two"] = lambda m: pared.Pruner(m, lambda a, b: 0.5)  # type: ignore[arg-type, misc]
    check("schedule", cases)
    for value in (np.float32(0.5), np.int64(0), torch.tensor(0.5)):
        pared.Pruner(network(), lambda step, v=value: v).step()  # type: ignore[misc]


def later(value: object) -> Callable[[nn.Module], Any]:
    """A metric that is good for the first call."""
    calls: list[int] = []

    def evaluate(model: nn.Module) -> object:
        calls.append(1)
        return 1.0 if len(calls) == 1 else value

    return evaluate


METRICS: dict[str, Callable[[nn.Module, Callable[[nn.Module], float]], object]] = {
    "prune_until": lambda m, e: training.prune_until(m, e, rounds=2),
    "sensitivity": lambda m, e: training.sensitivity(m, e, ratios=[0.5]),
    "search_budget": lambda m, e: pared.search_budget(m, 0.5, evaluate=e, levels=[0, 0.5, 0.9]),
    "search_channels": lambda m, e: pruning.search_channels(m, X, 0.9, evaluate=e),
    "compress": lambda m, e: pared.compress(m, good(), e, sparsities=[0.5], importance="magnitude"),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name: str) -> None:
    call = METRICS[name]
    values: tuple[Any, ...] = (None, "0.5", (1.0, 2), {"accuracy": 1}, 1j, True, float("nan"), torch.ones(2))
    values = (*values, torch.ones((), device="meta"))
    check("evaluate", {f"{v!r:.40}": lambda m, v=v: call(m, lambda model: v) for v in values})
    check("evaluate", {f"later {v!r}": lambda m, v=v: call(m, later(v)) for v in (None, float("nan"))})


def compressed(tune: Any) -> Callable[[nn.Module], object]:
    return lambda m: pared.compress(
        m, good(), one, sparsities=[0.5], importance="magnitude", fine_tune=tune, progress=False
    )


def test_training_steps() -> None:
    tune = training.FineTune
    losses: dict[str, Callable[[nn.Module, Any], Any]] = {
        "None": lambda m, b: None,
        "a number": lambda m, b: 1.0,
        "no scalar": lambda m, b: m(b[0]),
        "detached": lambda m, b: loss_fn(m, b).detach(),
        "a tuple": lambda m, b: (loss_fn(m, b), 1),
        "meta": lambda m, b: torch.ones((), device="meta"),
    }
    check("loss", {k: compressed(tune(v, sgd, 2)) for k, v in losses.items()})
    check("data", {"NaN": compressed(tune(lambda m, b: loss_fn(m, b) * torch.nan, sgd, 2))})
    made = {"None": lambda p: None, "a list": lambda p: [sgd(p)], "a class": lambda p: torch.optim.SGD}
    check("optimizer", {k: compressed(tune(loss_fn, v, 2)) for k, v in made.items()})
    plans = {"None": None, "an object": object(), "a class": torch.optim.lr_scheduler.StepLR}
    check(
        "scheduler",
        {k: compressed(tune(loss_fn, sgd, 2, scheduler=lambda o, v=v: v)) for k, v in plans.items()},
    )
    check(
        "data",
        {
            "none": compressed(tune(loss_fn, sgd, 2, data=[])),
            "used up": compressed(tune(loss_fn, sgd, 5, data=iter(good()))),
        },
    )


def test_errors_of_the_users_own_come_as_they_are() -> None:
    def fails(*arguments: object) -> Any:
        raise OSError("the user's own")

    class Failing:
        def __iter__(self) -> Iterator[Any]:
            yield good()[0]
            raise OSError("the user's own")

    calls: list[Callable[[nn.Module], object]] = [
        by(score=fails),
        by(needs_data=True, observe=fails),
        by(measure=fails),
        by(compensate=fails),
        lambda m: pared.Pruner(m, lambda step: fails()).step(),
        lambda m: pared.prune(m, 0.5, importance="wanda", data=Failing()),
        lambda m: pared.prune(m, 0.5, importance="wanda", data=good(), loss_fn=lambda model, batch: fails()),
        compressed(training.FineTune(lambda model, batch: fails(), sgd, 2)),
        compressed(lambda model, pruner: fails()),
        *(lambda m, call=call: call(m, lambda model: fails()) for call in METRICS.values()),
    ]
    for call in calls:
        model = network()
        before = fingerprint(model)
        with pytest.raises(OSError, match="the user's own"):
            call(model)
        assert fingerprint(model) == before


# ---------------------------------------------------------------- data

DATA: dict[str, Any] = {
    "None": [None],
    "numbers": [1, 2],
    "words": ["ab"],
    "empty tuples": [()],
    "empty dicts": [{}],
    "arrays": [np.ones((4, 8), np.float32)],
    "tuples of arrays": [(np.ones((4, 8), np.float32), np.arange(4))],
    "scalars": [torch.tensor(1.0)],
    "no samples": [(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))],
    "other keys": [{"other": torch.ones(4, 8)}],
    "numbers as keys": [{1: torch.ones(4, 8)}],
    "integers": [(torch.ones(4, 8, dtype=torch.int64), torch.arange(4))],
    "meta": [(torch.ones(4, 8, device="meta"), torch.arange(4))],
    "of another size": [(torch.ones(4, 5), torch.arange(4))],
    "lists of lists": [[[torch.ones(4, 8)]]],
    "sets": [{1}],
    "objects": [object()],
    "a word": "abc",
    "samples": torch.utils.data.TensorDataset(torch.ones(4, 8), torch.arange(4)),
    "a class": list,
    "a function": lambda: iter(good()),
    "an array": np.ones((4, 4, 8), np.float32),
}

READERS: dict[str, Callable[[nn.Module, Any], object]] = {
    "wanda": lambda m, d: pared.prune(m, 0.5, importance="wanda", data=d),
    "activation": lambda m, d: pared.prune(m, 0.5, importance="activation", data=d),
    "mutual_information": lambda m, d: pared.prune(m, 0.5, importance="mutual_information", data=d),
    "change_rate": lambda m, d: pared.prune(m, 0.5, importance="change_rate", data=d),
    "sparsegpt": lambda m, d: pared.prune(m, 0.5, importance="sparsegpt", data=d),
    "Pruner": lambda m, d: pared.Pruner(m, schedules.OneShot(0.5), importance="wanda", data=d).step(),
    "prune_channels": lambda m, d: pared.prune_channels(m, X, 0.5, importance="wanda", data=d),
    "prune_progressively": lambda m, d: pruning.prune_progressively(m, 0.5, data=d),
    "quantize": lambda m, d: pared.quantize(m, d, bits=8),
    "distributions": lambda m, d: quant.distributions(m, d),
    "search_budget": lambda m, d: pared.search_budget(m, 0.5, data=d, levels=[0, 0.5, 0.9]),
    "compress": lambda m, d: pared.compress(m, d, one, sparsities=[0.5]),
    "evaluate": lambda m, d: pared.evaluate(m, d, seconds=0.0, example_inputs=X),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_data(name: str) -> None:
    check("data", {what: lambda m, d=d: READERS[name](m, d) for what, d in DATA.items()})
    READERS[name](network(), good())


def test_an_empty_batch_among_others_counts_nothing() -> None:
    models = network(), network()
    empty = (torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    for model, data in zip(models, (good(), [*good(), empty]), strict=True):
        pared.prune(model, 0.5, importance="activation", data=data)
    assert fingerprint(models[0])[0] == fingerprint(models[1])[0]


def test_evaluation() -> None:
    def score(value: Callable[[torch.Tensor], object]) -> Callable[[nn.Module], object]:
        return lambda m: pared.evaluate(
            m, good(), seconds=0.0, score=lambda model, batch: value(model(batch[0])[:, 0])
        )

    scores: dict[str, Callable[[torch.Tensor], object]] = {
        "None": lambda y: None,
        "a number": lambda y: 1.0,
        "a list": lambda y: y.tolist(),
        "two axes": lambda y: y[:, None],
        "NaN": lambda y: y * torch.nan,
        "complex": lambda y: y.to(torch.complex64),
        "meta": lambda y: y.to("meta"),
    }
    check("score", {k: score(v) for k, v in scores.items()})
    sizes = iter(range(1, 100))
    check(
        "score",
        {
            "another number for each model": lambda m: pared.evaluate(
                {"a": m, "b": network()},
                good(),
                seconds=0.0,
                distortions={},
                score=lambda model, batch: torch.ones(next(sizes)),
            )
        },
    )
    changes: dict[str, Callable[[torch.Tensor], Any]] = {
        "None": lambda x: None,
        "a list": lambda x: x.tolist(),
    }
    check(
        "distortions",
        {
            k: lambda m, v=v: pared.evaluate(m, good(), seconds=0.0, distortions={"d": v})
            for k, v in changes.items()
        },
    )
    labels: dict[str, Any] = {"a list": [0, 1, 2, 3], "None": None, "floats": torch.rand(4)}
    data = {k: [(X, v)] for k, v in labels.items()} | {"no key": [{"input": X}]}
    check("data", {k: lambda m, d=d: pared.evaluate(m, d, seconds=0.0) for k, d in data.items()})


def test_logits_that_are_nan_are_wrong() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return torch.cat([y[:1], y[1:] * torch.nan])

    labels = Broken().layer(X).argmax(1) * 0
    found = pared.evaluate(Broken(), [(X, labels)], seconds=0.0, distortions={})
    assert found.models[0].metrics["top-1"].value <= 1 / len(X)


# ---------------------------------------------------------------- example inputs

EXAMPLES: dict[str, Any] = {
    "of another size": torch.zeros(2, 5),
    "integers": torch.zeros(2, 8, dtype=torch.int64),
    "float64": X.double(),
    "complex": X.to(torch.complex64),
    "meta": torch.zeros(2, 8, device="meta"),
    "NaN": X * torch.nan,
    "a scalar": torch.tensor(1.0),
    "an unknown keyword": {"other": X},
    "too many": (X, X),
    "none": (),
    "no keywords": {},
    "an array": np.zeros((2, 8), np.float32),
    "an array in a tuple": (np.zeros((2, 8), np.float32),),
    "a list of arrays": [np.zeros((2, 8))],
    "a list of lists": [[X]],
    "a word": "a",
}

RUNNERS: dict[str, Callable[[nn.Module, Any], object]] = {
    "accelerate": lambda m, x: pared.accelerate(m, x, progress=False, min_speedup=0),
    "levels": lambda m, x: pared.levels(m, x, [0.5], progress=False),
    "prune_channels": lambda m, x: pared.prune_channels(m, x, 0.5),
    "prune_layers": lambda m, x: pared.prune_layers(m, x, 0),
    "prune": lambda m, x: pared.prune(m, 0.5, pattern="auto", example_inputs=x),
    "search_channels": lambda m, x: pruning.search_channels(m, x, 0.9),
    "search_budget": lambda m, x: pared.search_budget(m, 0.5, cost="macs", example_inputs=x),
    "compress": lambda m, x: pared.compress(
        m, good(), one, sparsities=[0.5], importance="magnitude", example_inputs=x, progress=False
    ),
    "evaluate": lambda m, x: pared.evaluate(m, good(), seconds=0.0, example_inputs=x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNNERS)
def test_example_inputs(name: str) -> None:
    check("example_inputs", {what: lambda m, x=x: RUNNERS[name](m, x) for what, x in EXAMPLES.items()})
    if name in ("prune_channels", "prune_layers", "search_channels", "search_budget"):
        with pytest.raises(ValueError, match=r"(example_inputs|cost): expected .*, got"):
            RUNNERS[name](network(), torch.zeros(0, 8))


def test_a_model_that_fails_leaves_no_hooks_in_evaluate() -> None:
    class Second(nn.Module):
        """Fails once its layer has been looked at."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(8, 4), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.layer._forward_pre_hooks:
                raise RuntimeError("looked at")
            return self.layer(x)

    model = Second()
    with pytest.raises(RuntimeError, match="looked at"):
        pared.evaluate(model, good(), seconds=0.0, distortions={})
    assert not model.layer._forward_pre_hooks


# ---------------------------------------------------------------- models


def replaced(weight: torch.Tensor | None) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    if weight is None:
        del model[0].weight
    else:
        model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def freed() -> nn.Module:
    model = replaced(torch.ones(12, 8))
    model[0].weight.untyped_storage().resize_(0)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "meta": lambda: replaced(torch.ones(12, 8, device="meta")),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(12), nn.ReLU(), nn.Linear(12, 4)),
    "complex": lambda: replaced(torch.ones(12, 8, dtype=torch.complex64)),
    "8 bits": lambda: replaced(torch.ones(12, 8).to(torch.float8_e4m3fn)),
    "integers": lambda: replaced(torch.ones(12, 8, dtype=torch.int8)),
    "sparse": lambda: replaced(torch.ones(12, 8).to_sparse()),
    "freed": freed,
    "gone": lambda: replaced(None),
}
TAKERS: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda m: pared.prune(m, 0.5),
    "Pruner": lambda m: pared.Pruner(m, schedules.OneShot(0.5)),
    "levels": lambda m: pared.levels(m, X),
    "search_budget": lambda m: pared.search_budget(m, 0.5),
    "compress": lambda m: pared.compress(m, good(), one),
    "quantize": lambda m: pared.quantize(m, good(), bits=8),
    "distributions": lambda m: quant.distributions(m, good()),
    "equalize": quant.equalize,
    "prepare_qat": quant.prepare_qat,
    "prune_progressively": lambda m: pruning.prune_progressively(m, 0.5, data=good()),
    "threshold": lambda m: pruning.threshold(m, 0.5),
    "Movement": training.Movement,
    "RigL": lambda m: training.RigL(m, 0.5),
    "Proximal": lambda m: training.Proximal(m, sgd([nn.Parameter(X)]), 0.1),
    "prune_until": lambda m: training.prune_until(m, one),
    "sensitivity": lambda m: training.sensitivity(m, one),
}


@pytest.mark.parametrize("what", MODELS)
def test_weights_that_cannot_be_pruned(what: str) -> None:
    said = {}
    for name, call in TAKERS.items():
        try:
            call(MODELS[what]())
            said[name] = "nothing"
        except (ValueError, TypeError) as e:
            if not re.match(r"(?s)model: expected .*('0\.weight'|copy\.deepcopy)", str(e)):
                said[name] = str(e)
    assert not said
    if what in ("meta", "lazy"):
        for call in (RUNNERS[n] for n in ("prune_channels", "prune_layers", "search_channels")):
            with pytest.raises(ValueError, match=r"model: expected weights with values, got '0\.weight'"):
                call(MODELS[what](), X)


# ---------------------------------------------------------------- states


def state() -> dict[str, Any]:
    pruner = pared.Pruner(network(), schedules.OneShot(0.5))
    pruner.step()
    return pruner.state_dict()


def mask(**entries: Any) -> dict[str, Any]:
    found = state()
    return {"masks": {**found["masks"], "0.weight": {**found["masks"]["0.weight"], **entries}}}


STATES: dict[str, dict[str, Any]] = {
    "step_count": {"step_count": -3},
    "a word as step_count": {"step_count": "a"},
    "half a step": {"step_count": 1.5},
    "updated_at": {"updated_at": -1},
    "a word as updated_at": {"updated_at": "a"},
    "chosen_for": {"chosen_for": float("nan")},
    "all": {"chosen_for": 1.0},
    "finalized": {"finalized": "no"},
    "version": {"version": 9},
    "pattern": {"pattern": "4x1"},
    "before": {"before": None},
    "other layers": {"before": {"9.weight": 3}},
    "words before": {"before": {"0.weight": "a", "4.weight": 3}},
    "masks": {"masks": [1]},
    "masks of others": {"masks": {"9.weight": {}}},
    "no mask": {"masks": {"0.weight": None}},
    "a number": {"masks": {"0.weight": 3}},
    "no bits": {"masks": {"0.weight": {"shape": [12, 8]}}},
    "a word as bits": mask(dropped="a"),
    "floats as bits": mask(dropped=torch.zeros(12)),
    "too few bits": mask(dropped=torch.zeros(3, dtype=torch.uint8)),
    "bits in two axes": mask(dropped=torch.zeros(3, 4, dtype=torch.uint8)),
    "bits on meta": mask(dropped=torch.zeros(12, dtype=torch.uint8, device="meta")),
    "shape": mask(shape=[8, 12]),
    "no shape": mask(shape=None),
}


@pytest.mark.parametrize("what", STATES)
def test_corrupt_states_of_a_pruner(what: str) -> None:
    model = network()
    pruner = pared.Pruner(model, schedules.OneShot(0.5))
    before = fingerprint(model), repr(pruner.state_dict())
    with pytest.raises((ValueError, TypeError), match=r"^state(\['\w+'\])?: expected .*, got "):
        pruner.load_state_dict({**state(), **STATES[what]})
    assert (fingerprint(model), repr(pruner.state_dict())) == before
    pruner.load_state_dict(state())
    assert pruner.step_count == 1


def test_calls_out_of_turn() -> None:
    pruner = pared.Pruner(network(), schedules.OneShot(0.5))
    pruner.step()
    report = pruner.finalize()
    assert pruner.finalize() is report
    with pytest.raises(RuntimeError, match="step: expected a pruner that is not finalized"):
        pruner.step()

    unseen = quant.InputRange(pruner._plan.targets[0])
    for call in (
        lambda: unseen.range("minmax"),
        lambda: unseen.grid("mse"),
        lambda: unseen.bars(8, True),
        lambda: unseen.squared_error(0.0, 1.0, 8),
        unseen.distribution,
        unseen.result,
    ):
        with pytest.raises(ValueError, match="data: expected batches that reach layer '0', got none"):
            call()

    moved = pruning.Statistics("0", "weight", torch.zeros(12, 8))
    with pytest.raises(ValueError, match=r"importance: expected update\(\) .*, got no gradient"):
        training.Movement(network()).score(nn.Identity(), moved)
    still = nn.Sequential(nn.Linear(8, 4))
    rigl = training.RigL(still, 0.5, update_every=1)
    with pytest.raises(ValueError, match=r"step: expected gradients of '0\.weight', got none"):
        rigl.step()


@pytest.mark.parametrize("content", [b"", b"not a file of torch"])
def test_a_damaged_checkpoint_of_a_callback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pared_pruner.pt").write_bytes(content)
    model = network()
    pruner = callbacks.TrainerPruner(schedules.OneShot(0.5), resume=tmp_path)
    with pytest.raises(ValueError, match="resume: expected the file of an earlier training, got a damaged"):
        pruner.on_train_begin(
            transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
            transformers.TrainerState(),
            transformers.TrainerControl(),
            model=model,
            optimizer=sgd(list(model.parameters())),
        )
    assert pruner.pruner is None


def test_plots_go_to_files_of_known_kinds(tmp_path: Path) -> None:
    scan = training.Sensitivity(1.0, (0.5,), {"0.weight": (0.9,)}, {"0.weight": 96})
    with pytest.raises(ValueError, match=r"path: expected .*'png'.*, got 'xyz'"):
        scan.plot(tmp_path / "page.xyz")
    with pytest.raises(FileNotFoundError, match="expected a folder that exists"):
        scan.plot(tmp_path / "missing" / "page.png")
    assert not list(tmp_path.iterdir())
    scan.plot(tmp_path / "page")
    assert (tmp_path / "page").read_bytes().startswith(b"\x89PNG")
