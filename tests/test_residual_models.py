"""Whole convolutional networks: residuals added by convolutions, and max pooling."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import fused_is_faster, set_times, sparse_conv
from torch import Tensor, nn
from torch.nn import functional

import pared
from pared import _accelerate as acc
from pared._residual import find_blocks, residual_block
from pared.nn import Conv2d, MaxPool2d, ResidualBlock


def conv_norm(channels: int, out: int, kernel: int, stride: int = 1, seed: int = 0) -> list[nn.Module]:
    norm = nn.BatchNorm2d(out)
    generator = torch.Generator().manual_seed(seed)
    for t in (norm.weight, norm.running_var):
        t.data.uniform_(0.5, 1.5, generator=generator)
    for t in (norm.bias, norm.running_mean):
        t.data.uniform_(-0.1, 0.1, generator=generator)
    conv = sparse_conv(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False, seed=seed)
    # Outputs of the size of the inputs, through any number of layers: what cancels leaves little error.
    conv.weight.data *= (conv.weight != 0).sum((1, 2, 3), keepdim=True).clamp(min=1) ** -0.5
    return [conv, norm]


class Basic(nn.Module):
    """As torchvision writes it: one ReLU module for all, in place."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(channels, out, 3, stride, seed=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_norm(out, out, 3, seed=2)
        other = stride != 1 or channels != out
        self.downsample = nn.Sequential(*conv_norm(channels, out, 1, stride, seed=3)) if other else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Functional(Basic):
    """The same with functions."""

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(torch.add(x if self.downsample is None else self.downsample(x), out))


class Inverted(Basic):
    """As in MobileNetV2: nothing behind the addition; and a parameter that is never given."""

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if scale is not None:
            out = out * scale
        return (x if self.downsample is None else self.downsample(x)) + out


class Net(nn.Module):
    def __init__(self, block: type[Basic] = Basic) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.Sequential(block(8, 8), block(8, 12, 2), block(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(self.stem(x)).mean((2, 3))
        return y


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel wins."""
    set_times(monkeypatch, fused_is_faster)
    monkeypatch.setattr(acc.timing, "time_block", lambda *rest: (1.0, 0.5))


X = torch.randn(2, 3, 15, 22, generator=torch.Generator().manual_seed(0))


def blocks(model: nn.Module) -> list[ResidualBlock]:
    return [m for m in model.modules() if isinstance(m, ResidualBlock)]


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def compute_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    """(with a residual, activation) of each call of a convolution."""
    seen: list[tuple[bool, str]] = []
    real = Conv2d._compute

    def count(self: Conv2d, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        seen.append((residual is not None, activation))
        return real(self, x, residual, activation)

    monkeypatch.setattr(Conv2d, "_compute", count)
    return seen


@pytest.mark.parametrize(("block", "behind"), [(Basic, "relu"), (Functional, "relu"), (Inverted, "")])
def test_blocks_of_any_class(times: None, monkeypatch: pytest.MonkeyPatch, block: Any, behind: Any) -> None:
    model = Net(block).eval()
    fast = pared.accelerate(model, X)
    assert len(blocks(fast)) == 3
    assert not blocks(model)
    report = pared.report(fast)
    assert any("3 block(s) add their residuals in convolutions, 2.00x" in n for n in report.notes)
    assert sum("adds a residual" in row.reason for row in report.layers) == 3
    seen = compute_calls(monkeypatch)
    for x in (X, X[:1], X.to(memory_format=torch.channels_last), torch.randn(1, 3, 40, 33)):
        seen.clear()
        torch.testing.assert_close(outputs(fast, x), outputs(model, x), rtol=1e-4, atol=1e-5)
        assert [c for c in seen if c[0]] == [(True, behind)] * 3
    assert seen.count((False, "relu")) == 4  # of the stem too


def test_in_one_kernel_call(times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel gives is final: torch adds nothing."""
    fast = pared.accelerate(Net().eval(), X)
    monkeypatch.setattr("pared.nn.conv._finished", lambda y, residual, activation: pytest.fail("not needed"))
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: pytest.fail("not needed"))
    outputs(fast)


def test_a_residual_of_another_shape_is_broadcast(times: None) -> None:
    layer = Conv2d.from_module(sparse_conv(3, 5, 1))
    x, r = torch.randn(2, 3, 4, 6), torch.randn(1, 5, 1, 1)
    with torch.no_grad():
        assert torch.equal(layer._compute(x, r, "relu"), torch.relu(layer(x) + r))
        r = torch.randn(2, 5, 4, 6).to(memory_format=torch.channels_last)
        assert torch.equal(layer._compute(x, r, ""), layer(x) + r)
        assert torch.equal(layer._compute(x[0], r[0], ""), layer(x[0]) + r[0])


class Traps(nn.Module):
    """Blocks in which an addition may not go into the convolution, or nothing may be rewritten at all."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = Conv2d.from_module(sparse_conv(4, 4, 1))
        self.second = Conv2d.from_module(sparse_conv(4, 4, 1, seed=1))
        self.relu = nn.ReLU(inplace=True)
        self.plain = nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.way == "used twice":
            return self.second(torch.add(y, x)) + y
        if self.way == "activated in place":
            z = self.relu(y)
            return (y + x) + z
        if self.way == "added in place":
            z = y
            z += x
            return self.second(y) + x
        if self.way == "input in place":
            return self.second(self.relu(x)) + x
        if self.way == "alpha":
            return torch.add(y, x, alpha=2)
        if self.way == "plain":
            return self.second(self.relu(y)) + x
        if self.way == "two outputs":
            return y + x, x
        if self.way == "itself":
            return y + y
        if self.way == "twice":
            return self.plain(self.plain(y) + x) + x
        if self.way == "product":
            return y * x + x
        return y + x if x.sum() > 0 else y


@pytest.mark.parametrize(
    "way",
    [
        "used twice",
        "activated in place",
        "added in place",
        "input in place",
        "alpha",
        "two outputs",
        "itself",
        "twice",
        "product",
        "decided by data",
    ],
)
def test_traps(way: str) -> None:
    plain = Traps(way).eval()
    new = residual_block(plain) or plain
    x = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want, got = plain(x.clone()), new(x.clone())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    rewritten = isinstance(new, ResidualBlock)
    assert rewritten == (way in ("used twice", "twice"))


def test_the_steps_of_a_block() -> None:
    """A block as it is after its layers were converted."""
    model = Traps("plain").eval()
    block = residual_block(model)
    assert block is not None
    assert [(s.module, s.value, s.residual, s.activation) for s in block.steps] == [
        (("conv",), 0, None, "relu"),
        (("second",), 1, 0, None),
    ]


def test_an_addition_that_is_left_out_is_seen(times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong outputs are taken back."""
    real = Conv2d._compute
    monkeypatch.setattr(Conv2d, "_compute", lambda self, x, r, a: real(self, x, None, a))
    model = Net().eval()
    fast = pared.accelerate(model, X)
    assert not blocks(fast)
    torch.testing.assert_close(outputs(fast), outputs(model), rtol=1e-4, atol=1e-5)


def test_slower_blocks_stay(times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acc.timing, "time_block", lambda *rest: (1.0, 1.0))
    fast = pared.accelerate(Net().eval(), X)
    assert not blocks(fast)
    assert not any(isinstance(m, MaxPool2d) for m in fast.modules())
    assert isinstance(fast.get_submodule("layers.0"), Basic)


def test_fuse_false_leaves_blocks_alone(times: None) -> None:
    fast = pared.accelerate(Net().eval(), X, fuse=False)
    assert not blocks(fast)


def put(inside: Any, conv: str, norm: str, new: nn.Module) -> None:
    """Another convolution, and nothing behind it."""
    setattr(inside, conv, new)
    setattr(inside, norm, nn.Identity())


EDITS: dict[str, Callable[[Any], Any]] = {
    "activation": lambda b: setattr(b, "relu", nn.SiLU()),
    "convolution": lambda b: put(b, "conv2", "bn2", nn.Conv2d(12, 12, 1)),
    "appended": lambda b: b.downsample.append(nn.Tanh()),
    "inside": lambda b: put(b.downsample, "0", "1", nn.Conv2d(8, 12, 1, 2)),
    "emptied": lambda b: setattr(b, "downsample", nn.Conv2d(8, 12, 1, 2)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_replaced_in_a_block(times: None, edit: str) -> None:
    """A block computes with the submodules that it has by now."""
    model = Net().eval()
    fast = pared.accelerate(model, X)
    twins = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast]
    for net in (model, *twins):
        torch.manual_seed(0)
        EDITS[edit](net.layers[1])
    for net in twins:
        torch.testing.assert_close(outputs(net), outputs(model), rtol=1e-4, atol=1e-5)


def test_hooks_see_what_they_saw(times: None) -> None:
    """A hook on a part of a block, put on later, is called with what that part gives."""
    model = Net().eval()
    fast = pared.accelerate(model, X)
    seen: list[Tensor] = []
    handle = fast.get_submodule("layers.0.bn2").register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    want = outputs(model)
    torch.testing.assert_close(outputs(fast), want, rtol=1e-4, atol=1e-5)
    handle.remove()
    inner: list[Tensor] = []
    model.get_submodule("layers.0.bn2").register_forward_hook(lambda m, a, y: inner.append(y.clone()))
    outputs(model)
    torch.testing.assert_close(seen[0], inner[0], rtol=1e-4, atol=1e-5)


def test_methods_and_attributes_of_the_block_are_there(times: None) -> None:
    class Named(Basic):
        expansion = 4

        def twice(self, n: int) -> int:
            return 2 * n

        @property
        def width(self) -> int:
            return int(self.conv1.out_channels)

    fast = pared.accelerate(Net(Named).eval(), X)
    block: Any = blocks(fast)[0]
    assert (block.expansion, block.twice(3), block.width) == (4, 6, 8)
    with pytest.raises(AttributeError):
        block.nothing  # noqa: B018


def test_copies_files_and_restore(times: None) -> None:
    model = Net().eval()
    fast = pared.accelerate(model, X)
    want = outputs(fast)
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    loaded = pared.load(file, Net())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded):
        assert len(blocks(other)) == 3
        assert sum(isinstance(m, MaxPool2d) for m in other.modules()) == 1
        assert torch.equal(outputs(other), want)
    assert fast.state_dict().keys() == loaded.state_dict().keys()
    plain = pared.restore(fast)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(outputs(plain), outputs(model))
    plain.train()(X).sum().backward()


def test_files_of_another_architecture_are_refused(times: None) -> None:
    class Other(Basic):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) * 2

    file = io.BytesIO()
    pared.save(pared.accelerate(Net().eval(), X), file)
    file.seek(0)
    with pytest.raises(pared.FormatError, match="expected a block whose convolutions add a residual"):
        pared.load(file, Net(Other))


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_blocks_of_transformers(times: None, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], layer_type=kind, num_labels=3
    )
    model = transformers.ResNetModel(config).eval()
    pared.prune(model, 0.7, scope="layer")
    x = {"pixel_values": torch.randn(1, 3, 40, 48)}
    fast = pared.accelerate(model, x)
    assert len(blocks(fast)) == 3
    with torch.no_grad():
        want, got = model(**x).last_hidden_state, fast(**x).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_traced_as_the_model_writes_it(times: None) -> None:
    fast = pared.accelerate(Net().eval(), X)
    want = outputs(fast)
    with torch.no_grad():
        exported = torch.export.export(fast, (X,), strict=False).module()
        torch.testing.assert_close(exported(X), want, rtol=1e-5, atol=1e-6)
        compiled = torch.compile(fast, backend="eager")
        torch.testing.assert_close(compiled(X), want, rtol=1e-5, atol=1e-6)


def test_training_mode_is_left_to_the_block(times: None) -> None:
    fast = pared.accelerate(Net().eval(), X)
    block = blocks(fast)[0]
    x = torch.randn(1, 8, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(block.train()(x), block.eval()(x), rtol=1e-5, atol=1e-6)


# -- max pooling ------------------------------------------------------------------------------------


def pooled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    real = pared._core.max_pool2d
    monkeypatch.setattr(pared.nn.pool._core, "max_pool2d", lambda *a: (seen.append(1), real(*a)))
    return seen


def test_pooling_is_taken_over(times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = pared.accelerate(Net().eval(), X)
    assert any("1 max pooling(s) run pared's kernel, 2.00x" in n for n in pared.report(fast).notes)
    seen = pooled(monkeypatch)
    outputs(fast)
    assert len(seen) == 1
    outputs(fast, X.to(memory_format=torch.channels_last))  # what torch is fast for stays torch's
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ceil", [False, True])
def test_the_values_are_those_of_torch(dtype: torch.dtype, ceil: bool) -> None:
    plain = nn.MaxPool2d((3, 2), 2, (1, 0), ceil_mode=ceil).eval()
    new = MaxPool2d.from_module(plain)
    for shape in ((2, 3, 9, 14), (3, 9, 14), (0, 3, 9, 14)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(new(x), plain(x))
    x = torch.randn(1, 2, 6, 8, requires_grad=True)
    new(x).sum().backward()
    assert x.grad is not None
    assert type(new.to_module()) is nn.MaxPool2d
    assert torch.equal(torch.compile(new, backend="eager")(x), plain(x))


def test_what_cannot_be_taken_over() -> None:
    with pytest.raises(ValueError, match="module: expected one that returns values alone"):
        MaxPool2d.from_module(nn.MaxPool2d(2, return_indices=True))
    with pytest.raises(TypeError, match=r"module: expected nn\.MaxPool2d"):
        MaxPool2d.from_module(nn.MaxPool1d(2))  # type: ignore[arg-type]


def test_blocks_are_found_inside_out() -> None:
    """An outer block with an addition of its own around inner ones."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Traps("plain")
            self.last = Conv2d.from_module(sparse_conv(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.inner(x)) + x
            return y

    model: Callable[[Tensor], Tensor] = nn.Sequential(Outer()).eval()
    names = [name for name, _ in find_blocks(model)]  # type: ignore[arg-type]
    assert names.index("0.inner") < names.index("0")
