"""`pared.accelerate` for a CUDA device: what it chooses, on a device and a clock that the test describes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import pared
import pared._accelerate as acc
from pared._choices import Choices
from pared._report import KEPT
from pared._target import Cuda, LayerCall, target_of
from pared._timing_cuda import copies_beyond, sample_rounds
from pared.nn import Linear

# Seconds by the kernel that a call launches; torch's own product launches none.
FAST = {"decode": 0.2, "int8": 0.5, "block_sparse": 0.6, "csr": 0.7, "expand": 2.0}


class FakeClock:
    def __init__(self, module, seconds, capturable=True):
        self.module, self.seconds, self.capturable = module, seconds, capturable
        self.prepared = []

    def prepare(self, call, copies, graph):
        if graph and not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.module.take_launched()
        call(0)
        call(copies - 1)
        launched = self.module.take_launched()
        self.prepared.append((copies, graph))
        took = [s for name, s in self.seconds.items() if any(k.startswith(name) for k in launched)]
        return lambda: max(took, default=1.0)


class FakeCuda(Cuda):
    """The emulator's device: the CPU's memory."""

    def properties(self):
        return {"name": "Fake GPU", "capability": [9, 0], "l2": 1 << 16}


@pytest.fixture
def device(emulated, monkeypatch):
    """A function that makes `accelerate` run on the fake device, with these times."""
    monkeypatch.setattr("pared._cuda._emulated", emulated)

    def use(seconds, **options):
        clock = FakeClock(emulated, seconds, **options)

        def target(model):
            return FakeCuda(torch.device("cpu"), sum(p.nbytes for p in model.parameters()), clock)

        monkeypatch.setattr(acc, "target_of", target)
        return clock

    return use


def model(dtype=torch.bfloat16, zeros=0.8, width=128):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(width, 192), nn.ReLU(), nn.Linear(192, width)).to(dtype).eval()
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight[torch.rand(layer.weight.shape) < zeros] = 0
    return net


def kernels(fast):
    return [row.kernel for row in pared.report(fast).layers]


def test_the_fastest_is_chosen_and_the_report_names_the_device(device, tmp_path):
    clock = device(FAST)
    net, x = model(), torch.randn(1, 128).bfloat16()
    fast = pared.accelerate(net, x, cache=False)
    assert kernels(fast) == ["bitmap", "bitmap"]
    report = pared.report(fast)
    assert report.machine["device"] == "Fake GPU"
    assert "Fake GPU" in str(report)
    assert report.memory_after < 0.6 * report.memory_before
    assert {c.kernel.split()[0] for c in report.layers[0].candidates} >= {KEPT, "bitmap", "csr"}
    assert any("times are of CUDA graphs; called without one" in note for note in report.notes)
    assert any(copies >= 8 and graph for copies, graph in clock.prepared)
    bound = 4 * torch.finfo(x.dtype).eps
    assert torch.allclose(fast(x).float(), net(x).float(), atol=bound, rtol=bound)
    # From the device to a file, and from there to the CPU.
    pared.save(fast, tmp_path / "model.pared")
    again = pared.load(tmp_path / "model.pared", net)
    assert [m.format for m in again if isinstance(m, Linear)] == ["bitmap", "bitmap"]
    assert again[0]._on_device is None
    assert torch.allclose(again(x).float(), net(x).float(), atol=bound, rtol=bound)
    restored = pared.restore(fast)
    assert torch.equal(restored[0].weight, net[0].weight)


@pytest.mark.parametrize(
    ("seconds", "precision", "dtype", "want"),
    [
        (FAST | {"decode": 1.5, "csr": 1.2}, "float32", torch.bfloat16, KEPT),
        (FAST | {"decode": 0.9}, "int8", torch.bfloat16, "int8"),
        (FAST, "int8", torch.float16, "b8"),
        (FAST, "float32", torch.float32, "csr"),
        (FAST, "int8", torch.float32, "int8"),
    ],
)
def test_choices(device, seconds, precision, dtype, want):
    device(seconds)
    net, x = model(dtype), torch.randn(4, 128).to(dtype)
    fast = pared.accelerate(net, x, precision, cache=False)
    few = {"bitmap", "bitmap8", "int8wo"}  # equally fast for this clock
    assert all(k in few if want == "b8" else k == want for k in kernels(fast)), kernels(fast)
    fast(x)


class Projections(nn.Module):
    """Three of one input, and one of what comes out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        for m in (self.q, self.k, self.v, self.o):
            m.weight.data *= torch.rand(64, 64) < 0.2

    def forward(self, x):
        return self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))


@pytest.mark.parametrize("gain", [1.5, 1.0, None])
def test_projections_of_one_token_are_one_launch(device, emulated, monkeypatch, tmp_path, gain):
    device(FAST)
    if gain is not None:
        monkeypatch.setattr(acc.timing, "time_sharing", lambda *_: gain)
    net, x = Projections().bfloat16().eval(), torch.randn(1, 64).bfloat16()
    fast = pared.accelerate(net, x, formats=["bitmap"], cache=False)
    together = gain == 1.5  # None: the device's clock, for which a launch costs nothing
    assert fast.q._sharers == ((fast.k, fast.v) if together else ())
    emulated.take_launched()
    y = fast(x)
    assert sum(emulated.take_launched().values()) == (2 if together else 4)
    eps = torch.finfo(x.dtype).eps
    assert torch.allclose(y.float(), net(x).float(), atol=4 * eps, rtol=4 * eps)
    rows = {row.name: row.reason for row in pared.report(fast).layers}
    assert ("computes k, v too: 1.50x" in rows["q"]) is together
    assert rows["v"].endswith("; computed with q") is together
    memory = pared.report(fast).memory_after
    if gain == 1.0:
        monkeypatch.setattr(acc.timing, "time_sharing", lambda *_: 2.0)
        again = pared.accelerate(net, x, formats=["bitmap"], cache=False)
        assert pared.report(again).memory_after <= memory + 256
    # In a file, and from there to the device.
    pared.save(fast, tmp_path / "model.pared")
    loaded = pared.load(tmp_path / "model.pared", Projections().bfloat16())
    assert torch.allclose(loaded(x).float(), net(x).float(), atol=4 * eps, rtol=4 * eps)
    for m in (loaded.q, loaded.k, loaded.v, loaded.o):
        assert m._on_device is None
        m._hold(m.packed_weight().to("cpu", torch.bfloat16))
    emulated.take_launched()
    y = loaded(x)
    assert sum(emulated.take_launched().values()) == (2 if together else 4)
    assert torch.allclose(y.float(), net(x).float(), atol=4 * eps, rtol=4 * eps)
    assert torch.equal(pared.restore(fast).k.weight, net.k.weight)


@pytest.mark.parametrize(("tokens", "near"), [(1, True), (4, False)])
def test_columns_are_kept_the_way_that_suits_the_calls(device, tokens, near):
    device(FAST)
    net, x = model(torch.float32), torch.randn(tokens, 128)
    fast = pared.accelerate(net, x, "float32", formats=["csr"], cache=False)
    assert [m._on_device.near for m in fast if isinstance(m, pared.nn.PackedModule)] == [near] * 2
    fast(x)


def images(zeros=0.8, **options):
    torch.manual_seed(3)
    conv = nn.Conv2d(32, 48, 1, stride=2, **options)
    net = nn.Sequential(conv, nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 16, 3)).eval()
    with torch.no_grad():
        for layer in (net[0], net[3]):
            layer.weight[torch.rand(layer.weight.shape) < zeros] = 0
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net


@pytest.mark.parametrize(
    ("seconds", "precision", "want"),
    [(FAST, "float32", "csr"), (FAST, "int8", "int8"), (FAST | {"csr": 1.1, "int8": 1.02}, "int8", KEPT)],
)
def test_convolutions_of_pixels_are_candidates(device, seconds, precision, want, tmp_path):
    device(seconds)
    net, x = images(), torch.randn(2, 32, 9, 7)
    fast = pared.accelerate(net, x, precision, cache=False)
    first, second = pared.report(fast).layers
    assert first.kernel == want
    assert second.kernel == KEPT
    assert "expected a convolution of kernel 1x1, without padding and groups" in second.reason
    if want == KEPT:
        assert "less than 1.05x" in first.reason
        return
    assert first.norm
    assert first.activation == "relu"
    tolerance = 1e-4 if want == "csr" else 0.05
    assert (fast(x) - net(x)).abs().max() <= tolerance * net(x).abs().max()
    pared.save(fast, tmp_path / "model.pared")
    again = pared.load(tmp_path / "model.pared", images())
    assert again[0]._on_device is None
    assert (again(x) - net(x)).abs().max() <= tolerance * net(x).abs().max()
    if want == "csr":
        assert torch.equal(pared.restore(fast)[0].weight, net[0].weight)


@pytest.mark.parametrize("options", [{"padding": 1}, {"groups": 2}])
def test_other_convolutions_stay(device, options):
    device(FAST)
    fast = pared.accelerate(images(**options), torch.randn(2, 32, 9, 7), cache=False)
    assert kernels(fast) == [KEPT, KEPT]
    assert "expected a convolution of kernel 1x1" in pared.report(fast).layers[0].reason


def test_weights_without_zeros_take_8_bits(device):
    device(FAST)
    net, x = model(torch.float16, zeros=0.0), torch.randn(2, 128).half()
    fast = pared.accelerate(net, x, "int8", cache=False)
    assert kernels(fast) == ["int8wo", "int8wo"]
    assert all(m._on_device.format == "dense8" for m in fast if isinstance(m, Linear))
    moved = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert torch.equal(moved(x), fast(x))


def test_the_crossover_is_measured_and_the_shape_decides(device):
    clock = device(FAST)
    net = model()
    for expand, want in ((2.0, 256), (0.1, 32)):
        clock.seconds = FAST | {"expand": expand}
        fast = pared.accelerate(net, torch.randn(1, 128).bfloat16(), cache=False)
        assert fast[0]._on_device.few_tokens == want
    clock.module.take_launched()
    fast(torch.randn(32, 128).bfloat16())
    assert not any(k.startswith("expand") for k in clock.module.take_launched())
    fast(torch.randn(33, 128).bfloat16())
    assert any(k.startswith("expand") for k in clock.module.take_launched())


def test_a_model_that_no_graph_holds_is_timed_as_it_is_called(device):
    clock = device(FAST)
    target = acc.target_of(model())
    clock.capturable = False
    t, remark = target.time_models({"dense": lambda: None, "pared": lambda: None}, 1.0)
    assert t.median("pared") == 1.0
    assert remark == "no CUDA graph can hold the model (RuntimeError): times are of eager calls"
    assert clock.prepared == [(1, False), (1, False)]


def test_weights_that_leave_the_cache_are_copied(device):
    clock = device(FAST)
    net, x = model(), torch.randn(1, 128).bfloat16()
    layer = LayerCall(net[0], x, [])
    copy = layer.copy()
    assert torch.equal(copy(), layer())
    assert copy.module.weight.data_ptr() != net[0].weight.data_ptr()
    target = acc.target_of(net)
    assert target.cold
    small = LayerCall(nn.Linear(32, 64).bfloat16(), torch.randn(1, 32).bfloat16(), [])
    target.time_layers({"dense": small}, 1.0)
    assert clock.prepared[-1] == (copies_beyond(1 << 16, small.nbytes), True)
    assert clock.prepared[-1][0] > 8
    packed = Linear.from_module(net[0], format="bitmap")
    target.place(packed, {1: 1})
    mine = LayerCall(packed, x, [nn.ReLU()])
    other = mine.copy()
    assert other.nbytes == mine.nbytes == packed._on_device.nbytes
    assert other.module._on_device.blocks.data_ptr() != packed._on_device.blocks.data_ptr()
    assert torch.equal(other(), mine())


def test_out_of_memory_keeps_the_layer(device, monkeypatch):
    device(FAST)

    def place(self, module, calls):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FakeCuda, "place", place)
    fast = pared.accelerate(model(), torch.randn(1, 128).bfloat16(), cache=False)
    assert kernels(fast) == [KEPT, KEPT]
    assert "no memory left" in pared.report(fast).layers[0].reason


def test_times_of_a_device_are_not_those_of_the_cpu(device):
    device(FAST)
    target = acc.target_of(model())
    assert Choices(None, target.machine()).key(a=1) != Choices().key(a=1)


def test_devices_that_do_not_fit():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match="model: expected all of it on one device, got "):
        pared.accelerate(net, torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"on the CPU or on a CUDA device, got 0\.weight on meta"):
        pared.accelerate(net.to("meta"), torch.ones(1, 4))
    assert target_of(nn.Linear(2, 2)).kind == "cpu"
    assert target_of(nn.ReLU()).kind == "cpu"


def test_samples_are_taken_round_by_round():
    seen = []
    samplers = {n: (lambda n=n: seen.append(n) or 1.0) for n in "abc"}
    t = sample_rounds(samplers, 5)
    assert t.rounds == 5
    assert all(sorted(seen[3 * i : 3 * i + 3]) == ["a", "b", "c"] for i in range(5))
    assert dataclasses.is_dataclass(t)
