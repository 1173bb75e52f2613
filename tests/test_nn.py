"""The accelerated modules, without accelerate: what they compute, hold, refuse, and survive."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from _models import sparse_conv, sparse_linear
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pared
from pared.nn import RULES, Conv1d, Conv2d, DenseWeightError, Linear
from pared.nn._base import pack

ACTIVATIONS = {
    None: lambda y: y,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
    "silu": nn.functional.silu,
}


def bound(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Two float32 sums of K products differ by at most K * eps * sum |w x|; 16-bit outputs round again."""
    eps = torch.finfo(torch.float32).eps
    b = None if layer.bias is None else layer.bias.double().abs()
    size = nn.functional.linear(x.double().abs(), layer.weight.double().abs(), b)
    out = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0
    return 1.13 * ((layer.in_features + 8) * eps + out) * size + 1e-30


def check(layer: nn.Linear, module: nn.Module, x: torch.Tensor, activation: str | None = None) -> None:
    b = None if layer.bias is None else layer.bias.double()
    expected = ACTIVATIONS[activation](nn.functional.linear(x.double(), layer.weight.double(), b))
    with torch.no_grad():
        y = module(x)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= bound(layer, x)).all())


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_equals_torch(isa: str, dtype: torch.dtype, activation: str | None) -> None:
    for n_in, n_out, shape in [(1, 1, (1,)), (17, 33, (5,)), (97, 16, (2, 3)), (64, 130, (33,))]:
        layer = sparse_linear(n_in, n_out)
        x = torch.randn(*shape, n_in, generator=torch.Generator().manual_seed(1)).to(dtype)
        check(layer, Linear.from_module(layer, activation=activation), x, activation)


@given(
    n_in=st.integers(1, 70),
    n_out=st.integers(1, 70),
    lead=st.lists(st.integers(0, 4), max_size=3),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    bias=st.booleans(),
)
def test_linear_any_shape(n_in: int, n_out: int, lead: list[int], density: float, bias: bool) -> None:
    layer = sparse_linear(n_in, n_out, density, bias)
    check(
        layer, Linear.from_module(layer), torch.randn(*lead, n_in, generator=torch.Generator().manual_seed(2))
    )


def test_linear_takes_any_strides() -> None:
    layer = sparse_linear(24, 8)
    module = Linear.from_module(layer)
    base = torch.randn(6, 5, 24)
    for x in (
        base.transpose(0, 1),
        base[:, 0],
        base[::2],
        base[..., :24],
        base.expand(2, 6, 5, 24),
        base[0, 0],
    ):
        check(layer, module, x)
    wide = torch.randn(4, 48)
    check(layer, module, wide[:, ::2])
    check(layer, module, wide[:, 24:])


def test_linear_keyword_argument_is_named_as_in_torch() -> None:
    layer = sparse_linear(8, 4)
    x = torch.randn(2, 8)
    assert torch.equal(Linear.from_module(layer)(input=x), Linear.from_module(layer)(x))


def test_checker_sees_a_wrong_weight() -> None:
    layer = sparse_linear(40, 8)
    wrong = copy.deepcopy(layer)
    with torch.no_grad():
        row, col = wrong.weight.nonzero()[0]
        wrong.weight[row, col] *= -1
    with pytest.raises(AssertionError):
        check(layer, Linear.from_module(wrong), torch.randn(4, 40))


def test_repr_and_attributes() -> None:
    module = Linear.from_module(sparse_linear(16, 24), activation="relu")
    assert (module.in_features, module.out_features, module.activation, module.format) == (
        16,
        24,
        "relu",
        "csr",
    )
    text = repr(module)
    for part in (
        "in_features=16",
        "out_features=24",
        "bias=True",
        "format=csr",
        "sparsity=0.",
        "activation=relu",
    ):
        assert part in text
    assert "activation" not in repr(Linear.from_module(sparse_linear(16, 24, bias=False)))
    assert list(module.state_dict()) == ["packed", "bias"]
    assert module.packed.dtype == torch.uint8
    assert not list(module.parameters())
    assert RULES[nn.Linear].module is Linear


def test_conversion_copies() -> None:
    layer = sparse_linear(16, 8)
    module = Linear.from_module(layer)
    x = torch.randn(3, 16)
    before = module(x)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert torch.equal(module(x), before)


def test_conversion_of_non_contiguous_weights() -> None:
    layer = sparse_linear(12, 20)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    check(layer, Linear.from_module(layer), torch.randn(3, 12))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_aligned_and_private(how: str) -> None:
    module = Linear.from_module(sparse_linear(33, 17), activation="gelu")
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.randn(4, 33)
    assert torch.equal(twin(x), module(x))
    assert twin.packed.data_ptr() % 64 == 0
    assert twin.packed.data_ptr() != module.packed.data_ptr()
    assert not twin.training
    twin.packed.zero_()
    module(x)  # the original has its own memory


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_takes_other_zeros_and_realigns(assign: bool) -> None:
    a, b = sparse_linear(32, 16, 0.1, seed=1), sparse_linear(32, 16, 0.5, seed=2)
    module, source = Linear.from_module(a), Linear.from_module(b)
    state = source.state_dict()
    shifted = torch.empty(state["packed"].numel() + 64, dtype=torch.uint8)[1:][: state["packed"].numel()]
    assert shifted.data_ptr() % 64
    shifted.copy_(state["packed"])
    state["packed"] = shifted
    state["bias"] = state["bias"].to(torch.bfloat16)
    module.load_state_dict(state, assign=assign)
    assert module.packed.data_ptr() % 64 == 0
    assert module.bias.dtype == torch.float32
    x = torch.randn(3, 32)
    with torch.no_grad():
        b.bias.copy_(b.bias.bfloat16())
    check(b, module, x)
    shifted.zero_()
    check(b, module, x)  # nothing is shared with the state dict


def test_load_state_dict_refuses_without_a_change() -> None:
    layer = sparse_linear(32, 16)
    module = Linear.from_module(layer)
    good = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(3, 32)
    before = module(x)
    flipped = good["packed"].clone()
    flipped[-65] ^= 1
    for packed, text in [
        (Linear.from_module(sparse_linear(16, 32)).packed, "expected a weight of shape"),
        (good["packed"][:-1], "expected"),
        (torch.zeros(4096, dtype=torch.uint8), "packed"),
        (good["packed"].float(), "dtype"),
        (flipped, "checksum"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            module.load_state_dict({**good, "packed": packed})
        assert torch.equal(module(x), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({"bias": good["bias"]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({**good, "weight": layer.weight})
    assert torch.equal(module(x), before)


def test_tied_weights_stay_tied() -> None:
    layer = sparse_linear(16, 16)
    weight = pack("csr", layer.weight)
    a, b = Linear.from_module(layer, weight=weight), Linear.from_module(layer, weight=weight)
    model = nn.ModuleList([a, b])
    assert a.packed is b.packed
    twin = copy.deepcopy(model)
    assert twin[0].packed is twin[1].packed
    twin = pickle.loads(pickle.dumps(model))
    assert twin[0].packed is twin[1].packed
    other = nn.ModuleList([Linear.from_module(sparse_linear(16, 16, 0.4, seed=5))] * 2)
    model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()})
    assert model[0].packed is model[1].packed


def test_dtype_changes_leave_the_weight_alone() -> None:
    layer = sparse_linear(16, 8)
    module = Linear.from_module(layer)
    x = torch.randn(3, 16)
    before = module(x)
    for change in (module.half, module.bfloat16, module.float, lambda: module.to(torch.float16), module.cpu):
        assert change() is module
        assert module.bias.dtype == torch.float32
        assert torch.equal(module(x), before)
    assert module(x.half()).dtype == torch.float16


def test_autocast_changes_nothing() -> None:
    module = Linear.from_module(sparse_linear(16, 8))
    x = torch.randn(3, 16)
    before = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), before)


def test_other_devices_are_refused() -> None:
    module = Linear.from_module(sparse_linear(16, 8))
    with pytest.raises(
        RuntimeError, match=r"device: Linear has no csr kernel for meta \(.*expected cpu.*restore"
    ):
        module.to("meta")
    assert module.packed.device.type == "cpu"
    with pytest.raises(TypeError, match="x: expected a CPU tensor, got one on meta"):
        module(torch.empty(3, 16, device="meta"))


def test_share_memory() -> None:
    module = Linear.from_module(sparse_linear(16, 8)).share_memory()
    assert module.packed.is_shared()
    assert module.packed.data_ptr() % 64 == 0


def test_always_in_eval_mode() -> None:
    module = nn.Sequential(Linear.from_module(sparse_linear(8, 8)), nn.ReLU())
    assert not module[0].training
    assert module.train() is module
    assert module.training
    assert not module[0].training


def test_gradients_are_refused() -> None:
    module = Linear.from_module(sparse_linear(16, 8))
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"pared\.nn\.Linear: expected an input that needs no gradient"):
        module(x)
    with torch.no_grad():
        assert not module(x).requires_grad
    with torch.inference_mode():
        assert module(x).is_inference()
    assert not module(x.detach()).requires_grad
    with pytest.raises(
        RuntimeError, match="needs no gradient"
    ):  # a subclass takes the way through the dispatcher
        module(nn.Parameter(torch.randn(3, 16)))
    module.bias.requires_grad_()
    with pytest.raises(RuntimeError, match="needs no gradient"):
        module(x.detach())


def test_a_damaged_pickle_is_refused() -> None:
    module = Linear.from_module(sparse_linear(16, 8))
    module.packed[-100] ^= 1
    with pytest.raises(ValueError, match="packed weight: expected checksum"):
        pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.randn(3, 15), ValueError, r"x: expected a last dimension of 16 .* got \[3, 15\]"),
        (torch.tensor(1.0), ValueError, "x: expected at least one dimension"),
        (torch.randn(3, 16).double(), TypeError, "x: expected dtype"),
        (torch.ones(3, 16, dtype=torch.int32), TypeError, "x: expected dtype"),
        (torch.randn(3, 16).to_sparse(), TypeError, "x: expected a strided"),
        (np.zeros((3, 16), np.float32), TypeError, "x: expected a torch tensor, got ndarray"),
        (None, TypeError, "x: expected a torch tensor, got NoneType"),
    ],
)
def test_bad_inputs(x: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Linear.from_module(sparse_linear(16, 8))(x)


def test_bad_arguments() -> None:
    layer = sparse_linear(16, 8)
    weight = pack("csr", layer.weight)
    with pytest.raises(ValueError, match=r"activation: expected one of relu, .* got 'tanh'"):
        Linear(weight, activation="tanh")
    with pytest.raises(ValueError, match=r"bias: expected shape \[8\], got \[9\]"):
        Linear(weight, torch.zeros(9))
    with pytest.raises(TypeError, match=r"weight: expected a packed .* got Parameter"):
        Linear(layer.weight)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"module: expected nn\.Linear, got Conv2d"):
        Linear.from_module(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"format: expected one of csr, .*bsr, dense, .*got 'coo'"):
        Linear.from_module(layer, format="coo")
    with pytest.raises(ValueError, match=r"linear weight \[out, in\]"):
        Linear(pared.ops.CSR.from_dense(torch.zeros(4, 2, 3, 3)))
    with torch.no_grad():
        layer.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite values"):
        Linear.from_module(layer)


def test_the_dense_weight_can_be_looked_at_but_not_used() -> None:
    module = Linear.from_module(sparse_linear(16, 8, dtype=torch.bfloat16))
    w = module.weight
    assert (w.shape, w.dtype, w.device.type) == ((8, 16), torch.bfloat16, "cpu")
    assert "WeightStandIn" in repr(w)
    for use in (
        lambda: w + 1,
        lambda: nn.functional.linear(torch.randn(2, 16).bfloat16(), w),
        lambda: w.abs(),
    ):
        with pytest.raises(DenseWeightError, match="holds a packed csr weight") as caught:
            use()
        assert caught.value.layer is module


def test_transformer_encoder_layer_calls_its_accelerated_layers() -> None:
    # Its fused path in eval mode hands linear1.weight to a native function.
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = encoder(x)
        calls = []
        for name in ("linear1", "linear2"):
            setattr(encoder, name, Linear.from_module(getattr(encoder, name)))
            getattr(encoder, name).register_forward_hook(lambda *a: calls.append(1))
        got = encoder(x)
    assert len(calls) == 2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_round_trip_to_a_plain_module() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = sparse_linear(16, 8, dtype=dtype)
        layer.bias.requires_grad_(False)
        plain = Linear.from_module(layer, activation="relu").to_module()
        assert type(plain) is nn.Linear
        assert torch.equal(plain.weight, layer.weight)
        assert torch.equal(plain.bias, layer.bias)
        assert (plain.weight.requires_grad, plain.bias.requires_grad) == (True, False)
    assert Linear.from_module(sparse_linear(4, 4, bias=False)).to_module().bias is None


def test_many_threads_call_one_module() -> None:
    layer = sparse_linear(64, 48)
    module = Linear.from_module(layer, activation="relu")
    inputs = [torch.randn(n, 64) for n in range(1, 9)]
    expected = [module(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(module(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# -- Conv2d


CONVS: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": (1, 2)},
    {"dilation": 2, "padding": "same"},
    {"kernel_size": 1},
    {"kernel_size": (2, 4), "padding": "same"},
    {"groups": 2, "padding": "valid"},
    {"groups": 6, "bias": False},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (2, 1), "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "replicate", "kernel_size": (4, 3)},
]


def check_conv(
    layer: nn.Module, module: nn.Module, x: torch.Tensor, activation: str | None = None
) -> torch.Tensor:
    exact, size = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    with torch.no_grad():
        for p in size.parameters():
            p.abs_()
        expected, s = ACTIVATIONS[activation](exact(x.double())), size(x.double().abs())
        y = module(x)
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    out = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0
    terms = layer.weight[0].numel() + 8
    allowed = 1.13 * (terms * torch.finfo(torch.float32).eps + out) * s + 1e-30
    assert bool(((y.double() - expected).abs() <= allowed).all())
    return y


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_conv_equals_torch(isa: str, options: dict[str, Any]) -> None:
    options = dict(options)
    layer = sparse_conv(6, 12, options.pop("kernel_size", 3), **options)
    zeros = layer.padding_mode == "zeros"  # other paddings come from torch, in a layout of its choice
    module = Conv2d.from_module(layer, activation="relu")
    x = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(3))
    for images in (
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3),
        x[:, :, ::2],
        x[0],
        x.bfloat16(),
        x[:0],
    ):
        y = check_conv(layer, module, images, "relu")
        if images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last) and zeros:
            assert y.is_contiguous(memory_format=torch.channels_last)
    plain = module.to_module()
    assert torch.equal(plain.weight, layer.weight)
    assert repr(plain) == repr(layer)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_conv_slices_of_channels() -> None:
    layer = sparse_conv(4, 8, 3)
    module = Conv2d.from_module(layer)
    wide = torch.randn(2, 9, 8, 8)
    check_conv(layer, module, wide[:, 2:6])
    check_conv(layer, module, wide.to(memory_format=torch.channels_last)[:, 2:6])


def test_conv_repr_attributes_and_errors() -> None:
    layer = sparse_conv(6, 12, 3, stride=2, padding=1, groups=2)
    module = Conv2d.from_module(layer)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(module, name) == getattr(layer, name)
    assert (
        "6, 12, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=True, format=csr"
        in repr(module)
    )
    with pytest.raises(RuntimeError, match=r"pared\.nn\.Conv2d: expected an input that needs no gradient"):
        module(torch.randn(1, 6, 5, 5, requires_grad=True))
    with pytest.raises(ValueError, match=r"x: expected \[N, C, H, W\] or \[C, H, W\], got shape \[6, 5\]"):
        module(torch.randn(6, 5))
    with pytest.raises(ValueError, match=r"x: expected shape \[any, 6, any, any\]"):
        module(torch.randn(1, 5, 5, 5))
    with pytest.raises(ValueError, match="padded size"):
        Conv2d.from_module(sparse_conv(6, 12, 3))(torch.randn(1, 6, 2, 2))
    with pytest.raises(TypeError, match="x: expected a torch tensor"):
        module(None)
    with pytest.raises(TypeError, match="x: expected a strided"):
        module(torch.randn(1, 6, 5, 5).to_sparse())
    weight = pack("csr", layer.weight, 2)
    with pytest.raises(ValueError, match="padding_mode: expected one of"):
        Conv2d(weight, padding_mode="mirror")
    with pytest.raises(ValueError, match=r"weight \[out, in/groups, kh, kw\]"):
        Conv2d(pack("csr", torch.zeros(3, 3)))
    with pytest.raises(TypeError, match=r"module: expected nn\.Conv2d, got Linear"):
        Conv2d.from_module(nn.Linear(1, 1))  # type: ignore[arg-type]
    other = Conv2d.from_module(sparse_conv(3, 12, 3, groups=1))
    with pytest.raises(RuntimeError, match="in 2 group"):
        module.load_state_dict(other.state_dict())


# ---- Conv1d


CONVS_1D: list[dict[str, Any]] = [
    {},
    {"padding": 2},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": "same"},
    {"kernel_size": 1},
    {"kernel_size": 4, "padding": "same"},
    {"groups": 2, "padding": "valid", "bias": False},
    {"groups": 6},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "replicate"},
]


def sparse_conv1d(**options: Any) -> nn.Conv1d:
    torch.manual_seed(8)
    layer = nn.Conv1d(6, 12, options.pop("kernel_size", 3), **options).requires_grad_(False)
    layer.weight[torch.rand_like(layer.weight) < 0.6] = 0
    return layer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("options", CONVS_1D, ids=str)
def test_conv1d_equals_torch(isa: str, options: dict[str, Any]) -> None:
    layer = sparse_conv1d(**options)
    x = torch.randn(2, 6, 37, generator=torch.Generator().manual_seed(3))
    for format in ("csr", "bsr", "dense"):
        module = Conv1d.from_module(layer, format=format, activation="relu")
        for rows in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :, ::2], x[0], x.half(), x[:0]):
            check_conv(layer, module, rows, "relu")
        plain = module.to_module()
        assert torch.equal(plain.weight, layer.weight)
        assert repr(plain) == repr(layer)
        assert torch.equal(copy.deepcopy(module)(x), module(x))
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    quantized = Conv1d.from_module(layer, format="int8")
    with torch.no_grad():
        expected = layer(x)
    assert float((quantized(x) - expected).abs().max()) < 0.03 * float(expected.abs().max())
    assert quantized.stored()["weight"].shape == layer.weight.shape


def test_conv1d_adds_a_residual() -> None:
    layer = sparse_conv1d(padding=1)
    module = Conv1d.from_module(layer)
    x, residual = torch.randn(2, 6, 9), torch.randn(2, 12, 9)
    with torch.no_grad():
        expected = (layer(x) + residual).relu()
    for other in (residual, residual.transpose(1, 2).contiguous().transpose(1, 2), residual.double().float()):
        torch.testing.assert_close(module._compute(x, other, "relu"), expected, atol=1e-5, rtol=1e-5)


def test_conv1d_attributes_and_errors() -> None:
    layer = sparse_conv1d(stride=2, padding=1, groups=2)
    module = Conv1d.from_module(layer)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    for name in (*names, "padding_mode"):
        assert getattr(module, name) == getattr(layer, name)
    assert module.weight.shape == layer.weight.shape
    assert "6, 12, kernel_size=(3,), stride=(2,), padding=(1,), groups=2, bias=True" in repr(module)
    weight = pack("csr", layer.weight, 2)
    assert torch.equal(Conv1d(weight, layer.bias, 2, 1)(torch.ones(6, 9)), module(torch.ones(6, 9)))
    with pytest.raises(RuntimeError, match=r"pared\.nn\.Conv1d: expected an input that needs no gradient"):
        module(torch.randn(1, 6, 5, requires_grad=True))
    for bad in (torch.randn(5), torch.randn(1, 5, 9), torch.randn(1, 6, 9, 9), torch.randn(6, 9).to_sparse()):
        with pytest.raises(ValueError, match=r"x: expected a strided tensor \[N, 6, L\] or \[6, L\], got"):
            module(bad)
    with pytest.raises(TypeError, match="x: expected a torch tensor, got NoneType"):
        module(None)
    with pytest.raises(TypeError, match="stride: expected an integer, got tuple"):
        Conv1d(weight, stride=(1, 2))
    with pytest.raises(ValueError, match="padding: expected an integer of at least 0"):
        Conv1d(weight, padding=-1)
    with pytest.raises(ValueError, match=r"weight \[out, in/groups, 1, taps\], got shape \[4, 4, 3, 3\]"):
        Conv1d(pack("csr", torch.zeros(4, 4, 3, 3)))
    with pytest.raises(TypeError, match=r"module: expected nn\.Conv1d, got Conv2d"):
        Conv1d.from_module(nn.Conv2d(1, 1, 1))


# ---- layers that hand their panel over


def handed_pair(seed: int = 0) -> tuple[Linear, Linear]:
    first = Linear.from_module(sparse_linear(24, 40, seed=seed), activation="relu")
    second = Linear.from_module(sparse_linear(40, 24, seed=seed + 1))
    return first, second


def test_a_layer_computes_its_followers_and_they_pass_it_on():
    first, second = handed_pair()
    x = torch.randn(5, 24)
    expected = second(first(x))
    first.hand_to(second)
    y = first(x)
    torch.testing.assert_close(y, expected)
    assert second(y) is y
    # The mark is gone: the same tensor is an input like any other now, and so is any that is not from there.
    other = torch.randn(5, 40)
    torch.testing.assert_close(second(other), handed_pair()[1](other))
    assert list(nn.Sequential(first, second).state_dict()) == ["0.packed", "0.bias", "1.packed", "1.bias"]
    first.hand_to()
    torch.testing.assert_close(second(first(x)), expected)
    assert first(x).shape == (5, 40)


def test_copies_and_pickles_of_handed_layers_refer_to_each_other():
    first, second = handed_pair()
    model = nn.Sequential(first, second)
    x = torch.randn(5, 24)
    expected = model(x)
    first.hand_to(second)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0]._handed == (twin[1],)
        assert twin[1]._fed_by is twin[0]
        torch.testing.assert_close(twin(x), expected)


def test_handed_layers_compute_one_by_one_where_they_are_traced():
    first, second = handed_pair()
    model = nn.Sequential(first, second)
    first.hand_to(second)
    x = torch.randn(5, 24)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_what_cannot_be_handed_over_is_refused():
    first, second = handed_pair()
    with pytest.raises(TypeError, match="followers: expected Linear layers that go with csr"):
        first.hand_to(nn.Linear(40, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="followers: expected a layer of 40 inputs"):
        first.hand_to(first)
    quantized = Linear.from_module(sparse_linear(40, 24), format="int8")
    with pytest.raises(TypeError, match="followers: expected Linear layers that go with csr"):
        first.hand_to(quantized)
    first.hand_to(second)
    with pytest.raises(ValueError, match="followers: expected a layer of"):
        handed_pair()[1].hand_to(first)
