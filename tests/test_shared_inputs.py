"""Linear layers that take the same input: quantized once, the same bits, and never a wrong one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared import _accelerate as acc
from pared import _core
from pared._choices import Timed
from pared._target import Target
from pared.nn import Linear
from pared.ops import BSR, CSR, Bitmap8, BSRInt8, Dense, Int8, PackedWeight

STATIC = {"activation_scale": 0.03, "activation_zero": 120}
# name: how a weight is packed, and the formats that share an input
FORMATS: dict[str, Callable[[Tensor], PackedWeight]] = {
    "bsr8": lambda w: BSRInt8.from_dense(w, block=(1, 4)),
    "csr": CSR.from_dense,
    "bsr": lambda w: BSR.from_dense(w, block=(4, 1)),
    "dense": Dense.from_dense,
    "int8": Int8.from_dense,
    "bitmap8": Bitmap8.from_dense,
}
EVERY = pytest.mark.parametrize("format", FORMATS)


def projections(
    sizes: tuple[int, ...] = (48, 48, 80), seed: int = 0, format: str = "bsr8", inputs: int = 64
) -> list[Linear]:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for i, n in enumerate(sizes):
        w = torch.randn(n, inputs, generator=generator)
        w *= (torch.rand(n, inputs // 4, generator=generator) < 0.4).repeat_interleave(4, 1)
        bias = torch.randn(n, generator=generator) if i != 1 else None
        weight = FORMATS[format](w)
        layers.append(Linear(weight, bias, [None, "relu", "gelu"][i % 3]))
    return layers


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the shared kernel computed."""
    seen: list[int] = []
    real = _core.linear_shared

    def count(x: Any, packed: Any, *rest: Any) -> None:
        seen.append(len(packed))
        real(x, packed, *rest)

    monkeypatch.setattr(_core, "linear_shared", count)
    return seen


@EVERY
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "sizes", "inputs"),
    [
        (1, (16, 31, 200), 64),
        (16, (1, 100, 0, 7), 64),
        (65, (16, 31, 200), 68),
        (300, (200, 16, 31), 128),
        (1, (16, 31, 200), 384),  # deeper than a kernel packs at once
        (37, (16, 31), 516),
        (129, (17, 70), 2048),  # a panel too large to be packed whole
    ],
)
def test_the_same_bits_as_separate_calls(
    isa: str, format: str, tokens: int, sizes: tuple[int, ...], inputs: int, threads: int
) -> None:
    layers, apart = (projections(sizes, format=format, inputs=inputs) for _ in range(2))
    layers[0].share_with(*layers[1:])
    x = torch.randn(tokens, inputs)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            assert all(torch.equal(a(x), b(x)) for a, b in zip(layers, apart, strict=True))
    finally:
        torch.set_num_threads(before)


@EVERY
def test_one_call_serves_all(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    layers = projections(format=format)
    layers[0].share_with(*layers[1:])
    seen = calls(monkeypatch)
    x = torch.randn(2, 5, 64)
    for layer in layers:
        layer(x)
    assert seen == [3]
    assert not vars(x)  # nothing is left behind
    layers[0].share_with()
    layers[0](x)
    assert seen == [3]
    assert not vars(x)


def test_another_or_a_changed_input_is_computed() -> None:
    layers, apart = projections(), projections()
    layers[0].share_with(*layers[1:])
    x = torch.randn(7, 64)
    layers[0](x)
    other = x.clone()
    assert torch.equal(layers[1](other), apart[1](other))
    x.mul_(2)
    assert torch.equal(layers[1](x), apart[1](x))
    assert torch.equal(layers[2](x), apart[2](x))
    # Followers first, and again and again.
    for layer, alone in [*zip(layers, apart, strict=True)][::-1] * 2:
        assert torch.equal(layer(x), alone(x))


def test_a_new_weight_is_seen_in_between() -> None:
    layers, other = projections(), projections(seed=1)
    layers[0].share_with(*layers[1:])
    x = torch.randn(7, 64)
    layers[0](x)
    layers[1].load_state_dict(other[1].state_dict())
    assert torch.equal(layers[1](x), other[1](x))


def test_inference_tensors_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, apart = projections(), projections()
    layers[0].share_with(*layers[1:])
    seen = calls(monkeypatch)
    with torch.inference_mode():
        x = torch.randn(7, 64)
        layers[0](x)
        x.mul_(2)
        assert torch.equal(layers[1](x), apart[1](x))
    assert seen == []


def test_tracers_see_every_layer() -> None:
    layers = projections()
    layers[0].share_with(*layers[1:])

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(layer(x) for layer in self.layers)

    x = torch.randn(9, 64)
    graph = torch.export.export(Block(), (x,)).graph
    assert sum("pared.linear" in str(n.target) for n in graph.nodes) == 3


def test_copies_and_pickles_refer_to_each_other() -> None:
    layers = projections()
    layers[0].share_with(*layers[1:])
    x = torch.randn(3, 64)
    for twin in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert twin[0]._sharers == (twin[1], twin[2])
        assert twin[1]._shares_of is twin[0]
        assert all(torch.equal(a(x), b(x)) for a, b in zip(twin, projections(), strict=True))


def test_what_cannot_share_is_refused() -> None:
    a, b, c = projections()
    csr = Linear(pared.ops.CSR.from_dense(torch.eye(64)))
    with pytest.raises(ValueError, match="others: expected layers of the same inputs"):
        a.share_with(csr)
    with pytest.raises(TypeError, match="others: expected Linear layers, got ReLU"):
        a.share_with(nn.ReLU())
    narrow = Linear(BSRInt8.from_dense(torch.ones(16, 32), block=(1, 4)))
    with pytest.raises(ValueError, match="others: expected layers of the same inputs"):
        a.share_with(narrow)
    b.share_with(c)
    with pytest.raises(ValueError, match="go with no others"):
        a.share_with(b)


def test_bad_arguments_of_the_kernel() -> None:
    a, b, _ = projections()
    x, out = torch.randn(3, 64), torch.empty(3, 48)
    with pytest.raises(ValueError, match="packed: expected a weight or more"):
        _core.linear_shared(x, [], [], [], [])
    with pytest.raises(ValueError, match="packed: expected"):
        _core.linear_shared(x, [a.packed, b.packed], [None], [out, out], ["", ""])
    with pytest.raises(ValueError, match="out"):
        _core.linear_shared(x, [a.packed, b.packed], [None, None], [out, out], ["", ""])
    with pytest.raises(ValueError, match="x: expected"):
        _core.linear_shared(x[:, :32], [a.packed], [None], [out], [""])


def test_what_shares_an_input() -> None:
    """Formats that are packed alike, with equal inputs and ranges."""
    w = projections((48,))[0].packed_weight().to_dense()
    packed = {name: torch.as_tensor(pack(w).packed) for name, pack in FORMATS.items()}
    panels = {"csr", "bsr", "dense"}
    for a in packed:
        assert _core.shares_inputs(packed[a], packed[a])
        for b in packed:
            if a != b and not {a, b} <= panels:
                assert not _core.shares_inputs(packed[a], packed[b])
    for kind in (Int8, Bitmap8, BSRInt8):
        fixed = kind.from_dense(w, **STATIC)
        assert _core.shares_inputs(fixed.packed, kind.from_dense(w[:16], **STATIC).packed)
        assert not _core.shares_inputs(fixed.packed, kind.from_dense(w).packed)
    four = pared.ops.Int4.from_dense(w, group=32)
    assert not _core.shares_inputs(four.packed, four.packed)
    with pytest.raises(ValueError, match="packed: expected weights of a format that shares inputs"):
        _core.linear_shared(torch.ones(2, 64), [four.packed], [None], [torch.ones(2, 48)], [""])


class Attention(nn.Module):
    """Projections of one input, and one of another that looks the same in the example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        for m in (self.q, self.k, self.v, self.o):
            m.weight.data *= (torch.rand(64, 16) < 0.3).repeat_interleave(4, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        other = x if context is None else context
        y: Tensor = self.o(torch.tanh(self.q(x)) * self.k(other) + self.v(other))
        return y


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acc.timing, "time_sharing", lambda *_: 1.5)
    monkeypatch.setattr(acc.timing, "time_hand_over", lambda layers, calls: 0.0)
    times = {"median": (0.5, 2.0), "p95": (0.5, 1.0)}
    monkeypatch.setattr(acc.timing, "time_models", lambda *models: Timed("model", 1.0, times))


def convert(model: nn.Module, x: Any, format: str = "bsr8") -> nn.Module:
    return pared.accelerate(
        model, x, precision="int8", min_speedup=0, max_error=1.0, formats=[format], progress=False
    )


@pytest.mark.parametrize("format", ["bsr8", "csr", "int8"])
def test_accelerate_finds_projections_of_one_input(shares: None, format: str) -> None:
    model, x = Attention().eval(), torch.randn(2, 9, 64)
    fast: Any = convert(model, x, format)
    assert fast.q._sharers == (fast.k, fast.v)
    assert fast.o._shares_of is None
    rows = {r.name: r.reason for r in pared.report(fast).layers}
    assert "computes k, v too: 1.50x" in rows["q"]
    assert "computed with q" in rows["k"]
    alone: Any = copy.deepcopy(fast)
    alone.q.share_with()
    with torch.no_grad():
        for inputs in ((x,), (x, torch.randn(2, 9, 64)), (torch.randn(1, 3, 64),)):
            assert torch.equal(fast(*inputs), alone(*inputs))


def test_files_and_restore(shares: None) -> None:
    model, x = Attention().eval(), torch.randn(2, 9, 64)
    fast: Any = convert(model, x)
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    loaded: Any = pared.load(file, Attention())
    assert loaded.q._sharers == (loaded.k, loaded.v)
    with torch.no_grad():
        assert torch.equal(loaded(x), fast(x))
        plain: Any = pared.restore(fast)
        assert type(plain.q) is nn.Linear
        np.testing.assert_allclose(plain(x), model(x), atol=0.1)


def test_other_inputs_in_the_example_share_less(shares: None) -> None:
    model, x = Attention().eval(), torch.randn(2, 9, 64)
    fast: Any = convert(model, (x, torch.randn(2, 9, 64)))
    assert fast.q._sharers == ()
    assert fast.k._sharers == (fast.v,)


def test_no_sharing_without_a_gain(shares: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acc.timing, "time_sharing", lambda *_: 1.0)
    fast: Any = convert(Attention().eval(), torch.randn(2, 9, 64))
    assert fast.q._sharers == ()


def test_the_gain_is_really_timed() -> None:
    layers = projections()
    calls = {acc.layers.Signature((4, 64), (64, 1), torch.float32): 2}
    gain = acc.timing.time_sharing(layers, calls, Target())
    assert gain > 0
    assert layers[0]._sharers == ()
