"""Attention and Conv1D layers as Linear layers: the same outputs; kernels and removal that now reach them."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _models import fused_is_faster, set_times
from torch import Tensor, nn

import pared
import pared._accelerate
from pared.nn import PackedModule
from pared.pruning import as_linears
from pared.pruning.linears import Attention, Encoder, Experts, close_layers, open_layers
from pared.quant.weights import put_records, quantized, simulate, take_records

PARTS = ("gate_up_proj", "down_proj")
TOLERANCE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(16, 4, **options)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 10, "vdim": 12, "batch_first": True}]
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_computes_the_same(options: dict[str, Any], training: bool, need_weights: bool) -> None:
    old = attention(**options).train(training)
    new = as_linears(copy.deepcopy(old))
    assert isinstance(new, Attention)
    assert new.training == training
    first = options.get("batch_first", False)
    shape = (lambda n, t, e: (n, t, e)) if first else (lambda n, t, e: (t, n, e))
    q = torch.randn(shape(2, 5, 16))
    k, v = torch.randn(shape(2, 7, old.kdim)), torch.randn(shape(2, 7, old.vdim))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    masks: list[dict[str, Any]] = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.triu(torch.ones(5, 7, dtype=torch.bool), 3)},
        {"attn_mask": torch.randn(8, 5, 7), "key_padding_mask": padding.float() * -1e9},
        {"average_attn_weights": False},
    ]
    for mask in masks:
        want, weights = old(q, k, v, need_weights=need_weights, **mask)
        got, mine = new(q, k, v, need_weights=need_weights, **mask)
        torch.testing.assert_close(got, want, **TOLERANCE)
        assert (mine is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(mine, weights, **TOLERANCE)


def test_attention_of_one_sequence() -> None:
    old = attention().eval()
    new = as_linears(copy.deepcopy(old))
    x = torch.randn(5, 16)
    for a, b in zip(old(x, x, x), new(x, x, x), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def encoder(nested: bool = False, norm: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    last = nn.LayerNorm(16) if norm else None
    made = nn.TransformerEncoder(layer, 2, last, enable_nested_tensor=nested).eval()
    for p in made.parameters():  # the layers are copies of one; and no bias is zero
        nn.init.normal_(p, std=0.3)
    return made


def packed(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, PackedModule)}


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel exists for is converted, however busy the machine."""
    set_times(monkeypatch, fused_is_faster)


# torch packs padded sequences in a way that it calls a prototype.
nested = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@nested
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("left", [True, False])
def test_padded_sequences_give_what_torch_gives(norm: bool, additive: bool, left: bool) -> None:
    """Zeros where torch packs, also in the rows that are padding; and what it computes where it does not."""
    model, x = encoder(nested=True, norm=norm), torch.randn(3, 6, 16)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[2, 4:] = True
    padding[1, 2:] = True
    if not left:
        padding = padding.flip(1)
    mask: Any = torch.zeros(3, 6).masked_fill(padding, -torch.inf) if additive else padding
    with torch.no_grad():
        want = model(x, src_key_padding_mask=mask)
        got = as_linears(copy.deepcopy(model))(x, src_key_padding_mask=mask)
    torch.testing.assert_close(got, want, **TOLERANCE)


@nested
def test_accelerate_opens_attention_and_restore_closes_it(known_times: None, tmp_path: Any) -> None:
    model, x = encoder(nested=True), torch.randn(3, 6, 16)
    model.layers[0].self_attn.in_proj_weight.requires_grad_(False)  # type: ignore[union-attr]
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[2, 3:] = True
    pared.prune(model, 0.8)
    inputs = {"src": x, "src_key_padding_mask": padding}
    fast = pared.accelerate(model, inputs, min_speedup=0)
    names = {f"layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in ("q", "k", "v", "out")}
    assert names <= packed(fast)
    report = pared.report(fast)
    assert report.opened == {
        "": "TransformerEncoder",
        "layers.0.self_attn": "MultiheadAttention",
        "layers.1.self_attn": "MultiheadAttention",
    }
    assert any("MultiheadAttention computes with Linear layers" in note for note in report.notes)
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs), model(**inputs), **TOLERANCE)
    plain = pared.restore(fast)
    assert repr(plain) == repr(model)
    assert type(plain) is nn.TransformerEncoder
    want, got = model.state_dict(), plain.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[k], want[k]) for k in want)
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert [(n, p.requires_grad) for n, p in plain.named_parameters()] == flags
    assert vars(plain).keys() == vars(model).keys()
    with torch.no_grad():
        assert torch.equal(plain(**inputs), model(**inputs))
    path = tmp_path / "model.pared"
    pared.save(fast, path)
    again = pared.load(path, model)
    assert packed(again) == packed(fast)
    with torch.no_grad():
        assert torch.equal(again(**inputs), fast(**inputs))
    with pytest.raises(pared._io.FormatError, match=r"expected .*MultiheadAttention .*, as in the file"):
        pared.load(path, nn.Linear(2, 2))


def test_what_stays_dense_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention none of whose layers is converted is torch's own again; its encoder is not."""
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 0.5 if ".linear" in name else 2.0)
    model, x = encoder(nested=True), torch.randn(3, 6, 16)
    pared.prune(model, 0.8)
    fast = pared.accelerate(model, x)
    assert packed(fast) == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert type(fast) is Encoder
    assert type(fast.layers[0].self_attn) is nn.MultiheadAttention  # type: ignore[union-attr]
    assert pared.report(fast).opened == {"": "TransformerEncoder"}
    assert repr(pared.restore(fast)) == repr(model)
    set_times(monkeypatch, lambda name, m: 1.0 if m is None else 2.0)
    dense = pared.accelerate(model, x)
    assert type(dense) is nn.TransformerEncoder
    assert not pared.report(dense).opened


class Reads(nn.Module):
    """Asks its attention for a tensor that Linear layers do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = attention(batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.attention.in_proj_weight.shape[0]
        return self.attention(x, x, x)[0] * scale


class Doubled(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, weights = super().forward(*args, **kwargs)
        return 2 * y, weights


def test_the_report_says_why_an_attention_is_not_opened() -> None:
    model = Reads().eval()
    pared.prune(model, 0.5)
    fast = pared.accelerate(model, torch.randn(2, 5, 16))
    notes = " ".join(pared.report(fast).notes)
    assert "no kernel is tried for MultiheadAttention: with Linear layers instead the model raises" in notes
    assert "in_proj_weight" in notes
    assert type(fast.attention) is nn.MultiheadAttention
    with pytest.raises(ValueError, match="got none of them"):
        as_linears(Doubled(16, 4))


def test_levels_open_all_or_none(known_times: None, tmp_path: Any) -> None:
    model, x = encoder(), torch.randn(3, 6, 16)
    fast = pared.levels(model, x, (0.5, 0.9), min_speedup=0)
    path = tmp_path / "levels.pared"
    pared.save(fast, path)
    again = pared.load(path, model)
    for level in (0, 1):
        fast.set_level(level)
        again.set_level(level)
        with torch.no_grad():
            assert torch.equal(again(x), fast(x))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 12, "batch_first": True}])
def test_closing_is_the_way_back(options: dict[str, Any]) -> None:
    old = attention(**options).eval()
    old.register_forward_hook(lambda *a: None)
    opened, types = open_layers(nn.ModuleDict({"a": copy.deepcopy(old), "b": nn.Linear(2, 2)}))
    assert types == {"a": "MultiheadAttention"}
    new: Any = close_layers(opened, types)["a"]  # type: ignore[index]
    assert type(new) is nn.MultiheadAttention
    assert len(new._forward_hooks) == 1
    want = old.state_dict()
    assert list(new.state_dict()) == list(want)
    assert all(torch.equal(v, want[k]) for k, v in new.state_dict().items())
    same = ("num_heads", "kdim", "vdim", "batch_first", "dropout", "head_dim", "_qkv_same_embed_dim")
    assert all(getattr(new, k) == getattr(old, k) for k in same)


def test_heads_that_are_gone_do_not_come_back() -> None:
    model, x = as_linears(encoder()), torch.randn(3, 6, 16)
    pared.prune_channels(model, x, 0.5, include="*.self_attn*", round_to=1)
    with pytest.raises(ValueError, match="expected all heads of 16 channels, got 8"):
        model.layers[0].self_attn.to_module()  # type: ignore[union-attr,index,operator]


def test_torchs_encoder_and_its_kernels() -> None:
    model, x = encoder(), torch.randn(3, 6, 16)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[2, 3:] = True
    want = [model(x), model(x, src_key_padding_mask=padding)]
    assert as_linears(model) is model
    got = [model(x), model(x, src_key_padding_mask=padding)]
    torch.testing.assert_close(got[0], want[0], **TOLERANCE)
    torch.testing.assert_close(got[1][~padding], want[1][~padding], **TOLERANCE)
    pared.prune(model, 0.8)
    fast = pared.accelerate(model, x, min_speedup=0)
    assert {"layers.0.self_attn.q_proj", "layers.1.self_attn.out_proj"} <= packed(fast)
    torch.testing.assert_close(fast(x), model(x), **TOLERANCE)


def test_heads_of_an_attention_are_removed() -> None:
    """Removed equals masked: prune_channels checks it, and this does so again from the report."""
    model, x = as_linears(encoder()), torch.randn(3, 6, 16)
    report = pared.prune_channels(model, x, 0.5, include="*.self_attn*", round_to=1)
    own = model.layers[0].self_attn  # type: ignore[union-attr,index]
    assert own.num_heads == 2
    assert own.q_proj.out_features == own.v_proj.out_features == own.out_proj.in_features == 8
    assert report.error < 1e-4
    assert model(x).shape == x.shape


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )
    return transformers.GPT2Model(config).eval()


def test_gpt2_as_linears_with_kernels_and_fewer_channels() -> None:
    model = gpt2()
    inputs = {"input_ids": torch.randint(0, 50, (2, 9))}
    want = model(**inputs).last_hidden_state
    as_linears(model)
    assert not any(type(m).__name__ == "Conv1D" for m in model.modules())
    torch.testing.assert_close(model(**inputs).last_hidden_state, want, **TOLERANCE)
    report = pared.prune_channels(model, inputs, 0.5, include="*.mlp.*", round_to=1)
    assert model.h[0].mlp.c_fc.out_features == model.h[0].mlp.c_proj.in_features == 32
    assert report.error < 1e-4
    pared.prune(model, 0.7)
    fast = pared.accelerate(model, inputs, min_speedup=0)
    assert isinstance(fast.h[0].mlp.c_fc, pared.nn.Linear)  # type: ignore[union-attr,index]
    torch.testing.assert_close(
        fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state, **TOLERANCE
    )


def mixture(kind: str) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 24, "use_cache": False}
    if kind == "Mixtral":
        own = {"num_local_experts": 4}
    else:
        own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
        own |= {"shared_expert_intermediate_size": 8} if kind == "Qwen2Moe" else {}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes, **own))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Qwen2Moe"])
def test_experts_as_linears(kind: str) -> None:
    model = mixture(kind)
    tokens = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        want = model(tokens).last_hidden_state
    opened: Any = as_linears(copy.deepcopy(model))
    experts = opened.layers[0].mlp.experts
    assert isinstance(experts, Experts)
    assert [type(m) for m in experts.down_proj] == [nn.Linear] * 4
    with torch.no_grad():
        torch.testing.assert_close(opened(tokens).last_hidden_state, want, **TOLERANCE)
        nobody = torch.zeros(0, 2, dtype=torch.int64)
        assert experts(torch.zeros(0, 16), nobody, nobody.float()).shape == (0, 16)
        exported = torch.export.export(opened, (tokens,), strict=False).module()
        torch.testing.assert_close(exported(tokens).last_hidden_state, want, **TOLERANCE)
    report = pared.prune(opened, 0.5)
    assert sum(".experts." in layer.name for layer in report.layers) == 16
    opened(tokens).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in opened.layers[1].mlp.experts.parameters())


def test_experts_are_opened_by_accelerate_and_come_back(known_times: None) -> None:
    model = mixture("Mixtral")
    tokens = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        model.layers[0].mlp.experts.down_proj[torch.rand(4, 16, 24) < 0.8] = 0  # whatever made these zeros
        want = model(tokens).last_hidden_state
    fast: Any = pared.accelerate(model, tokens, min_speedup=0)
    assert {f"layers.{i}.mlp.experts.{p}.{e}" for i in (0, 1) for p in PARTS for e in range(4)} <= packed(
        fast
    )
    assert pared.report(fast).opened["layers.0.mlp.experts"] == "MixtralExperts"
    with torch.no_grad():
        torch.testing.assert_close(fast(tokens).last_hidden_state, want, **TOLERANCE)
        one = tokens[:1, :1]
        torch.testing.assert_close(fast(one).last_hidden_state, model(one).last_hidden_state, **TOLERANCE)
    plain: Any = pared.restore(fast)
    assert repr(plain) == repr(model)
    assert plain.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    assert all(p.requires_grad for p in plain.layers[0].mlp.experts.parameters())
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    assert torch.equal(
        pared.load(file, lambda: mixture("Mixtral"))(tokens).last_hidden_state, fast(tokens).last_hidden_state
    )


def test_experts_that_no_example_reaches_get_kernels_too(known_times: None) -> None:
    model = mixture("Mixtral")
    token, tokens = torch.tensor([[7]]), torch.arange(40)[None]
    fast = pared.accelerate(model, token, min_speedup=0)  # of four experts it reaches two
    rows = {layer.name: layer for layer in pared.report(fast).layers}
    reached = [rows[f"layers.0.mlp.experts.down_proj.{e}"].calls for e in range(4)]
    assert sorted(reached) == [0, 0, 1, 1]
    assert {f"layers.{i}.mlp.experts.{p}.{e}" for i in (0, 1) for p in PARTS for e in range(4)} <= packed(
        fast
    )
    with torch.no_grad():
        torch.testing.assert_close(
            fast(tokens).last_hidden_state, model(tokens).last_hidden_state, **TOLERANCE
        )


def test_experts_of_another_make_stay(known_times: None) -> None:
    model = mixture("Mixtral")
    experts: Any = model.layers[0].mlp.experts
    model.config._experts_implementation = "eager"
    experts.has_bias = True  # as GPT-OSS has them
    fast = pared.accelerate(model, torch.randint(0, 50, (2, 9)), min_speedup=0)
    assert pared.report(fast).opened.keys() == {"layers.1.mlp.experts"}
    masked = mixture("Mixtral")
    torch.nn.utils.prune.l1_unstructured(masked.layers[0].mlp.experts, "down_proj", 0.5)
    with pytest.raises(ValueError, match=r"model: expected nn\.MultiheadAttention, or"):
        as_linears(masked.layers[0].mlp)


def test_gpt2_is_opened_by_accelerate_with_the_grids_of_quantize(known_times: None) -> None:
    model = gpt2()
    inputs = {"input_ids": torch.randint(0, 50, (2, 9))}
    pared.quantize(model, [inputs, inputs], bits=8, sparsity=0.5)
    fast = pared.accelerate(model, inputs, precision="int8", min_speedup=0, max_error=1.0, formats=["int8"])
    assert {"h.0.attn.c_attn", "h.1.mlp.c_proj"} <= packed(fast)
    assert pared.report(fast).opened["h.0.attn.c_attn"] == "Conv1D"
    # The kernel's integers are those that quantize settled on: nothing is rounded again.
    layer: Any = fast.get_submodule("h.0.mlp.c_fc")
    own = model.get_submodule("h.0.mlp.c_fc")
    record = quantized(own)
    assert record is not None
    codes, scale = layer.packed_weight().to_quantized()
    weight = own.weight.detach().t()  # type: ignore[union-attr,operator]
    assert torch.equal(torch.from_numpy(codes).to(torch.int8), record.codes(weight).to(torch.int8))
    torch.testing.assert_close(torch.from_numpy(scale), record.scale.reshape(-1))
    plain = pared.restore(fast)
    assert repr(plain) == repr(model)
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_the_grid_of_packed_projections_is_handed_to_each() -> None:
    model, x = encoder(), torch.randn(3, 6, 16)
    pared.quantize(model, [x], bits=8)
    whole = quantized(model.layers[1].self_attn)  # type: ignore[arg-type]
    assert whole is not None
    as_linears(model)
    own: Any = model.layers[1].self_attn
    for i, part in enumerate((own.q_proj, own.k_proj, own.v_proj)):
        record = quantized(part)
        assert record is not None
        assert torch.equal(record.scale, whole.scale[16 * i : 16 * (i + 1)])
        torch.testing.assert_close(record.codes(part.weight) * record.scale, part.weight.detach())
    assert quantized(own.out_proj) is not None


def test_measured_time_of_a_search_sees_attention(known_times: None) -> None:
    model, x = encoder(), torch.randn(3, 6, 16)
    pared.prune(model, 0.9)
    times = pared._accelerate.layer_seconds(model, x, "float32", ["csr"])
    assert {"layers.0.self_attn", "layers.0.self_attn.out_proj", "layers.1.linear2"} <= times.keys()
    assert "layers.0.self_attn.q_proj" not in times
    assert times["layers.0.self_attn"] == (3.0, 2.0)


def test_ties_names_flags_and_hooks_stay() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    first, second = conv1d(6, 6), conv1d(6, 6)
    second.weight = first.weight
    first.weight.requires_grad_(False)
    calls: list[int] = []
    first.register_forward_hook(lambda *a: calls.append(1))
    model = nn.ModuleDict({"a": first, "b": second, "again": first})
    x = torch.randn(3, 6)
    want = second(first(x))
    new: Any = as_linears(model)
    assert new["a"] is new["again"]
    assert new["a"].weight is new["b"].weight
    assert not new["a"].weight.requires_grad
    torch.testing.assert_close(new["b"](new["a"](x)), want)
    assert calls == [1, 1]


def test_a_wrong_projection_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    old = attention().eval()
    new: Any = as_linears(copy.deepcopy(old))
    new.k_proj, new.v_proj = new.v_proj, new.k_proj
    x = torch.randn(5, 2, 16)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(new(x, x, x)[0], old(x, x, x)[0], **TOLERANCE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Linear(3, 3),
            "expected nn.MultiheadAttention, or transformers' Conv1D or experts, got none",
        ),
        (
            lambda: nn.Sequential(attention(add_bias_kv=True)),
            "without bias_k and add_zero_attn, got one .* '0'",
        ),
        (lambda: attention(add_zero_attn=True), "got one with them in 'the model'"),
    ],
)
def test_what_cannot_be_replaced(model: Any, message: str) -> None:
    made = model()
    before = list(made.state_dict())
    with pytest.raises(ValueError, match=message):
        as_linears(made)
    assert list(made.state_dict()) == before


class Cross(nn.Module):
    """An attention whose keys and values are narrower than its queries: three weights in one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=12, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = self.attention(q, k, v, need_weights=False)[0]
        return y


def test_separate_projections_keep_their_grids(known_times: None) -> None:
    model = Cross().eval()
    inputs = torch.randn(3, 6, 16), torch.randn(3, 9, 8), torch.randn(3, 9, 12)
    options = {"activations": "static", "bias_correction": True}
    pared.quantize(model, [inputs, inputs], bits=8, **options)
    with torch.no_grad():
        want = model(*inputs)
    fast: Any = pared.accelerate(
        model, inputs, precision="int8", formats=["int8"], min_speedup=0, max_error=1.0, progress=False
    )
    grids = set()
    for part in "qkv":
        record = quantized(model.attention, f"{part}_proj_weight")
        layer = fast.attention.get_submodule(f"{part}_proj")
        codes, scale = layer.packed_weight().to_quantized()
        weight = getattr(model.attention, f"{part}_proj_weight").detach()
        assert record is not None
        assert (codes == record.codes(weight).numpy()).all()
        np.testing.assert_array_equal(scale, record.scale.flatten().numpy())
        assert layer.packed_weight().activations[0] == np.float32(record.activation_scale)
        grids.add(record.activation_scale)
    assert len(grids) == 3
    # What is simulated is what the kernels compute, and a checkpoint holds all of it.
    with simulate(model), torch.no_grad():
        rounded = model(*inputs)
    assert (rounded - want).abs().max() > 0
    torch.testing.assert_close(fast(*inputs), rounded, atol=0.05 * float(want.abs().max()), rtol=0)
    other = Cross()
    put_records(other, take_records(model))
    for part in "qkv":
        name = f"{part}_proj_weight"
        mine, theirs = quantized(model.attention, name), quantized(other.attention, name)
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine.scale, theirs.scale)
        assert mine.activation_scale == theirs.activation_scale
    assert quantized(model.attention) is None  # which of the three is to be said


class OwnLinear(nn.Linear):
    """What transformers' FalconLinear does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Twice(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(input)


class Adapted(nn.Linear):
    """Computes what nn.Linear does while its second weight is zero."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.more = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + nn.functional.linear(input, self.more)


class WithOption(nn.Linear):
    def forward(self, input: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * super().forward(input)


class NewConv(nn.Conv2d):
    pass


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = NewConv(3, 8, 3)
        self.own, self.doubled, self.adapted = OwnLinear(32, 32), Twice(32, 32), Adapted(32, 32)
        self.option, self.unused = WithOption(32, 32), OwnLinear(4, 4)
        self.again = self.own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.again(self.own(self.conv(x).flatten(1)))
        return self.option(self.adapted(self.doubled(y)), scale=0.5)  # type: ignore[no-any-return]


def test_subclasses_that_compute_what_torch_does(known_times: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Subclasses().eval(), torch.randn(5, 3, 4, 4)
    report = pared.prune(model, 0.5, exclude="unused")
    assert not any("OwnLinear" in note or "NewConv" in note for note in report.notes)
    with torch.no_grad():
        want = model(x)
    fast = pared.accelerate(model, x, min_speedup=0)
    assert packed(fast) == {"conv", "own"}
    assert fast.again is fast.own
    kinds = {
        "conv": "NewConv as nn.Conv2d",
        "own": "OwnLinear as nn.Linear",
        "again": "OwnLinear as nn.Linear",
    }
    assert pared.report(fast).opened == kinds
    notes = "\n".join(pared.report(fast).notes)
    for kind in ("Twice", "Adapted", "WithOption"):
        assert f"no kernel accelerates {kind}" in notes
    assert type(model.own) is OwnLinear
    with torch.no_grad():
        torch.testing.assert_close(fast(x), want)

    pared.save(fast, tmp_path / "fast.pared")
    loaded = pared.load(tmp_path / "fast.pared", Subclasses)
    assert packed(loaded) == {"conv", "own"}
    assert torch.equal(loaded(x), fast(x))
    other = Subclasses()
    other.own = other.again = nn.Linear(32, 32)  # type: ignore[assignment]
    with pytest.raises(pared.FormatError, match=r"expected OwnLinear as nn\.Linear 'own'"):
        pared.load(tmp_path / "fast.pared", other)

    plain = pared.restore(fast)
    assert [type(m) for m in (plain.conv, plain.own, plain.doubled)] == [nn.Conv2d, nn.Linear, Twice]
    assert plain.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain(x), want)


def test_subclasses_stay_where_no_kernel_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, lambda name, module: 1.0)
    model, x = Subclasses().eval(), torch.randn(5, 3, 4, 4)
    pared.prune(model, 0.5)
    fast = pared.accelerate(model, x)
    assert [type(m) for m in (fast.conv, fast.own)] == [NewConv, OwnLinear]
    assert not pared.report(fast).opened


class Bytes(nn.Linear):
    """How other tools keep 8-bit weights: integers in the place of the parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) / 127, self.bias)


def test_a_subclass_with_integer_weights_is_left_alone(known_times: None) -> None:
    model, x = nn.Sequential(Bytes(16, 16), nn.ReLU(), OwnLinear(16, 8)).eval(), torch.randn(3, 16)
    fast = pared.accelerate(model, x, min_speedup=0)
    assert type(fast[0]) is Bytes
    assert packed(fast) == {"2"}
    torch.testing.assert_close(fast(x), model(x).detach())
