"""Int8 layers in models: the module, the file, the operator, and what `pared.accelerate` makes of 8 bits."""

from __future__ import annotations

import copy
import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from _models import set_times, sparse_conv, sparse_linear
from torch import nn

import pared
import pared._accelerate as acc
from pared.nn import Conv2d, Linear, PackedModule
from pared.ops import Int8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions are under test here, not times: what goes together in one call would hang on them."""
    monkeypatch.setattr(acc.timing, "LAYER_SECONDS", 0.0)
    monkeypatch.setattr(acc.timing, "MODEL_SECONDS", 0.0)
    monkeypatch.setattr(acc.timing, "time_hand_over", lambda layers, calls: 0.0)
    monkeypatch.setattr(acc.timing, "time_sharing", lambda *_: 0.0)


def fastest(*formats: str) -> Any:
    """For `set_times`: dense takes 1 s, the formats in this order ever longer fractions of it."""
    return lambda name, m: 1.0 if m is None else 0.2 * (1 + formats.index(m.format))


def model(seed: int = 0) -> nn.Sequential:
    return nn.Sequential(
        sparse_linear(64, 96, 0.5, seed=seed),
        nn.GELU(),
        sparse_linear(96, 48, 0.5, seed=seed + 1),
        nn.ReLU(),
        sparse_linear(48, 10, 0.5, seed=seed + 2),
    )


def formats(m: nn.Module) -> list[str]:
    return [x.format for x in m.modules() if isinstance(x, PackedModule)]


def converted(m: nn.Module, x: Any, **kwargs: Any) -> nn.Module:
    arguments = {"precision": "int8", "min_speedup": 0, "progress": False, "formats": ["int8", "csr"]}
    return pared.accelerate(m, x, **{**arguments, **kwargs})


# -- the module


def foreign() -> Linear:
    """With values that pared's own quantization would not choose, and a static input."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-128, 100, (24, 17), dtype=torch.int8, generator=generator)
    q[:, 0] = -128
    scales = torch.rand(24, generator=generator) * 0.1
    packed = Int8.from_quantized(
        q, scales, activation_scale=0.05, activation_zero=7, activation_dtype="uint8"
    )
    return Linear(packed, torch.randn(24, generator=generator), "relu")


def test_the_module_computes_what_the_operation_does() -> None:
    plain = nn.Linear(17, 24)
    layer = Linear.from_module(plain, format="int8", activation="gelu")
    x = torch.randn(2, 3, 17)
    packed = Int8.from_dense(plain.weight)
    assert torch.equal(layer(x), pared.ops.linear(x, packed, plain.bias.detach(), "gelu"))
    assert "format=int8" in repr(layer)
    assert torch.equal(layer.to_module().weight, torch.as_tensor(packed.to_dense()))


def test_state_dicts_copies_and_damage() -> None:
    layer, other = foreign(), Linear.from_module(nn.Linear(17, 24), format="int8", activation="relu")
    x = torch.randn(5, 17)
    for twin in (copy.deepcopy(layer), other):
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), layer(x))
    state = layer.state_dict()
    state["packed"][300] ^= 1
    with pytest.raises(RuntimeError, match="expected checksum"):
        other.load_state_dict(state)


def test_compile_export_and_opcheck() -> None:
    layer = foreign()
    x = torch.randn(5, 17)
    with torch.no_grad():
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    from pared.ops._library import linear_op

    arguments = (x, layer.packed, layer.bias, 24, "relu")
    assert set(torch.library.opcheck(linear_op, arguments).values()) == {"SUCCESS"}


def foreign_conv(**kwargs: Any) -> Conv2d:
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-128, 100, (24, 6, 3, 3), dtype=torch.int8, generator=generator)
    scales = torch.rand(24, generator=generator) * 0.1
    packed = Int8.from_quantized(
        q, scales, groups=2, activation_scale=0.05, activation_zero=7, activation_dtype="uint8"
    )
    return Conv2d(packed, torch.randn(24, generator=generator), padding=1, activation="relu", **kwargs)


def test_a_convolution_compiled_and_exported() -> None:
    layer = foreign_conv(stride=2)
    x = torch.randn(2, 12, 9, 9)
    with torch.no_grad():
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        sparse_conv(8, 24, 3, 0.5, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        sparse_conv(24, 16, 3, 0.5, padding=1, groups=2, seed=1),
        nn.ReLU(),
        sparse_conv(16, 5, 1, 0.5, stride=2, padding_mode="reflect", padding=1, seed=2),
    ).eval()
    norm = layers[1]
    with torch.no_grad():
        for t in (norm.weight, norm.running_var):
            t.copy_(torch.rand(24) + 0.5)
        for t in (norm.bias, norm.running_mean):
            t.copy_(torch.randn(24))
        norm.weight[3] = -0.7
    return layers


@pytest.mark.parametrize("format", ["int8", "bsr8"])
def test_accelerate_converts_convolutions(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """Within the bound of 8 bits, with the normalisation in it; also restored, and saved and loaded."""
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5)
    plain, x = convolutions(), torch.randn(2, 8, 11, 10)
    fast = converted(plain, x, formats=[format])
    rows = pared.report(fast).layers
    assert formats(fast) == [format] * 3
    assert rows[0].norm
    assert all(0 < row.error <= row.bound for row in rows)
    want, y = plain(x).detach(), fast(x)
    assert 0 < (y - want).abs().max() < 0.05 * want.abs().max()
    loaded = pared.load(io.BytesIO(saved(fast)), convolutions())
    # A folded weight is unfolded for the file: its integers come back, its scales up to their rounding.
    torch.testing.assert_close(loaded(x), y, rtol=1e-5, atol=1e-5)
    if format == "int8":
        for mine, theirs in zip(fast.modules(), loaded.modules(), strict=True):
            if isinstance(mine, Conv2d):
                q, scales = mine.packed_weight().to_quantized()
                again, others = theirs.packed_weight().to_quantized()
                assert np.array_equal(q, again)
                np.testing.assert_allclose(scales, others, rtol=1e-6 if "fold_scale" in mine._buffers else 0)
    back = pared.restore(fast)
    torch.testing.assert_close(back(x), want, rtol=0, atol=0.05 * float(want.abs().max()))


def test_the_bound_of_a_convolution_is_no_larger_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are off by one step are beyond it."""
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5)
    pack = acc.choose.pack

    def coarse(format: str, weight: torch.Tensor, groups: int = 1, record: Any = None) -> Any:
        return pack(format, weight + weight.abs().amax() / 16, groups, record)

    plain, x = convolutions()[3:4], torch.rand(1, 24, 9, 9)
    assert formats(converted(plain, x, max_error=10, formats=["int8"])) == ["int8"]
    monkeypatch.setattr(acc.choose, "pack", coarse)
    assert formats(converted(plain, x, max_error=10, formats=["int8"])) == []


def test_a_convolution_keeps_its_integers_in_a_file() -> None:
    layer = foreign_conv()
    fast = nn.Sequential(layer)
    report = pared.report(converted(nn.Sequential(nn.Conv2d(12, 24, 3)), torch.randn(1, 12, 5, 5)))
    vars(fast)[acc._ATTRIBUTE] = report
    x = torch.randn(2, 12, 9, 9)
    loaded = pared.load(io.BytesIO(saved(fast)), nn.Sequential(nn.Conv2d(12, 24, 3, padding=1, groups=2)))
    assert torch.equal(loaded[0].packed, layer.packed)
    assert torch.equal(loaded(x), layer(x))


# -- the file


def saved(m: nn.Module) -> bytes:
    file = io.BytesIO()
    pared.save(m, file)
    return file.getvalue()


def test_a_loaded_convolution_says_the_dtype_of_its_weight() -> None:
    """Models of images in transformers cast their input to it."""
    for dtype in (torch.float32, torch.bfloat16):
        plain = nn.Conv2d(3, 8, 4, 4).to(dtype)
        fast = nn.Sequential(Conv2d.from_module(plain, format="int8"))
        file = io.BytesIO()
        pared.save(fast, file)
        file.seek(0)
        loaded: Any = pared.load(file, nn.Sequential(copy.deepcopy(plain)))
        assert fast[0].weight.dtype == loaded[0].weight.dtype == dtype


def test_a_file_holds_the_integers_and_gives_them_back() -> None:
    plain = nn.Sequential(nn.Linear(17, 24), nn.ReLU())
    fast = nn.Sequential(foreign(), nn.Identity())
    data = saved(fast)
    back = pared.load(io.BytesIO(data), plain)
    assert torch.equal(back[0].packed, fast[0].packed)
    x = torch.randn(5, 17)
    assert torch.equal(back(x), torch.relu(fast(x)))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(17, 24), nn.ReLU())
    assert torch.equal(pared.load(io.BytesIO(data), empty)(x), back(x))
    assert saved(nn.Sequential(back[0], nn.Identity())) == data
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = json.loads(about["__metadata__"]["pared"])["tensors"]
    assert (tensors["0.weight"]["dtype"], tensors["0.weight_scale"]["dtype"]) == ("int8", "float32")
    assert back[0].weight_dtype == torch.float32
    assert pared.restore(back)[0].weight.requires_grad


def test_a_file_is_refused_by_another_architecture() -> None:
    data = saved(nn.Sequential(foreign()))
    for wrong in (nn.Linear(18, 24), nn.Linear(17, 23), nn.Linear(17, 24, bias=False)):
        with pytest.raises(pared.FormatError):
            pared.load(io.BytesIO(data), nn.Sequential(wrong))


def test_an_accelerated_model_through_a_file() -> None:
    m, x = model(), torch.randn(9, 64)
    fast = converted(m, x, max_error=1, formats=["int8"])
    assert formats(fast) == ["int8"] * 3
    back = pared.load(io.BytesIO(saved(fast)), m)
    assert torch.equal(back(x), fast(x))
    restored = pared.restore(fast)
    assert [type(layer) for layer in restored] == [type(layer) for layer in m]
    largest = m(x).abs().max()
    assert (restored(x) - m(x)).abs().max() < 0.05 * largest


# -- accelerate


def test_float32_is_the_default_and_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5)
    fast = pared.accelerate(model(), torch.randn(9, 64), progress=False)
    assert "int8" not in formats(fast)


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_8_bits_where_they_are_fastest(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    set_times(monkeypatch, fastest("int8", "csr"))
    m, x = model(), torch.randn(9, 64)
    fast = converted(m, x, precision=precision, max_error=1.0)
    assert formats(fast) == ["int8"] * 3
    report = pared.report(fast)
    assert report.precision == precision
    assert report.tolerance == 1.0
    assert 0 < report.relative_error < 0.1
    for row in report.layers:
        assert row.kernel == "int8"
        assert 0 < row.error <= row.bound
        assert "8 bits change its output by" in row.reason
    assert "int8" in str(report)
    want = m(x).detach()
    assert math.isclose(
        float((fast(x) - want).abs().max() / want.abs().max()), report.relative_error, rel_tol=1e-4
    )


def test_exact_kernels_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, fastest("csr", "int8"))
    assert formats(converted(model(), torch.randn(9, 64), max_error=1.0)) == ["csr"] * 3


def test_over_budget_the_best_exact_kernel_takes_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, fastest("int8", "csr"))
    fast = converted(model(), torch.randn(9, 64), max_error=1e-5)
    assert formats(fast) == ["csr"] * 3
    report = pared.report(fast)
    assert report.relative_error <= 1e-5
    assert all("but with it outputs would differ by more than 1e-05" in row.reason for row in report.layers)
    assert all(row.speedup == pytest.approx(2.5) for row in report.layers)


def test_over_budget_and_without_an_exact_kernel_layers_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, fastest("int8"))
    m, x = model(), torch.randn(9, 64)
    fast = converted(m, x, max_error=0.0, formats=["int8"])
    assert formats(fast) == []
    assert torch.equal(fast(x), m(x))


def test_within_the_budget_as_many_layers_as_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, fastest("int8", "csr"))
    # Its own numbers: with some inputs no single layer in 8 bits is within nine tenths of the error of all.
    m, x = model(), torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    every = pared.report(converted(m, x, max_error=1.0)).relative_error
    fast = converted(m, x, max_error=every * 0.9)
    found = formats(fast)
    assert "csr" in found
    assert "int8" in found
    assert pared.report(fast).relative_error <= every * 0.9


def test_a_layer_that_8_bits_ruin_is_the_one_that_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, fastest("int8", "csr"))
    m, x = model(), torch.randn(9, 64)
    # One input so large that the others of its token round to nothing.
    x[:, 5] = 3000.0
    with torch.no_grad():
        m[0].weight[:, 5] = 0
    fast = converted(m, x, max_error=0.05)
    kernels = {row.name: row.kernel for row in pared.report(fast).layers}
    assert kernels["0"] == "csr"
    assert kernels["2"] == kernels["4"] == "int8"


def test_the_budgets_without_max_error(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, fastest("int8", "csr"))
    for precision, budget in (("int8", 0.1), ("auto", 0.02)):
        report = pared.report(converted(model(), torch.randn(9, 64), precision=precision))
        assert report.relative_error <= budget
        if any(row.kernel == "int8" for row in report.layers):
            assert report.tolerance == budget


def test_a_kernel_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of 8 bits is no licence: a product with a wrong scale is beyond it."""
    set_times(monkeypatch, fastest("int8"))
    from_dense = Int8.from_dense.__func__  # type: ignore[attr-defined]

    def wrong(cls: Any, weight: Any, **kwargs: Any) -> Int8:
        q, scales = from_dense(cls, weight, **kwargs).to_quantized()
        return Int8.from_quantized(q, scales * 1.5)

    monkeypatch.setattr(Int8, "from_dense", classmethod(wrong))
    fast = converted(model(), torch.randn(9, 64), max_error=1.0, formats=["int8"])
    assert formats(fast) == []
    assert "more than its bound" in pared.report(fast).layers[0].reason


def test_bad_arguments() -> None:
    x = torch.randn(9, 64)
    with pytest.raises(ValueError, match="precision: expected 'float32', 'int8', 'auto', got 'int4'"):
        pared.accelerate(model(), x, precision="int4")
    with pytest.raises(ValueError, match=r"formats: expected names among .* with precision='float32', got"):
        pared.accelerate(model(), x, formats=["int8"])
