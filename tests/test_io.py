"""Files: what `pared.save` writes `pared.load` gives back bit for bit, and nothing else is ever accepted."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import random
import stat
import struct
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from _models import fused_is_faster, set_times, sparse_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import pared
from pared import _accelerate, _core, _format

DTYPES = [getattr(torch, name) for name in _format.DTYPES]


@pytest.fixture(autouse=True)
def known_times(monkeypatch):
    """What accelerate would measure does not matter here, and decides nothing: whatever can be fused is."""
    set_times(monkeypatch, fused_is_faster)
    monkeypatch.setattr(_accelerate.timing, "MODEL_SECONDS", 0.0)


# -- helpers ---------------------------------------------------------------------------------------


class Bag(nn.Module):
    """Buffers of the given tensors."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        for i, t in enumerate(tensors):
            self.register_buffer(f"t{i}", t)


class Net(nn.Module):
    """A bit of everything: convolution, norm, tied weights, a local buffer, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 40)
        self.out = nn.Linear(40, 8, bias=False)
        self.back = nn.Linear(40, 8, bias=False)
        self.back.weight = self.out.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3)) + self.shift
        h = torch.relu(self.fc(x))
        return self.scale * (self.out(h) - 2 * self.back(h.flip(-1)))


def pruned(model: nn.Module, sparsity: float = 0.9, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            with torch.no_grad():
                module.weight[torch.rand(module.weight.shape, generator=generator) < sparsity] = 0
    return model


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    pared.save(model, file)
    return file.getvalue()


def loaded(data: bytes, model: Any) -> nn.Module:
    return pared.load(io.BytesIO(data), model)


def bits(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (str(t.dtype), tuple(t.shape), bits(t)) for n, t in model.state_dict().items()}


def metadata(data: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["pared"])


def encoding(data: bytes, name: str = "t0") -> str:
    return metadata(data)["tensors"][name]["encoding"]


Edit = Callable[[dict[str, Any], dict[str, Any]], None]


def forged(data: bytes, edit: Edit = lambda h, m: None, body: bytes | None = None) -> bytes:
    """The file with its header and metadata edited and the checksum of the header made right again."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    meta = json.loads(header["__metadata__"]["pared"])
    edit(header, meta)
    about = header.get("__metadata__")
    if isinstance(about, dict) and "pared" in about:
        header["__metadata__"]["pared"] = json.dumps(meta)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if raw.startswith(_format._PREFIX):
        raw = _format.sign(raw)
    return struct.pack("<Q", len(raw)) + raw + (data[8 + size :] if body is None else body)


def rejects(data: bytes, model: Any, match: str | None = None) -> None:
    with pytest.raises(pared.FormatError, match=match):
        loaded(data, model)


def accelerated(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """Every layer that a kernel exists for, faster or not; deterministic."""
    fast = pared.accelerate(model, inputs, min_speedup=0, progress=False, formats=["csr"])
    assert any(isinstance(m, pared.nn.PackedModule) for m in fast.modules())
    return fast


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int) -> torch.Tensor:
    """Random bit patterns: NaN payloads, infinities, denormals and -0.0 among them."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape, dtype=np.int64))
    size = _format.DTYPES[str(dtype).removeprefix("torch.")].itemsize
    data = rng.integers(0, 2 if dtype == torch.bool else 256, (count, size), dtype=np.uint8)
    data[rng.random(count) >= density] = 0
    return (
        torch.from_numpy(data).view(-1).view(dtype).reshape(shape)
        if count
        else torch.empty(shape, dtype=dtype)
    )


# -- round trips -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.6, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tensor_round_trips_bit_for_bit(shape, dtype, density, seed):
    t = random_tensor(shape, dtype, density, seed)
    data = saved(Bag(t))
    for target in (Bag(torch.empty_like(t)), Bag(torch.empty_like(t, device="meta"))):
        back = loaded(data, target).t0
        assert (back.dtype, back.shape, back.device.type) == (t.dtype, t.shape, "cpu")
        assert bits(back) == bits(t)
        assert back.numel() == 0 or back.data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("density", "expected"),
    [(1.0, "dense"), (0.5, "bitmap"), (0.1, "gaps4"), (0.02, "gaps8"), (0.0005, "gaps16"), (0.0, "gaps4")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_every_encoding_is_chosen_where_it_is_smallest(density, expected, dtype):
    t = (torch.rand(300_000, generator=torch.Generator().manual_seed(1)) < density).to(dtype)
    data = saved(Bag(t))
    assert encoding(data) == expected
    assert bits(loaded(data, Bag(t)).t0) == bits(t)
    nonzeros = int(t.count_nonzero())
    index = {
        "dense": 0,
        "bitmap": 1 / 8,
        "gaps4": 0.75 * density,
        "gaps8": 1.25 * density,
        "gaps16": 2.1 * density,
    }
    size = (t.numel() if expected == "dense" else nonzeros) * t.element_size() + index[expected] * t.numel()
    assert len(data) <= size + 1000


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("skips", [1, 2, 3])
def test_gaps_at_the_edge_of_a_code(width, extra, skips):
    # A gap of exactly n * skip needs n skip codes and a zero; first, last and adjacent positions as well.
    gap = skips * ((1 << width) - 1) + extra
    words = np.zeros(2 * gap + 5, np.uint32)
    words[[0, 1, 2 + gap, -1]] = 1, 2, 3, 4
    at = np.flatnonzero(words)
    codes = _format._pack_gaps(np.diff(at, prepend=-1) - 1, width)
    assert np.array_equal(_format._unpack_gaps(codes, width), at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.02, 0.0005, 0.0])
def test_the_signs_of_zeros_cost_a_bit(dtype, density):
    # As weights that were multiplied with a mask: half of the zeros are -0.0.
    rng = np.random.default_rng(int(density * 10000))
    size = dtype.itemsize
    words = rng.integers(1, 1 << 7, 100_003).astype(f"<u{size}")
    words[rng.random(words.size) >= density] = 0
    positive = saved(Bag(torch.from_numpy(words.view(np.uint8)).view(dtype)))
    words |= (rng.random(words.size) < 0.5).astype(words.dtype) << (8 * size - 1)
    t = torch.from_numpy(words.view(np.uint8)).view(dtype)
    data = saved(Bag(t))
    assert bits(loaded(data, Bag(t)).t0) == words.tobytes()
    assert metadata(data)["tensors"]["t0"]["signs"]
    assert len(data) <= len(positive) + (1 - density) * words.size / 8 + 600


def test_a_few_negative_zeros_are_values():
    t = torch.zeros(10_000)
    t[::100] = -0.0
    data = saved(Bag(t))
    assert not metadata(data)["tensors"]["t0"]["signs"]
    assert metadata(data)["tensors"]["t0"]["values"] == 100
    assert bits(loaded(data, Bag(t)).t0) == bits(t)


def test_signed_zeros_denormals_and_nan_payloads_are_kept():
    words = torch.zeros(4096, dtype=torch.int32)
    words[::41] = torch.tensor([-(2**31)], dtype=torch.int32)  # -0.0
    words[1::41] = 1  # the smallest denormal
    words[2::41] = 0x7FC01234
    t = words.view(torch.float32)
    data = saved(Bag(t))
    assert encoding(data) != "dense"
    assert bits(loaded(data, Bag(t)).t0) == bits(t)


def test_a_model_round_trips(tmp_path):
    model = pruned(Net()).train()
    before = state(model)
    path = tmp_path / "model.pared"
    pared.save(model, path)
    assert model.training
    assert state(model) == before
    target = Net()
    untouched = state(target)
    back = pared.load(path, target)
    assert state(back) == before
    assert state(target) == untouched
    assert back is not target
    assert type(back) is Net
    assert not any(m.training for m in back.modules())
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(back(x), model.eval()(x))
    assert back.out.weight is back.back.weight
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in target.parameters()]


@pytest.mark.parametrize("make", [Net, lambda: Net(), lambda: Net().eval()])
def test_a_factory_and_the_meta_device(make):
    model = pruned(Net()).eval()
    data = saved(model)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(loaded(data, make)(x), model(x))
    with torch.device("meta"):
        empty = Net()
    back = loaded(data, empty)
    assert torch.equal(back(x), model(x))  # the local buffer came out of the file
    assert back.out.weight is back.back.weight
    assert all(p.is_meta for p in empty.parameters())


def test_local_buffers_with_data_keep_their_own():
    model, target = Net(), Net()
    target.shift.fill_(5.0)
    assert torch.equal(loaded(saved(model), target).shift, torch.full((8,), 5.0))


def test_memory_that_modules_share_is_stored_once_and_tied_again():
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    b.weight.data = a.weight.data
    data = saved(nn.Sequential(a, b, a))
    meta = metadata(data)
    assert meta["ties"] == {"1.weight": "0.weight", "2.weight": "0.weight", "2.bias": "0.bias"}
    assert len(data) < 64 * 64 * 4 + 4096
    back = loaded(data, nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))))
    assert back[0].weight is back[1].weight
    assert torch.equal(back[0].weight, a.weight)
    shared = nn.Linear(64, 64)
    with pytest.raises(pared.FormatError, match="shared in the model"):
        loaded(data, nn.Sequential(shared, shared, nn.Linear(64, 64)))


def test_views_that_overlap_are_stored_for_themselves():
    base = torch.arange(100.0)
    data = saved(Bag(base[:60], base[40:], base.view(10, 10).t()))
    back = loaded(data, Bag(torch.empty(60), torch.empty(60), torch.empty(10, 10)))
    assert torch.equal(back.t0, base[:60])
    assert torch.equal(back.t1, base[40:])
    assert torch.equal(back.t2, base.view(10, 10).t())


def test_recurrent_layers_use_the_loaded_weights():
    model = nn.LSTM(5, 7)
    back = loaded(saved(model), lambda: nn.LSTM(5, 7))
    x = torch.randn(3, 2, 5)
    assert torch.equal(back(x)[0], model.eval()(x)[0])


def test_masks_of_torch_prune_stay_as_they_are():
    def make() -> nn.Module:
        layer = nn.Linear(64, 64)
        prune.random_unstructured(layer, "weight", 0.5)
        return layer

    model = make()
    for target in (make, make()):  # the masked weight is no leaf, which deepcopy refuses
        back = loaded(saved(model), target)
        assert state(back) == state(model)
        x = torch.randn(3, 64)
        assert torch.equal(back(x), model(x))


def test_ninety_percent_sparse_takes_less_than_a_fifth():
    model = pruned(nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)))
    dense = sum(p.numel() * 4 for p in model.parameters())
    assert len(saved(model)) < 0.125 * dense  # 4.65 bytes a non-zero


def test_the_same_model_gives_the_same_bytes():
    assert saved(pruned(Net_seeded())) == saved(pruned(Net_seeded()))


def Net_seeded() -> Net:
    torch.manual_seed(3)
    return Net()


# -- accelerated models ----------------------------------------------------------------------------


class Small(nn.Module):
    """Fused activations, a shared layer, a head tied to an embedding, a layer that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.body = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16), nn.SiLU())
        self.shared = nn.Linear(16, 16)
        self.again = self.shared
        self.wide = nn.Linear(16, 16).double()
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.relu(self.shared(self.body(self.embed(i)))))
        return self.head(x + self.wide(x.double()).float())


@pytest.fixture
def fast() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A pruned model, what accelerate makes of it, and an input."""
    torch.manual_seed(1)
    model = pruned(Small(), 0.8)
    x = torch.randint(0, 50, (3, 20))
    return model, accelerated(model, x), x


@pytest.mark.parametrize("kind", ["module", "meta", "class", "original"])
def test_an_accelerated_model_comes_back_the_same(fast, kind):
    model, fast, x = fast
    with torch.device("meta" if kind == "meta" else "cpu"):
        target = {"class": Small, "original": model}.get(kind) or Small()
    data = saved(fast)
    back = loaded(data, target)
    with torch.no_grad():
        assert torch.equal(back(x), fast(x))
    assert repr(back) == repr(fast)
    assert pared.report(back) == pared.report(fast)
    assert back.again is back.shared
    assert isinstance(back.body[1], pared.nn.Fused)
    assert all(m.packed.data_ptr() % 64 == 0 for m in back.modules() if isinstance(m, pared.nn.PackedModule))
    assert not any(m.training for m in back.modules())
    assert not any(p.requires_grad for p in back.parameters())  # for inference, as accelerate gives it
    assert saved(back) == data
    plain = pared.restore(back)
    assert state(plain) == state(pared.restore(fast))
    assert plain.head.weight is plain.embed.weight
    assert pared.restore(back).body[1](torch.tensor(-1.0)) == nn.GELU()(torch.tensor(-1.0))


def test_the_file_holds_logical_weights_once(fast):
    model, fast, _ = fast
    data = saved(fast)
    meta = metadata(data)
    assert meta["layers"]["body.0"] == {
        "type": "Linear",
        "format": "csr",
        "norm": None,
        "activation": "gelu",
        "input": None,
    }
    assert meta["fused"] == {"body.1": "gelu", "body.3": "silu"}
    ties = {"head.weight": "embed.weight", "again.weight": "shared.weight", "again.bias": "shared.bias"}
    assert meta["ties"] == ties
    assert meta["report"]["machine"]["isa"] == pared.isa()
    assert meta["tensors"].keys() | ties.keys() == set(model.state_dict())
    # The tensors are what the plain model's file would hold: only what is beside them differs.
    assert meta["tensors"] == {**metadata(saved(model))["tensors"]}


def test_convolutions():
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(16, 24, 1, bias=False),
            nn.BatchNorm2d(24),
            nn.Conv2d(24, 8, (3, 1), dilation=2),
        )

    model = pruned(make(), 0.8).eval()
    x = torch.randn(2, 8, 17, 15)
    fast = accelerated(model, x)
    data = saved(fast)
    assert {layer["type"] for layer in metadata(data)["layers"].values()} == {"Conv2d"}
    with torch.device("meta"):
        target = make()
    back = loaded(data, target)
    with torch.no_grad():
        assert torch.equal(back(x), fast(x))
    assert repr(back) == repr(fast)
    assert saved(back) == data
    assert state(pared.restore(back)) == state(model)


def test_layers_with_equal_weights_are_not_tied():
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    b.load_state_dict(a.state_dict())
    back = loaded(saved(accelerated(nn.Sequential(a, b), torch.randn(3, 64))), nn.Sequential(a, b))
    plain = pared.restore(back)
    assert plain[0].weight is not plain[1].weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_alone_and_every_dtype(dtype, bias):
    model = sparse_linear(70, 33, 0.1, bias, dtype)
    x = torch.randn(5, 70).to(dtype)
    fast = accelerated(model, x)
    back = loaded(saved(fast), model)
    assert isinstance(back, pared.nn.Linear)
    assert torch.equal(back(x), fast(x))
    assert state(pared.restore(back)) == state(pared.restore(fast))


def test_a_file_of_any_level_loads_on_any_level(isa, rng):
    x = torch.from_numpy(rng.standard_normal((17, 300), np.float32))
    model = nn.Sequential(sparse_linear(300, 50, 0.1), nn.ReLU())
    fast = accelerated(model, x)
    here, data = fast(x), saved(fast)
    assert torch.equal(loaded(data, model)(x), here)
    magnitude = x.abs() @ model[0].weight.detach().abs().T + model[0].bias.detach().abs()
    for other in _core.supported_isas():
        _core.set_isa(other)
        there = loaded(data, model)(x)
        _core.set_isa(isa)
        # Two float32 sums of the same 301 terms in any order.
        assert ((there - here).abs() <= 2 * 301 * 2.0**-24 * magnitude).all()


def test_denormals_go_when_a_layer_is_packed_and_not_before():
    model = nn.Sequential(sparse_linear(64, 64, 0.2))
    with torch.no_grad():
        model[0].weight[0, 0], model[0].weight[0, 1], model[0].weight[0, 2] = 1e-40, -0.0, 1.5
    plain = loaded(saved(model), model)
    assert bits(plain[0].weight) == bits(model[0].weight)
    back = pared.restore(loaded(saved(accelerated(model, torch.randn(2, 64))), model))
    assert bits(back[0].weight[0, :3]) == bits(torch.tensor([0.0, 0.0, 1.5]))


def test_masks_that_accelerate_applied_may_be_attached_to_the_target():
    def make() -> nn.Module:
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        prune.random_unstructured(model[0], "weight", 0.8)
        return model

    model = make()
    x = torch.randn(3, 64)
    fast = accelerated(model, x)
    for target in (model, make, lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU())):
        assert torch.equal(loaded(saved(fast), target)(x), fast(x))


def test_hooks_of_the_target_are_kept():
    seen = []
    model = sparse_linear(64, 64)
    data = saved(accelerated(model, torch.randn(3, 64)))
    model.register_forward_hook(lambda *args: seen.append(1))
    loaded(data, model)(torch.randn(3, 64))
    assert seen == [1]


def test_dense_weights_are_dropped_layer_by_layer(monkeypatch):
    model = nn.Sequential(*(sparse_linear(64, 64, seed=i) for i in range(6)))
    data = saved(accelerated(model, torch.randn(3, 64)))
    dense: list[weakref.ref] = []
    alive: list[int] = []
    real = pared.nn.Linear.from_module.__func__

    def watch(cls: Any, module: nn.Linear, **kwargs: Any) -> Any:
        dense.append(weakref.ref(module.weight))
        alive.append(sum(ref() is not None for ref in dense))
        return real(cls, module, **kwargs)

    monkeypatch.setattr(pared.nn.Linear, "from_module", classmethod(watch))
    loaded(data, model)
    assert len(alive) == 6
    assert max(alive) <= 2  # a reference of the loop may outlive its turn by one


def test_the_target_has_to_be_plain(fast):
    _, fast, _ = fast
    with pytest.raises(ValueError, match=r"model: expected the plain architecture.*restore"):
        loaded(saved(fast), fast)


@functools.cache
def fused_file() -> bytes:
    """Of a Linear with a fused GELU."""
    return saved(accelerated(nn.Sequential(sparse_linear(64, 64), nn.GELU()), torch.randn(3, 64)))


def gelu_tanh() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.GELU("tanh"))


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()), "'gelu' at '1', .* got ReLU"),
        (gelu_tanh, "'gelu' at '1', .* got GELU"),
        (lambda: nn.Sequential(nn.Linear(64, 64)), "'gelu' at '1', .* got nothing"),
        (lambda: nn.Sequential(nn.Bilinear(1, 1, 1), nn.GELU()), "expected 'Linear', .* got Bilinear"),
        (lambda: nn.Linear(64, 64), "expected a layer '0', as in the file, got none"),
        (lambda: nn.Sequential(*[nn.Linear(64, 64)] * 2), "layer '0': shared in the model as"),
        (lambda: nn.Sequential(nn.Linear(64, 65), nn.GELU()), r"'0.weight': expected .* \[65, 64\], got"),
    ],
)  # fmt: skip
def test_layers_that_the_target_does_not_have(target, match):
    assert metadata(fused_file())["fused"] == {"1": "gelu"}
    rejects(fused_file(), target, match)


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("layers", "0", "activation"), "exec", "unknown activation 'exec'"),
        (("layers", "0", "format"), "zip", "unknown format 'zip', known are csr"),
        (("layers", "0", "type"), "os.system", "expected 'os.system'"),
        (("layers", "0", "norm"), "1", "expected a batch normalisation at '1'"),
        (("layers", "0", "norm"), "nowhere", "got nothing"),
        (("layers", "0"), "csr", "expected an object"),
        (("layers", "0", "more"), 1, "expected the fields"),
        (
            ("layers", "__class__"),
            {"type": "Linear", "format": "csr", "norm": None, "activation": None, "input": None},
            "got none",
        ),
        (("fused", "0"), "relu", "expected activation 'relu' at '0'"),
        (("fused", "1"), 3, "expected str, got 3"),
        (("report",), [], "expected an object"),
        (("report", "layers"), [{}], "expected the fields"),
        (("report", "speedup"), "fast", "expected float, got 'fast'"),
        (("report", "dense"), {"p50": 10**400, "p95": 1}, "expected float"),
        (("report", "ties"), [["0.weight", 0]], "expected str, got 0"),
        (("report", "ties"), [[]], "expected names in the model, got \\[\\]"),
        (("report", "ties"), [["0.weight", "0.forward"]], "expected names in the model"),
    ],
)  # fmt: skip
def test_hostile_metadata_of_accelerated_models(path, value, match):
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    loaded(forged(fused_file()), model)
    rejects(forged(fused_file(), put(*path, value=value)), model, match)


def test_names_are_not_markup():
    model = nn.Sequential()
    model.add_module("[/red]", sparse_linear(64, 64))
    back = loaded(saved(accelerated(model, torch.randn(3, 64))), model)
    assert "[/red]" in str(pared.report(back))


def test_reports_of_other_versions():
    model = nn.Sequential(sparse_linear(64, 64))
    fast = accelerated(model, torch.randn(3, 64))

    def edit(header: dict[str, Any], meta: dict[str, Any]) -> None:
        meta["report"]["new"] = 1
        meta["report"]["layers"][0]["new"] = 1
        del meta["report"]["notes"], meta["report"]["layers"][0]["calls"]

    back = pared.report(loaded(forged(saved(fast), edit), model))
    assert back.layers[0].reason == pared.report(fast).layers[0].reason


def test_weights_that_packing_refuses():
    model = nn.Sequential(sparse_linear(64, 64))
    data = saved(accelerated(model, torch.randn(3, 64)))
    with torch.no_grad():
        model[0].weight[3, 5] = torch.nan
    plain = saved(model)
    loaded(plain, model)  # a plain model may hold what it likes

    def claim(header: dict[str, Any], meta: dict[str, Any]) -> None:
        meta["layers"] = metadata(data)["layers"]

    rejects(forged(plain, claim), model, r"layer '0': .*row 3")


# -- the container ---------------------------------------------------------------------------------


def test_any_safetensors_reader_opens_the_file(tmp_path):
    model = Bag(torch.randn(5, 7), (torch.rand(1000) < 0.1).half(), torch.tensor(3, dtype=torch.int8))
    path = tmp_path / "model.pared"
    pared.save(model, path)
    with safetensors.safe_open(path, "pt") as f:
        assert sorted(f.keys()) == ["t0", "t1..gaps", "t1..values", "t2"]
        assert torch.equal(f.get_tensor("t0"), model.t0)
        assert torch.equal(f.get_tensor("t1..values"), torch.ones(int(model.t1.sum())).half())
        about = json.loads(f.metadata()["pared"])
    assert about["version"] == 1
    assert about["pared"] == pared.__version__
    assert about["tensors"]["t1"]["shape"] == [1000]


def test_parts_are_aligned_to_their_elements():
    tensors = [random_tensor((n,), d, 0.1, n) for n, d in zip(range(61, 3000, 140), DTYPES, strict=False)]
    data = saved(Bag(*tensors))
    (size,) = struct.unpack("<Q", data[:8])
    assert (8 + size) % 64 == 0
    for name, part in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            assert part["data_offsets"][0] % _format._TAG_SIZES[part["dtype"]] == 0


class Dribble(io.BytesIO):
    """Gives and takes a few bytes at a time, as a socket may; no readinto."""

    readinto = None

    def read(self, n=-1):
        return super().read(min(n, 7))


def test_file_objects(tmp_path):
    model = pruned(Net())
    file = io.BytesIO()
    file.write(b"before")
    pared.save(model, file)
    file.seek(6)
    assert state(pared.load(file, Net)) == state(model)
    assert state(pared.load(Dribble(saved(model)), Net)) == state(model)
    with open(tmp_path / "raw", "wb", buffering=0) as raw:
        pared.save(model, raw)
    with open(tmp_path / "raw", "rb", buffering=0) as raw:
        assert state(pared.load(raw, Net)) == state(model)
    with open(tmp_path / "text", "w") as text, pytest.raises(TypeError, match="binary"):
        pared.save(model, text)


def test_loading_takes_one_layer_beside_the_model():
    model = pruned(nn.Sequential(*(nn.Linear(256, 256) for _ in range(20))), 0.5)
    data = saved(model)
    tracemalloc.start()  # sees numpy's memory, not torch's: what the model itself does not need
    try:
        loaded(data, model)
        beside = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The parts of one tensor (bitmap and values), its mask, and the header; all twenty layers are 5 MB.
    assert beside < 3 * 256 * 256 * 4


def test_no_pickle_is_involved(monkeypatch, tmp_path):
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle")

    models = [
        (Net(), Net),
        (accelerated(sparse_linear(64, 64), torch.randn(3, 64)), nn.Linear(64, 64)),
    ]
    for name in ("load", "loads", "Unpickler", "_Unpickler", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, fail)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, fail)
    for model, target in models:
        pared.save(model, tmp_path / "model.pared")
        pared.load(tmp_path / "model.pared", target)


# -- writing files ---------------------------------------------------------------------------------


def test_a_file_appears_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model.pared"
    pared.save(nn.Linear(3, 3), path)
    before = path.read_bytes()
    real = _format.Writer.write

    def crash(self: Any, file: Any, about: Any) -> None:
        real(self, file, about)
        raise OSError("no space left on device")

    with monkeypatch.context() as m:
        m.setattr(_format.Writer, "write", crash)
        with pytest.raises(OSError, match="no space"):
            pared.save(nn.Linear(4, 4), path)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("replace")))
        with pytest.raises(OSError, match="replace"):
            pared.save(nn.Linear(4, 4), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.pared"]


def test_overwriting(tmp_path):
    path = tmp_path / "model.pared"
    pared.save(nn.Linear(3, 3), path, overwrite=False)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"model.pared"):
        pared.save(nn.Linear(4, 4), path, overwrite=False)
    assert path.read_bytes() == before
    pared.save(nn.Linear(4, 4), path)
    assert pared.load(path, nn.Linear(4, 4)).in_features == 4
    assert os.listdir(tmp_path) == ["model.pared"]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """Not the temporary file, which nobody has heard of."""
    with pytest.raises(FileNotFoundError, match=r"model\.pared: expected a folder that exists: '.*missing'"):
        pared.save(nn.Linear(3, 3), tmp_path / "missing" / "model.pared")


def test_links_directories_and_permissions(tmp_path):
    real = tmp_path / "folder" / "real.pared"
    real.parent.mkdir()
    pared.save(nn.Linear(3, 3), str(real))
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert real.stat().st_mode == plain.stat().st_mode
    for mode in (0o600, 0o660):  # a private file stays one when it is replaced
        real.chmod(mode)
        pared.save(nn.Linear(3, 3), str(real))
        assert stat.S_IMODE(real.stat().st_mode) == mode
    link = tmp_path / "link.pared"
    link.symlink_to(real)
    pared.save(nn.Linear(4, 4), link)
    assert link.is_symlink()
    assert pared.load(real, nn.Linear(4, 4)).in_features == 4
    os.mkfifo(tmp_path / "pipe")  # not a device of this machine: a fault would replace it
    for bad in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="regular file"):
            pared.save(nn.Linear(3, 3), bad)
    with pytest.raises(FileNotFoundError):
        pared.save(nn.Linear(3, 3), tmp_path / "absent" / "model.pared")
    with pytest.raises(FileNotFoundError):
        pared.load(tmp_path / "absent.pared", nn.Linear(3, 3))


# -- arguments and architectures -------------------------------------------------------------------


class Odd(torch.Tensor):
    pass


def nameless() -> nn.Module:
    module = nn.Linear(3, 3)
    module._parameters["..values"] = nn.Parameter(torch.ones(3))  # torch's own functions refuse such names
    return nn.Sequential(module)


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return object()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Linear(3, 3, device="meta"), "weight: .*meta device"),
        (lambda: nn.LazyLinear(3), "lazy"),
        (lambda: Bag(torch.eye(3).to_sparse()), "t0: .*layout"),
        (lambda: Bag(torch.ones(3).as_subclass(Odd)), "t0: .*subclass Odd"),
        (lambda: nameless(), "empty components"),
        (lambda: Extra(3, 3), "the root: .*extra state"),
        (lambda: nn.Sequential(Extra(3, 3)), "0: .*extra state"),
    ],
)
def test_what_cannot_be_saved(make, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        pared.save(make(), tmp_path / "model.pared")
    assert os.listdir(tmp_path) == []


def test_wrong_arguments(tmp_path):
    data = saved(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        pared.save({}, tmp_path / "model.pared")
    compiled = nn.Module()
    compiled._orig_mod = nn.Linear(3, 3)  # what torch.compile wraps around a module
    with pytest.raises(TypeError, match=r"torch\.compile"):
        pared.save(compiled, tmp_path / "model.pared")
    with pytest.raises(TypeError, match=r"path: .*got int"):
        pared.save(nn.Linear(3, 3), 3)
    with pytest.raises(TypeError, match=r"path: .*got int"):
        pared.load(3, nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"model: .*got int"):
        loaded(data, 3)
    with pytest.raises(TypeError, match=r"model: .*got dict from it"):
        loaded(data, dict)
    with pytest.raises(pared.FormatError, match="lazy"):
        loaded(data, nn.LazyLinear(3))


def test_an_attribute_that_stays_on_meta_is_refused():
    class Odd(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.table = torch.ones(3)

    data = saved(Odd())
    loaded(data, Odd)
    with torch.device("meta"):
        empty = Odd()
    with pytest.raises(ValueError, match=r"Odd.table"):
        loaded(data, empty)


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 5)), r"unexpected in the file: '1.bias', '1.weight'"),
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(1, 1)),
            r"missing .*'2.bias', '2.weight'",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 7)),
            r"'1.weight': expected .* \[7, 5\], got .* \[6, 5\]",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)).half(),
            r"'0.weight': expected parameter float16",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6, bias=False)),
            r"unexpected in the file: '1.bias'",
        ),
        (lambda: Bag(torch.ones(3)), "missing in the file: 't0'; unexpected"),
    ],
)
def test_another_architecture_is_refused_with_the_differences(target, match):
    rejects(saved(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))), target, match)


def test_parameters_and_buffers_are_not_exchanged():
    class Parameter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t0 = nn.Parameter(torch.ones(3))

    rejects(saved(Bag(torch.ones(3))), Parameter(), r"'t0': expected parameter float32 \[3\], got buffer")


def test_many_differences_make_a_short_message():
    with pytest.raises(pared.FormatError) as e:
        loaded(saved(nn.Linear(3, 3)), nn.Sequential(*(nn.Linear(3, 3) for _ in range(1000))))
    assert "and 1990 more" in str(e.value)
    assert len(str(e.value)) < 600


# -- damaged files ---------------------------------------------------------------------------------


def small() -> tuple[nn.Module, bytes]:
    """A model of every encoding whose file is small enough to damage everywhere."""
    torch.manual_seed(0)
    tensors = [random_tensor((900,), torch.int8, d, 7) for d in (1.0, 0.4, 0.1)]
    tensors += [(torch.rand(40000) < 0.0003).to(torch.int16), torch.tensor([True, False])]
    tensors += [torch.randn(901).half() * (torch.rand(901) < 0.1)]
    model = Bag(*tensors)
    data = saved(model)
    expected = ["dense", "bitmap", "gaps4", "gaps16", "dense", "gaps4"]
    assert [encoding(data, f"t{i}") for i in range(6)] == expected
    assert metadata(data)["tensors"]["t5"]["signs"]
    return model, data


def damaged(data: bytes, model: nn.Module) -> None:
    """The property: a damaged file is refused. Fails on any other exception and on any result."""
    try:
        loaded(data, model)
    except pared.FormatError:
        return
    raise AssertionError("a damaged file was loaded")


def test_every_flipped_byte_and_every_truncation_is_refused():
    model, data = small()
    choice = random.Random(20).choice
    for i in range(len(data)):
        flipped = bytearray(data)
        flipped[i] ^= choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        damaged(bytes(flipped), model)
    for n in [*range(0, len(data), 7), len(data) - 1]:
        damaged(data[:n], model)
    for tail in (b"\0", b" " * 8, data):
        damaged(data + tail, model)


def test_random_damage_is_refused(rng):
    model, data = small()
    rng = random.Random(int(rng.integers(2**32)))
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 2, 8, 64])):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        kind = rng.randrange(4)
        if kind == 1:
            del changed[a:b]
        elif kind == 2:
            changed[a:b] = bytes(b - a)
        elif kind == 3:
            changed[a:a] = rng.randbytes(rng.randrange(1, 100))
        if changed != data:
            damaged(bytes(changed), model)


@pytest.mark.parametrize("check", ["_check_digest", "sign"])
def test_the_damage_tests_see_a_reader_that_checks_nothing(check, monkeypatch):
    model, data = small()
    if check == "sign":
        monkeypatch.setattr(_format, "sign", lambda header: header)
        at = data.index(b'\\"pared\\":\\"0') + 12  # the version of pared, which nothing depends on
    else:
        monkeypatch.setattr(_format.Reader, "_check_digest", lambda *args: None)
        at = len(data) - 500
    flipped = bytearray(data)
    flipped[at] ^= 1
    with pytest.raises(AssertionError, match="was loaded"):
        damaged(bytes(flipped), model)


HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2, 2**31, 2**62, 2**64, 10**40, 1.5, "", "x", "0" * 500, "\ud800", [], {}, [[]],
    [-1], [2**62, 2**62], [0, 2**70], [None], ["1"], {"a": {}}, [0, 0], [1] * 100, [0] * 65, [0, 2**61],
    "dense", "gaps16", "complex128", "bool", "t0", "__metadata__", "t1..values", "t0.__class__",
]  # fmt: skip


def mutate(node: Any, rng: random.Random) -> None:
    """Change one random thing somewhere in a JSON document."""
    path = [node]
    while rng.random() < 0.85:
        children = path[-1].values() if isinstance(path[-1], dict) else path[-1]
        inner = [c for c in children if isinstance(c, dict | list) and c]
        if not inner:
            break
        path.append(rng.choice(inner))
    at = path[-1]
    key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
    value = copy.deepcopy(rng.choice(HOSTILE))
    action = rng.randrange(6)
    if action == 0:
        del at[key]
    elif action == 1 and isinstance(at, dict):
        at[str(rng.choice(HOSTILE))] = at.pop(key)
    elif action == 2 and isinstance(at, dict):
        at[str(rng.choice(HOSTILE))] = value
    elif action == 3 and isinstance(at[key], int):
        at[key] += rng.choice([-1, 1, 8, -8])
    else:
        at[key] = value


def test_hostile_headers_with_right_checksums_are_refused_or_harmless(rng):
    rng = random.Random(int(rng.integers(2**32)))

    def edit(header: dict[str, Any], meta: dict[str, Any]) -> None:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            target = rng.choice([header, meta])
            if target:
                mutate(target, rng)

    fast = accelerated(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 16))
    plain = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    for model, data in (small(), (plain, saved(fast))):
        before = {n: t[:2] for n, t in state(model).items()}
        refused = 0
        for _ in range(1500):
            try:
                back = loaded(forged(data, edit), model)
            except pared.FormatError:
                refused += 1
                continue
            if any(isinstance(m, pared.nn.PackedModule) for m in back.modules()):
                with torch.no_grad():
                    back(torch.randn(2, 16))
                str(pared.report(back))
                back = pared.restore(back)
            assert {n: t[:2] for n, t in state(back).items()} == before
        assert refused > 500


def put(*path: str, value: Any, where: str = "meta") -> Edit:
    def edit(header: dict[str, Any], meta: dict[str, Any]) -> None:
        at = meta if where == "meta" else header
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return edit


def overlap(header: dict[str, Any], meta: dict[str, Any]) -> None:
    header["t1..bitmap"]["data_offsets"] = [0, 113]


def extra(header: dict[str, Any], meta: dict[str, Any]) -> None:
    header["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (put("version", value=3), r"^file is version 3, this pared reads up to 1$"),
        (put("version", value="1"), "invalid version"),
        (put("version", value=True), "invalid version"),
        (put("version", value=0), "invalid version"),
        (put("__metadata__", value={}, where="header"), "another origin"),
        (put("__metadata__", value=[], where="header"), "expected an object"),
        (put("unknown", value=1), "expected the fields"),
        (put("tensors", "t0", "more", value=1), "expected the fields"),
        (put("tensors", "t0", "encoding", value="zstd"), "unknown encoding 'zstd', known are dense, bitmap"),
        (put("tensors", "t0", "dtype", value="float3"), "unknown dtype"),
        (put("tensors", "t0", "kind", value="method"), "unknown kind"),
        (put("tensors", "t0", "shape", value=[-900]), "invalid shape"),
        (put("tensors", "t0", "shape", value=[2**40, 2**40]), "too large"),
        (put("tensors", "t0", "shape", value=[2**62, 0, 2**62]), "too large"),
        (put("tensors", "t0", "shape", value=[900.0]), "invalid shape"),
        (put("tensors", "t0", "shape", value=[30, 30]), "another type or shape"),
        (put("tensors", "t0", "values", value=901), "number of values"),
        (put("tensors", "t0", "values", value=899), "not all elements are stored"),
        (put("tensors", "t1", "values", value=-1), "number of values"),
        (put("tensors", "t1", "values", value=True), "number of values"),
        (put("tensors", "t1", "signs", value=0), "invalid signs"),
        (put("tensors", "t1", "signs", value=True), "'t1..signs' is missing"),
        (put("tensors", "t5", "signs", value=False), r"belong to none: \['t5..signs'\]"),
        (put("tensors", "t5", "dtype", value="complex128"), "complex128 is always dense"),
        (put("tensors", "t0", "blake2b", value="0" * 32), "tensor 't0': the checksum does not match"),
        (put("t0", "dtype", value="F128", where="header"), "unknown dtype"),
        (put("t0", "data_offsets", value=[0, 2**63], where="header"), "offsets outside"),
        (put("t0", "data_offsets", value=[-8, 892], where="header"), "offsets outside"),
        (put("t0", "data_offsets", value=[900, 0], where="header"), "offsets outside"),
        (put("t0", "shape", value=[2**64 + 900], where="header"), "invalid shape"),
        (put("t0", "shape", value=[899], where="header"), "its shape needs 899"),
        (overlap, "overlap or leave a hole"),
        (extra, "belong to none: \\['more'\\]"),
        (put("ties", "x", value="nothing"), "tied to an unknown tensor"),
        (put("ties", "t0", value="t1"), "stored and tied"),
        (put("ties", "forward", value="t1"), "unexpected in the file: 'forward'"),
        (put("ties", "__class__", value="t1"), "unexpected in the file: '__class__'"),
        (put("ties", "t0.data", value="t1"), "unexpected in the file: 't0.data'"),
    ],
)  # fmt: skip
def test_hostile_headers(edit, match):
    model, data = small()
    assert state(loaded(forged(data), model)) == state(model)  # the forgery itself is good
    rejects(forged(data, edit), model, match)


def framed(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "at least 8 bytes"),
        (b"1234567", "at least 8 bytes"),
        (framed(b"{}", 2**64 - 1), "truncated or foreign"),
        (framed(b"{}", 3), "truncated or foreign"),
        (framed(b""), "safetensors header"),
        (framed(b" " * (_format.MAX_HEADER + 1)), "truncated or foreign"),
        (framed(b"[" * 100_000), "RecursionError"),
        (framed(b'{"a":' * 100_000), "RecursionError"),
        (framed(b"{" + b'"a":1,' * 3 + b'"b":2}'), "occurs twice"),
        (framed(b'{"a":NaN}'), "NaN"),
        (framed(b'{"a":-Infinity}'), "Infinity"),
        (framed(b'{"a":' + b"9" * 5000 + b"}"), "safetensors header"),
        (framed("{}".encode("utf-16")), "safetensors header"),
        (framed(b'"' + b"\xff" * 8 + b'"'), "UnicodeDecodeError"),
        (framed(b"[]"), "expected an object"),
        (framed(b"null"), "expected an object"),
        (framed(b'{"__metadata__":{"pared":"["}}'), "pared's metadata"),
        (framed(b'{"__metadata__":{"pared":1}}'), "another origin"),
        (framed(b'{"__metadata__":{"pared":"{}"}}'), "invalid version"),
        (framed(b'{"__metadata__":{"pared":"{\\"version\\":1}"}}'), "header's checksum"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (pickle.dumps({"a": 1}), "pickle, which pared never loads"),
        (b"\x7fELF" + bytes(100), "foreign"),
    ],
)
def test_files_that_are_something_else(data, match):
    rejects(data, nn.Linear(3, 3), match)


def test_plain_safetensors_and_torch_files_are_named(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "plain")
    with pytest.raises(pared.FormatError, match="another origin"):
        pared.load(tmp_path / "plain", nn.Linear(3, 3))
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "torch")
    with pytest.raises(pared.FormatError, match="zip archive"):
        pared.load(tmp_path / "torch", nn.Linear(3, 3))


def with_data(name: str, content: Callable[[bytearray], None]) -> Callable[[bytes], bytes]:
    """Change the bytes of a stored tensor and make all checksums right."""

    def change(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        body = bytearray(data[8 + size :])
        begin, end = header[name]["data_offsets"]
        part = body[begin:end]
        content(part)
        body[begin:end] = part

        def resign(header: dict[str, Any], meta: dict[str, Any]) -> None:
            tensor = name.split("..")[0]
            parts = [n for n in header if n == tensor or n.startswith(tensor + "..")]
            parts.sort(key=lambda n: ["bitmap", "gaps", "values", "signs", tensor].index(n.split("..")[-1]))
            chunks = [bytes(body[slice(*header[n]["data_offsets"])]) for n in parts]
            meta["tensors"][tensor]["blake2b"] = _format.digest(*chunks)

        return forged(data, resign, bytes(body))

    return change


def fill(value: int) -> Callable[[bytearray], None]:
    def content(part: bytearray) -> None:
        part[:] = bytes([value]) * len(part)

    return content


def last(value: int) -> Callable[[bytearray], None]:
    def content(part: bytearray) -> None:
        part[-1] |= value

    return content


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_data("t1..bitmap", fill(0)), "values, its index has 0"),
        (with_data("t1..bitmap", last(0xF0)), "behind its end"),
        (with_data("t2..gaps", fill(0)), "values, its index has"),
        (with_data("t2..gaps", fill(0xFF)), "values, its index has 0"),
        (with_data("t3..gaps", fill(0xFE)), "behind its end"),
        (with_data("t5..signs", last(0xFE)), "behind its end"),
        (with_data("t4", fill(7)), "expected bytes 0 and 1"),
    ],
)
def test_hostile_data_with_right_checksums(change, match):
    model, data = small()
    rejects(change(data), model, match)


def test_a_bomb_is_refused_before_anything_is_allocated():
    # A kilobyte that claims a terabyte of zeros: valid in itself, refused because no model has that shape.
    data = saved(Bag(torch.zeros(4096)))
    assert encoding(data) == "gaps4"
    rejects(forged(data, put("tensors", "t0", "shape", value=[2**38])), Bag(torch.zeros(4096)), r"got buffer")
    with pytest.raises(pared.FormatError, match="too large"):
        loaded(forged(data, put("tensors", "t0", "shape", value=[2**60])), Bag(torch.zeros(4096)))
