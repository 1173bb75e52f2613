"""The CUDA part: what it says when it is not there, host logic without a GPU, kernels where there is one."""

from __future__ import annotations

import os
import sys
import types

import pytest

import pared
from pared import _cuda

torch = pytest.importorskip("torch")


def usable() -> bool:
    try:
        _cuda.kernels(0)
    except RuntimeError:
        return False
    return torch.cuda.is_available()


ONLY_GPU = os.environ.get("PARED_TEST_GPU") == "1"
NO_GPU = "needs an NVIDIA GPU, with CUDA builds of torch and pared"
gpu = pytest.mark.skipif(not ONLY_GPU and not usable(), reason=NO_GPU)


@pytest.fixture
def module():
    """The extension itself: its host logic runs on any machine."""
    try:
        return _cuda._load()
    except RuntimeError:
        pytest.skip("this installation of pared was built without its CUDA part")


def use(monkeypatch, **functions):
    """Put a stand-in in the extension's place: a machine that the test describes."""
    _cuda.kernels.cache_clear()
    stand_in = types.ModuleType("pared._cuda_kernels")
    stand_in.ARCHITECTURES = "80-real, 90"
    stand_in.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, "pared._cuda_kernels", stand_in)


@pytest.fixture(autouse=True)
def forget_devices():
    yield
    _cuda.kernels.cache_clear()


def test_a_build_without_cuda_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pared._cuda_kernels", None)
    assert _cuda.status() == "not built"
    with pytest.raises(RuntimeError, match=r"built without its CUDA part; .*PARED_CUDA=on"):
        _cuda.kernels(0)


def test_a_machine_without_a_driver(monkeypatch):
    def device_count():
        raise RuntimeError("device_count: CUDA error 35 (cudaErrorInsufficientDriver): too old")

    use(monkeypatch, device_count=device_count)
    with pytest.raises(RuntimeError, match=r"no usable NVIDIA driver .*error 35"):
        _cuda.kernels(0)
    assert _cuda.status().startswith("no usable NVIDIA driver")


def test_a_machine_without_a_device(monkeypatch):
    use(monkeypatch, device_count=lambda: 0)
    with pytest.raises(RuntimeError, match="shows no device"):
        _cuda.kernels(0)


def test_a_device_that_is_too_old(monkeypatch):
    info = {"name": "Old", "capability": (7, 5), "multiprocessors": 40, "supported": False}
    use(monkeypatch, device_count=lambda: 1, device_info=lambda device: info)
    with pytest.raises(RuntimeError, match=r"device 0 \(Old\) has compute capability 7.5; .* 80-real, 90"):
        _cuda.kernels(0)
    assert _cuda.status() == "Old (7.5, not supported)"


def test_a_failure_is_asked_again_a_success_is_not(monkeypatch):
    calls = []
    info = {"name": "New", "capability": (9, 0), "multiprocessors": 132, "supported": True}
    use(monkeypatch, device_count=lambda: 0)
    with pytest.raises(RuntimeError):
        _cuda.kernels(0)
    monkeypatch.setattr(sys.modules["pared._cuda_kernels"], "device_count", lambda: 1)
    sys.modules["pared._cuda_kernels"].device_info = lambda device: calls.append(device) or info
    assert _cuda.kernels(0) is _cuda.kernels(0)
    assert calls == [0]


def test_loading_needs_no_driver_using_does(module):
    reason = _cuda._reason(module)
    if reason is None:
        assert module.device_count() >= 1
    else:
        with pytest.raises(RuntimeError, match="driver"):
            _cuda.kernels(0)


def test_an_error_names_the_kernel(module):
    # No such device, whether or not there is a driver.
    with pytest.raises(
        RuntimeError, match=r"^(select_mask_groups|multiprocessors): CUDA error \d+ \(cudaError\w+\): "
    ):
        rows(module, device=9999)


def rows(module, device=0, k=1, **change):
    x = {"w": 64, "rows": 1, "cols": 1, "stride": 1, "dtype": "float32", "key": "abs", "g": 0, "g_stride": 0}
    x |= {"g_dtype": "float32"}
    rest = {"mask": 64, "nans": 0} | {n: change.pop(n) for n in ("mask",) if n in change}
    module.select_groups(tuple((x | change).values()), k, 1, 1, device=device, stream=0, **rest)


def test_arguments_of_the_launchers(module):
    for change, error, message in [
        ({"dtype": "float64"}, ValueError, "dtype: expected float32, float16 or bfloat16, got 'float64'"),
        ({"key": "max"}, ValueError, "key: expected one of abs, identity, square, abs_mul, got 'max'"),
        ({"k": 2}, ValueError, "k: expected 0 to 1, got 2"),
        ({"cols": 1 << 31}, ValueError, r"x: expected rows of less than 2\*\*31"),
        ({"mask": 0}, ValueError, "expected device memory, got null"),
    ]:
        with pytest.raises(error, match=message):
            rows(module, **change)
    with pytest.raises(ValueError, match="k: expected 1 to 3, got 4"):
        module.plan_select([3], 4, 132)


@gpu
def test_selection_past_two_to_the_31():
    x = torch.zeros((1 << 31) + 24, dtype=torch.float16, device="cuda")
    x[[0, 1 << 31, -1]] = 2
    mask = pared.ops.topk_mask(x, 3, nan="lowest")
    assert mask.nonzero().flatten().tolist() == [0, 1 << 31, (1 << 31) + 23]


@gpu
def test_selection_runs_on_torch_stream_and_in_a_graph():
    x = torch.randn(300_007, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.add_(1)
        got = pared.ops.select_threshold(x, 1000, nan="lowest")  # enqueued behind the sleep and the addition
    side.synchronize()
    assert got.value == x.abs().topk(1000).values[-1]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = pared.ops.topk_mask(x, 1000, nan="lowest")
        with pytest.raises(ValueError, match="while a CUDA graph is captured"):
            pared.ops.topk_mask(x, 1000)
    for _ in range(3):
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert mask.sum() == 1000
        assert x.abs()[mask].min() >= x.abs()[~mask].max()


@gpu
def test_the_current_device_is_restored():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(100_000, device="cuda:1")
    assert pared.ops.topk_mask(x, 10).sum() == 10
    assert torch.cuda.current_device() == 0
