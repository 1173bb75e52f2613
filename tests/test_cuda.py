"""The CUDA part: what it says when it is not there, host logic without a GPU, kernels where there is one."""

from __future__ import annotations

import sys
import types

import pytest

from pared import _cuda

torch = pytest.importorskip("torch")


def usable() -> bool:
    try:
        _cuda.kernels(0)
    except RuntimeError:
        return False
    return torch.cuda.is_available()


gpu = pytest.mark.skipif(not usable(), reason="needs an NVIDIA GPU, with CUDA builds of torch and pared")


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


@pytest.mark.parametrize(("dtype", "short"), [("float32", "f32"), ("float16", "f16"), ("bfloat16", "bf16")])
def test_an_error_names_the_kernel(module, dtype, short):
    # No such device, whether or not there is a driver.
    with pytest.raises(RuntimeError, match=rf"^threshold_mask_{short}: CUDA error \d+ \(cudaError\w+\): "):
        module.threshold_mask(x=64, dtype=dtype, n=1, threshold=64, mask=64, device=9999, stream=0)


def test_arguments_of_the_launcher(module):
    ok = {"x": 64, "dtype": "float32", "n": 1, "threshold": 64, "mask": 64, "device": 0, "stream": 0}
    for change, error, message in [
        ({"dtype": "float64"}, TypeError, "x: expected dtype float32 or float16 or bfloat16, got float64"),
        ({"n": -1}, ValueError, "n: expected a non-negative size, got -1"),
        ({"x": 66}, ValueError, "x: expected memory aligned"),
        ({"mask": 0}, ValueError, "expected device memory, got null"),
    ]:
        with pytest.raises(error, match=message):
            module.threshold_mask(**(ok | change))


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("offset", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 127, 4096, 4097, 10**6 + 3, 2**33 + 5])
def test_launch_plan_covers_each_element_once(module, item, offset, n):
    x, mask = 1 << 20, (1 << 21) + offset
    head, vectors, tail, wide, blocks = module.plan_mask(x + offset * item, mask, n, item, 132)
    per_load = 16 // item
    assert head + vectors * per_load + tail == n
    assert 0 <= head < per_load
    assert 0 <= tail < per_load
    if vectors:
        assert (x + (offset + head) * item) % 16 == 0
    assert wide == ((mask + head) % per_load == 0)
    # Head and tail have a thread each; the grid is never larger than what is resident at once.
    assert (blocks == 0) == (n == 0)
    assert blocks <= 132 * 6
    assert blocks >= min(132 * 6, vectors / (256 * 4))


def test_tensors_are_checked_before_any_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with pytest.raises(TypeError, match="x: expected a CUDA tensor, got one on cpu"):
        _cuda.threshold_mask(torch.ones(3), torch.ones(()))
    with pytest.raises(TypeError, match="x: expected a CUDA tensor, got list"):
        _cuda.threshold_mask([1.0], torch.ones(()))
    with FakeTensorMode():  # shapes, types and devices without memory behind them
        x, t = torch.empty(4, 6, device="cuda"), torch.empty((), device="cuda")
        for bad_x, bad_t, error, message in [
            (x.T, t, ValueError, "x: expected contiguous memory"),
            (x.double(), t, TypeError, "x: expected dtype float32 or float16 or bfloat16, got torch.float64"),
            (x, t.half(), TypeError, r"threshold: expected one float32 element, got torch.float16 \[\]"),
            (x, x, TypeError, r"threshold: expected one float32 element, got torch.float32 \[4, 6\]"),
            (x, torch.empty(()), TypeError, "threshold: expected a CUDA tensor, got one on cpu"),
            (x, torch.empty((), device="cuda:1"), ValueError, "threshold: expected a tensor on cuda:0"),
        ]:
            with pytest.raises(error, match=message):
                _cuda.threshold_mask(bad_x, bad_t)


@gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 4095, 4096, 100_003, 1 << 22])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_threshold_mask(dtype, n, offset):
    storage = torch.randn(n + offset, device="cuda").to(getattr(torch, dtype))
    x = storage[offset:]
    if n > 2:
        x[1], x[2] = float("nan"), float("inf")
    for value in (0.5, 0.0, -1.0, float("inf"), float("nan")):
        t = torch.tensor(value, device="cuda")
        if n:
            t = x.float().abs().nanmedian() if value == 0.5 else t
        assert torch.equal(_cuda.threshold_mask(x, t), x.float().abs() > t)


@gpu
def test_threshold_mask_past_two_to_the_31():
    x = torch.zeros((1 << 31) + 24, dtype=torch.float16, device="cuda")
    x[[0, 1 << 31, -1]] = 2
    mask = _cuda.threshold_mask(x, torch.tensor(1.0, device="cuda"))
    assert mask.nonzero().flatten().tolist() == [0, 1 << 31, (1 << 31) + 23]


@gpu
def test_threshold_mask_runs_on_torch_stream_and_in_a_graph():
    x, t = torch.randn(100_003, device="cuda"), torch.tensor(0.5, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.add_(1)
        mask = _cuda.threshold_mask(x, t)  # enqueued behind the sleep and the addition
    side.synchronize()
    assert torch.equal(mask, x.abs() > t)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = _cuda.threshold_mask(x, t)
    x.mul_(3)
    t.fill_(1.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(mask, x.abs() > t)


@gpu
def test_the_current_device_is_restored():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, t = torch.randn(1000, device="cuda:1"), torch.tensor(0.5, device="cuda:1")
    assert torch.equal(_cuda.threshold_mask(x, t), x.abs() > t)
    assert torch.cuda.current_device() == 0
