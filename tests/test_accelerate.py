"""pared.accelerate: what it converts, keeps, checks, undoes and refuses."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import FakeTimings, fused_is_faster, set_times, sparse_conv, sparse_linear
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import pared
import pared._accelerate as acc
from pared._accelerate import choose
from pared._fusion import activation_of
from pared._inputs import compare, examples, tolerance
from pared._timing import interleave
from pared.nn import Conv1d, Conv2d, FoldedBatchNorm2d, Fused, Linear, PackedModule


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions are under test here, not times: a few rounds do."""
    monkeypatch.setattr(acc.timing, "LAYER_SECONDS", 0.0)
    monkeypatch.setattr(acc.timing, "MODEL_SECONDS", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, PackedModule | None], float]], None]:
    """Replaces the timer: seconds for a name and a module, None for dense ones."""
    return lambda seconds: set_times(monkeypatch, seconds)


@pytest.fixture
def fused_wins(clock: Any) -> None:
    clock(fused_is_faster)


def convert(model: nn.Module, inputs: Any, **kwargs: Any) -> nn.Module:
    """Every layer that has a kernel, whatever the times say; one format, so that chance does not choose."""
    return pared.accelerate(
        model, inputs, **{"min_speedup": 0, "progress": False, "formats": ["csr"], **kwargs}
    )


def layers(model: nn.Module, kind: type[nn.Module] = PackedModule) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, kind)]


def row(model: nn.Module, name: str) -> Any:
    return next(r for r in pared.report(model).layers if r.name == name)


def mlp(seed: int = 0) -> nn.Sequential:
    return nn.Sequential(
        sparse_linear(16, 32, seed=seed),
        nn.GELU(),
        sparse_linear(32, 8, seed=seed + 1),
        nn.ReLU(),
        nn.Linear(8, 4),
    )


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


# -- what comes out


def test_a_new_model_in_eval_mode_and_the_old_one_untouched() -> None:
    model = mlp().train()
    before = copy.deepcopy(model)
    x = torch.randn(5, 16)
    fast = convert(model, x)
    assert equal_states(model, before)
    assert model.training
    assert model[0].training
    assert not any(m.training for m in fast.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *fast.modules()])
    assert layers(fast) == ["0", "2", "4"]
    y, z = model.eval()(x), fast(x)
    assert not z.requires_grad
    torch.testing.assert_close(z, y.detach(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(fast(x), z)


def race(monkeypatch: pytest.MonkeyPatch, times: Callable[[], Any]) -> None:
    """What timing the whole model gives."""
    monkeypatch.setattr("pared._target.interleave", lambda calls, **kwargs: times())


def test_faster_where_it_should_be_and_dense_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Everything is run as it would be timed; what is noted down is a clock's that no load disturbs.
    def timed(calls: dict[str, Callable[[], Any]], **kwargs: Any) -> FakeTimings:
        for call in calls.values():
            call()
        return FakeTimings(**dict.fromkeys(calls, 0.25) | {"dense": 1.0})

    monkeypatch.setattr("pared._target.interleave", timed)
    model = nn.Sequential(sparse_linear(64, 64, 0.02), nn.Linear(64, 64))
    fast = pared.accelerate(model, torch.randn(8, 64), formats=["csr"])
    assert layers(fast) == ["0"]
    report = pared.report(fast)
    assert (row(fast, "0").speedup, row(fast, "0").before, row(fast, "0").after) == (4.0, 1.0, 0.25)
    assert row(fast, "0").reason == "4.00x faster than dense"
    assert "no kernel is faster with 0.0% zeros" in row(fast, "1").reason
    assert report.speedup == 4.0
    assert report.dense == pared._report.ModelTime(1.0, 1.0)


def test_what_the_real_timer_says_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which layers win depends on the machine and on what else it does; that the times decide does not.
    monkeypatch.undo()
    model = nn.Sequential(sparse_linear(256, 256, 0.02), nn.ReLU(), sparse_linear(256, 256, 0.4))
    fast = pared.accelerate(model, torch.randn(64, 256), formats=["csr"])
    report = pared.report(fast)
    for r in report.layers:
        assert r.before > 0
        assert r.after > 0
        assert (r.kernel == "csr") <= (r.speedup >= 1.05)
    assert report.speedup >= 0.98
    if report.converted:
        assert 0 < report.dense.p50 <= report.dense.p95


def test_layers_that_gain_too_little_stay(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(lambda name, module: 1.0 if module is None else {"0": 0.5, "2": 0.97, "4": 2.0}[name])
    race(monkeypatch, lambda: FakeTimings(dense=1.0, pared=0.8))
    model, x = nn.Sequential(*mlp()[:4], sparse_linear(8, 4)), torch.randn(3, 16)
    fast = pared.accelerate(model, x, fuse=False, formats=["csr"])
    assert layers(fast) == ["0"]
    assert row(fast, "2").kernel == "torch"
    assert "1.03x, less than 1.05x" in row(fast, "2").reason
    assert "0.50x, less than 1.05x" in row(fast, "4").reason
    assert row(fast, "2").before == row(fast, "2").after == 1.0


def test_never_slower(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Layers that look fast alone, in a model that is slow with them: those that gain least go back first.
    clock(lambda name, module: 1.0 if module is None else {"0": 0.7, "2": 0.4, "4": 0.9}[name])
    times = iter([1.5, 1.2, 0.9])
    race(monkeypatch, lambda: FakeTimings(dense=1.0, pared=next(times)))
    model, x = nn.Sequential(*mlp()[:4], sparse_linear(8, 4)), torch.randn(3, 16)
    fast = pared.accelerate(model, x)
    assert layers(fast) == ["2"]
    report = pared.report(fast)
    assert report.speedup == pytest.approx(1 / 0.9)
    assert "the whole model was 0.67x with it" in row(fast, "4").reason
    assert "the whole model was 0.83x with it" in row(fast, "0").reason
    assert len(report.notes) == 2
    race(monkeypatch, lambda: FakeTimings(dense=1.0, pared=2.0))
    fast = pared.accelerate(model, x)
    assert not layers(fast)
    assert not layers(fast, Fused)
    report = pared.report(fast)
    assert (report.speedup, report.dense, report.fast, report.error) == (1.0, None, None, 0.0)
    assert torch.equal(fast(x), model.eval()(x))
    race(monkeypatch, lambda: FakeTimings(dense=0.985, pared=1.0))
    assert layers(pared.accelerate(model, x)) == ["0", "2", "4"]  # 0.985 cannot be told from 1


def test_hooks_of_the_user_move_along_and_prevent_fusion(fused_wins: None) -> None:
    model = mlp()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    x = torch.randn(3, 16)
    fast = convert(model, x)
    seen.clear()
    fast(x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], model.eval()[0](x).detach())
    assert row(fast, "0").activation is None
    assert row(fast, "2").activation == "relu"


def test_a_model_that_is_one_layer() -> None:
    fast = convert(sparse_linear(8, 4), torch.randn(2, 8))
    assert isinstance(fast, Linear)
    assert pared.report(fast).layers[0].name == ""
    assert type(pared.restore(fast)) is nn.Linear


def test_accelerated_copies_keep_their_report() -> None:
    fast = convert(mlp(), torch.randn(2, 16))
    assert pared.report(copy.deepcopy(fast)) == pared.report(fast)


def test_sparsity_of_the_report() -> None:
    model = mlp()
    fast = convert(model, torch.randn(2, 16))
    assert row(fast, "0").sparsity == pytest.approx(float((model[0].weight == 0).double().mean()))


# -- example inputs


class Calls(nn.Module):
    """Takes arguments in every form."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = sparse_linear(8, 8)

    def forward(self, a: Tensor, b: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Any]:
        y = self.fc(a) * scale
        return {"y": y, "extra": (y + b if b is not None else None, [scale, "text"])}


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        (torch.randn(2, 8), [[2, 8]]),
        ((torch.randn(2, 8), torch.randn(8)), [[2, 8]]),
        ({"a": torch.randn(2, 8), "scale": 2.0}, [[2, 8]]),
        ([torch.randn(2, 8), torch.randn(3, 8), torch.randn(2, 8)], [[2, 8], [3, 8]]),
        ([(torch.randn(1, 8),), {"a": torch.randn(5, 1, 8)}], [[1, 8], [5, 1, 8]]),
    ],
)
def test_forms_of_inputs(inputs: Any, shapes: list[list[int]]) -> None:
    fast = convert(Calls(), inputs)
    assert layers(fast) == ["fc"]
    assert row(fast, "fc").inputs == shapes


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ([], ValueError, "example_inputs: expected at least one input, got an empty list"),
        (3, TypeError, "example_inputs: expected a tensor, a tuple .* got int"),
        ([torch.zeros(2, 8), "x"], TypeError, r"example_inputs\[1\]: expected a tensor, .* got str"),
        ({1: torch.zeros(2, 8)}, TypeError, "example_inputs: expected argument names"),
        (
            torch.zeros(2, 8, device="meta"),
            ValueError,
            "example_inputs: expected tensors on the CPU, got one on meta",
        ),
        (
            [torch.zeros(2, 8), torch.zeros(2, 9)],
            ValueError,
            r"example_inputs\[1\]: expected inputs that the model runs",
        ),
        ({"z": torch.zeros(2, 8)}, ValueError, "example_inputs: .*unexpected keyword argument"),
    ],
)
def test_bad_inputs_change_nothing(inputs: Any, error: type[Exception], text: str) -> None:
    model = Calls().train()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=text) as caught:
        convert(model, inputs)
    if "runs" in text:
        assert isinstance(caught.value.__cause__, RuntimeError)
    assert equal_states(model, before)
    assert model.training
    assert type(model.fc) is nn.Linear
    assert not model.fc._forward_pre_hooks


def test_inputs_are_not_written_to() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = sparse_linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return self.fc(x)

    x = torch.zeros(2, 8)
    fast = convert(Writes(), x)
    assert torch.equal(x, torch.zeros(2, 8))
    assert layers(fast) == ["fc"]


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"model": 3}, TypeError, "model: expected a torch module, got int"),
        ({"precision": "int4"}, ValueError, "precision: expected 'float32', 'int8', 'auto', got 'int4'"),
        ({"max_error": -1}, ValueError, "max_error: expected a finite number >= 0 or None, got -1"),
        ({"max_error": "small"}, TypeError, "max_error: .* got 'small'"),
        ({"min_speedup": math.nan}, ValueError, "min_speedup: expected a finite number >= 0, got nan"),
        ({"min_speedup": True}, TypeError, "min_speedup: .* got True"),
        ({"formats": "csr"}, TypeError, "formats: expected a list of names or None, got 'csr'"),
        ({"formats": ["coo"]}, ValueError, "formats: expected names among csr, .* got 'coo'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pared.accelerate(**{"model": mlp(), "example_inputs": torch.zeros(1, 16), **kwargs})


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_bad_models() -> None:
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match=r"the CPU or on a CUDA device, got 0\.weight on meta"):
        pared.accelerate(mlp().to("meta"), x)
    with pytest.raises(ValueError, match=r"model: expected a plain model, got one with accelerated layers"):
        pared.accelerate(convert(mlp(), x), x)
    with pytest.raises(TypeError, match=r"model: expected an uncompiled module"):
        pared.accelerate(torch.compile(mlp()), x)
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = math.inf
    with pytest.raises(ValueError, match="model: layer '2': weight: expected finite values"):
        convert(model, x)


# -- layers called in special ways


class Shared(nn.Module):
    """One module under two names and called twice; and another layer with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = sparse_linear(8, 8)
        self.b = self.a
        self.c = sparse_linear(8, 8, seed=7)
        self.c.weight = self.a.weight
        self.idle = sparse_linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)[:1]))


def test_tied_and_repeated_layers() -> None:
    model, x = Shared(), torch.randn(4, 8)
    fast = convert(model, x)
    assert fast.a is fast.b
    assert isinstance(fast.a, Linear)
    assert fast.c.packed is fast.a.packed
    assert row(fast, "a").aliases == ["b"]
    assert (row(fast, "a").calls, row(fast, "a").inputs) == (2, [[4, 8], [1, 8]])
    assert row(fast, "idle").reason == "not called with the example inputs"
    twin = copy.deepcopy(fast)
    assert twin.c.packed is twin.a.packed
    plain = pared.restore(fast)
    assert plain.a is plain.b
    assert plain.c.weight is plain.a.weight
    assert equal_states(plain, model)


def test_gains_of_disturbed_timings_are_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of torch that stall beside other processes make any kernel look 20 times as fast."""
    now = waits = 0

    def takes(nanoseconds: Iterator[int]) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            now += next(nanoseconds)

        return call

    def timed(calls: dict[str, Any], **kwargs: Any) -> Any:
        dense = itertools.cycle([20_000_000] * 6 + [1_000_000])
        fakes = {n: takes(dense if n == "dense" else itertools.repeat(1_000_000)) for n in calls}
        return interleave(fakes, budget=0, min_rounds=40, clock=lambda: now, waits=lambda: waits * now)

    monkeypatch.setattr("pared._target.interleave", timed)
    model = nn.Sequential(sparse_linear(64, 64, 0.02))
    waits = 2
    fast = pared.accelerate(model, torch.randn(8, 64), formats=["csr"])
    assert row(fast, "0").reason == "csr is 1.00x, less than 1.05x"
    (note,) = pared.report(fast).notes
    assert note.startswith(
        "1 of 1 timings were disturbed: for each second the process's threads waited up to 2.0 s"
    )
    assert "1 of 1 timings were disturbed" in str(pared.report(fast))


def test_several_shapes_are_decided_on_summed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([FakeTimings(dense=1.0, csr=2.0), FakeTimings(dense=10.0, csr=4.0)])
    race(monkeypatch, lambda: next(times))
    layer = sparse_linear(8, 8)
    c = acc.layers.Candidate("fc", ["fc"], layer, pared._report.LayerReport("fc", "Linear", [8, 8], 0.8))
    small, large = (acc.layers.Signature((n, 8), (8, 1), torch.float32) for n in (1, 64))
    c.calls = {small: 3, large: 1}
    v = acc.layers.Variant(Linear.from_module(layer), 0, 0.0, 0.0)
    assert acc.timing.time_layer(c, {"csr": v}) == 13.0
    assert v.after == 10.0
    assert v.speedup == pytest.approx(1.3)


def test_layers_alike_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    set_times(monkeypatch, lambda name, module: asked.append(name) or (1.0 if module is None else 0.5))
    model = nn.Sequential(
        sparse_linear(64, 64),
        sparse_linear(64, 64, seed=1),
        sparse_linear(64, 64, 0.4, seed=2),  # another density
        sparse_linear(64, 64, bias=False, seed=3),
        nn.Sequential(nn.Unflatten(0, (2, 3)), sparse_linear(64, 64, seed=4)),  # another input
        nn.Sequential(sparse_linear(64, 64, seed=5), nn.ReLU()),  # other variants
    )
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight.flip(0))  # as many non-zeros
    fast = convert(model, torch.randn(6, 64), min_speedup=1.0)
    assert list(dict.fromkeys(asked)) == ["0", "2", "3", "4.1", "5.0"]
    assert (row(fast, "1").before, row(fast, "1").after, row(fast, "1").speedup) == (1.0, 0.5, 2.0)
    assert row(fast, "1").reason == "2.00x faster than dense, as timed for 0"
    assert isinstance(fast[1], Linear)
    monkeypatch.undo()
    set_times(monkeypatch, lambda name, module: 1.0)
    fast = convert(model, torch.randn(6, 64), min_speedup=1.5)
    assert row(fast, "1").reason == "csr is 1.00x, less than 1.5x, as timed for 0"
    assert not layers(fast)


def test_strided_inputs_are_timed_as_they_come() -> None:
    x = torch.randn(3, 6, 8)
    for view in (x[:, 0], x.transpose(0, 1), x[..., ::2], x[:1].expand(4, 6, 8), x[0, 0], x[:0]):
        s = acc.layers.Signature(tuple(view.shape), tuple(view.stride()), view.dtype)
        made = acc.timing.timing_input(s)
        assert made.shape == view.shape
        if 0 not in view.stride() and view.numel():
            assert made.stride() == view.stride()
        assert bool((made.abs() >= 2**-11).all())


def test_wrong_dtypes_are_kept_dense() -> None:
    fast = convert(mlp().double(), torch.randn(2, 16).double())
    assert not layers(fast)
    assert "weights of dtype torch.float64" in row(fast, "0").reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    x = torch.randn(6, 16).to(dtype)
    fast = convert(model, x)
    assert layers(fast) == ["0", "2", "4"]
    assert fast(x).dtype == dtype
    assert pared.report(fast).relative_error <= pared.report(fast).tolerance
    assert equal_states(pared.restore(fast), model)


# -- models that other tools pruned


def test_torch_prune_masks_attached_and_removed() -> None:
    for removed in (False, True):
        model = mlp()
        for m in (model[0], model[2]):
            torch_prune.l1_unstructured(m, "weight", 0.9)
            m(torch.randn(1, m.in_features))  # leaves a computed tensor behind, which deepcopy refuses
            if removed:
                torch_prune.remove(m, "weight")
        keys = list(model.state_dict())
        x = torch.randn(3, 16)
        fast = convert(model, x)
        assert list(model.state_dict()) == keys
        assert torch_prune.is_pruned(model) is not removed
        assert row(fast, "0").sparsity > 0.89
        torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-5, rtol=1e-5)
        plain = pared.restore(fast)
        assert not torch_prune.is_pruned(plain)
        assert list(plain.state_dict()) == list(mlp().state_dict())
        assert torch.equal(plain[0].weight, model[0].weight)


class FakeSparsity(nn.Module):
    """As torch.ao.pruning's: the mask is the parametrisation's buffer."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.mask * x


def test_fake_sparsity() -> None:
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", FakeSparsity((torch.rand(32, 16) < 0.1).float()))
    x = torch.randn(3, 16)
    fast = convert(model, x)
    assert isinstance(fast[0], Linear)
    assert row(fast, "0").sparsity > 0.8
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-5, rtol=1e-5)
    assert parametrize.is_parametrized(model[0])


class Halved(nn.Module):
    """A parametrisation of the user's."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_other_parametrisations_are_kept() -> None:
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Halved())
    fast = convert(model, torch.randn(3, 16))
    assert layers(fast) == ["2", "4"]
    assert "unknown parametrisation" in row(fast, "0").reason


def parametrised(kind: str) -> nn.Sequential:
    torch.manual_seed(4)
    module = nn.utils if kind.startswith("older") else nn.utils.parametrizations
    wrap: Any = getattr(module, kind.removeprefix("older "))
    return nn.Sequential(wrap(nn.Linear(16, 16)), nn.ReLU(), wrap(nn.Conv1d(4, 8, 3))).eval()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind", ["weight_norm", "spectral_norm", "orthogonal", "older weight_norm", "older spectral_norm"]
)
def test_computed_weights_are_constants(kind: str) -> None:
    model, x = parametrised(kind), torch.randn(3, 4, 16)
    with torch.no_grad():
        expected = model(x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fast = convert(model, x)
    assert layers(fast) == ["0", "2"]
    torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)
    # The user's model computes its weights as before.
    assert {name: t.tolist() for name, t in model.state_dict().items()} == {
        name: t.tolist() for name, t in before.items()
    }
    plain = pared.restore(fast)
    assert sorted(plain.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(type(p) is nn.Parameter and p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)
    for device in ("cpu", "meta"):
        file = io.BytesIO()
        pared.save(fast, file)
        file.seek(0)
        with torch.device("cpu" if kind == "orthogonal" else device):  # orthogonal cannot be made on meta
            target = parametrised(kind)
        assert torch.equal(pared.load(file, target.to(device))(x), fast(x))


# -- fusion


def test_sequential_fusion(fused_wins: None) -> None:
    model, x = mlp(), torch.randn(3, 16)
    fast = convert(model, x)
    assert [fast[0].activation, fast[2].activation, fast[4].activation] == ["gelu", "relu", None]
    assert layers(fast, Fused) == ["1", "3"]
    assert "GELU, fused into the layer before" in repr(fast[1])
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-5, rtol=1e-5)
    plain = pared.restore(fast)
    assert repr(plain) == repr(model)
    assert torch.equal(plain(x), model(x))
    twin = copy.deepcopy(fast)
    assert torch.equal(twin(x), fast(x))
    assert not layers(convert(model, x, fuse=False), Fused)


def test_fusion_only_when_it_is_faster(clock: Any) -> None:
    clock(lambda name, module: 1.0 if module is None else 0.5 if module.activation is None else 0.6)
    fast = convert(mlp(), torch.randn(3, 16))
    assert layers(fast) == ["0", "2", "4"]
    assert not layers(fast, Fused)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.ELU(), None),
        (nn.LeakyReLU(), None),
    ],
)
def test_which_activations(fused_wins: None, module: nn.Module, name: str | None) -> None:
    model, x = nn.Sequential(sparse_linear(16, 8), module), torch.randn(3, 16)
    fast = convert(model, x)
    assert fast[0].activation == name
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-5, rtol=1e-5)


class SharedActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.one = nn.Sequential(sparse_linear(8, 8), act)
        self.two = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), act)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Peeks(nn.Module):
    """Calls the members of a Sequential one by one, and uses what is in between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(sparse_linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y + self.body[1](y - 1)


@pytest.mark.parametrize("kind", [SharedActivation, Peeks])
def test_no_fusion_where_the_activation_has_other_users(fused_wins: None, kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(3, 8)
    fast = convert(model, x)
    assert not layers(fast, Fused)
    assert layers(fast)
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-5, rtol=1e-5)


class Block(nn.Module):
    """As in a ResNet: each module once, and a branch on an argument that is None by default."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = sparse_conv(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = sparse_conv(channels, channels, 3, padding=1, seed=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        generator = torch.Generator().manual_seed(4)
        for norm in (self.norm1, self.norm2):
            for t in (norm.weight, norm.bias, norm.running_mean):
                t.data.normal_(generator=generator)
            norm.running_var.uniform_(0.1, 4, generator=generator)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if extra is not None:
            y = y + extra
        return self.act2(y + x)


def test_batch_normalisation_is_folded_and_comes_back_bit_for_bit(fused_wins: None) -> None:
    model, x = nn.Sequential(Block(8), Block(8)), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        model[0].conv1.weight[0, 0, 0, 0] = 1e-42  # a denormal: packing drops it
    fast = convert(model, x)
    assert layers(fast, FoldedBatchNorm2d) == [f"{i}.norm{j}" for i in (0, 1) for j in (1, 2)]
    assert layers(fast, Fused) == ["0.act1", "1.act1"]
    assert [fast[0].conv1.activation, fast[0].conv2.activation] == ["relu", None]
    assert row(fast, "0.conv1").norm
    assert "csr + batchnorm + relu" in str(pared.report(fast))
    assert "batchnorm=True" in repr(fast[0].conv1)
    assert "folded into the layer before" in repr(fast[0].norm1)
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        model[0].conv1.weight[0, 0, 0, 0] = 0
    twin = copy.deepcopy(fast).half()
    for other in (fast, twin):
        plain = pared.restore(other)
        assert repr(plain) == repr(model)
        if other is fast:
            assert equal_states(plain, model)
            assert type(plain[0].norm1) is nn.BatchNorm2d
        else:  # half() rounds what is still dense, not what is packed
            assert torch.equal(plain[0].conv1.weight, model[0].conv1.weight)
    assert not layers(convert(model, x, fuse=False), FoldedBatchNorm2d)
    # Its statistics are in the state dict, and load into another.
    other = convert(nn.Sequential(Block(8), Block(8)), x)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), fast(x))
    assert equal_states(pared.restore(other), model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fast(x))


def test_batch_normalisation_that_cannot_be_undone_stays(fused_wins: None) -> None:
    for change in ("switched off", "no statistics", "other width"):
        model = nn.Sequential(sparse_conv(4, 4, 3), nn.BatchNorm2d(4))
        if change == "switched off":
            model[1].weight.data[2] = 0
        elif change == "no statistics":
            model[1] = nn.BatchNorm2d(4, track_running_stats=False)
        else:
            model[1].double()
            model[1].forward = lambda x: x  # never reached with this dtype
        x = torch.randn(2, 4, 6, 6)
        fast = convert(model, x)
        assert layers(fast) == ["0"]
        assert not layers(fast, FoldedBatchNorm2d)
        torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-4, rtol=1e-4)


class Functional(nn.Module):
    """Activations as modules, called from a forward of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fc = sparse_linear(8, 8)
        self.act = nn.SiLU()
        self.out = nn.Linear(8, 8)
        self.seen: Any = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.fc(x)
        if self.kind == "residual":
            return self.out(self.act(h) + h)
        if self.kind == "kept":
            self.seen = h
        if self.kind == "branch" and mask is None:
            return self.out(self.act(h)) + h.mean()
        if self.kind == "data" and bool(h.sum() > 1e9):
            return h
        if self.kind == "twice":
            return self.out(self.act(h)) + self.act(x)
        return self.out(self.act(h))


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ("plain", True),
        ("residual", False),
        ("kept", False),
        ("branch", False),
        ("data", False),
        ("twice", False),
    ],
)
def test_fusion_in_a_forward_of_the_users(fused_wins: None, kind: str, fused: bool) -> None:
    model, x = nn.ModuleDict({"a": Functional(kind)})["a"], torch.randn(3, 8)
    for inputs in (x, (x, torch.ones(3))):
        fast = convert(model, inputs)
        assert layers(fast, Fused) == (["act"] if fused else [])
        torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-5, rtol=1e-5)
    assert not isinstance(fast.seen, torch.fx.Proxy)


def test_activations_of_transformers(fused_wins: None) -> None:
    activations = pytest.importorskip("transformers.activations")
    for name, kernel in [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("quick_gelu", None),
    ]:
        assert activation_of(activations.ACT2FN[name]) == kernel, name
    assert activation_of(nn.Dropout()) is None


# -- formats


def test_formats_that_suit(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: dict[str, list[str]] = {}

    def time_layer(c: acc.layers.Candidate, variants: dict[str, acc.layers.Variant]) -> float:
        tried[c.name] = sorted(variants)
        return 1.0

    monkeypatch.setattr(acc.timing, "time_layer", time_layer)
    blocks = nn.Linear(32, 32)
    with torch.no_grad():
        blocks.weight.mul_((torch.rand(8, 1, 32) < 0.3).float().expand(8, 4, 32).reshape(32, 32))
    model = nn.Sequential(sparse_linear(32, 32, 0.1), nn.Linear(32, 32), blocks, sparse_linear(32, 32, 0.6))
    pared.accelerate(model, torch.randn(64, 32))
    assert tried == {"0": ["csr"], "1": ["dense"], "2": ["bsr", "csr"], "3": ["csr", "dense"]}
    fast = pared.accelerate(model, torch.randn(1, 32))
    assert tried["0"] == ["bitmap", "csr"]
    assert tried["2"] == ["bitmap", "csr"]
    assert "no kernel is faster with 0.0% zeros" in row(fast, "1").reason


def test_a_linear_format_converts_and_comes_back() -> None:
    model, x = mlp(), torch.randn(3, 16)
    fast = convert(model, x, formats=["bitmap"])
    assert {m.format for m in fast.modules() if isinstance(m, PackedModule)} == {"bitmap"}
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-5, rtol=1e-5)
    assert equal_states(pared.restore(fast), model)
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))


@pytest.mark.parametrize("name", ["csr", "bsr", "dense"])
def test_every_format_converts_and_comes_back(name: str) -> None:
    model, x = Net(), torch.randn(2, 3, 12, 12)
    fast = convert(model, x, formats=[name])
    assert {m.format for m in fast.modules() if isinstance(m, PackedModule)} == {name}
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-4, rtol=1e-4)
    assert equal_states(pared.restore(fast), model)
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))


# -- checks


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # Planted fault: one stored value of the packed weight of layer 2 has its sign flipped.
    from_module = Linear.from_module.__func__

    def faulty(cls: type[Linear], module: nn.Linear, **kwargs: Any) -> Linear:
        if module.out_features == 8:
            wrong = copy.deepcopy(module)
            i, j = wrong.weight.nonzero()[3]
            wrong.weight[i, j] *= -1
            module, kwargs = wrong, {**kwargs, "weight": None}
        return from_module(cls, module, **kwargs)

    monkeypatch.setattr(Linear, "from_module", classmethod(faulty))
    model, x = mlp(), torch.randn(4, 16)
    fast = convert(model, x)
    assert layers(fast) == ["0", "4"]
    assert "more than its bound" in row(fast, "2").reason
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-5, rtol=1e-5)


def test_the_check_of_the_whole_model_takes_layers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # The same fault where the check of the layers is blind: the outputs still show it.
    monkeypatch.setattr(acc.choose, "layer_error", lambda m, *_: (float(m.out_features == 8), math.inf, 0.0))
    test_forward = Linear.forward
    monkeypatch.setattr(
        Linear,
        "forward",
        lambda self, input: test_forward(self, input) * (1.5 if self.out_features == 8 else 1.0),
    )
    model, x = mlp(), torch.randn(4, 16)
    fast = convert(model, x)
    assert "2" not in layers(fast)
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-5, rtol=1e-5)


def test_max_error_zero_takes_everything_back() -> None:
    model, x = mlp(), torch.randn(4, 16)
    fast = convert(model, x, max_error=0)
    report = pared.report(fast)
    if report.relative_error == 0 and not report.converted:
        assert "outputs differ by" in row(fast, "0").reason
    assert report.relative_error <= 0
    assert torch.equal(fast(x), model.eval()(x))


def test_a_model_that_computes_with_the_weight_keeps_the_layer() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = sparse_linear(8, 8), sparse_linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc(x) / self.fc.weight.norm()).to(self.out.weight.dtype)

    model, x = Norm(), torch.randn(3, 8)
    fast = convert(model, x)
    assert layers(fast) == ["out"]
    assert row(fast, "fc").reason == "the model computes with its .weight"


def test_models_with_randomness_are_compared_at_one_seed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = sparse_linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + torch.randn_like(x))

    model, x = Noisy(), torch.randn(3, 8)
    state = torch.get_rng_state()
    fast = convert(model, x)
    assert layers(fast) == ["fc"]
    assert torch.equal(torch.get_rng_state(), state)


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class Cache:
    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


def test_compare() -> None:
    x = torch.tensor([1.0, -2.0, 4.0])
    near = x + torch.tensor([0.0, 0.0, 0.25])
    assert compare(x, x).relative == 0
    d = compare(x, near)
    assert (d.absolute, d.relative, d.where) == (0.25, 0.0625, "output")
    pairs: list[tuple[Any, Any, str]] = [
        ((x, [x, {"k": x}]), (x, [x, {"k": near}]), "output[1][1]['k']"),
        (Output(x, (x, x)), Output(x, (x, near)), "output.hidden[1]"),
        (Cache(x), Cache(near), "output.keys"),
        (OrderedDict(a=x), OrderedDict(a=near), "output['a']"),
    ]
    for a, b, where in pairs:
        assert compare(a, a).relative == 0
        assert (compare(a, b).relative, compare(a, b).where) == (0.0625, where)
    for a, b in [
        (x, x[:2]),
        (x, x.double()),
        (x, None),
        ((x,), (x, x)),
        ({"a": x}, {"b": x}),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0])),
        (torch.tensor([math.inf]), torch.tensor([-math.inf])),
        (torch.zeros(2), torch.ones(2)),
        ("a", "b"),
        (1, 2),
        (1, 1.0),
    ]:
        assert compare(a, b).relative == math.inf, (a, b)
    for same in (
        torch.tensor([math.nan, math.inf, 1.0]),
        math.nan,
        None,
        "a",
        torch.zeros(0),
        torch.zeros(3),
    ):
        assert compare(same, copy.deepcopy(same)).relative == 0
    loop: list[Any] = [x]
    loop.append(loop)
    assert compare(loop, loop).relative == 0


def test_tolerance_is_the_stated_formula() -> None:
    assert tolerance(3, 256, 2**-23) == 8 * 2**-23 * 16 * 3
    assert tolerance(4, 256, 2**-7) == 8 * 2**-23 * 16 * 4 + 4 * 2**-7 * 2
    assert [e.label for e in examples([torch.zeros(1), torch.zeros(1)])] == [
        "example_inputs[0]",
        "example_inputs[1]",
    ]


# -- whole models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            sparse_conv(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            sparse_conv(8, 16, 3, groups=2),
            nn.SiLU(),
        )
        self.head = sparse_linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_convolutions(fused_wins: None) -> None:
    model = Net()
    x = torch.randn(2, 3, 12, 12)
    fast = convert(model, [x, x.to(memory_format=torch.channels_last)])
    assert layers(fast, Conv2d) == ["body.0", "body.3"]
    assert layers(fast, Fused) == ["body.1", "body.4"]
    torch.testing.assert_close(fast(x), model.eval()(x).detach(), atol=1e-4, rtol=1e-4)
    plain = pared.restore(fast)
    assert repr(plain) == repr(model)
    assert equal_states(plain, model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fast(x))


class Sequences(nn.Module):
    """A residual block over sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(
            nn.Conv1d(8, 16, 5, padding=2, bias=False),
            nn.GELU(),
            nn.Conv1d(16, 16, 3, groups=2, padding="same"),
        )
        self.down = nn.Conv1d(16, 8, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body[1](self.body[0](x))
        return self.down(y + self.body[2](y))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_convolutions_over_sequences(fused_wins: None, precision: str) -> None:
    model = Sequences()
    pared.prune(model, 0.7)
    x = torch.randn(3, 8, 21)
    fast = pared.accelerate(model, [x, x[0]], precision, 0.2 if precision == "int8" else None, min_speedup=0)
    assert layers(fast, Conv1d) == ["body.0", "body.2", "down"]
    assert layers(fast, Fused) == ["body.1"]
    close = {"atol": 1e-5, "rtol": 1e-5} if precision == "float32" else {"atol": 0.05, "rtol": 0.0}
    for shape in ((3, 8, 21), (8, 21), (1, 8, 6)):
        rows = torch.randn(shape)
        torch.testing.assert_close(fast(rows), model.eval()(rows).detach(), **close)
    # What is estimated: output positions of all sequences, at 3 x 21 and at 21.
    candidates = acc.find_candidates(model, precision)
    acc.record_calls(model, [*examples([x, x[0]])], candidates, fuse=True)
    assert choose._positions({c.name: c for c in candidates}["down"]) == {33: 1, 11: 1}
    rows = {row.name: row for row in pared.report(fast).layers}
    assert rows["body.2"].shape == [16, 8, 3]
    assert rows["body.0"].error <= rows["body.0"].bound
    plain = pared.restore(fast)
    assert repr(plain) == repr(model)
    if precision == "float32":
        assert equal_states(plain, model)
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    with torch.device("meta"):
        target = Sequences()
    loaded = pared.load(file, target)
    assert repr(loaded) == repr(fast)
    assert torch.equal(loaded(x), fast(x))
    exported = torch.export.export(fast, (x,)).module()
    for traced in (torch.compile(fast, fullgraph=True, backend="aot_eager"), exported):
        torch.testing.assert_close(traced(x), fast(x))


def test_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    model = transformers.BertForMaskedLM(config)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Linear):
                m.weight.mul_(torch.rand_like(m.weight) < 0.3)
    inputs = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    fast = convert(model, inputs)
    # The decoder's weight is the embedding's: packed for the one, dense for the other, tied again by restore.
    assert "cls.predictions.decoder" in layers(fast)
    assert len(layers(fast)) == 2 * 6 + 2
    torch.testing.assert_close(
        fast(**inputs).logits, model.eval()(**inputs).logits.detach(), atol=1e-4, rtol=1e-4
    )
    plain = pared.restore(fast)
    assert equal_states(plain, model)
    assert plain.cls.predictions.decoder.weight is plain.bert.embeddings.word_embeddings.weight


def test_transformer_encoder() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 5, 16)
    fast = convert(encoder, x)
    own = [*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "linear1", "linear2"]
    assert layers(fast) == [f"layers.{i}.{name}" for i in (0, 1) for name in own]
    torch.testing.assert_close(fast(x), encoder(x).detach(), atol=1e-5, rtol=1e-5)


def test_threads_share_an_accelerated_model() -> None:
    fast = convert(mlp(), torch.randn(3, 16))
    inputs = [torch.randn(n, 16) for n in range(1, 7)]
    expected = [fast(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(fast(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    pared.accelerate(mlp(), torch.randn(2, 16), progress=True)
    assert "pared" in capfd.readouterr().err


# ---- hand-over between layers


class WithDropout(nn.Module):
    """The feed-forward part of a transformer, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = sparse_linear(32, 64), sparse_linear(64, 32), sparse_linear(32, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.dropout(nn.functional.relu(self.up(x))))
        return self.last(x + y)


def always_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, fused_is_faster)
    monkeypatch.setattr(acc.timing, "time_hand_over", lambda layers, calls: 2.0)


def test_layers_in_a_row_hand_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    always_hand_over(monkeypatch)
    model = nn.Sequential(
        sparse_linear(32, 64), nn.ReLU(), nn.Dropout(), sparse_linear(64, 48), sparse_linear(48, 8)
    ).eval()
    x = torch.randn(70, 32)
    fast = convert(model, x)
    assert fast[0]._handed == (fast[3], fast[4])
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    rows = {r.name: r.reason for r in pared.report(fast).layers}
    assert "hands over to 3, 4: 2.00x" in rows["0"]
    assert "computed with 0" in rows["4"]
    pared.save(fast, tmp_path / "fast.pared")
    loaded = pared.load(tmp_path / "fast.pared", model)
    assert loaded[0]._handed == (loaded[3], loaded[4])
    assert torch.equal(loaded(x), fast(x))
    with torch.no_grad():
        assert torch.equal(pared.restore(fast)(x), model(x))


@pytest.mark.parametrize("formats", [["int8"], ["bsr8"]])
def test_layers_of_8_bits_hand_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, formats: list[str]
) -> None:
    always_hand_over(monkeypatch)
    model = nn.Sequential(sparse_linear(32, 64), nn.GELU(), sparse_linear(64, 16, seed=1)).eval()
    x = torch.randn(70, 32)
    fast = convert(model, x, precision="int8", formats=formats, max_error=1.0)
    assert fast[0]._handed == (fast[2],)
    assert {m.format for m in fast if isinstance(m, Linear)} == set(formats)
    pared.save(fast, tmp_path / "fast.pared")
    loaded = pared.load(tmp_path / "fast.pared", model)
    assert loaded[0]._handed == (loaded[2],)
    together = fast(x)
    fast[0].hand_to()
    assert torch.equal(fast(x), together)  # quantised once, with the bits of one after the other
    torch.testing.assert_close(loaded(x), together)


def test_no_hand_over_where_the_output_is_used_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    always_hand_over(monkeypatch)
    model = WithDropout().eval()
    x = torch.randn(70, 32)
    fast = convert(model, x)
    assert not any(m._handed for m in fast.modules() if isinstance(m, Linear))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_no_hand_over_without_fusion_or_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    always_hand_over(monkeypatch)
    model = nn.Sequential(sparse_linear(32, 64), sparse_linear(64, 48)).eval()
    assert convert(model, torch.randn(8, 32), fuse=False)[0]._handed == ()
    monkeypatch.setattr(acc.timing, "time_hand_over", lambda layers, calls: 1.0)
    assert convert(model, torch.randn(8, 32))[0]._handed == ()


def test_the_gain_of_a_hand_over_is_really_timed() -> None:
    layers = [
        Linear.from_module(sparse_linear(32, 64)),
        Linear.from_module(sparse_linear(64, 8)),
    ]
    calls = {acc.layers.Signature((5, 32), (32, 1), torch.float32): 2}
    assert acc.timing.time_hand_over(layers, calls) > 0
