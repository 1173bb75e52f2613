"""Attention modules of transformers that run pared's kernel: chosen by time, taken back, stored, traced."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from _models import FakeTimings
from torch import Tensor, nn

import pared
from pared import _accelerate as acc
from pared import _core
from pared.nn import _attention
from pared.nn._attention import attending

transformers = pytest.importorskip("transformers")


def bert(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=100,
        **changes,
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def llama() -> nn.Module:
    """Fewer heads of keys than of queries, and causal."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=100,
    )
    return transformers.LlamaModel(config).eval()


def tokens(batch: int = 2, length: int = 21, padded: bool = False) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[0, length // 2 :] = 0
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, 100, (batch, length), generator=generator), "attention_mask": mask}


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers stay torch's, the attention kernel and the model win."""
    race = FakeTimings(dense=1.0, pared=0.5)
    monkeypatch.setattr("pared._target.interleave", lambda calls, **kwargs: race)
    monkeypatch.setattr(acc, "decide", lambda c, *rest: c.keep_dense("not asked"))


def hidden(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(**inputs).last_hidden_state
    return y


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_are_those_of_torch(times: None, make: Any, padded: bool) -> None:
    model, inputs = make(), tokens(padded=padded)
    fast = pared.accelerate(model, inputs)
    assert len(attending(fast)) == 2
    assert not attending(model)
    report = pared.report(fast)
    assert any("2 attention module(s) run pared's kernel, 2.00x" in note for note in report.notes)
    assert 0 < report.relative_error <= report.tolerance
    assert report.speedup == 2.0
    for other in (inputs, tokens(3, 40, not padded), tokens(1, 1)):
        torch.testing.assert_close(hidden(fast, other), hidden(model, other), rtol=1e-4, atol=1e-5)


def test_it_really_runs(times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = pared.accelerate(bert(), tokens())
    calls = []
    real = _attention._core.attention
    monkeypatch.setattr(_attention._core, "attention", lambda *a: (calls.append(1), real(*a)))
    hidden(fast, tokens())
    assert len(calls) == 2


def test_a_slower_kernel_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    race = FakeTimings(dense=1.0, pared=0.99)
    monkeypatch.setattr("pared._target.interleave", lambda calls, **kwargs: race)
    monkeypatch.setattr(acc, "decide", lambda c, *rest: c.keep_dense("not asked"))
    fast = pared.accelerate(bert(), tokens())
    assert not attending(fast)
    assert not pared.report(fast).notes


def test_wrong_outputs_are_taken_back(times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _attention._core.attention

    def wrong(*args: Any) -> None:
        real(*args)
        args[4].mul_(1.01)

    monkeypatch.setattr(_attention._core, "attention", wrong)
    model = bert()
    fast = pared.accelerate(model, tokens())
    assert not attending(fast)
    assert any("attention stays torch's" in note for note in pared.report(fast).notes)
    assert torch.equal(hidden(fast, tokens()), hidden(model, tokens()))


def test_fuse_false_leaves_attention_alone(times: None) -> None:
    assert not attending(pared.accelerate(bert(), tokens(), fuse=False))


def test_copies_files_and_restore(times: None) -> None:
    model, inputs = bert(), tokens()
    fast = pared.accelerate(model, inputs)
    want = hidden(fast, inputs)
    file = io.BytesIO()
    pared.save(fast, file)
    file.seek(0)
    loaded = pared.load(file, bert())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded):
        assert len(attending(twin)) == 2
        assert all(m.config.original is twin.config for m in attending(twin).values())
        assert torch.equal(hidden(twin, inputs), want)
    plain = pared.restore(fast)
    assert not attending(plain)
    assert len(attending(fast)) == 2
    assert all(m.config is plain.config for m in plain.modules() if hasattr(m, "config"))
    assert torch.equal(hidden(plain, inputs), hidden(model, inputs))


def test_a_file_needs_the_same_attention(times: None) -> None:
    file = io.BytesIO()
    pared.save(pared.accelerate(bert(), tokens()), file)
    file.seek(0)
    with pytest.raises(pared.FormatError, match="expected an attention module of transformers"):
        pared.load(file, bert(attn_implementation="eager"))


def test_the_configuration_of_the_model_is_in_force(times: None) -> None:
    fast = pared.accelerate(bert(), tokens())
    module = next(iter(attending(fast).values()))
    assert module.config.hidden_size == 64
    module.config.hidden_size = 65
    assert fast.config.hidden_size == 65
    assert module.config._attn_implementation == "pared"
    fast.set_attn_implementation("eager")
    assert module.config._attn_implementation == "eager"
    with torch.no_grad():
        assert fast(**tokens(), output_attentions=True).attentions[0].shape == (2, 4, 21, 21)


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_sixteen_bits(
    times: None, monkeypatch: pytest.MonkeyPatch, make: Any, dtype: torch.dtype
) -> None:
    inputs = tokens(padded=True)
    exact, model = hidden(make(), inputs), make().to(dtype)
    fast = pared.accelerate(model, inputs)
    assert len(attending(fast)) == 2
    seen: list[torch.dtype] = []
    real = _core.attention

    def note(q: Tensor, *rest: Any) -> None:
        seen.append(q.dtype)
        real(q, *rest)

    monkeypatch.setattr(_core, "attention", note)
    mine = hidden(fast, inputs)
    assert seen == [dtype] * 2
    assert mine.dtype == dtype
    kept = inputs["attention_mask"].bool()
    error, theirs = ((y.float() - exact)[kept].abs().max() for y in (mine, hidden(model, inputs)))
    assert error <= 1.5 * theirs + torch.finfo(dtype).eps


def test_what_the_kernel_does_not_take_is_torchs(times: None) -> None:
    model, inputs = bert(), tokens()
    fast = pared.accelerate(model, inputs)
    ids = inputs["input_ids"]
    # Gradients.
    embeddings = model.embeddings.word_embeddings(ids).detach().requires_grad_()
    fast(inputs_embeds=embeddings).last_hidden_state.sum().backward()
    assert embeddings.grad is not None
    # Other dtypes.
    twice, dense = copy.deepcopy(fast).double(), copy.deepcopy(model).double()
    assert torch.equal(hidden(twice, inputs), hidden(dense, inputs))
    # Dropout.
    q = torch.randn(1, 4, 8, 16)
    module = next(iter(attending(fast).values()))
    torch.manual_seed(3)
    mine = _attention.pared_attention(module, q, q, q, None, dropout=0.5)[0]
    torch.manual_seed(3)
    assert torch.equal(mine, _attention.torch_attention(module, q, q, q, None, dropout=0.5)[0])
    # Arguments that only torch's function knows.
    bias = torch.randn(1, 4, 8, 8)
    mine = _attention.pared_attention(module, q, q, q, None, position_bias=bias)[0]
    assert torch.equal(mine, _attention.torch_attention(module, q, q, q, None, position_bias=bias)[0])


def test_tracers_see_an_operator(times: None) -> None:
    inputs = tokens()
    fast = pared.accelerate(bert(), inputs)
    want = hidden(fast, inputs)
    with torch.no_grad():
        exported = torch.export.export(fast, (), inputs)
        assert sum("pared.attention" in str(n.target) for n in exported.graph.nodes) == 2
        torch.testing.assert_close(exported.module()(**inputs).last_hidden_state, want)


def test_the_operator() -> None:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8)
    for mask in (None, torch.rand(2, 4, 9, 12) < 0.5):
        torch.library.opcheck(torch.ops.pared.attention, (q, k, k, mask, 0.3, False))
