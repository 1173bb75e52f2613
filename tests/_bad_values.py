"""Bad values for parameters of several kinds, and what a function says to them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

ARRAY = np.ones((3, 12), np.float32)


class Kind(Protocol):
    """What a parameter takes."""

    def bad(self) -> dict[str, Any]:
        """What it does not take, by what to call it."""
        ...


class Values(NamedTuple):
    """A parameter that takes numbers, words or objects, and what it refuses."""

    values: dict[str, Any]

    def bad(self) -> dict[str, Any]:
        return self.values

    def but(self, *names: str) -> Values:
        """Without those that this parameter takes."""
        assert names
        assert set(names) <= self.values.keys()
        return Values({k: v for k, v in self.values.items() if k not in names})


NOTHING = Values({})
INTEGER = Values(
    {
        "None": None,
        "a string": "a",
        "a float": 1.5,
        "a bool": True,
        "a list": [1],
        "an array": np.array([1, 2]),
        "2**70": 2**70,
        "-2**70": -(2**70),
        "NaN": float("nan"),
    }
)
WORD = Values(
    {
        "None": None,
        "an integer": 3,
        "unknown": "unknown",
        "bytes": b"abs",
        "a list": ["abs"],
        "an array": ARRAY,
        "a surrogate": "\ud800",
    }
)
OPTIONAL_WORD = WORD.but("None")
PAIR = Values(
    {
        "None": None,
        "a string": "4x1",
        "one": (1,),
        "three": (1, 2, 3),
        "mixed": (1, "a"),
        "2**70": 2**70,
        "a pair of 2**70": (2**70, 1),
        "a float": 1.5,
        "a float of numpy": np.float32(2),
        "a bool": True,
        "bools": (True, True),
        "negative": -1,
        "negative in a pair": (1, -1),
        "NaN": float("nan"),
    }
)
NUMBER = Values(
    {
        "a string": "a",
        "a list": [1.0],
        "an array": np.zeros(3),
        "NaN": float("nan"),
        "infinity": float("inf"),
        "10**400": 10**400,
        "complex": 1j,
        "a bool": True,
    }
)
FLAG = Values({"an integer": 3, "a string": "a", "None": None, "an array": ARRAY, "an object": object()})
OBJECT = Values({"an integer": 3, "a string": "a", "None": None, "an array": ARRAY, "an object": object()})
OPTIONAL_OBJECT = OBJECT.but("None")


class Call(NamedTuple):
    function: Callable[..., Any]
    good: dict[str, Any]
    kinds: Mapping[str, Kind]
    # What a parameter needs beside it.
    also: Mapping[str, dict[str, Any]] = MappingProxyType({})


def parameters(function: Callable[..., Any]) -> set[str]:
    return {
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


# What the words call a parameter otherwise: one entry of it, or its name in the formula.
SAME = {"biases": "bias", "activations": "activation", "input": "x"}


def refusals(call: Call) -> Iterator[tuple[str, str]]:
    """Each bad value, and what is wrong with what the call says to it."""
    for parameter, kind in call.kinds.items():
        for what, value in kind.bad().items():
            bad = {**call.good, **call.also.get(parameter, {}), parameter: value}
            said = "nothing"
            try:
                call.function(**bad)
            except (ValueError, TypeError) as e:
                said = str(e)
            except Exception as e:
                said = f"{type(e).__name__}: {e}"
            known = f"({parameter}|{SAME.get(parameter, parameter)})"
            named = rf"(?s)(\w+, )?{known}(\[[^\]]+\])?(, \w+)?: expected .*, got .*"
            yield f"{parameter}, {what}", "" if re.fullmatch(named, said) else said
