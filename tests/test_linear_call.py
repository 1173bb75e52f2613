"""The one call behind every linear operation: what it makes, and what it does not."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pared import _core, nn, ops
from pared.ops._formats import FORMATS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def weight() -> ops.Int8:
    return ops.Int8.from_dense(torch.ones(5, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 4, 3), (0, 3), (2, 0, 3)])
def test_a_new_output_is_as_torch_makes_them(weight, dtype, shape):
    y = ops.linear(torch.ones(shape, dtype=dtype), weight)
    like = torch.empty((*shape[:-1], 5), dtype=dtype)
    assert type(y) is torch.Tensor
    assert (y.shape, y.stride(), y.dtype, y.device) == (like.shape, like.stride(), like.dtype, like.device)
    assert y.data_ptr() % 64 == 0
    assert (y.is_inference(), y.requires_grad, y._version) == (False, False, 0)
    y.resize_(7, 11).requires_grad_()  # memory of torch's own, which it may grow


def test_outputs_in_inference_mode_are_inference_tensors(weight):
    x = torch.ones(2, 3)
    with torch.inference_mode():
        assert ops.linear(x, weight).is_inference()
        assert nn.Linear(weight)(x).is_inference()


def test_an_output_outlives_its_own_object(weight):
    y = ops.linear(torch.ones(2, 3), weight)
    want = y.clone()
    view = y[1:]
    del y
    gc.collect()
    torch.testing.assert_close(view, want[1:], rtol=0, atol=0)


def test_default_device_and_dtype_do_not_count(weight):
    x = torch.ones(2, 3)
    with torch.device("meta"):
        assert ops.linear(x, weight).device.type == "cpu"
    torch.set_default_dtype(torch.float64)
    try:
        assert ops.linear(x, weight).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_in_numpy_out(dtype):
    weight = ops.Int8.from_dense(np.ones((5, 3), np.float32))
    y = ops.linear(np.ones((2, 4, 3), dtype), weight)
    assert type(y) is np.ndarray
    assert (y.shape, y.dtype) == ((2, 4, 5), dtype)
    assert y.flags.c_contiguous
    assert y.flags.owndata
    assert y.flags.writeable


@pytest.mark.parametrize("format", [f.name for f in FORMATS.values()])
def test_every_format_goes_through_it(format):
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    weight = FORMATS[format].weight.from_dense(w)
    x, out = torch.randn(2, 64, generator=torch.Generator().manual_seed(4)), torch.full((2, 8), 7.0)
    y = _core.linear(x, weight.packed, None, "relu", out)
    assert y is out
    torch.testing.assert_close(_core.linear(x, weight.packed, None, "relu"), out, rtol=0, atol=0)
    assert out.min() == 0
    assert out.max() > 0


WITHOUT = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
packed = torch.as_tensor(core.int8_pack_dense(torch.eye(3)))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = torch.tensor([[[-1, 0, 1]], [[1, 1, 0]]]).to(dtype)
    y = core.linear(x, packed, None, None)
    assert type(y) is torch.Tensor and y.dtype is dtype, (type(y), y.dtype)
    assert torch.equal(y, x), y
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there the names are looked up")
def test_a_torch_that_exports_other_names_makes_outputs_too(tmp_path):
    extension = Path(_core.__file__).read_bytes()
    name = b"_Z16THPVariable_WrapRKN2at10TensorBaseE"
    assert extension.count(name) == 1
    other = tmp_path / Path(_core.__file__).name
    other.write_bytes(extension.replace(name, name[::-1]))
    subprocess.run([sys.executable, "-c", WITHOUT, str(other)], check=True, timeout=300)


def test_memory_that_is_not_there_is_torchs_error(weight):
    with pytest.raises(RuntimeError, match="alloc"):
        ops.linear(torch.ones(1, 3).expand(2**41, 3), weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), TypeError, "linear: expected 4 or 5 arguments, got 0"),
        ((None, None, None, 3, None), TypeError, "packed: expected a numpy array or a torch tensor"),
    ],
)
def test_the_call_itself_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        _core.linear(*arguments)


@pytest.mark.parametrize("activation", [3, b"relu", ["relu"]])
def test_an_activation_is_a_string(weight, activation):
    with pytest.raises(TypeError, match="activation: expected a string, got"):
        ops.linear(torch.ones(2, 3), weight, None, activation)


@pytest.mark.parametrize("activation", ["tänh", "\ud800", "RELU", "relu\0"])
def test_an_unknown_activation_is_named(weight, activation):
    with pytest.raises(ValueError, match=r"activation: expected one of relu, .*, got"):
        ops.linear(torch.ones(2, 3), weight, None, activation)


def test_gradients_are_refused_only_where_they_would_be_recorded(weight):
    x, bias = torch.ones(2, 3), torch.ones(5)
    for name, a, b in (("x", x.clone().requires_grad_(), bias), ("bias", x, bias.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match=f"{name}: expected a tensor that needs no gradient"):
            ops.linear(a, weight, b)
        with torch.no_grad():
            assert not ops.linear(a, weight, b).requires_grad
