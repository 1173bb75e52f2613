"""pared.ops.linear as users call it: kinds of arrays, dtypes, shapes, threads, errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_check import check_linear

from pared import _core, ops
from pared.ops import CSR
from pared.ops._formats import FORMATS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(rng, rows: int, cols: int, sparsity: float) -> torch.Tensor:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    w[rng.random(w.shape) < sparsity] = 0
    return torch.from_numpy(w)


def random_input(rng, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- results


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_dtypes_and_activations(isa, rng, dtype, activation):
    w = random_weight(rng, 70, 150, 0.8)
    bias = random_input(rng, 70)
    packed = CSR.from_dense(w)
    for tokens in (1, 16, 45):
        x = random_input(rng, tokens, 150, dtype=dtype)
        y = ops.linear(x, packed, bias, activation)
        assert y.dtype == dtype
        assert not y.requires_grad
        check_linear(y, x, w, bias, activation, name_of(dtype))


def test_every_bfloat16_survives_the_identity(isa):
    x = (
        torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16)
        .reshape(-1, 16)
    )
    y = ops.linear(x, CSR.from_dense(torch.eye(16)))
    assert torch.equal(x.isnan(), y.isnan())
    assert torch.equal(x.nan_to_num(nan=1.0), y.nan_to_num(nan=1.0))


def test_bfloat16_results_round_to_nearest_even(isa, rng):
    scale = torch.from_numpy(np.exp2(rng.uniform(-3, 3, 64)).astype(np.float32))
    scale[:2] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])  # ties with x = 1
    x = random_input(rng, 2048, 64, dtype=torch.bfloat16)
    x[0] = 1.0
    x[1] = torch.finfo(torch.bfloat16).max
    y = ops.linear(x, CSR.from_dense(torch.diag(scale)))
    assert torch.equal(y, (x.float() * scale).bfloat16())


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=name_of)
def test_weights_of_every_dtype(rng, weight_dtype):
    w = random_weight(rng, 30, 90, 0.7).to(weight_dtype)
    x = random_input(rng, 20, 90)
    check_linear(ops.linear(x, CSR.from_dense(w)), x, w)


@pytest.mark.parametrize("shape", [(90,), (1, 90), (0, 90), (2, 3, 90), (2, 0, 3, 90), (1, 1, 5, 1, 90)])
def test_leading_dimensions(isa, rng, shape):
    w = random_weight(rng, 30, 90, 0.7)
    x = random_input(rng, *shape)
    packed = CSR.from_dense(w)
    y = ops.linear(x, packed)
    assert y.shape == (*shape[:-1], 30)
    check_linear(y, x, w)
    z = ops.linear(x.numpy(), packed)
    assert isinstance(z, np.ndarray)
    assert np.array_equal(z, y.numpy())


def test_views_whose_rows_are_strided(rng):
    w = random_weight(rng, 30, 90, 0.7)
    packed = CSR.from_dense(w)
    big = random_input(rng, 6, 8, 200)
    for x in (big[..., 10:100], big[::2, :, 100:190], big[:, 3, :90], big.view(48, 200)[5:20, :90]):
        if x.dim() == 3 and x.shape[0] == 3:
            with pytest.raises(ValueError, match=r"x: expected leading dimensions that fold into one"):
                ops.linear(x, packed)
        else:
            assert torch.equal(ops.linear(x, packed), ops.linear(x.contiguous(), packed))


def test_agrees_with_torch(rng):
    """The usual tolerance of a float32 product, in the user's terms."""
    w = random_weight(rng, 256, 384, 0.8)
    bias = random_input(rng, 256)
    x = random_input(rng, 100, 384)
    y = ops.linear(x, CSR.from_dense(w), bias, "gelu")
    want = torch.nn.functional.gelu(torch.nn.functional.linear(x, w, bias))
    torch.testing.assert_close(y, want, rtol=1e-5, atol=2e-5)


@settings(max_examples=80)
@given(
    tokens=st.integers(0, 140),
    rows=st.integers(0, 60),
    cols=st.integers(0, 260),
    sparsity=st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0]),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    activation=st.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu"]),
    level=st.sampled_from(_core.supported_isas()),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(tokens, rows, cols, sparsity, dtype, has_bias, activation, level, seed):
    rng = np.random.default_rng(seed)
    w = random_weight(rng, rows, cols, sparsity)
    x = random_input(rng, tokens, cols, dtype=dtype)
    bias = random_input(rng, rows) if has_bias else None
    before = _core.set_isa(level)
    try:
        y = ops.linear(x, CSR.from_dense(w), bias, activation)
    finally:
        _core.set_isa(before)
    check_linear(y, x, w, bias, activation, name_of(dtype))


# ---- threads


@pytest.mark.parametrize("tokens", [1, 40, 129, 256, 700])
@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_the_thread_count_does_not_change_a_bit(isa, rng, threads, tokens, sparsity):
    """Each output is summed by one thread, in an order that does not depend on how the work is shared."""
    w = random_weight(rng, 517, 400, sparsity)
    w[:100] = 0  # shares are of non-zeros, not of rows
    packed = CSR.from_dense(w)
    x = random_input(rng, tokens, 400)
    bias = random_input(rng, 517)
    results = []
    for n in (1, 2, 3, 5):
        torch.set_num_threads(n)
        results.append(ops.linear(x, packed, bias))
    assert all(torch.equal(results[0], y) for y in results[1:])
    check_linear(results[0], x, w, bias)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_how_threads_share_the_work_does_not_change_a_bit(rng, threads, format):
    """One tile and two, equal and unequal; few tokens, which some formats share by their outputs."""
    w = format.weight.from_dense(random_weight(rng, 1500, 900, 0.7))
    inputs = [random_input(rng, tokens, 900) for tokens in (1, 3, 16, 33, 97, 128, 129)]
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append([ops.linear(x, w) for x in inputs])
    dense = torch.as_tensor(w.to_dense()).double()
    for x, first, *others in zip(inputs, *results, strict=True):
        assert all(torch.equal(first, y) for y in others), f"{len(x)} tokens"
        x = x.double()
        # Float32 sums; and where tokens are rounded to 8 bits, half a step of each input.
        bound = 1000 * 2.0**-24 * (x.abs() @ dense.abs().T)
        if format.precision != "float32":
            bound += x.abs().amax(1, keepdim=True) / 254 * dense.abs().sum(1) * 1.001
        assert ((first.double() - x @ dense.T).abs() <= bound).all(), f"{len(x)} tokens"


def test_calls_from_many_python_threads(rng):
    w = random_weight(rng, 300, 400, 0.8)
    packed = CSR.from_dense(w)
    inputs = [random_input(rng, 64, 400) for _ in range(6)]
    want = [ops.linear(x, packed) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(ops.linear(inputs[i], packed), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    assert not wrong


# ---- gradients


def test_refuses_an_input_that_needs_a_gradient(rng):
    w = CSR.from_dense(random_weight(rng, 4, 5, 0.5))
    x = random_input(rng, 3, 5).requires_grad_()
    with pytest.raises(RuntimeError, match=r"x: expected a tensor that needs no gradient"):
        ops.linear(x, w)
    with torch.no_grad():
        y = ops.linear(x, w)
    with torch.inference_mode():
        assert torch.equal(ops.linear(x, w), y)
    assert torch.equal(ops.linear(x.detach(), w), y)
    bias = torch.zeros(4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"bias: expected a tensor that needs no gradient"):
        ops.linear(x.detach(), w, bias)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, w, bias), y)


# ---- bad input


def test_bad_input(rng):
    w = CSR.from_dense(random_weight(rng, 4, 6, 0.5))
    x, bias = random_input(rng, 3, 6), torch.ones(4)
    conv = CSR.from_dense(torch.ones(2, 3, 3, 3))
    sparse = torch.eye(6).to_sparse()
    cases = [
        (TypeError, r"x: expected a numpy array or a torch tensor, got list", ([1.0], w)),
        (TypeError, r"x: expected dtype float32 or .*, got float64", (x.double(), w)),
        (TypeError, r"x: expected dtype .*, got int64", (x.long(), w)),
        (TypeError, r"x: expected a dtype of .* got torch.complex64", (x.to(torch.complex64), w)),
        (TypeError, r"x: expected a CPU tensor, got one on meta", (x.to("meta"), w)),
        (TypeError, r"x: expected a strided \(dense\) tensor, got layout torch.sparse_coo", (sparse, w)),
        (ValueError, r"x: expected at least one dimension, got a scalar", (x[0, 0], w)),
        (ValueError, r"x: expected a last dimension of 6 .*, got \[3, 5\]", (x[:, :5], w)),
        (
            ValueError,
            r"x: expected the last dimension contiguous, got stride 3",
            (random_input(rng, 6, 3).T, w),
        ),
        (TypeError, r"w: expected a packed weight \(CSR, .*\), got Tensor", (x, x)),
        (ValueError, r"w: expected a linear weight \[out, in\], got shape \[2, 3, 3, 3\]", (x, conv)),
        (TypeError, r"bias: expected dtype float32, got bfloat16", (x, w, bias.bfloat16())),
        (ValueError, r"bias: expected shape \[4\], got \[5\]", (x, w, torch.ones(5))),
        (ValueError, r"bias: expected shape \[4\], got \[1, 4\]", (x, w, bias[None])),
        (ValueError, r"bias: expected contiguous memory", (x, w, torch.ones(8)[::2])),
        (TypeError, r"bias: expected a numpy array or a torch tensor, got float", (x, w, 1.0)),
        (ValueError, r"activation: expected one of relu, gelu, .*, got 'tanh'", (x, w, bias, "tanh")),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            ops.linear(*arguments)


class OwnTensor(torch.Tensor):
    """A subclass is asked for its attributes; a plain tensor is read through DLPack in C."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_and_subclasses_are_read_alike(rng, dtype):
    w = CSR.from_dense(random_weight(rng, 5, 7, 0.5))
    x = torch.as_tensor(rng.standard_normal((6, 4, 21)), dtype=dtype)
    for view in (x[..., :7], x[1:, :, 7:14], x[:, ::2, 14:], x[0, :, 3:10], x[3, 2, 5:12], x[:0, :, :7]):
        expected = torch.as_tensor(ops.linear(view.contiguous(), w))
        for tensor in (view, torch.nn.Parameter(view, requires_grad=False), view.as_subclass(OwnTensor)):
            assert torch.equal(ops.linear(tensor, w).as_subclass(torch.Tensor), expected), type(tensor)
    for other in (torch.uint16, torch.float8_e4m3fn, torch.complex64):
        for tensor in (x.to(other), x.to(other).as_subclass(OwnTensor)):
            with pytest.raises(TypeError, match=f"x: expected .*dtype.*got {other}"):
                ops.linear(tensor, w)


def test_a_pending_negation_is_refused():
    """The imaginary part of a conjugate: its memory holds the values with the other sign."""
    z = torch.randn(4, 8, dtype=torch.complex64).conj()
    view = torch._neg_view(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"x: expected values, got a view whose negation is pending"):
        ops.linear(view, CSR.from_dense(torch.eye(8)))
    with pytest.raises(ValueError, match="negation is pending"):
        CSR.from_dense(z.imag)
    kept = CSR.from_dense(z.imag.resolve_neg())
    assert torch.equal(torch.as_tensor(kept.to_dense()), z.imag)


def test_bad_output_memory(rng):
    w = CSR.from_dense(random_weight(rng, 6, 6, 0.5)).packed
    x = rng.standard_normal((3, 6)).astype(np.float32)
    readonly = np.zeros((3, 6), np.float32)
    readonly.flags.writeable = False
    shared = np.zeros((4, 6), np.float32)
    bias = np.zeros(12, np.float32)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    overlapping = np.lib.stride_tricks.as_strided(zeros(40), (3, 6), (8, 4))
    cases = [
        (ValueError, r"out: expected writable memory", x, None, readonly),
        (ValueError, r"out: expected memory that does not overlap x", x, None, x),
        (ValueError, r"out: expected memory that does not overlap x", shared[1:], None, shared[:3]),
        (ValueError, r"out: expected memory that does not overlap bias", x[:1], bias[2:8], bias[None, :6]),
        (ValueError, r"out: expected shape \[..., 6\] .*, got \[2, 6\]", x, None, zeros(2, 6)),
        (ValueError, r"out: expected shape \[..., 6\] .*, got \[3, 7\]", x, None, zeros(3, 7)),
        (TypeError, r"out: expected dtype float32, got float16", x, None, zeros(3, 6).astype(np.float16)),
        (ValueError, r"out: expected the last dimension contiguous", x, None, zeros(6, 3).T),
        (ValueError, r"out: expected rows that do not overlap, got stride 2", x, None, overlapping),
    ]
    for error, message, x_, bias_, out in cases:
        with pytest.raises(error, match=message):
            _core.linear(x_, w, bias_, None, out)
