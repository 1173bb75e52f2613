"""Models that torch.ao and torchao quantised, or torch.jit compiled in part: what `pared.accelerate` takes
over, and what it leaves."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from _models import set_times
from torch import nn

import pared
import pared._accelerate as acc
from pared.nn import Conv2d, Linear, PackedModule
from pared.ops import Int8


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of ours is faster."""
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5 if m.activation is None else 0.25)


@contextmanager
def unwarned() -> Iterator[None]:
    """torch.ao says that it will move, and torchao's libraries that they are for other machines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10)).eval()


def dynamic(model: nn.Module, dtype: torch.dtype = torch.qint8) -> nn.Module:
    with unwarned():
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}, dtype=dtype)


def accelerated(model: nn.Module, x: Any, precision: str = "int8", **how: Any) -> nn.Module:
    how = {"max_error": 1.0, "formats": None if precision == "float32" else ["int8"], **how}
    with unwarned():
        return pared.accelerate(model, x, precision, progress=False, cache=False, **how)


def rows(model: nn.Module) -> list[Any]:
    return pared.report(model).layers


def check_taken_over(old: Any, new: Any) -> None:
    w = old.weight() if callable(old.weight) else old.weight
    q, scales = new.packed_weight().to_quantized()
    if w.is_quantized:
        per_tensor = w.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
        expected = torch.tensor(w.q_scale()) if per_tensor else w.q_per_channel_scales()
        integers = w.int_repr()
    else:
        integers, expected = w.qdata, w.scale.reshape(-1)
    assert torch.equal(torch.from_numpy(q), integers)
    assert (torch.from_numpy(scales) == expected.float()).all()


def test_a_dynamically_quantised_model() -> None:
    model, x = dynamic(plain_model()), torch.randn(9, 64)
    want = model(x)
    fast = accelerated(model, x)
    assert [type(m).__name__ for m in fast] == ["Linear", "Fused", "Linear", "Fused", "Linear"]
    for old, new in zip(model, fast, strict=True):
        if isinstance(new, PackedModule):
            check_taken_over(old, new)
    report = pared.report(fast)
    for row in report.layers:
        assert row.type == "Linear (torch.ao)"
        assert 0 < row.error <= row.bound
        assert "faster than torch.ao" in row.reason
        assert "its integers are taken over" in row.reason
    difference = float((fast(x) - want).abs().max() / want.abs().max())
    assert 0 < difference == pytest.approx(report.relative_error, rel=1e-4)
    # The integers of the three weights, which no parameter shows.
    assert report.memory_before >= 64 * 96 + 96 * 48 + 48 * 10
    assert torch.equal(model(x), want)


def test_through_a_file_and_restored() -> None:
    model, x = dynamic(plain_model()), torch.randn(9, 64)
    fast = accelerated(model, x)
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    assert torch.equal(pared.load(file, plain_model())(x), fast(x))
    back = pared.restore(fast)
    for old, new in zip(model, back, strict=True):
        if isinstance(new, nn.Linear):
            assert torch.equal(new.weight, old.weight().dequantize())


def test_other_layers_of_such_a_model_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(12, 20), nn.Linear(20, 5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.lstm(x)[0])

    model, x = dynamic(Net().eval()), torch.randn(3, 2, 12)
    fast = accelerated(model, x)
    assert type(fast.lstm) is type(model.lstm)
    assert isinstance(fast.head, Linear)
    with pytest.raises(ValueError, match=r"model: lstm.*: expected tensors only, got torch\.ao\.nn"):
        pared.save(fast, io.BytesIO())


def test_what_is_not_faster_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5 if name == "2" else 2.0)
    model, x = dynamic(plain_model()), torch.randn(9, 64)
    fast = accelerated(model, x)
    assert [r.kernel for r in rows(fast)] == ["torch", "int8", "torch"]
    assert type(fast[0]) is type(model[0])
    assert "less than 1.05x" in rows(fast)[0].reason
    with pytest.raises(ValueError, match="model: 0: expected tensors only"):
        pared.save(fast, io.BytesIO())


def test_over_the_budget_they_stay() -> None:
    model, x = dynamic(plain_model()), torch.randn(9, 64)
    fast = accelerated(model, x, max_error=0.0)
    assert [r.kernel for r in rows(fast)] == ["torch"] * 3
    assert torch.equal(fast(x), model(x))


def test_float32_leaves_them() -> None:
    model, x = dynamic(plain_model()), torch.randn(9, 64)
    fast = accelerated(model, x, "float32", max_error=None)
    assert torch.equal(fast(x), model(x))
    text = "quantised by torch.ao: taken over with precision='int8' or 'auto'"
    assert [r.reason for r in rows(fast)] == [text] * 3


def test_a_fused_activation_comes_along() -> None:
    from torch.ao.nn.intrinsic.quantized.dynamic import LinearReLU

    with unwarned():
        layer = LinearReLU(33, 20)
        w = torch.randn(20, 33)
        layer.set_weight_bias(torch.quantize_per_tensor(w, 0.03, 0, torch.qint8), torch.randn(20))
    model, x = nn.Sequential(layer, nn.GELU()).eval(), torch.randn(7, 33)
    fast = accelerated(model, x)
    assert fast[0].activation == "relu"
    assert type(fast[1]) is nn.GELU
    check_taken_over(layer, fast[0])
    assert 0 < rows(fast)[0].error <= rows(fast)[0].bound


@pytest.mark.parametrize("fused", [False, True])
def test_a_dynamic_convolution(fused: bool) -> None:
    from torch.ao.nn.quantized.dynamic import Conv2d as Dynamic

    w, scales = torch.randn(8, 6, 3, 3), torch.rand(8) * 0.05 + 0.01
    with unwarned():
        layer = Dynamic(6, 8, 3, padding=1, stride=2)
        zeros = torch.zeros(8, dtype=torch.long)
        layer.set_weight_bias(torch.quantize_per_channel(w, scales, zeros, 0, torch.qint8), torch.randn(8))
    model = nn.Sequential(layer, *([nn.ReLU()] if fused else [])).eval()
    x = torch.randn(2, 6, 9, 11)
    # torch 2.13 computes something else than the convolution of these integers; ours is held to that.
    fast = accelerated(model, x, max_error=10.0)
    assert isinstance(fast[0], Conv2d)
    assert fast[0].activation == ("relu" if fused else None)
    check_taken_over(layer, fast[0])
    assert 0 < rows(fast)[0].error <= rows(fast)[0].bound
    want = nn.functional.conv2d(x, layer.weight().dequantize(), layer.bias(), 2, 1)
    assert (fast(x) - (want.relu() if fused else want)).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("weight_only", [False, True])
def test_torchao(weight_only: bool) -> None:
    with unwarned():
        torchao = pytest.importorskip("torchao.quantization")
    plain = plain_model()
    config = torchao.Int8WeightOnlyConfig if weight_only else torchao.Int8DynamicActivationInt8WeightConfig
    model = copy.deepcopy(plain)
    with unwarned():
        torchao.quantize_(model, config())
    x = torch.randn(9, 64)
    with unwarned(), torch.no_grad():
        want = model(x)
    fast = accelerated(model, x)
    assert [r.kernel for r in rows(fast)] == ["int8"] * 3
    assert {r.type for r in rows(fast)} == {"Linear (torchao)"}
    for old, new in zip(model, fast, strict=True):
        if isinstance(new, PackedModule):
            check_taken_over(old, new)
    assert (fast(x) - want).abs().max() < 0.05 * want.abs().max()
    kept = accelerated(model, x, "float32", max_error=None)
    assert [r.kernel for r in rows(kept)] == ["torch"] * 3
    with torch.no_grad():
        assert torch.equal(kept(x), want)


def test_what_no_kernel_takes_is_left_with_the_reason() -> None:
    layer = dynamic(plain_model())
    with unwarned():
        w = torch.quantize_per_tensor(torch.randn(96, 64), 0.03, 3, torch.qint8)
        layer[0].set_weight_bias(w, layer[0].bias())
    x = torch.randn(9, 64)
    fast = accelerated(layer, x)
    assert [r.kernel for r in rows(fast)] == ["torch", "int8", "int8"]
    assert "no int8 kernel takes: source: expected zero points of 0" in rows(fast)[0].reason
    halves = dynamic(plain_model(), torch.float16)
    assert {r.kernel for r in rows(accelerated(halves, x))} == {"torch"}


def test_a_kernel_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from_torch = Int8.from_torch.__func__  # type: ignore[attr-defined]

    def wrong(cls: Any, source: Any, **how: Any) -> Int8:
        q, scales = from_torch(cls, source, **how).to_quantized()
        return Int8.from_quantized(q, scales * 1.05)

    model, x = dynamic(plain_model()), torch.randn(9, 64)
    make = acc.choose.Workshop._weight

    def weight(self: Any, format: str) -> Any:
        with monkeypatch.context() as m:
            m.setattr(Int8, "from_torch", classmethod(wrong))
            return make(self, format)

    monkeypatch.setattr(acc.choose.Workshop, "_weight", weight)
    fast = accelerated(model, x)
    assert "more than its bound" in rows(fast)[0].reason
    assert type(fast[0]) is type(model[0])


# -- static quantisation: integers between the layers


class Static(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


def static(way: str, x: torch.Tensor) -> nn.Module:
    from torch.ao import quantization as q

    torch.manual_seed(0)
    with unwarned():
        if way == "fx":
            from torch.ao.quantization import quantize_fx as fx

            mapping = q.get_default_qconfig_mapping("x86")
            prepared = fx.prepare_fx(Static().eval(), mapping, (x,))
            prepared(x)
            return fx.convert_fx(prepared)
        model = nn.Sequential(q.QuantStub(), Static(), q.DeQuantStub()).eval()
        model.qconfig = q.get_default_qconfig("x86")
        q.fuse_modules(model, [["1.conv", "1.relu"]], inplace=True)
        q.prepare(model, inplace=True)
        model(x)
        return q.convert(model, inplace=True)


@pytest.mark.parametrize("way", ["eager", "fx"])
def test_layers_between_which_integers_pass_stay(way: str) -> None:
    x = torch.randn(2, 3, 9, 9)
    model = static(way, x)
    fast = accelerated(model, x)
    found = rows(fast)
    assert {r.type for r in found} == {"ConvReLU2d (torch.ao)", "Linear (torch.ao)"}
    for r in found:
        assert r.kernel == "torch"
        assert r.reason.startswith("called with quantised tensors (torch.quint8), as torch's static")
    assert torch.equal(fast(x), model(x))


class _WithScripted(nn.Module):
    """A compiled part between layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(96, 96), nn.Linear(96, 96)
        self.compiled = torch.jit.script(nn.Sequential(nn.Linear(96, 96), nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.compiled(self.first(x)))
        return y


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_parts_are_left_alone(tmp_path) -> None:
    model, x = _WithScripted().eval(), torch.randn(32, 96)
    pared.prune(model, 0.9, include=["first", "last"])
    fast = pared.accelerate(model, x)
    assert all(isinstance(m, Linear) for m in (fast.first, fast.last))
    assert isinstance(fast.compiled, torch.jit.ScriptModule)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    pared.save(fast, tmp_path / "m.pared")
    assert torch.equal(pared.load(tmp_path / "m.pared", _WithScripted().eval())(x), fast(x))
