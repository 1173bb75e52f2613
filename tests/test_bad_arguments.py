"""Bad arguments to everything in pared.ops and pared.nn: a table of good calls, in which each parameter has a
kind; every bad value of that kind has to be refused in the words ``argument: expected ..., got ...``."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from _bad_values import (
    FLAG,
    INTEGER,
    NOTHING,
    NUMBER,
    OBJECT,
    OPTIONAL_OBJECT,
    OPTIONAL_WORD,
    PAIR,
    WORD,
    Call,
    Kind,
    Values,
    parameters,
    refusals,
)
from torch import nn

import pared.nn
from pared import ops
from pared.nn.residual import Call as Step

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((8, 12)) * (RNG.random((8, 12)) < 0.5)).astype(np.float32)
FILTERS = RNG.standard_normal((8, 4, 3, 3)).astype(np.float32)
X = RNG.standard_normal((3, 12)).astype(np.float32)
IMAGES = RNG.standard_normal((2, 4, 7, 7)).astype(np.float32)
BIAS = np.zeros(8, np.float32)
HEADS = RNG.standard_normal((1, 2, 5, 4)).astype(np.float32)
Q = RNG.integers(-7, 8, (8, 12)).astype(np.int8)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as quantized and fake tensors are."""

    @staticmethod
    def __new__(cls, like: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, *args: Any) -> Any:
        raise AssertionError(f"{function} ran on a tensor without memory")


class Array(NamedTuple):
    """A parameter that takes arrays like `good`; `optional`: or None; `casts`: float dtypes are converted."""

    good: Any
    optional: bool = False
    casts: bool = False
    torch_only: bool = False

    def bad(self) -> dict[str, Any]:
        good = self.good
        tensor = torch.from_numpy(good.copy())
        freed = tensor.clone()
        freed.untyped_storage().resize_(0)
        found: dict[str, Any] = {
            "a string": "abc",
            "a set": {1},
            "objects": good.astype(object),
            "a mask": np.ma.masked_array(good, mask=np.zeros(good.shape, bool)),
            "fields": np.zeros(good.shape, dtype=[("a", "f4")]),
            "complex": good.astype(np.complex64),
            "dates": np.zeros(good.shape, "M8[s]"),
            "words": np.zeros(good.shape, "U3"),
            "uint32": good.astype(np.uint32),
            "meta": tensor.to("meta"),
            "sparse": tensor.to_sparse(),
            "complex tensor": tensor.to(torch.complex64),
        }
        if not self.casts:  # torch's own conversions crash on it
            found["freed"] = freed
        if not self.optional:
            found["None"] = None
        if good.dtype.itemsize > 1 and not self.casts:
            found["big-endian"] = good.astype(good.dtype.newbyteorder(">"))
            found["longdouble"] = good.astype(np.longdouble)
        if good.dtype == np.float32:
            found["quantized"] = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
            if not self.casts:
                found["float8"] = tensor.to(torch.float8_e4m3fn)
                found["float64"] = good.astype(np.float64)
        if good.dtype != np.float32:
            found["float32"] = good.astype(np.float32)
        if self.torch_only:
            found |= {"numpy": good, "a number": 3, "a list": good.tolist()}
        return found


ENTRIES = Values(
    {"an integer": 3, "a string": "a", "an array": X, "too few": [None], "objects": [object(), object()]}
)
DEVICE = Values(
    {"an integer": 3, "None": None, "an array": X, "unknown": "nodevice", "an object": object()}
    | ({} if torch.cuda.is_available() else {"absent": "cuda"})
)


SELECT = {
    "scores": Array(W),
    "k": INTEGER,
    "key": WORD,
    "other": Array(W, optional=True),
    "col_scale": Array(W[0], optional=True),
    "nan": WORD,
}
MASKED = {**SELECT, "out": Array(np.zeros(W.shape, bool), optional=True)}
BLOCKED = {"x" if k == "scores" else k: v for k, v in MASKED.items()}
FACTORS = {name: {"key": "abs_mul"} for name in ("other", "col_scale")}
ACTIVATIONS = {
    "activation_scale": NUMBER,
    "activation_zero": INTEGER,
    "activation_dtype": WORD,
}
SQUARE = [ops.CSR.from_dense(np.ascontiguousarray(W.T)), ops.CSR.from_dense(W)]
LINEAR, CONV, ROWS = (ops.CSR.from_dense(torch.from_numpy(w)) for w in (W, FILTERS, FILTERS[:, :, :1].copy()))
STEP = Values({k: v for k, v in INTEGER.values.items() if k != "a list"})  # nn.Conv1d keeps a sequence of one

BLOCK = nn.Sequential(pared.nn.Conv2d(CONV, padding=1), nn.ReLU())

CALLS: dict[str, Call] = {
    "ops.select_threshold": Call(ops.select_threshold, {"scores": W, "k": 5}, SELECT, FACTORS),
    "ops.topk_mask": Call(
        ops.topk_mask,
        {"scores": W, "k": 5},
        {**MASKED, "dim": Values({"0": 0, "2": 2, "True": True, "an array": X, "a string": "1"})},
        FACTORS,
    ),
    "ops.topk": Call(
        ops.topk,
        {"x": X[0], "k": 3},
        {"x": Array(X[0]), "k": INTEGER, "key": WORD, "other": Array(X[0], optional=True), "nan": WORD},
        FACTORS,
    ),
    "ops.block_mask": Call(ops.block_mask, {"x": W, "k": 3}, {**BLOCKED, "block": PAIR}, FACTORS),
    "ops.nm_mask": Call(
        ops.nm_mask,
        {"x": W, "n": 2, "m": 4},
        {**{k: v for k, v in BLOCKED.items() if k != "k"}, "n": INTEGER, "m": INTEGER},
        FACTORS,
    ),
    "ops.linear": Call(
        ops.linear,
        {"x": X, "w": SQUARE[1]},
        {"x": Array(X), "w": OBJECT, "bias": Array(BIAS, optional=True), "activation": OPTIONAL_WORD},
    ),
    "ops.conv2d": Call(
        ops.conv2d,
        {"x": IMAGES, "w": CONV},
        {
            "x": Array(IMAGES),
            "w": OBJECT,
            "bias": Array(BIAS, optional=True),
            "stride": PAIR,
            "padding": PAIR,
            "dilation": PAIR,
            "groups": INTEGER,
            "activation": OPTIONAL_WORD,
            "residual": Array(np.zeros((2, 8, 5, 5), np.float32), optional=True),
        },
    ),
    "ops.max_pool2d": Call(
        ops.max_pool2d,
        {"x": IMAGES, "kernel_size": 3},
        {
            "x": Array(IMAGES),
            "kernel_size": PAIR,
            "stride": PAIR.but("None"),
            "padding": PAIR,
            "dilation": PAIR,
            "ceil_mode": FLAG,
        },
    ),
    "ops.linear_chain": Call(
        ops.linear_chain,
        {"x": X[:, :8].copy(), "weights": SQUARE},
        {
            "x": Array(X[:, :8].copy()),
            "weights": Values({**ENTRIES.values, "None": None, "one": SQUARE[:1]}),
            "biases": ENTRIES,
            "activations": Values({**ENTRIES.values, "unknown": ["unknown", None]}),
        },
    ),
    "ops.gemm_s8": Call(ops.gemm_s8, {"a": Q, "b": Q}, {"a": Array(Q), "b": Array(Q)}),
    "ops.attention": Call(
        ops.attention,
        {"q": HEADS, "k": HEADS, "v": HEADS},
        {
            "q": Array(HEADS),
            "k": Array(HEADS),
            "v": Array(HEADS),
            "mask": Array(np.zeros((5, 5), np.float32), optional=True),
            "scale": NUMBER,
            "is_causal": FLAG,
        },
    ),
    "ops.layer_norm": Call(
        ops.layer_norm,
        {"x": X},
        {
            "x": Array(X),
            "weight": Array(X[0], optional=True),
            "bias": Array(X[0], optional=True),
            "eps": NUMBER,
            "residual": Array(X, optional=True),
        },
    ),
    "nn.Linear": Call(
        pared.nn.Linear,
        {"weight": LINEAR},
        {
            "weight": OBJECT,
            "bias": Array(BIAS, optional=True, casts=True, torch_only=True),
            "activation": OPTIONAL_WORD,
        },
    ),
    "nn.Conv2d": Call(
        pared.nn.Conv2d,
        {"weight": CONV},
        {
            "weight": OBJECT,
            "bias": Array(BIAS, optional=True, casts=True, torch_only=True),
            "stride": PAIR,
            "padding": PAIR,
            "dilation": PAIR,
            "padding_mode": WORD,
            "activation": OPTIONAL_WORD,
        },
    ),
    "nn.Conv1d": Call(
        pared.nn.Conv1d,
        {"weight": ROWS},
        {
            "weight": OBJECT,
            "bias": Array(BIAS, optional=True, casts=True, torch_only=True),
            "stride": STEP,
            "padding": STEP,
            "dilation": STEP,
            "padding_mode": WORD,
            "activation": OPTIONAL_WORD,
        },
    ),
    "nn.Conv1d.forward": Call(
        lambda input: pared.nn.Conv1d(ROWS)(input),
        {"input": torch.from_numpy(IMAGES[:, :, 0].copy())},
        {"input": Array(IMAGES[:, :, 0].copy(), torch_only=True)},
    ),
    "nn.Linear.forward": Call(
        lambda input: pared.nn.Linear(LINEAR)(input),
        {"input": torch.from_numpy(X)},
        {"input": Array(X, torch_only=True)},
    ),
    "nn.Conv2d.forward": Call(
        lambda input: pared.nn.Conv2d(CONV)(input),
        {"input": torch.from_numpy(IMAGES)},
        {"input": Array(IMAGES, torch_only=True)},
    ),
    "nn.MaxPool2d.from_module": Call(
        pared.nn.MaxPool2d.from_module, {"module": nn.MaxPool2d(2)}, {"module": OBJECT}
    ),
    "nn.MaxPool2d.forward": Call(
        lambda input: pared.nn.MaxPool2d.from_module(nn.MaxPool2d(2))(input),
        {"input": torch.from_numpy(IMAGES)},
        {"input": NOTHING},  # what the kernel does not take goes to torch, whose words they are
    ),
    "nn.Fused": Call(pared.nn.Fused, {"original": nn.ReLU()}, {"original": OBJECT}),
    "nn.FoldedBatchNorm2d.from_module": Call(
        pared.nn.FoldedBatchNorm2d.from_module,
        {"module": nn.BatchNorm2d(8), "layer": pared.nn.Conv2d(CONV)},
        {"module": Values({**OBJECT.values, "another": nn.ReLU()}), "layer": OBJECT},
    ),
    "nn.FoldedBatchNorm2d.forward": Call(
        pared.nn.FoldedBatchNorm2d.from_module(nn.BatchNorm2d(8), nn.ReLU()),
        {"input": torch.from_numpy(IMAGES)},
        {"input": NOTHING},  # an identity
    ),
    "nn.Rule": Call(
        pared.nn.Rule,
        {"module": pared.nn.Linear, "formats": ("csr",)},
        {
            "module": Values({**OBJECT.values, "of torch": nn.Linear, "no class": nn.ReLU()}),
            "formats": Values(
                {
                    **OBJECT.values,
                    "a word": "csr",
                    "a list": ["csr"],
                    "unknown": ("csr", "unknown"),
                    "mixed": (1,),
                }
            ),
        },
    ),
    "nn.ResidualBlock.from_module": Call(
        pared.nn.ResidualBlock.from_module,
        {"module": BLOCK, "steps": [Step(("0",), 0, 0, "relu"), Step(None, 1, 0)], "watched": [("0",)]},
        {
            "module": OBJECT,
            "steps": Values(
                {
                    **OBJECT.values,
                    "none": [],
                    "objects": [object()],
                    "a value to come": [Step(("0",), 1)],
                    "a negative value": [Step(("0",), -1)],
                    "a bool": [Step(("0",), False)],
                    "a residual to come": [Step(("0",), 0, 1)],
                    "a float": [Step(("0",), 0, 0.5)],  # type: ignore[arg-type]
                    "a path to nothing": [Step(("0", "1"), 0)],
                    "a path of numbers": [Step((0,), 0)],  # type: ignore[arg-type]
                    "a word as path": [Step("0", 0)],  # type: ignore[arg-type]
                    "an unknown activation": [Step(None, 0, None, "unknown")],
                    "an activation of lists": [Step(None, 0, None, [])],  # type: ignore[arg-type]
                    "a residual of another module": [Step(("1",), 0, 0)],
                    "an activation of another module": [Step(("1",), 0, None, "relu")],
                }
            ),
            "watched": Values(
                {
                    **OBJECT.values,
                    "a path to nothing": [("2",)],
                    "words": ["0"],
                    "an attribute": [("0", "bias")],
                }
            ),
        },
    ),
    "nn.Linear.hand_to": Call(
        lambda followers, between=(): pared.nn.Linear(LINEAR).hand_to(followers, between=between),
        {"followers": pared.nn.Linear(ops.CSR.from_dense(torch.from_numpy(W.T.copy())))},
        {
            "followers": OBJECT,
            "between": Values({"a module": nn.ReLU(), "words": ["0"], "None": None, "3": 3}),
        },
    ),
    "nn.Linear.share_with": Call(
        lambda others: pared.nn.Linear(ops.BSRInt8.from_dense(torch.from_numpy(W))).share_with(others),
        {"others": pared.nn.Linear(ops.BSRInt8.from_dense(torch.from_numpy(W)))},
        {"others": OBJECT},
    ),
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.ao's are deprecated
    QUANTIZED = {
        "Linear": torch.ao.nn.quantized.Linear(12, 8),
        "Conv1d": torch.ao.nn.quantized.Conv1d(4, 8, 3),
        "Conv2d": torch.ao.nn.quantized.Conv2d(4, 8, 3),
    }
FLOAT = {"Linear": nn.Linear(12, 8), "Conv1d": nn.Conv1d(4, 8, 3), "Conv2d": nn.Conv2d(4, 8, 3)}
for _name, _module in FLOAT.items():
    _class = getattr(pared.nn, _name)
    CALLS[f"nn.{_name}.from_module"] = Call(
        _class.from_module,
        {"module": _module},
        {
            "module": OBJECT,
            "format": WORD,
            "activation": OPTIONAL_WORD,
            "weight": OPTIONAL_OBJECT,
            "norm": OPTIONAL_OBJECT,
        },
    )
    CALLS[f"nn.{_name}.from_quantized"] = Call(
        _class.from_quantized, {"module": QUANTIZED[_name]}, {"module": OBJECT, **ACTIVATIONS}
    )


def _formats() -> dict[str, Call]:
    """The methods of every packed weight, by their parameters' names."""
    scales = {"scales": np.ones(8, np.float32)}
    kinds: dict[str, Kind] = {
        "weight": Array(W),
        "packed": Array(np.zeros(4096, np.uint8)),
        "q": Array(Q),
        "scales": Array(scales["scales"], casts=True),
        "groups": INTEGER,
        "group": INTEGER,
        "dtype": WORD,
        "block": Values({**PAIR.values, "a number": 4}),
        "tokens": INTEGER,
        "threads": INTEGER.but("None"),
        "device": DEVICE,
        "matrix": OBJECT,
        "tensor": OBJECT,
        "source": OBJECT,
        "mask": OPTIONAL_OBJECT,
        **ACTIVATIONS,
    }
    found = {}
    for name in ops.__all__:
        cls = getattr(ops, name)
        if not (inspect.isclass(cls) and issubclass(cls, ops.PackedWeight)) or cls is ops.PackedWeight:
            continue
        # Of 16 bits: those that go to a device go there.
        half = cls.from_dense(torch.from_numpy(W).half())
        good = {
            "from_dense": {"weight": W},
            "from_quantized": {"q": Q, **scales},
            "from_device": {"weight": W},
            "from_scipy": {},
            "from_torch": {"source": QUANTIZED["Linear"]}
            if issubclass(cls, ops.Int8 | ops.Bitmap8 | ops.BSRInt8)
            else {},
            "estimate": {"tokens": 3},
            "to": {"device": "cuda"},
            "to_scipy": {},
            "to_torch": {"block": (4, 4)},
        }
        if name == "Int4":
            good["from_quantized"] = {"q": Q, "scales": np.ones((8, 1), np.float32), "group": 32}
        methods = {m: getattr(half, m) for m in good if m in dir(cls)} | {"": cls}
        for method, function in methods.items():
            own = {}
            for parameter in inspect.signature(function).parameters:
                kind = kinds[parameter]
                if (method, parameter) in (("from_torch", "groups"), ("from_device", "mask")):
                    kind = INTEGER.but("None") if parameter == "groups" else NOTHING
                if method == "to" and parameter in ("dtype", "block"):
                    # Refused before the device is looked at.
                    kind = OPTIONAL_OBJECT if name not in ("Int8", "BSRInt8") else NOTHING
                    kind = NOTHING if parameter == "block" else kind
                if method == "to" and name in ("Dense", "BitmapCSR", "Int4"):
                    kind = OBJECT if parameter == "device" else NOTHING
                if parameter == "block" and (name == "BSRInt8" or method == "to_scipy"):
                    kind = Values(kinds["block"].values).but("None")
                if parameter == "scales" and name == "Int4":
                    kind = Array(good["from_quantized"]["scales"])
                own[parameter] = kind
            found[f"ops.{name}" + (f".{method}" if method else "")] = Call(
                function, good.get(method, {"packed": half.packed}), own
            )
    return found


CALLS |= _formats()


def own(thing: type, name: str) -> bool:
    """Whether pared defines what `name` is of this class, or inherits it from torch."""
    return next((c for c in thing.__mro__ if name in vars(c)), object).__module__.startswith("pared.")


def public() -> dict[str, set[str]]:
    """Every public function, constructor and method that takes arguments, with its parameters."""
    found = {}
    abstract = (ops.PackedWeight, pared.nn.PackedModule)
    for module in ("ops", "nn"):
        for name in getattr(pared, module).__all__:
            thing = getattr(getattr(pared, module), name)
            if inspect.isclass(thing):
                # What the package makes and raises is no user's call.
                if thing in abstract or issubclass(thing, BaseException) or thing is ops.Threshold:
                    continue
                if own(thing, "__init__"):
                    found[f"{module}.{name}"] = parameters(thing)
                for method in dir(thing):
                    if method.startswith("_") or method == "train" or not own(thing, method):
                        continue
                    function = inspect.getattr_static(thing, method)
                    if isinstance(function, property) or not callable(getattr(thing, method)):
                        continue
                    taken = parameters(getattr(thing, method)) - {"self"}
                    if taken:
                        found[f"{module}.{name}.{method}"] = taken
            elif callable(thing):
                found[f"{module}.{name}"] = parameters(thing)
    return found


# What is for the package itself: made from what the same class gave.
INTERNAL = ("from_parts", "from_stored", "stored_like", "plain")


def missing(table: dict[str, Call]) -> list[str]:
    found = []
    for name, wanted in public().items():
        if name.rpartition(".")[2] in INTERNAL:
            continue
        if name not in table:
            found.append(name)
            continue
        found += [f"{name}({p})" for p in wanted if p not in table[name].kinds]
    return found


def test_everything_public_is_in_the_table() -> None:
    assert not missing(CALLS)


def test_what_is_missing_is_seen() -> None:
    one = dict(CALLS)
    del one["ops.topk"]
    one["ops.linear"] = one["ops.linear"]._replace(kinds={"x": Array(X)})
    assert sorted(missing(one)) == [
        "ops.linear(activation)",
        "ops.linear(bias)",
        "ops.linear(w)",
        "ops.topk",
    ]


# They need a device, or are looked at in their own tests.
SKIPPED = (".to", ".from_device", ".from_scipy", ".from_torch", ".from_quantized")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_the_good_call_works(name: str) -> None:
    """So that what refuses the others is the bad value."""
    call = CALLS[name]
    if name.endswith(SKIPPED):
        return
    call.function(**call.good)


@pytest.mark.filterwarnings("ignore")  # torch's, on sparse and quantized tensors
@pytest.mark.parametrize("name", CALLS)
def test_every_bad_value_is_refused_by_name(name: str) -> None:
    faults = [f"{what}: {said}" for what, said in refusals(CALLS[name]) if said]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", CALLS)
def test_integers_of_numpy_are_taken(name: str) -> None:
    call = CALLS[name]
    if name.endswith(SKIPPED):
        return
    defaults = {p.name: p.default for p in inspect.signature(call.function).parameters.values()}
    for parameter, kind in call.kinds.items():
        value = {**defaults, **call.good}.get(parameter)
        if isinstance(kind, Values) and "2**70" in kind.values and type(value) is int:
            call.function(**{**call.good, **call.also.get(parameter, {}), parameter: np.int64(value)})


@pytest.mark.filterwarnings("ignore")
def test_a_planted_fault_is_seen() -> None:
    """A function that takes anything, and one whose words say nothing, are both found."""

    def silent(x: Any) -> None:
        pass

    def vague(x: Any) -> None:
        raise TypeError("incompatible function arguments")

    for function in (silent, vague):
        assert all(said for _, said in refusals(Call(function, {"x": X}, {"x": Array(X)})))


@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_memory_are_an_error(name: str) -> None:
    """The type of such a tensor decides what happens; no kernel reads where there is nothing."""
    call = CALLS[name]
    for parameter, kind in call.kinds.items():
        if isinstance(kind, Array):
            empty = Wrapper(torch.from_numpy(kind.good.copy()))
            with pytest.raises((ValueError, TypeError, AssertionError), match=r"without|use from_dense"):
                call.function(**{**call.good, **call.also.get(parameter, {}), parameter: empty})


def test_tensors_inside_torch_func_are_an_error() -> None:
    weight = ops.CSR.from_dense(torch.from_numpy(W))
    with pytest.raises(TypeError, match=r"x: expected a tensor with memory of its own, got a Tensor without"):
        torch.func.vmap(lambda x: ops.linear(x, weight))(torch.from_numpy(X))
