"""Int8 Linear against float32 and every int8 engine at hand, on the shapes of BERT-base and MiniLM.

Dynamic activations, quantization included: float32 in, float32 out. Peers, each with its weight prepared
once: ``nn.Linear`` (MKL on x86), torch's dynamically quantized linear on each of its engines; where they are
installed, ONNX Runtime in float32 and int8, OpenVINO in float32 and torchao's int8. ``torch._int_mm`` is the
bare product, without quantization, scales and bias.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import pared
from bench.bench_linear import SHAPES, THREADS
from bench.roofline import int8_limit, measure
from pared import _peers
from pared._peers import ENGINES
from pared._timing import rotate

TOKENS = [16, 128, 384]
# oneDNN, which torchao's products go through, adds pairs of them in 16 bits where it is held below VNNI:
# outputs are off by a tenth.
MAY_SATURATE = ("onednn", "torchao int8") if "ONEDNN_MAX_CPU_ISA" in os.environ else ()
COLD = [(768, 768), (3072, 768), (768, 3072), (4096, 4096)]


def torch_dynamic(engine: str, w: torch.Tensor, bias: torch.Tensor) -> torch.nn.Module:
    """Torch's dynamically quantized linear, one scale a tensor, as its own converter sets it up."""
    return _peers.torch_dynamic(engine, _peers.layer_of(w, bias))


def close(got: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Within `share` of the largest output: 8 bits are 8 bits."""
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < share, f"differs by {error:.3f} of the largest output"


@THREADS
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_int8_dynamic(versus: Any, out: int, inputs: int, tokens: int, threads: int) -> None:
    w, bias, x = torch.randn(out, inputs) * inputs**-0.5, torch.randn(out), torch.randn(tokens, inputs)
    packed = pared.ops.Int8.from_dense(w)
    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: functional.linear(x, w, bias),
        "pared": lambda: pared.ops.linear(x, packed, bias),
    }
    expected = calls["nn.Linear"]()
    close(calls["pared"](), expected, 0.03)
    for name, peer in _peers.one_layer(w, bias).peers([x], threads).items():
        calls[name] = peer.make()
        if not name.endswith(MAY_SATURATE):
            close(torch.as_tensor(calls[name]()), expected, 0.06)
    calls[_peers.BARE] = _peers.int_mm(w, x).make()
    versus(
        calls,
        suite="linear Int8, dynamic",
        case=f"{out}x{inputs}, {tokens} tokens",
        cell=">= 128 tokens" if tokens >= 128 else f"{tokens} tokens",
        rivals=("nn.Linear",),
        work=2.0 * tokens * out * inputs,
        limit_s=int8_limit(measure(threads), out, inputs, tokens),
        facts={"out": out, "in": inputs, "tokens": tokens, "dtype": "int8"},
    )


@THREADS
@pytest.mark.parametrize("tokens", [1, *TOKENS])
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_int4(versus: Any, out: int, inputs: int, tokens: int, threads: int) -> None:
    """4-bit weights with a scale for 64 inputs, beside 8 bits; warm."""
    w, bias, x = torch.randn(out, inputs) * inputs**-0.5, torch.randn(out), torch.randn(tokens, inputs)
    four, eight = pared.ops.Int4.from_dense(w, group=64), pared.ops.Int8.from_dense(w)
    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: functional.linear(x, w, bias),
        "pared Int8": lambda: pared.ops.linear(x, eight, bias),
        "pared": lambda: pared.ops.linear(x, four, bias),
    }
    close(calls["pared"](), calls["nn.Linear"](), 0.3)
    versus(
        calls,
        suite="linear Int4",
        case=f"{out}x{inputs}",
        cell=f"{tokens} token{'s' if tokens > 1 else ''}",
        rivals=("nn.Linear",),
        work=2.0 * tokens * out * inputs,
        facts={"out": out, "in": inputs, "tokens": tokens, "dtype": "int4"},
    )


@THREADS
@pytest.mark.parametrize("tokens", [1, pytest.param(4, marks=pytest.mark.full), 8])
@pytest.mark.parametrize(("out", "inputs"), COLD)
def test_int8_few_tokens_cold(versus: Any, out: int, inputs: int, tokens: int, threads: int) -> None:
    """Few tokens with the weights in memory: reading them is the cost."""
    w, bias, x = torch.randn(out, inputs) * inputs**-0.5, torch.randn(out), torch.randn(tokens, inputs)
    packed = pared.ops.Int8.from_dense(w)
    engine = ENGINES[0]

    def float32(_: int) -> Callable[[], object]:
        copy = w.clone()
        return lambda: functional.linear(x, copy, bias)

    def torch_int8(_: int) -> Callable[[], object]:
        module = torch_dynamic(engine, w, bias)
        return lambda: module(x)

    def ours(_: int) -> Callable[[], object]:
        copy = pared.ops.Int8.from_dense(w)
        return lambda: pared.ops.linear(x, copy, bias)

    versus(
        {
            "nn.Linear": rotate(float32, w.nbytes),
            f"torch int8 dynamic, {engine}": rotate(torch_int8, w.numel()),
            "pared": rotate(ours, packed.nbytes),
        },
        suite="linear Int8, dynamic, few tokens",
        case=f"{out}x{inputs}",
        cell=f"{tokens} token{'s' if tokens > 1 else ''}",
        rivals=("nn.Linear",),
        work=2.0 * tokens * out * inputs,
        moved=float(packed.nbytes),
        cold=True,
        facts={"out": out, "in": inputs, "tokens": tokens, "dtype": "int8"},
    )
