"""What the caller has set around a call: the default device and dtype, autocast, modes, other processes."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from _models import set_times
from torch import nn
from torch.nn import functional as F

import pared
import pared._accelerate as acc
from pared.nn import PackedModule


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 8)).eval()


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 16, 8),
    ).eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


BATCHES = [(torch.randn(16, 24), torch.arange(16) % 8) for _ in range(3)]
INPUTS = [x for x, _ in BATCHES]
CASES = {
    "mlp": (mlp, INPUTS[0]),
    "convolutions": (convolutions, torch.randn(2, 8, 12, 12)),
    "encoder": (encoder, torch.randn(2, 9, 32)),
}


@pytest.fixture
def elsewhere():
    """As ``torch.set_default_device("cuda")`` does, with a device that any computation fails on."""
    with torch.device("meta"):
        yield


@pytest.fixture
def ours_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5 if m.activation is None else 0.25)


def check(fast: nn.Module, model: nn.Module, x: torch.Tensor, tolerance: float = 1e-4) -> None:
    got, want = fast(x).detach(), model(x).detach()
    assert got.device.type == "cpu"
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_another_default_device(elsewhere, ours_is_faster, case, precision):
    make, x = CASES[case]
    with torch.device("cpu"):
        model = make()
    pared.prune(model, 0.8)
    fast = pared.accelerate(model, x, precision, max_error=1.0 if precision == "int8" else None)
    assert any(isinstance(m, PackedModule) for m in fast.modules())
    tolerance = 0.2 if precision == "int8" else 1e-4
    check(fast, model, x, tolerance)
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    loaded = pared.load(file, make)  # on the meta device, as docs have it
    check(loaded, model, x, tolerance)
    check(pared.restore(loaded), model, x, tolerance)
    check(copy.deepcopy(fast), model, x, tolerance)


def test_timed_under_another_default_device(elsewhere):
    with torch.device("cpu"):
        model = mlp()
    pared.prune(model, 0.8)
    check(pared.accelerate(model, INPUTS[0], min_speedup=0), model, INPUTS[0])


@pytest.mark.parametrize("importance", ["random", "wanda", "sparsegpt", "taylor", "mutual_information"])
def test_pruned_under_another_default_device(elsewhere, importance):
    with torch.device("cpu"):
        model = mlp()
    report = pared.prune(model, 0.5, importance=importance, data=BATCHES, loss_fn=loss)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_channels_under_another_default_device(elsewhere):
    with torch.device("cpu"):
        model, images = convolutions(), torch.randn(2, 8, 12, 12)
    pared.prune_channels(model, images, 0.5)
    assert model(images).shape == (2, 8)


@pytest.mark.parametrize("how", [{"bits": 8}, {"bits": 4, "group": 16}, {"bits": "auto"}, {"sparsity": 0.5}])
def test_quantized_under_another_default_device(elsewhere, how):
    with torch.device("cpu"):
        model = mlp()
    plain = copy.deepcopy(model)
    pared.quantize(model, INPUTS, **how)
    check(model, plain, INPUTS[0], 1.0)


# -- autocast


def test_accelerated_under_autocast(ours_is_faster):
    model, x = mlp(), INPUTS[0]
    pared.prune(model, 0.8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = pared.accelerate(model, x)
        assert pared.report(fast).notes == [acc.AUTOCAST]
        assert fast(x).dtype == torch.float32
    assert all(row.kernel != "torch" for row in pared.report(fast).layers)
    check(fast, model, x)
    assert pared.report(pared.accelerate(model, x)).notes == []


# -- a model that is changed in place after it has run


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "share_memory"])
@pytest.mark.parametrize("case", CASES)
def test_converted_in_place_after_a_call(ours_is_faster, case, change):
    make, x = CASES[case]
    model = make()
    pared.prune(model, 0.8)
    fast = pared.accelerate(model, x)
    want = fast(x)
    getattr(fast, change)()
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(change, torch.float32)
    if change == "double" and case != "mlp":
        fast.float()
    got = fast(x.to(dtype))
    assert got.dtype == dtype
    assert float((got.float() - want).abs().max()) <= (0.05 if dtype.itemsize == 2 else 1e-6) * float(
        want.abs().max()
    )


# -- numpy's own numbers and layouts


def test_convolutions_configured_with_numpys_integers(ours_is_faster):
    two, one = np.int64(2), np.int32(1)
    layer = nn.Conv2d(8, 16, 3, stride=two, padding=(one, one), dilation=one)
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(2, 8, 9, 9)
    pared.prune(model, 0.8)
    fast = pared.accelerate(model, x)
    assert isinstance(fast[0], PackedModule)
    check(fast, model, x)
    w = pared.ops.CSR.from_dense(layer.weight.detach())
    assert torch.equal(pared.ops.conv2d(x, w, stride=two), pared.ops.conv2d(x, w, stride=2))
    with pytest.raises(TypeError, match="stride: expected an int or a pair of ints"):
        pared.ops.conv2d(x, w, stride=np.True_)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_errors_about_strides_say_what_to_call(kind):
    dense, x = np.ones((4, 6), np.float32), np.asfortranarray(np.ones((3, 6), np.float32))
    image, kernel = (
        np.ones((2, 8, 8, 3), np.float32).transpose(0, 3, 2, 1)[:, :, ::2],
        np.ones((4, 3, 3, 3), np.float32),
    )
    hint = r"call numpy\.ascontiguousarray\(\)"
    if kind == "torch":
        x, image, hint = torch.from_numpy(x), torch.from_numpy(image), r"call \.contiguous\(\)"
    for call in (
        lambda: pared.ops.linear(x, pared.ops.CSR.from_dense(dense)),
        lambda: pared.ops.topk_mask(x, 3),
        lambda: pared.ops.topk_mask(x, 3, dim=1),
        lambda: pared.ops.conv2d(image, pared.ops.CSR.from_dense(kernel)),
        lambda: pared.ops.max_pool2d(image, 2),
    ):
        with pytest.raises(ValueError, match=hint):
            call()
