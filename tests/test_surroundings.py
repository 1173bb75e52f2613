"""What the caller has set around a call: the default device and dtype, autocast, modes, other processes."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import signal
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from _models import set_times
from torch import nn
from torch.nn import functional as F

import pared
import pared._accelerate as acc
from pared import _core
from pared._interrupt import uninterrupted
from pared.nn import PackedModule
from pared.pruning import oneshot, structured


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


# -- transformers


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


@pytest.fixture
def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **size)).eval()
    pared.prune(model, 0.8)
    return model


def test_save_pretrained_goes_through_the_plain_model(ours_is_faster, bert, tmp_path):
    tokens = {"input_ids": torch.arange(12).reshape(2, 6)}
    fast = pared.accelerate(bert, tokens)
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    inside = pared.accelerate(Wrapper(bert), tokens).inner
    for model in (fast, copy.deepcopy(fast), pared.load(file, lambda: copy.deepcopy(bert)), inside):
        with pytest.raises(ValueError, match=r"save_pretrained: .*pared\.restore"):
            model.save_pretrained(tmp_path / "accelerated")
    assert not (tmp_path / "accelerated").exists()
    pared.restore(fast).save_pretrained(tmp_path / "plain")
    again = type(bert).from_pretrained(tmp_path / "plain")
    assert all(torch.equal(p, bert.state_dict()[name]) for name, p in again.state_dict().items())
    dense = pared.accelerate(bert, tokens, min_speedup=1e9)
    dense.save_pretrained(tmp_path / "dense")  # nothing was converted


# -- autocast inside the model


class Casting(nn.Module):
    """As transformers' Trainer leaves a model: a forward that turns autocast on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.inner(x).float()
        return self.head(y)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_model_that_turns_autocast_on(precision):
    model = Casting().eval()
    pared.prune(model, 0.8)
    fast = pared.accelerate(model, INPUTS[0], precision, min_speedup=0, max_error=0.5)
    kernels = {row.name: row for row in pared.report(fast).layers}
    for name in ("inner.0", "inner.2", "inner.4"):
        assert kernels[name].kernel == "torch"
        assert kernels[name].reason.startswith("called under torch.autocast, which the model turns on")
    assert isinstance(fast.head, PackedModule)
    check(fast, model, INPUTS[0], 1e-4 if precision == "float32" else 0.1)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_accelerated_in_inference_mode(ours_is_faster, case, precision):
    """The new model's tensors are ordinary ones: it can be loaded into, moved and copied anywhere."""
    make, x = CASES[case]
    model = make()
    pared.prune(model, 0.8)
    with torch.inference_mode():
        fast = pared.accelerate(model, x + 0, precision)
        want = fast(x)
    assert not any(t.is_inference() for t in (*fast.parameters(), *fast.buffers()))
    fast.load_state_dict(fast.state_dict())
    with torch.no_grad():
        assert torch.equal(fast(x), want)
        torch.testing.assert_close(fast(torch.cat([x, x])), torch.cat([want, want]), atol=1e-2, rtol=1e-2)


def test_autocast_that_changes_nothing(ours_is_faster):
    model, x = mlp().bfloat16(), INPUTS[0].bfloat16()
    pared.prune(model, 0.8)
    forward = torch.autocast("cpu", dtype=torch.bfloat16)(type(model).forward)
    inside = type("Inside", (nn.Sequential,), {"forward": forward})(*model).eval()
    fast = pared.accelerate(inside, x)
    assert all(row.kernel != "torch" for row in pared.report(fast).layers)
    assert torch.equal(fast(x), pared.accelerate(model, x)(x))


# -- weights that are not whole, or not plain


class Opaque(torch.Tensor):
    """A weight of another tool's tensor class, as torchao and fully_shard make them."""


@pytest.fixture
def sharded() -> nn.Sequential:
    """As FullyShardedDataParallel(use_orig_params=True) leaves weights outside a call."""
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().reshape(-1)[:700])
    return model


def test_shards_are_not_pruned(sharded):
    before = copy.deepcopy(sharded.state_dict())
    for call in (
        lambda: pared.prune(sharded, 0.5),
        lambda: pared.Pruner(sharded, pared.schedules.OneShot(0.5)),
    ):
        with pytest.raises(ValueError, match=r"'0\.weight': expected the whole weight.*\[700\].*summon_full"):
            call()
    del sharded[0].weight
    sharded[0].weight = torch.zeros(48, 24)  # use_orig_params=False: a view of what all layers share
    with pytest.raises(ValueError, match=r"'0\.weight': weight: expected a parameter .*summon_full"):
        pared.prune(sharded, 0.5)
    del before["0.weight"]
    assert all(torch.equal(t, sharded.state_dict()[name]) for name, t in before.items())


def test_a_pruner_whose_weights_were_sharded_since(sharded):
    model = mlp()
    pruner = pared.Pruner(model, pared.schedules.OneShot(0.5))
    whole = model[0].weight
    model[0].weight = sharded[0].weight
    before = copy.deepcopy(model.state_dict())
    for call in (pruner.step, pruner.finalize):
        with pytest.raises(ValueError, match=r"'0\.weight' with shape \[48, 24\].*\[700\].*summon_full"):
            call()
    assert pruner.step_count == 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model[0].weight = nn.Parameter(whole.detach().as_subclass(Opaque), requires_grad=False)
    with pytest.raises(ValueError, match="got a Opaque of shape"):
        pruner.step()
    model[0].weight = whole
    pruner.step()
    assert pruner.finalize().sparsity == pytest.approx(0.5, abs=0.01)


def test_weights_of_another_class_are_not_pruned():
    model = mlp()
    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Opaque))
    with pytest.raises(ValueError, match=r"'2\.weight': expected a plain tensor, got the subclass Opaque"):
        pared.prune(model, 0.5)
    assert pared.prune(model, 0.5, exclude="2").sparsity == pytest.approx(0.5, abs=0.01)


# -- code that writes to a converted layer, or compiles it


@pytest.fixture
def packed(ours_is_faster) -> nn.Sequential:
    model = mlp()
    pared.prune(model, 0.8)
    return pared.accelerate(model, INPUTS[0])


def test_weights_of_converted_layers_are_not_written_to(packed):
    want, zeros = packed(INPUTS[0]), torch.zeros(48, 24)
    for name, value in (("weight", zeros), ("bias", torch.zeros(48))):
        with pytest.raises(TypeError, match=f"{name}: expected none to be set.*pared.restore"):
            setattr(packed[0], name, nn.Parameter(value))
    with pytest.raises(TypeError, match="weight: expected none to be set, got a Tensor"):
        packed[0].weight = zeros
    with pytest.raises(pared.nn.DenseWeightError, match="packed"):
        packed[0].weight.data = zeros
    with pytest.raises(pared.nn.DenseWeightError, match="packed"):
        packed[0].weight.data.mul_(2)
    assert torch.equal(packed(INPUTS[0]), want)
    packed[0].bias = torch.zeros(48)  # a buffer, as it was
    assert not torch.equal(packed(INPUTS[0]), want)


def test_accelerated_layers_are_not_passed_over(packed):
    half = nn.Sequential(packed, nn.Linear(8, 8))
    for call in (
        lambda: pared.prune(half, 0.5),
        lambda: pared.Pruner(half, pared.schedules.OneShot(0.5)),
        lambda: pared.quantize(half, INPUTS),
    ):
        with pytest.raises(ValueError, match=r"expected plain layers, got accelerated ones.*pared\.restore"):
            call()
    assert pared.prune(half, 0.5, include="1").sparsity == pytest.approx(0.5)
    assert pared.prune(pared.restore(packed), 0.9).sparsity == pytest.approx(0.9, abs=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_scripting_is_refused_and_tracing_is_not(packed):
    with pytest.raises(TypeError, match=r"torch\.jit\.script: .*accelerated Linear; torch\.jit\.trace"):
        torch.jit.script(packed)
    traced = torch.jit.trace(packed, INPUTS[0])
    assert torch.equal(torch.jit.freeze(traced)(INPUTS[0]), packed(INPUTS[0]))


def test_functional_call_does_not_drop_a_weight(packed):
    """It sets what it is given as attributes, and takes them back when one is refused."""
    x = INPUTS[0]
    want, bias = packed(x), packed[0].bias
    given = {"0.bias": torch.zeros(48), "0.weight": torch.zeros(48, 24)}
    with pytest.raises(TypeError, match="weight: expected none to be set, got a Tensor; Linear holds"):
        torch.func.functional_call(packed, given, x)
    assert packed[0].bias is bias
    assert torch.equal(packed(x), want)
    moved = torch.func.functional_call(packed, {"4.bias": packed[4].bias + 1}, x)
    torch.testing.assert_close(moved, want + 1)
    assert torch.equal(packed(x), want)


def places(model: nn.Module) -> set[str]:
    return {t.device.type for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("how", ["accelerated", "copied", "unpickled", "loaded"])
def test_a_model_that_cannot_move_stays_whole(ours_is_faster, tmp_path, how):
    inner = nn.Sequential(nn.LayerNorm(24), mlp())
    model = nn.Sequential(nn.LayerNorm(24), inner)
    pared.prune(model, 0.8)
    original = pared.accelerate(model, INPUTS[0])
    pared.save(original, tmp_path / "model.pared")
    fast = {
        "accelerated": lambda: original,
        "copied": lambda: copy.deepcopy(original),
        "unpickled": lambda: pickle.loads(pickle.dumps(original)),
        "loaded": lambda: pared.load(tmp_path / "model.pared", model),
    }[how]()
    want = fast(INPUTS[0])
    for part in (fast, fast[1]):  # what lies before the first accelerated layer would have gone
        for move in (lambda m: m.to("meta"), lambda m: m.to_empty(device="meta")):
            with pytest.raises(RuntimeError, match=r"Linear has no \w+ kernel for meta .*pared\.restore"):
                move(part)
    assert places(fast) == {"cpu"}
    assert torch.equal(fast(INPUTS[0]), want)
    assert fast.double() is fast
    assert fast[0].weight.dtype == torch.float64
    if how == "copied":
        assert original[0].weight.dtype == torch.float32
    assert places(pared.restore(fast).to("meta")) == {"meta"}


def test_a_layer_that_refuses_is_asked_before_another_moves(packed, monkeypatch):
    held = []
    monkeypatch.setattr(pared.nn.PackedModule, "_hold", lambda self, weight: held.append(self))
    monkeypatch.setattr(pared.nn.PackedModule, "_moved", lambda self, device: None)
    packed.float()
    assert held == [packed[0], packed[2], packed[4]]

    def refused(device):
        raise RuntimeError("refused")

    packed[2]._moved = refused
    with pytest.raises(RuntimeError, match="refused"):
        packed.float()
    del packed[2]._moved
    assert len(held) == 3
    packed.float()
    assert len(held) == 6


def test_memory_of_a_model_is_freed_at_once(packed):
    fast = copy.deepcopy(packed)
    gone = weakref.ref(fast)
    shallow = copy.copy(fast)
    gc.disable()
    try:
        del fast
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match=r"model: .*got a shallow copy of one that is gone"):
        shallow.float()


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("at", ["head", "between", "follower", "everywhere"])
def test_hooks_on_layers_in_one_call(ours_is_faster, monkeypatch, tmp_path, at, loaded):
    """A hook sees what its module gives, and what it gives instead is what the next one takes."""
    monkeypatch.setattr(acc.timing, "time_hand_over", lambda layers, calls: 2.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 24)).eval()
    pared.prune(model, 0.5)
    fast = pared.accelerate(model, INPUTS[0], formats=["csr"])
    if loaded:
        pared.save(fast, tmp_path / "model.pared")
        fast = pared.load(tmp_path / "model.pared", model)
    assert fast[0]._handed == (fast[3],)
    x = INPUTS[1]
    check(fast, model, x)
    expected = model[:2](x)  # with the ReLU that the first layer computes now
    seen = []

    def look(module, args, output):
        seen.append(output)

    def change(module, args, output):
        return output + 1

    if at == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(y))
        fast(x)
        handle.remove()
        torch.testing.assert_close(seen[0], expected)
        return
    place = {"head": 0, "between": 2, "follower": 3}[at]
    handles = [fast[place].register_forward_hook(look)]
    y = fast(x)
    torch.testing.assert_close(seen[0], y if place == 3 else expected)
    torch.testing.assert_close(y, model(x))
    handles.append(fast[place].register_forward_hook(change))
    torch.testing.assert_close(fast(x), model(x) + 1 if place == 3 else model[3](expected + 1))
    for handle in handles:
        handle.remove()
    handle = fast[place].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    wanted = {0: lambda: model(2 * x), 2: lambda: model[3](2 * expected), 3: lambda: model[3](2 * expected)}
    torch.testing.assert_close(fast(x), wanted[place]())
    handle.remove()
    assert calls_together(monkeypatch, fast, x) == 1  # the chain again


def calls_together(monkeypatch: pytest.MonkeyPatch, fast: nn.Module, x: torch.Tensor) -> int:
    """How many calls of a pass go through several layers."""
    seen = []
    with monkeypatch.context() as patch:
        whole = _core.linear_chain
        patch.setattr(_core, "linear_chain", lambda *args: seen.append(args) or whole(*args))
        fast(x)
    return len(seen)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.first = nn.Linear(24, 24)
        self.between = nn.Dropout(0.5)
        self.second = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.inner.first(x)))


class Adapter(nn.Module):
    """As LoRA wraps a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(24, 2, bias=False), nn.Linear(2, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.fixture
def chained(ours_is_faster, monkeypatch, request) -> tuple[nn.Sequential, nn.Sequential]:
    """A model, and an accelerated one whose Linear layers go in one call."""
    monkeypatch.setattr(acc.timing, "time_hand_over", lambda layers, calls: 2.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.5), nn.Linear(24, 24), nn.Linear(24, 24)).eval()
    pared.prune(model, 0.5)
    fast = pared.accelerate(model, INPUTS[0], formats=["csr"])
    if request.param == "copied":
        fast = copy.deepcopy(fast)
    elif request.param == "unpickled":
        fast = pickle.loads(pickle.dumps(fast))
    elif request.param == "loaded":
        file = io.BytesIO()
        pared.save(fast, file)
        file.seek(0)
        fast = pared.load(file, model)
    assert calls_together(monkeypatch, fast, INPUTS[1]) == 1
    return model, fast


EVERY_WAY = pytest.mark.parametrize(
    "chained", ["accelerated", "copied", "unpickled", "loaded"], indirect=True
)
EDITS = {
    "a layer set": lambda m: setattr(m, "2", nn.Linear(24, 24)),
    "an item set": lambda m: m.__setitem__(0, nn.Linear(24, 24)),
    "what is between set": lambda m: m.__setitem__(1, nn.Tanh()),
    "inserted": lambda m: m.insert(2, nn.Tanh()),
    "appended": lambda m: m.append(nn.Tanh()),
    "deleted": lambda m: m.__delitem__(2),
    "deleted before it, then set": lambda m: (m.__delitem__(0), m.__setitem__(1, nn.Tanh())),
    "head wrapped": lambda m: m.__setitem__(0, Adapter(m[0])),
    "follower wrapped": lambda m: m.__setitem__(2, Adapter(m[2])),
    "forward set": lambda m: setattr(m, "forward", lambda x: m[1](m[0](x))),
    "training between": lambda m: (m.train(), torch.manual_seed(0)),
}


@EVERY_WAY
@pytest.mark.parametrize("edit", EDITS)
def test_a_model_in_which_layers_of_one_call_are_replaced(chained, edit):
    """Layers that went in one call compute what the model says by now."""
    results = []
    for m in chained:
        torch.manual_seed(1)
        EDITS[edit](m)
        results.append(m.requires_grad_(False)(INPUTS[1]))
    torch.testing.assert_close(results[1], results[0])


@EVERY_WAY
def test_layers_of_one_call_called_alone(chained):
    model, fast = chained
    x = INPUTS[1]
    for part in (
        lambda m: m[0],
        lambda m: m[:2],
        lambda m: nn.Sequential(*list(m)[:3]),
        lambda m: nn.Sequential(m[0], nn.ReLU(), m[3]),
        lambda m: copy.deepcopy(m[0]),
    ):
        check(part(fast), part(model), x)
        check(fast, model, x)


def test_layers_of_one_call_in_different_modules(ours_is_faster, monkeypatch):
    """The innermost module around all of them is what says when they go together."""
    monkeypatch.setattr(acc.timing, "time_hand_over", lambda layers, calls: 2.0)
    torch.manual_seed(0)
    model = nn.Sequential(Nested(), nn.Tanh()).eval()
    pared.prune(model, 0.5)
    fast = pared.accelerate(model, INPUTS[0], formats=["csr"])
    assert calls_together(monkeypatch, fast[0], INPUTS[1]) == 1
    check(fast, model, INPUTS[1])
    check(fast[0].inner.first, model[0].inner.first, INPUTS[1])
    for m in (model, fast):
        torch.manual_seed(1)
        m[0].inner.first = Adapter(m[0].inner.first).requires_grad_(False)
    assert calls_together(monkeypatch, fast, INPUTS[1]) == 0
    check(fast, model, INPUTS[1])


def test_models_go_to_spawned_processes(ours_is_faster):
    """As a pool's arguments and a DataLoader's workers are sent; from shared memory too."""
    fast = {case: pared.accelerate(make(), x) for case, (make, x) in CASES.items()}
    want = {case: model(CASES[case][1]) for case, model in fast.items()}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for case, model in fast.items():
            torch.testing.assert_close(pool.submit(model, CASES[case][1]).result(), want[case])
        for case, model in fast.items():
            model.share_memory()
            assert all(b.is_shared() for b in model.buffers())
            torch.testing.assert_close(pool.submit(model, CASES[case][1]).result(), want[case])
            torch.testing.assert_close(model(CASES[case][1]), want[case])


@EVERY_WAY
def test_restored_models_have_their_own_classes(chained):
    model, fast = chained
    plain = pared.restore(fast)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert vars(plain).keys() == vars(model).keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_torch_func_is_named(packed):
    for call in (
        lambda: torch.func.vmap(packed)(INPUTS[0]),
        lambda: torch.func.jvp(packed, (INPUTS[0],), (INPUTS[0],)),
    ):
        with pytest.raises(TypeError, match=r"x: .*without, such as torch\.func's vmap and jvp pass"):
            call()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_a_file_into_layers_of_another_library(packed):
    file = io.BytesIO()
    pared.save(packed, file)
    file.seek(0)
    quantized = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, torch.qint8)
    with pytest.raises(
        pared.FormatError, match=r"expected 'Linear', as in the file, got torch\.ao\..*\.Linear"
    ):
        pared.load(file, quantized)


# -- Ctrl-C


def press() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: what a shell starts in the background inherits that the signal is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def when_written(ctrl_c: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as soon as the first tensor of a model has been written to."""
    pressed: list[int] = []

    def once(function):
        def call(*args):
            result = function(*args)
            if not pressed:
                pressed.append(1)
                press()
            return result

        return call

    monkeypatch.setattr(oneshot, "zero", once(oneshot.zero))
    monkeypatch.setattr(torch.Tensor, "copy_", once(torch.Tensor.copy_))
    monkeypatch.setattr(torch.Tensor, "div_", once(torch.Tensor.div_))


def test_pruning_is_interrupted_before_or_after_and_not_between(when_written):
    model, whole = mlp(), mlp()
    with pytest.raises(KeyboardInterrupt):
        pared.prune(model, 0.5)
    pared.prune(whole, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_equalisation_is_interrupted_between_pairs(when_written):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight[0] *= 50
    x = torch.randn(5, 8)
    want, before = model(x), model[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        pared.quant.equalize(model)
    assert not torch.equal(model[0].weight, before)
    torch.testing.assert_close(model(x), want)


def test_the_removal_of_channels_is_not_interrupted_in_a_module(ctrl_c, monkeypatch):
    model = mlp()
    x = INPUTS[0]

    def transplant(*args):
        press()
        done(*args)

    done = structured._transplant
    monkeypatch.setattr(structured, "_transplant", transplant)
    with pytest.raises(KeyboardInterrupt):
        pared.prune_channels(model, x, 0.5, round_to=1)
    assert model(x).shape == (16, 8)
    assert model[0].out_features == 24


def test_the_graph_of_channels_lets_an_interrupt_through(ctrl_c):
    traced = []

    class Pressed(nn.Sequential):
        def forward(self, x):
            if torch.is_grad_enabled():  # while the graph is traced
                traced.append(x)
                if len(traced) == 1:
                    press()
            return super().forward(x)

    model = Pressed(*mlp())
    with pytest.raises(KeyboardInterrupt):
        pared.prune_channels(model, INPUTS[0], 0.5)
    assert model[0].out_features == 48


def test_other_threads_and_handlers_are_left_alone(monkeypatch):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(pared.prune, mlp(), 0.5).result().sparsity == pytest.approx(0.5, abs=0.01)
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with uninterrupted():
            press()
            assert not came
        assert came == [signal.SIGINT]
        with pytest.raises(ZeroDivisionError), uninterrupted():
            raise ZeroDivisionError
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with uninterrupted():
            press()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
