"""pared.ops.conv2d as a user calls it: torch's semantics, layouts, dtypes and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conv_check import Geometry, assert_within, bound, sparse_weight

import pared.ops
from pared import _core
from pared.ops import CSR, conv2d

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


def numbers(rng, shape, dtype=torch.float32):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)


def check(x, w, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Against torch in float64, within the error bound of float32 accumulation."""
    y = conv2d(x, CSR.from_dense(w, groups=groups), bias, stride, padding, dilation, groups)
    b64 = None if bias is None else bias.double()
    expected = torch.nn.functional.conv2d(x.double(), w.double(), b64, stride, padding, dilation, groups)
    assert y.dtype == x.dtype

    def pair(v):
        return v if isinstance(v, tuple) else (v, v)

    pads = pared.ops.conv.resolve_padding(padding, tuple(w.shape[2:]), pair(stride), pair(dilation))
    g = Geometry(pair(stride), pads, pair(dilation), groups)
    x64, w64 = x.double().numpy(), w.double().numpy()
    limit = bound(x64, w64, None if bias is None else bias.numpy(), g, DTYPES[x.dtype])
    assert_within(y.double().numpy(), expected.numpy(), limit)
    return y


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "stride", "size"),
    [
        (3, 8, 7, 2, 33),
        (16, 24, 1, 1, 14),
        (24, 48, 1, 2, 14),
        (16, 16, 3, 1, 14),
        (32, 40, 3, 2, 13),
        (9, 5, 3, 3, 9),
    ],
)
def test_agrees_with_torch(isa, rng, memory_format, dtype, channels, filters, kernel, stride, size):
    x = numbers(rng, (2, channels, size, size), dtype).contiguous(memory_format=memory_format)
    w = torch.from_numpy(sparse_weight(rng, (filters, channels, kernel, kernel), 0.8))
    y = check(x, w, numbers(rng, (filters,)), stride, kernel // 2)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same"},
        {"padding": "same", "dilation": (2, 1)},
        {"padding": "valid", "stride": 2},
        {"padding": (2, 0), "stride": (1, 2)},
        {"groups": 12},
        {"groups": 3, "padding": 1, "dilation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 2), (4, 4)], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's own, on even kernels
def test_options_are_torch_s(rng, memory_format, options, kernel):
    x = numbers(rng, (2, 12, 15, 18)).contiguous(memory_format=memory_format)
    w = torch.from_numpy(sparse_weight(rng, (24, 12 // options.get("groups", 1), *kernel), 0.5))
    check(x, w, numbers(rng, (24,)), **options)


def test_unbatched_numpy_and_channels_last_numpy(rng):
    x, w = rng.standard_normal((3, 6, 8)).astype(np.float32), sparse_weight(rng, (5, 3, 3, 3), 0.5)
    packed = CSR.from_dense(w)
    y = conv2d(x, packed, padding=1)
    assert isinstance(y, np.ndarray)
    assert y.shape == (5, 6, 8)
    t = conv2d(torch.from_numpy(x), packed, padding=1)
    assert isinstance(t, torch.Tensor)
    assert np.array_equal(t.numpy(), y)
    last = np.ascontiguousarray(x[None].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    z = conv2d(last, packed, padding=1)
    assert z.transpose(0, 2, 3, 1).flags.c_contiguous
    # The same order of additions in every layout.
    assert np.array_equal(z[0], y)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_empty_batch_and_one_pixel(rng, memory_format):
    w = CSR.from_dense(sparse_weight(rng, (5, 4, 3, 3), 0.5))
    y = conv2d(torch.empty(0, 4, 6, 6).contiguous(memory_format=memory_format), w)
    assert y.shape == (0, 5, 4, 4)
    for size, kernel in ((3, 3), (1, 1)):
        x = numbers(rng, (3, 4, size, size)).contiguous(memory_format=memory_format)
        y = check(x, torch.from_numpy(sparse_weight(rng, (5, 4, kernel, kernel), 0.5)))
        assert y.shape == (3, 5, 1, 1)


def test_activation_and_bias_are_fused(rng):
    x, w = numbers(rng, (1, 8, 9, 9)), torch.from_numpy(sparse_weight(rng, (16, 8, 3, 3), 0.5))
    bias, packed = numbers(rng, (16,)), CSR.from_dense(w)
    plain = conv2d(x, packed, bias)
    for name, f in (
        ("relu", torch.relu),
        ("gelu", torch.nn.functional.gelu),
        ("gelu_tanh", lambda v: torch.nn.functional.gelu(v, approximate="tanh")),
        ("silu", torch.nn.functional.silu),
    ):
        torch.testing.assert_close(conv2d(x, packed, bias, activation=name), f(plain), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(rng, threads):
    """Every output is summed by one thread in one order."""
    x = numbers(rng, (3, 64, 30, 30))
    packed = CSR.from_dense(sparse_weight(rng, (96, 64, 3, 3), 0.8))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = conv2d(x, packed, padding=1)
        torch.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(conv2d(x, packed, padding=1), expected)
    finally:
        torch.set_num_threads(before)


W = CSR.from_dense(np.ones((4, 3, 3, 3), dtype=np.float32))
X = np.zeros((1, 3, 8, 8), dtype=np.float32)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: conv2d([1.0], W), TypeError, "x: expected a numpy array or a torch tensor, got list"),
        (
            lambda: conv2d(X, np.ones((4, 3, 3, 3))),
            TypeError,
            r"w: expected a packed weight \(CSR, .*\), got ndarray",
        ),
        (lambda: conv2d(X, CSR.from_dense(np.ones((4, 27), np.float32))), ValueError, "w: .*use linear"),
        (
            lambda: conv2d(X[0, 0], W),
            ValueError,
            r"x: expected \[N, C, H, W\] or \[C, H, W\], got shape \[8, 8\]",
        ),
        (lambda: conv2d(X[None], W), ValueError, "x: expected"),
        (
            lambda: conv2d(X[:, :2], W),
            ValueError,
            r"x: expected shape \[any, 3, any, any\], got \[1, 2, 8, 8\]",
        ),
        (lambda: conv2d(X.astype(np.float64), W), TypeError, "x: expected dtype float32 .*, got float64"),
        (lambda: conv2d(X.astype(np.int32), W), TypeError, "x: expected dtype"),
        (
            lambda: conv2d(torch.zeros(1, 3, 8, 8, device="meta"), W),
            TypeError,
            "x: expected a CPU tensor, got .* meta",
        ),
        (
            lambda: conv2d(X.transpose(0, 1, 3, 2), W),
            ValueError,
            "x: expected contiguous planes or channels-last",
        ),
        (lambda: conv2d(X[..., ::2], W), ValueError, "x: expected contiguous planes or channels-last"),
        (lambda: conv2d(X, W, padding=-1), ValueError, "padding: expected an integer of at least 0, got -1"),
        (
            lambda: conv2d(X, W, padding="full"),
            ValueError,
            "padding: expected 'same', 'valid', an int or a pair",
        ),
        (lambda: conv2d(X, W, padding=1.5), TypeError, "padding: expected an int or a pair of ints"),
        (
            lambda: conv2d(X, W, padding="same", stride=2),
            ValueError,
            "padding: expected stride 1 with 'same'",
        ),
        (lambda: conv2d(X, W, stride=0), ValueError, r"stride: expected an integer of at least 1, got 0"),
        (lambda: conv2d(X, W, stride=(1, 2, 3)), TypeError, "stride: expected an int or a pair"),
        (lambda: conv2d(X, W, stride=True), TypeError, "stride: expected an int or a pair"),
        (
            lambda: conv2d(X, W, dilation=-2),
            ValueError,
            "dilation: expected an integer of at least 1, got -2",
        ),
        (
            lambda: conv2d(X, W, dilation=4),
            ValueError,
            "x: expected a padded size of at least .* 9x9, got 8x8",
        ),
        (lambda: conv2d(X[..., :2], W), ValueError, "x: expected a padded size of at least .* 3x3, got 8x2"),
        (lambda: conv2d(X[..., :0], W, padding=2), ValueError, "x: expected"),
        (
            lambda: conv2d(X, W, groups=3),
            ValueError,
            "groups: expected 1, as the weight was packed with, got 3",
        ),
        (lambda: conv2d(X, W, np.zeros(3, np.float32)), ValueError, r"bias: expected shape \[4\], got \[3\]"),
        (lambda: conv2d(X, W, np.zeros(4)), TypeError, "bias: expected dtype float32, got float64"),
        (
            lambda: conv2d(X, W, activation="tanh"),
            ValueError,
            "activation: expected one of relu, .*, got 'tanh'",
        ),
        (lambda: conv2d(torch.zeros(1, 3, 8, 8).to_sparse(), W), TypeError, "x: expected a strided"),
    ],
)
def test_errors_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_arguments_that_equal_known_ones_are_checked():
    """What is kept of a call with ints serves no call with something that equals them."""
    x, w = np.ones((1, 3, 8, 8), np.float32), CSR.from_dense(np.ones((4, 3, 3, 3), np.float32))
    y = conv2d(x, w, stride=1, padding=1)
    for stride, padding in ((True, 1), (1.0, 1), (1, True), ((1, True), 1)):
        with pytest.raises(TypeError, match="expected an int or a pair of ints"):
            conv2d(x, w, stride=stride, padding=padding)
    assert np.array_equal(conv2d(x, w, stride=[1, 1], padding=(1, 1)), y)
    # Other sizes, kernels and dilations under the same numbers.
    assert conv2d(x[..., :5, :7].copy(), w, stride=1, padding=1).shape == (1, 4, 5, 7)
    assert conv2d(x, CSR.from_dense(np.ones((4, 3, 2, 1), np.float32)), padding=1).shape == (1, 4, 9, 10)
    assert conv2d(x, w, stride=1, padding=1, dilation=2).shape == (1, 4, 6, 6)
    assert conv2d(x, w, stride=2, padding=0).shape == (1, 4, 3, 3)


def test_gradients_are_refused():
    x = torch.zeros(1, 3, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="x: expected a tensor that needs no gradient"):
        conv2d(x, W)
    with torch.no_grad():
        assert conv2d(x, W).shape == (1, 4, 6, 6)
    with pytest.raises(RuntimeError, match="bias: expected a tensor that needs no gradient"):
        conv2d(x.detach(), W, torch.zeros(4, requires_grad=True))


def test_huge_padding_is_an_error_not_a_crash():
    with pytest.raises((ValueError, MemoryError, RuntimeError)):
        conv2d(X, W, padding=2**62)


SHORT: list[tuple[Any, Any, Any, Any]] = [
    (1, 0, 1, 1),
    (2, 1, 1, 2),
    ((2, 1), (2, 1), (1, 2), 1),
    ((1, 2), (0, 1, 2, 3), 2, None),
]


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), SHORT)
@pytest.mark.parametrize("format", [pared.ops.CSR, pared.ops.Dense, pared.ops.BSRInt8, pared.ops.Int8])
def test_one_call_does_what_the_parts_do(format, stride, padding, dilation, groups) -> None:
    """Contiguous tensors, the commonest case, are checked and their output made inside the extension."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 9, 11, generator=g)
    w = format.from_dense(torch.randn(6, 8 // (groups or 1), 3, 2, generator=g), groups=groups or 1)
    bias = torch.randn(6, generator=g)
    y = _core.conv2d(x, w.packed, bias, stride, padding, dilation, groups, "relu", None)
    expected = torch.full_like(y, torch.nan)
    _core.conv2d(x, w.packed, bias, stride, padding, dilation, groups, "relu", None, expected)
    assert torch.equal(y, expected)
    added = _core.conv2d(x, w.packed, bias, stride, padding, dilation, groups, "", y)
    _core.conv2d(x, w.packed, bias, stride, padding, dilation, groups, "", y, expected)
    assert torch.equal(added, expected)


def test_what_python_has_to_look_at() -> None:
    x, w = torch.ones(1, 4, 5, 5), pared.ops.CSR.from_dense(torch.ones(4, 4, 3, 3))

    def short(x=x, w=w, stride=1, padding=1, dilation=1, groups=1, residual=None):
        return _core.conv2d(x, w.packed, None, stride, padding, dilation, groups, None, residual)

    assert short() is not None
    others: list[dict[str, Any]] = [
        {"x": x.numpy()},
        {"x": x[0]},
        {"x": torch.ones(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)},
        {"x": x[:, :3]},
        {"stride": True},
        {"stride": 0},
        {"stride": [1, 1]},
        {"padding": "same"},
        {"padding": (1, 1, 1)},
        {"padding": -1},
        {"padding": 2**40},
        {"dilation": 1.0},
        {"groups": 2},
        {"groups": True},
        {"residual": x.numpy()},
        {"residual": x.double()},
        {"residual": x[..., :4]},
        {"residual": x.contiguous(memory_format=torch.channels_last)},
        {"w": pared.ops.CSR.from_dense(torch.ones(4, 4))},
    ]
    for arguments in others:
        assert short(**arguments) is None, arguments
    with pytest.raises(ValueError, match=r"x: expected a padded size of at least"):
        short(padding=0, dilation=3)
    with pytest.raises(RuntimeError, match="x: expected a tensor that needs no gradient"):
        short(x=x.clone().requires_grad_())
