"""Layers of transformer encoders in one call: the bits of their parts; what is not understood stays."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import set_times
from torch import Tensor, nn

import pared
from pared import _core, ops
from pared._accelerate import timing
from pared.nn import Linear, _encoder
from pared.nn._encoder import encoding, fuse_layer, separate

FORMATS = ("csr", "bsr", "dense", "bitmap", "bitmap+csr", "int8", "bitmap8", "bsr8")


def linear(rows: int, cols: int, format: str, activation: str | None = None) -> Linear:
    dense = nn.Linear(cols, rows, bias=rows % 3 != 0)
    with torch.no_grad():
        dense.weight *= (torch.rand(rows, (cols + 3) // 4) < 0.5).repeat_interleave(4, 1)[:, :cols]
    return Linear.from_module(dense, format=format, activation=activation)


class Parts:
    """A layer of 40 features, five heads of 6 and 52 features between, and its parts one by one."""

    def __init__(self, formats: tuple[str, ...], norm_first: bool = False) -> None:
        torch.manual_seed(0)
        sizes = ((30, 40), (30, 40), (30, 40), (40, 30), (52, 40), (40, 52))
        self.linears = [
            linear(*size, f, "gelu" if i == 4 else None)
            for i, (size, f) in enumerate(zip(sizes, formats, strict=True))
        ]
        self.norms = [torch.randn(40), torch.randn(40), torch.randn(40), None]
        self.norm_first = norm_first
        self.kernel = self.build()

    def build(self, **changes: Any) -> Any:
        arguments = {
            "packed": [m.packed for m in self.linears],
            "bias": [m.bias for m in self.linears],
            "activation": [m.activation or "" for m in self.linears],
            "norm": self.norms,
            "eps": [1e-12, 0.1],
            "heads": 5,
            "scale": 0.3,
            "norm_first": self.norm_first,
        }
        return _core.EncoderLayer(**{**arguments, **changes})

    def one(
        self, x: Tensor, mask: Tensor | None = None, batch_first: bool = True, causal: bool = False
    ) -> Tensor:
        out = torch.full_like(x, torch.nan)
        assert self.kernel(x, mask, out, batch_first, causal)
        return out

    def apart(
        self, x: Tensor, mask: Tensor | None = None, batch_first: bool = True, causal: bool = False
    ) -> Tensor:
        q, k, v, o, up, down = self.linears
        w1, b1, w2, b2 = self.norms
        n = ops.layer_norm(x, w1, b1, 1e-12) if self.norm_first else x
        heads = [m(n).unflatten(2, (5, 6)) for m in (q, k, v)]
        if not batch_first:
            heads = [h.transpose(0, 1) for h in heads]
        y = ops.attention(*(h.transpose(1, 2) for h in heads), mask, 0.3, causal).transpose(1, 2)
        y = o((y if batch_first else y.transpose(0, 1)).flatten(2))
        if self.norm_first:
            h = x + y
            return h + down(up(ops.layer_norm(y, w2, b2, 0.1, x)))
        h = ops.layer_norm(y, w1, b1, 1e-12, x)
        return ops.layer_norm(down(up(h)), w2, b2, 0.1, h)


def same(y: Tensor, want: Tensor, format: str = "csr") -> None:
    """Equal bits, unless the order of a sum depends on how many tokens a call has (the width of a tile)."""
    assert torch.equal(y, want) or ("csr" in format and torch.allclose(y, want, 1e-5, 1e-5))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_the_bits_of_the_parts(isa, format, norm_first):
    parts = Parts((format,) * 6, norm_first)
    for shape in ((1, 1), (2, 17), (3, 70)):
        x = torch.randn(*shape, 40)
        same(parts.one(x), parts.apart(x), format)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_masks_orders_and_threads(threads):
    """Groups of sequences, whether threads share them or the work within, and masks of each of them."""
    parts = Parts(("bitmap", "int8", "dense", "bsr8", "dense", "int8"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for batch, tokens in ((1, 5), (4, 50), (5, 50), (9, 33), (2, 200)):
            x = torch.randn(batch, tokens, 40)
            full = torch.rand(batch, 5, tokens, tokens) < 0.7
            for mask in (
                None,
                full,
                torch.where(full, 0.5, -torch.inf),
                (torch.rand(batch, 1, 1, tokens) < 0.7).expand(full.shape),
                (torch.rand(1, 5, tokens, 1) < 0.7).expand(full.shape),
            ):
                assert torch.equal(parts.one(x, mask), parts.apart(x, mask))
                turned = x.transpose(0, 1).contiguous()
                assert torch.equal(parts.one(turned, mask, False), parts.apart(turned, mask, False))
            assert torch.equal(parts.one(x, causal=True), parts.apart(x, causal=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "formats",
    [
        ("int8", "int8", "bsr8"),
        ("csr", "int8", "csr"),
        ("bitmap", "bitmap8", "bitmap8"),
        ("bitmap+csr", "bitmap+csr", "bitmap"),
        ("bsr", "dense", "dense"),
    ],
)
def test_projections_that_share_and_that_do_not(isa, formats):
    parts = Parts((*formats, "int8", "int8", "int8"))
    for shape in ((1, 1), (2, 17)):
        x = torch.randn(*shape, 40)
        same(parts.one(x), parts.apart(x), "csr" if "csr" in "".join(formats) else "")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(isa, dtype, norm_first):
    """The layer's outputs for these inputs in float32, rounded once."""
    parts = Parts(("bitmap", "int8", "dense", "bsr8", "dense", "int8"), norm_first)
    for shape in ((1, 1), (2, 17), (3, 70)):
        x = torch.randn(*shape, 40).to(dtype)
        mask = torch.randn(shape[0], 1, 1, shape[1]).to(dtype).expand(shape[0], 5, shape[1], shape[1])
        for given in (None, mask, mask > 0.5):
            wide = given.float() if given is not None and given.dtype == dtype else given
            assert torch.equal(parts.one(x, given), parts.one(x.float(), wide).to(dtype))
    turned = x.transpose(0, 1).contiguous()
    assert torch.equal(parts.one(turned, None, False), parts.one(turned.float(), None, False).to(dtype))


def test_16_bit_normalisations_are_read_on_each_call():
    parts, x = Parts(("csr",) * 6), torch.randn(2, 9, 40).bfloat16()
    parts.norms = [w if w is None else w.bfloat16() for w in parts.norms]
    wide = Parts(("csr",) * 6)
    wide.norms = [w if w is None else w.float() for w in parts.norms]
    parts.kernel, wide.kernel = parts.build(), wide.build()
    assert torch.equal(parts.one(x), wide.one(x))
    for w in (*parts.norms, *wide.norms):
        if w is not None:
            w *= 2
    assert torch.equal(parts.one(x), wide.one(x))


def test_nothing():
    parts = Parts(("csr",) * 6)
    for shape in ((0, 3, 40), (2, 0, 40)):
        assert parts.one(torch.zeros(shape)).shape == shape


def test_the_comparison_catches_faults():
    """Keys and values exchanged, the normalisations exchanged, another scale, a residual forgotten."""
    parts, x = Parts(("csr",) * 6), torch.randn(2, 9, 40)
    q, k, v, *rest = (m.packed for m in parts.linears)
    want = parts.apart(x)
    w1, b1, w2, b2 = parts.norms
    for wrong in (
        {"packed": [q, v, k, *rest]},
        {"norm": [w2, b2, w1, b1]},
        {"scale": 0.31},
        {"norm_first": True},
    ):
        parts.kernel = parts.build(**wrong)
        assert not torch.allclose(parts.one(x), want, rtol=1e-3)


def test_bad_arguments():
    parts = Parts(("csr",) * 6)
    x = torch.zeros(2, 3, 40)
    for change, message in (
        ({"packed": [m.packed for m in parts.linears[:5]]}, "packed: expected six weights"),
        ({"packed": [parts.linears[3].packed] * 6}, "bias: expected shape|packed: expected weight"),
        ({"heads": 7}, "heads: expected a positive divisor of 30, got 7"),
        ({"scale": float("inf")}, "scale: expected a finite number"),
        ({"norm": [torch.zeros(39), None, None, None]}, "norm: expected shape"),
        ({"eps": [-1.0, 0.0]}, "eps: expected a finite number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parts.build(**change)
    for args, message in (
        ((x[..., :39], None, x), "x: expected shape"),
        ((x, None, x), "out: expected memory"),
        ((x, torch.zeros(2, 3), torch.zeros(2, 3, 40)), "mask: expected shape"),
        ((x.transpose(0, 1), None, torch.zeros(3, 2, 40)), "x: expected contiguous"),
        ((x.double(), None, x), "x: expected dtype"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            parts.kernel(*args)


@pytest.mark.parametrize("change", [torch.clone, torch.Tensor.half, lambda t: t[:30]])
def test_other_memory_is_noticed_and_nothing_computed(change):
    """As module.half() and module.share_memory() give it to a tensor in place."""
    parts = Parts(("csr",) * 6)
    parts.norms[0].data = change(parts.norms[0])
    out = torch.full((2, 3, 40), 7.0)
    assert not parts.kernel(torch.zeros(2, 3, 40), None, out)
    assert bool((out == 7).all())
    parts = Parts(("csr",) * 6)
    parts.linears[2].packed.data = parts.linears[2].packed.clone()
    assert not parts.kernel(torch.zeros(2, 3, 40), None, out)
    parts.kernel = parts.build()
    assert parts.kernel(torch.zeros(2, 3, 40), None, out)


# -- modules ---------------------------------------------------------------------------------------


def pruned(model: nn.Module) -> nn.Module:
    pared.prune(model, 0.5, scope="layer")
    return model.eval()


def hugging(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "distilbert":
        config = transformers.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
        return pruned(transformers.DistilBertModel(config))
    kind = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}[name]
    config = getattr(transformers, f"{kind}Config")(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=100
    )
    return pruned(getattr(transformers, f"{kind}Model")(config))


def images(name: str) -> tuple[nn.Module, list[Tensor]]:
    """Encoders of images and of sound in transformers: the order of their normalisations is another."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    picture = {**size, "image_size": 16, "patch_size": 4}
    x = torch.randn(2, 3, 16, 16)
    if name in ("whisper", "bart"):
        size = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
        size |= {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
        if name == "bart":
            config = transformers.BartConfig(**size, vocab_size=50)
            inputs = [torch.arange(10).reshape(1, 10), torch.arange(40).reshape(2, 20)]
            return pruned(transformers.BartModel(config).encoder), inputs
        config = transformers.WhisperConfig(**size, num_mel_bins=8, max_source_positions=10)
        return pruned(transformers.WhisperModel(config).encoder), [torch.randn(2, 8, 20)]
    if name == "ast":
        config = transformers.ASTConfig(**size, num_mel_bins=16, max_length=24, patch_size=8)
        return pruned(transformers.ASTModel(config)), [torch.randn(2, 24, 16)]
    if name == "yolos":
        config = transformers.YolosConfig(**picture | {"image_size": [16, 16]}, num_detection_tokens=3)
        return pruned(transformers.YolosModel(config)), [x, x[:1]]
    if name == "siglip":
        return pruned(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**picture))), [x, x[:1]]
    kind = {"vit": "ViT", "deit": "DeiT"}[name]
    config = getattr(transformers, f"{kind}Config")(**picture)
    return pruned(getattr(transformers, f"{kind}Model")(config)), [x, x[:1]]


def tokens(batch: int = 2, length: int = 21, padded: bool = False) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[0, length // 2 :] = 0
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(2, 100, (batch, length), generator=generator), "attention_mask": mask}


def hidden(model: Any, inputs: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(**inputs, **options).last_hidden_state
    return y


@pytest.fixture
def one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """CSR wins in every layer, and so does one call for an encoder layer."""
    set_times(monkeypatch, lambda name, m: 1.0 if m is None or m.format != "csr" else 0.4)
    monkeypatch.setattr(timing, "time_encoder", lambda *a: (1.0, 0.5))
    monkeypatch.setattr(timing, "time_attention", lambda *a: (1.0, 0.5))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers ran in one call."""
    seen: list[int] = []
    real = _encoder._Plan.kernel

    def count(plan: Any, layer: nn.Module) -> Any:
        kernel = real(plan, layer)
        seen.append(1)
        return kernel

    monkeypatch.setattr(_encoder._Plan, "kernel", count)
    return seen


@pytest.mark.parametrize(
    ("name", "padded"), [("bert", False), ("roberta", True), ("electra", False), ("distilbert", True)]
)
def test_models_of_transformers(one_call: None, ran: list[int], name: str, padded: bool) -> None:
    model, inputs = hugging(name), tokens(padded=padded)
    fast = pared.accelerate(model, inputs)
    assert len(encoding(fast)) == 2
    assert not encoding(model)
    report = pared.report(fast)
    assert any("2 encoder layer(s) run in one call each, 2.00x faster" in note for note in report.notes)
    assert any("in one call with its encoder layer" in row.reason for row in report.layers)
    assert 0 < report.relative_error <= report.tolerance
    for other in (inputs, tokens(3, 40, not padded), tokens(1, 1)):
        ran.clear()
        y = hidden(fast, other)
        assert len(ran) == 2
        torch.testing.assert_close(y, hidden(model, other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "deit", "yolos", "siglip", "ast", "whisper", "bart"])
def test_models_of_images_and_sound(one_call: None, ran: list[int], name: str) -> None:
    model, inputs = images(name)
    fast = pared.accelerate(model, inputs[0])
    assert len(encoding(fast)) == 2
    for x in inputs:
        ran.clear()
        with torch.no_grad():
            y, want = fast(x).last_hidden_state, model(x).last_hidden_state
        assert len(ran) == 2
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    loaded = pared.load(file, images(name)[0])
    assert len(encoding(loaded)) == 2
    with torch.no_grad():
        assert torch.equal(loaded(inputs[0]).last_hidden_state, fast(inputs[0]).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_16_bit_models(one_call: None, ran: list[int], name: str, dtype: torch.dtype) -> None:
    """As close to the float32 model as the model in 16 bits is, or closer."""
    if name == "bert":
        plain: nn.Module = hugging("bert")
        inputs: Any = tokens(padded=True)
    else:
        plain, (x, _) = images("vit")
        inputs = {"pixel_values": x.to(dtype)}
    exact = copy.deepcopy(plain)
    model = plain.to(dtype)
    exact.load_state_dict(model.state_dict())
    wide = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    fast = pared.accelerate(model, inputs)
    assert len(encoding(fast)) == 2
    ran.clear()
    y, want = hidden(fast, inputs), hidden(exact, wide)
    assert len(ran) == 2
    assert y.dtype == dtype
    off = (y.float() - want).abs().max()
    assert off <= (hidden(model, inputs).float() - want).abs().max() + 2 * torch.finfo(dtype).eps


def torch_encoder(activation: Any, norm_first: bool, batch_first: bool) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, activation=activation, norm_first=norm_first, batch_first=batch_first
    )
    return pruned(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


@pytest.mark.parametrize(
    ("activation", "norm_first", "batch_first"),
    [("relu", True, True), ("gelu", False, False), (nn.GELU(), False, True), (nn.ReLU(), True, False)],
)
def test_torchs_own(
    one_call: None, ran: list[int], activation: Any, norm_first: bool, batch_first: bool
) -> None:
    model = torch_encoder(activation, norm_first, batch_first)
    x = torch.randn(3, 11, 32) if batch_first else torch.randn(11, 3, 32)
    fast = pared.accelerate(model, x)
    assert len(encoding(fast)) == 2
    causal = nn.Transformer.generate_square_subsequent_mask(11)
    padding = torch.zeros(3, 11, dtype=torch.bool)
    padding[1, 7:] = True
    calls: list[dict[str, Any]] = [
        {},
        {"mask": causal},
        {"mask": causal, "is_causal": True},
        {"mask": causal == -torch.inf},
        {"mask": causal.expand(12, 11, 11)},
        {"src_key_padding_mask": padding},
        {"src_key_padding_mask": padding, "mask": causal == -torch.inf},
        {"src_key_padding_mask": torch.zeros(3, 11).masked_fill(padding, -torch.inf), "mask": causal},
    ]
    with torch.no_grad():
        for options in calls:
            ran.clear()
            y = fast(x, **options)
            assert len(ran) == 2
            torch.testing.assert_close(y, model(x, **options), rtol=1e-4, atol=1e-5)
        ran.clear()
        torch.testing.assert_close(fast(x[0]), model(x[0]), rtol=1e-4, atol=1e-5)  # no batch
        assert not ran


def test_a_slower_call_is_not_taken(one_call: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_encoder", lambda *a: (1.0, 0.99))
    fast = pared.accelerate(hugging("bert"), tokens())
    assert not encoding(fast)
    assert not any("one call" in note for note in pared.report(fast).notes)


def test_wrong_outputs_are_taken_back(one_call: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A structure that says another order of the normalisations than the layer has."""
    import dataclasses

    real = _encoder.structure_of

    def wrong(*args: Any) -> Any:
        s = real(*args)
        return s and dataclasses.replace(s, norm_first=True)

    monkeypatch.setattr(_encoder, "structure_of", wrong)
    fast = pared.accelerate(hugging("bert"), tokens())
    assert not encoding(fast)
    assert any("encoder layers stay apart" in note for note in pared.report(fast).notes)


def test_copies_files_and_restore(one_call: None, ran: list[int]) -> None:
    model, inputs = hugging("bert"), tokens()
    fast = pared.accelerate(model, inputs)
    want = hidden(fast, inputs)
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    loaded = pared.load(file, hugging("bert"))
    layer = type(model.encoder.layer[0])
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded):
        assert len(encoding(twin)) == 2
        assert all(isinstance(m, layer) for m in encoding(twin).values())
        ran.clear()
        assert torch.equal(hidden(twin, inputs), want)
        assert len(ran) == 2
    plain = pared.restore(fast)
    assert all(type(m) is layer for m in plain.encoder.layer)
    assert len(encoding(fast)) == 2
    assert plain.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(hidden(plain, inputs), hidden(model, inputs))


def test_what_is_unusual_goes_the_layers_own_way(one_call: None, ran: list[int]) -> None:
    model, inputs = hugging("bert"), tokens()
    fast = pared.accelerate(model, inputs)
    want = hidden(fast, inputs)
    layer: Any = fast.encoder.layer[0]

    def apart(count: int = 1) -> Tensor:
        ran.clear()
        y = hidden(fast, inputs)
        assert len(ran) == 2 - count
        return y

    # Hooks within, forward hooks and hooks before; those around the layer do not matter.
    seen: list[Any] = []
    for where, register in (
        (layer.intermediate.dense, "register_forward_hook"),
        (layer.attention.self, "register_forward_pre_hook"),
    ):
        hook = getattr(where, register)(lambda *a: seen.append(1))
        torch.testing.assert_close(apart(), want)
        hook.remove()
    assert len(seen) == 2
    hook = layer.register_forward_hook(lambda *a: seen.append(1))
    assert torch.equal(apart(0), want)
    hook.remove()
    assert len(seen) == 3
    # A part in training mode, a part that was replaced, arguments that ask for more.
    layer.attention.output.dropout.train()
    apart()
    layer.attention.output.dropout.eval()
    dense, layer.output.dense = layer.output.dense, nn.Linear(48, 32)
    assert not torch.allclose(apart(), want)
    layer.output.dense = dense
    assert torch.equal(apart(0), want)
    ran.clear()
    hidden(fast, inputs, position_ids=torch.arange(21)[None])
    assert not ran
    # A new tensor in the place of an old one is seen.
    layer.output.LayerNorm.weight = nn.Parameter(torch.zeros(32), requires_grad=False)
    assert not torch.allclose(apart(0), want)


def test_attentions_and_hidden_states_are_recorded(one_call: None) -> None:
    model, inputs = hugging("bert"), tokens()
    fast = pared.accelerate(model, inputs)
    with torch.no_grad():
        states = fast(**inputs, output_hidden_states=True).hidden_states
        wanted = model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-5)
    fast.set_attn_implementation("eager")
    with torch.no_grad():
        assert fast(**inputs, output_attentions=True).attentions[0].shape == (2, 4, 21, 21)


def test_gradients_are_refused_as_by_the_parts(one_call: None) -> None:
    model = hugging("bert")
    fast = pared.accelerate(model, tokens())
    embeddings = torch.randn(1, 5, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="expected an input that needs no gradient"):
        fast(inputs_embeds=embeddings)


def test_tracers_see_the_parts(one_call: None, ran: list[int]) -> None:
    inputs = tokens()
    fast = pared.accelerate(hugging("bert"), inputs)
    want = hidden(fast, inputs)
    ran.clear()
    with torch.no_grad():
        exported = torch.export.export(fast, (), inputs)
        assert sum("pared.linear" in str(n.target) for n in exported.graph.nodes) == 13  # and the pooler
        torch.testing.assert_close(exported.module()(**inputs).last_hidden_state, want)
    assert not ran


def _decoder() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=48, is_decoder=True
    )
    return transformers.BertModel(config).eval().encoder.layer[0]


def _subclass() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    layer = hugging("bert").encoder.layer[0]

    class Scaled(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            y: Tensor = 2 * super().forward(hidden_states, attention_mask)
            return y

    assert transformers
    layer.__class__ = Scaled
    return layer


def _more() -> nn.Module:
    layer = hugging("bert").encoder.layer[0]
    layer.attention.self.distance_embedding = nn.Embedding(4, 4)
    return layer


def _packed(layer: nn.Module) -> nn.Module:
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Linear.from_module(child, activation="gelu" if name == "up" else None))
    return layer


@pytest.mark.parametrize("make", [_decoder, _subclass, _more])
def test_what_is_not_understood_stays(make: Callable[[], nn.Module]) -> None:
    layer = _packed(make())
    kind = type(layer)
    assert not fuse_layer(layer)
    assert type(layer) is kind


def test_layers_that_stay_dense_stay_apart() -> None:
    layer: Any = _packed(hugging("distilbert").transformer.layer[0])
    layer.ffn.activation = nn.Identity()
    assert fuse_layer(layer)
    separate(layer)
    layer.ffn.lin2 = nn.Linear(48, 32)
    assert not fuse_layer(layer)
