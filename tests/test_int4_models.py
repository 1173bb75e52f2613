"""4-bit layers in models: quantised by `pared.quantize`, taken over by `pared.accelerate`, in files."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from _models import set_times
from torch import nn

import pared
import pared._accelerate as acc
from pared.nn import Linear, PackedModule
from pared.ops import Int4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions are under test here, not times: what goes together in one call would hang on them."""
    monkeypatch.setattr(acc.timing, "LAYER_SECONDS", 0.0)
    monkeypatch.setattr(acc.timing, "MODEL_SECONDS", 0.0)
    monkeypatch.setattr(acc.timing, "time_hand_over", lambda layers, calls: 0.0)
    monkeypatch.setattr(acc.timing, "time_sharing", lambda *_: 0.0)


def plain_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(130, 96), nn.GELU(), nn.Linear(96, 45), nn.ReLU(), nn.Linear(45, 20)]
    return nn.Sequential(*layers).to(dtype).eval()


def quantised(
    bits: Any = 4, group: int | None = 32, dtype: torch.dtype = torch.float32, **how: Any
) -> nn.Sequential:
    model = plain_model(dtype)
    pared.quantize(
        model, [torch.randn(32, 130, dtype=dtype) for _ in range(2)], bits=bits, group=group, **how
    )
    return model


def converted(model: nn.Module, x: Any, **how: Any) -> nn.Module:
    arguments = {
        "precision": "int8",
        "min_speedup": 0,
        "progress": False,
        "formats": ["int4"],
        "cache": False,
    }
    return pared.accelerate(model, x, **{**arguments, "max_error": 1.0, **how})


def formats(m: nn.Module) -> list[str]:
    return [x.format for x in m.modules() if isinstance(x, PackedModule)]


def saved(m: nn.Module) -> bytes:
    file = io.BytesIO()
    pared.save(m, file)
    return file.getvalue()


# -- taken over


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
def test_quantise_accelerate_save_load_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, group: int | None, method: str
) -> None:
    """Nothing is rounded a second time on the whole way, and the file is about half a byte a weight."""
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5)
    model, x = quantised(group=group, method=method), torch.randn(7, 130)
    fast = converted(model, x)
    assert formats(fast) == ["int4"] * 3
    for old, new in zip(model, fast, strict=True):
        if isinstance(new, Linear):
            record = pared.quant.quantized(old)
            q, scales = new.packed_weight().to_quantized()
            assert np.array_equal(q, record.codes(old.weight))
            assert new.packed_weight().group == (group or 128)
            if group:
                assert np.array_equal(scales, record.scale)
            assert torch.equal(new.to_module().weight, old.weight)
    for row in pared.report(fast).layers:
        assert 0 < row.error <= row.bound
        assert "4-bit weights with 8-bit inputs change its output by" in row.reason
    data = saved(fast)
    with torch.device("meta"):
        architecture = plain_model()
    back = pared.load(io.BytesIO(data), architecture)
    assert formats(back) == ["int4"] * 3
    for m in (1, 7, 40):
        x = torch.randn(m, 130)
        assert torch.equal(back(x), fast(x))
    assert saved(back) == data
    for a, b in zip(pared.restore(back).parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_file_holds() -> None:
    model = quantised(group=32)
    fast = converted(model, torch.randn(3, 130))
    data = saved(fast)
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["pared"]
    tensors = json.loads(about)["tensors"]
    assert (tensors["0.weight"]["dtype"], tensors["0.weight"]["shape"]) == ("uint8", [48, 130])
    assert tensors["0.weight_scale"]["shape"] == [96, 5]
    assert (tensors["4.weight"]["shape"], tensors["4.weight_scale"]["shape"]) == ([10, 45], [20, 2])
    for wrong in (nn.Linear(131, 96), nn.Linear(129, 96), nn.Linear(60, 96), nn.Linear(130, 95)):
        other = plain_model()
        other[0] = wrong
        with pytest.raises(pared.FormatError, match=r"0\.weight"):
            pared.load(io.BytesIO(data), other)


@pytest.mark.parametrize("shape", [(5, 1), (16, 31), (3, 32), (7, 33), (2, 64), (1, 128), (9, 129), (4, 200)])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_stored_and_back(shape: tuple[int, int], group: int) -> None:
    """All sixteen values, odd numbers of outputs, and groups that a scale's shape does not tell apart."""
    rng = np.random.default_rng(0)
    q = rng.integers(-8, 8, shape).astype(np.int8)
    scales = rng.random((shape[0], -(-shape[1] // group)), np.float32)
    weight = Int4.from_quantized(q, scales, group=group, dtype="bfloat16")
    integers, stored = weight.stored()
    (dtype, expected), scale_shape = Int4.stored_like(shape, stored.shape)
    assert (str(integers.dtype), integers.shape, stored.shape) == (dtype, expected, scale_shape)
    back = Int4.from_stored(shape, integers, stored, weight.dtype, None)
    assert np.array_equal(back.to_quantized()[0], q)
    assert np.array_equal(back.to_quantized()[1], scales)
    assert back.dtype == "bfloat16"
    x = rng.standard_normal((3, shape[1])).astype(np.float32)
    assert np.array_equal(pared.ops.linear(x, back), pared.ops.linear(x, weight))
    if shape[1] > group:
        assert np.array_equal(back.packed, weight.packed)


def test_a_fixed_input_in_a_file_is_refused() -> None:
    fast = converted(quantised(), torch.randn(3, 130))
    header = bytearray(saved(fast))
    n = int.from_bytes(header[:8], "little")
    text = bytes(header[8 : 8 + n]).replace(b'\\"input\\": null', b'\\"input\\": [1.0, 0.0, 0.0, 9.0]', 1)
    if text == bytes(header[8 : 8 + n]):
        text = text.replace(b'\\"input\\":null', b'\\"input\\":[1.0,0.0,0.0,9.0]', 1)
    from pared._format import sign

    text = text.rstrip(b" ")
    text = sign(text + b" " * (-(len(text) + 8) % 64))
    forged = len(text).to_bytes(8, "little") + text + bytes(header[8 + n :])
    with pytest.raises(pared.FormatError, match="input: expected none for an int4 weight"):
        pared.load(io.BytesIO(forged), plain_model())


def test_16_bit_models(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5)
    model, x = quantised(dtype=torch.bfloat16), torch.randn(5, 130, dtype=torch.bfloat16)
    fast = converted(model, x)
    assert formats(fast) == ["int4"] * 3
    assert fast(x).dtype == torch.bfloat16
    back = pared.load(io.BytesIO(saved(fast)), plain_model(torch.bfloat16))
    assert torch.equal(back(x), fast(x))
    assert all(
        torch.equal(a, b) for a, b in zip(pared.restore(back).parameters(), model.parameters(), strict=True)
    )


# -- the choice


def fastest(*names: str) -> Any:
    return lambda name, m: 1.0 if m is None else 0.2 * (1 + names.index(m.format))


def test_the_faster_of_4_and_8_bits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = quantised(group=None), torch.randn(7, 130)
    for names in (("int4", "int8"), ("int8", "int4")):
        set_times(monkeypatch, fastest(*names))
        fast = converted(model, x, formats=["int4", "int8"])
        assert formats(fast) == [names[0]] * 3
        tried = {c.kernel for c in pared.report(fast).layers[2].candidates}
        assert {"int4", "int8"} <= tried


def test_over_the_budget_an_exact_kernel_takes_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, fastest("int4", "csr"))
    fast = converted(quantised(), torch.randn(7, 130), formats=["int4", "csr"], max_error=1e-5)
    assert formats(fast) == ["csr"] * 3
    assert "int4 is 5.00x, but with it outputs would differ" in pared.report(fast).layers[0].reason


@pytest.mark.parametrize(
    "model",
    [
        lambda: quantised(bits=8, group=None),
        lambda: quantised(group=16),
        lambda: quantised(symmetric=False),
        lambda: quantised(group=None, activations="static"),
    ],
    ids=["8 bits", "a group without a kernel", "zero points", "a fixed input"],
)
def test_nothing_is_rounded_twice(model: Any) -> None:
    fast = converted(model(), torch.randn(7, 130))
    assert formats(fast) == []


def test_layers_that_were_not_quantised_are_rounded_where_4_bits_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5)
    model, x = plain_model(), torch.randn(7, 130)
    fast = converted(model, x)
    assert formats(fast) == ["int4"] * 3
    for old, new in zip(model, fast, strict=True):
        if isinstance(new, Linear):
            assert np.array_equal(new.packed_weight().packed, Int4.from_dense(old.weight).packed)
    for row in pared.report(fast).layers:
        assert 0 < row.error <= row.bound
        assert "4-bit weights with 8-bit inputs change its output by" in row.reason
    back = pared.load(io.BytesIO(saved(fast)), plain_model())
    assert torch.equal(back(x), fast(x))


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_4_bits_have_to_be_asked_for(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.1 if m.format == "int4" else 0.5)
    for names in (None, ["int8", "csr"]):
        fast = converted(plain_model(), torch.randn(7, 130), precision=precision, formats=names)
        assert formats(fast)
        assert "int4" not in formats(fast)


def test_over_the_budget_4_bits_become_8_and_those_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, fastest("int4", "int8", "csr"))
    model, x = plain_model(), torch.randn(7, 130)

    def with_bits(*names: str, max_error: float = 1.0) -> tuple[list[str], float]:
        fast = converted(model, x, formats=names, max_error=max_error)
        return formats(fast), pared.report(fast).relative_error

    every = ("int4", "int8", "csr")
    (four, most), (_, least) = with_bits(*every), with_bits("int8")
    assert four == ["int4"] * 3
    assert most > 3 * least  # or the rest says nothing
    some, error = with_bits(*every, max_error=0.5 * most)
    assert error <= 0.5 * most
    assert "int8" in some
    assert "csr" not in some
    eight, error = with_bits(*every, max_error=1.0001 * least)
    assert (eight, error) == (["int8"] * 3, least)
    some, error = with_bits(*every, max_error=0.5 * least)
    assert error <= 0.5 * least
    assert "csr" in some
    assert with_bits(*every, max_error=1e-5)[0] == ["csr"] * 3


def test_a_weight_that_has_changed_since_is_not_taken_over() -> None:
    model = quantised()
    with torch.no_grad():
        model[2].weight[3, 4] += 0.05 * pared.quant.quantized(model[2]).scale[3, 0]
    assert [r.kernel for r in pared.report(converted(model, torch.randn(7, 130))).layers] == [
        "int4",
        "torch",
        "int4",
    ]


def test_fewer_than_4_bits_run_on_the_same_kernel() -> None:
    assert formats(converted(quantised(bits=3), torch.randn(7, 130))) == ["int4"] * 3


def test_float32_does_not_take_it() -> None:
    fast = pared.accelerate(quantised(), torch.randn(7, 130), min_speedup=0, progress=False, cache=False)
    assert "int4" not in formats(fast)
    with pytest.raises(ValueError, match=r"formats: expected names among .* with precision='float32', got"):
        pared.accelerate(quantised(), torch.randn(7, 130), formats=["int4"])


def test_a_kernel_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound knows the grid: one step of a single weight is beyond it."""
    from_quantized = Int4.from_quantized.__func__  # type: ignore[attr-defined]

    def wrong(cls: Any, q: Any, scales: Any, **how: Any) -> Int4:
        return from_quantized(cls, q, scales * np.float32(1.5), **how)

    model, x = quantised(), torch.randn(7, 130)
    assert formats(converted(model, x)) == ["int4"] * 3
    monkeypatch.setattr(Int4, "from_quantized", classmethod(wrong))
    fast = converted(model, x)
    assert formats(fast) == []
    assert "more than its bound" in pared.report(fast).layers[0].reason


def test_a_rounding_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a step of the weights, and of the inputs, is what rounding may do."""
    from_dense = Int4.from_dense.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Int4, "from_dense", classmethod(lambda cls, w, **how: from_dense(cls, 2 * w, **how)))
    model, x = plain_model(), torch.randn(7, 130)
    fast = converted(model, x)
    assert pared.report(fast).layers[0].kernel == "torch"
    assert "more than its bound" in pared.report(fast).layers[0].reason


def test_auto_times_the_kernel_of_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def seconds(model: Any, x: Any, precision: str, names: Any, four: Any) -> Any:
        asked.append((precision, None if names is None else "int4" in names, four))
        return dict.fromkeys(("0", "2", "4"), (1.0, 2.0 if names and "int4" in names else 1.0))

    monkeypatch.setattr(acc, "layer_seconds", seconds)
    model = plain_model()
    report = pared.quantize(
        model, [torch.randn(8, 130)], group=64, max_error=1.0, example_inputs=torch.randn(2, 130)
    )
    assert asked == [("int8", True, 64), ("int8", False, 64), ("float32", None, 64)]
    assert [layer.bits for layer in report.layers] == [4, 4, 4]
    assert formats(converted(model, torch.randn(2, 130))) == ["int4"] * 3


def test_the_time_of_a_trial_on_a_plain_layer() -> None:
    found = acc.layer_seconds(plain_model(), torch.randn(3, 130), "int8", ["int4"], 64)
    assert found.keys() == {"0", "2", "4"}
    assert all(seconds > 0 and speedup > 0 for seconds, speedup in found.values())


# -- the module


def test_state_dicts_copies_and_damage() -> None:
    layer = converted(quantised(), torch.randn(3, 130))[0]
    other = Linear.from_module(nn.Linear(130, 96), format="int4", activation="gelu")
    x = torch.randn(5, 130)
    for twin in (copy.deepcopy(layer), other):
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), layer(x))
    state = layer.state_dict()
    state["packed"][300] ^= 1
    with pytest.raises(RuntimeError, match="expected checksum"):
        other.load_state_dict(state)


def test_compile_export_and_opcheck() -> None:
    layer = converted(quantised(), torch.randn(3, 130))[0]
    from pared.ops._library import linear_op

    for tokens in (1, 5, 20):
        x = torch.randn(tokens, 130)
        with torch.no_grad():
            assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))
            assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
        arguments = (x, layer.packed, layer.bias, 96, "gelu")
        assert set(torch.library.opcheck(linear_op, arguments).values()) == {"SUCCESS"}


def test_tied_layers_are_one_in_the_file() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    model[2].weight = model[0].weight
    pared.quantize(model, [torch.randn(16, 64)], bits=4, group=32)
    x = torch.randn(3, 64)
    fast = converted(model, x)
    assert fast[0].packed.data_ptr() == fast[2].packed.data_ptr()
    arch = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    arch[2].weight = arch[0].weight
    back = pared.load(io.BytesIO(saved(fast)), arch)
    assert torch.equal(back(x), fast(x))
    assert back[0].packed.data_ptr() == back[2].packed.data_ptr()


def test_levels_are_exact() -> None:
    x = torch.randn(3, 130)
    with pytest.raises(ValueError, match="precision: expected 'float32', in which levels have common values"):
        pared.levels(quantised(), x, precision="int8")
    chosen = pared.levels(quantised(), x, (0.5, 0.9), progress=False, min_speedup=0, cache=False)
    chosen.set_level(1)
    assert "int4" not in formats(chosen)
    assert torch.isfinite(chosen(x)).all()


def test_it_stays_on_the_cpu() -> None:
    layer = converted(quantised(), torch.randn(3, 130))[0]
    with pytest.raises(RuntimeError, match="has no int4 kernel for"):
        layer.to("meta")
