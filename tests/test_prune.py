"""pared.prune: exact counts, closed forms, filters, ties, models that others pruned, errors, the report."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import pared
from pared.pruning import Magnitude, PruneReport, Random, Statistics
from pared.pruning import masks as masks_module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(*layers: nn.Module, seed: int = 0) -> nn.Module:
    """The layers in a row, with distinct weights: no two magnitudes tie."""
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            order = torch.randperm(p.numel(), generator=generator).reshape(p.shape).float()
            sign = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
            p.copy_((order + 1) / p.numel() * sign)
    return model


def small() -> nn.Module:
    return seeded(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {k: v.detach().contiguous().numpy().tobytes() for k, v in model.state_dict().items()}


def zeros(tensor: torch.Tensor) -> int:
    return int((tensor == 0).sum())


class FakeConv1D(nn.Module):
    """The layout of transformers' Conv1D: weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


FakeConv1D.__name__ = "Conv1D"


# ---------------------------------------------------------------- counts and closed forms


def check_top_magnitudes(before: list[torch.Tensor], after: list[torch.Tensor], keep: int) -> None:
    """`after` is `before` with all but the `keep` largest magnitudes zeroed; survivors are bit-equal."""
    b = torch.cat([t.detach().flatten() for t in before]).abs()
    a = torch.cat([t.detach().flatten() for t in after])
    kept = a != 0
    assert int(kept.sum()) == keep
    assert torch.equal(a[kept], torch.cat([t.detach().flatten() for t in before])[kept])
    if 0 < keep < b.numel():
        assert b[kept].min() >= b[~kept].max()


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 19), st.integers(1, 17)), min_size=1, max_size=4),
    sparsity=st.floats(0, 0.999),
    seed=st.integers(0, 2**31),
)
def test_global_unstructured_keeps_exactly_the_largest(
    shapes: list[tuple[int, int]], sparsity: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in shapes)
    before = [m.weight.detach().clone() for m in model]
    report = pared.prune(model, sparsity)
    total = sum(t.numel() for t in before)
    keep = max(total - round(sparsity * total), len(shapes))
    after = [m.weight.detach() for m in model]
    assert report.kept == sum(t.numel() - zeros(t) for t in after) == keep
    assert all(zeros(t) < t.numel() for t in after)  # no layer is emptied
    flat_b, flat_a = torch.cat([t.flatten() for t in before]), torch.cat([t.flatten() for t in after])
    kept = flat_a != 0
    assert torch.equal(flat_a[kept], flat_b[kept])
    # What is kept is the top of all, but for one weight in layers that would have been emptied.
    floor = {i for i, t in enumerate(after) if t.numel() - zeros(t) == 1}
    rest = [i for i in range(len(shapes)) if i not in floor]
    if rest:
        lowest = min(float(before[i][after[i] != 0].abs().min()) for i in rest)
        for b, a in zip(before, after, strict=True):
            if zeros(a):
                assert float(b[a == 0].abs().max()) <= lowest


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.97])
def test_global_against_a_sort(sparsity: float) -> None:
    model = small()
    before = [p.detach().clone() for p in model.parameters() if p.ndim == 2]
    biases = [p.detach().clone() for p in model.parameters() if p.ndim == 1]
    pared.prune(model, sparsity)
    total = sum(t.numel() for t in before)
    check_top_magnitudes(
        before, [p for p in model.parameters() if p.ndim == 2], total - round(sparsity * total)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(biases, [p for p in model.parameters() if p.ndim == 1], strict=True)
    )


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.999])
def test_layer_and_row_scope(sparsity: float) -> None:
    model = small()
    before = [p.detach().clone() for p in model.parameters() if p.ndim == 2]
    pared.prune(model, sparsity, scope="layer")
    for b, p in zip(before, [p for p in model.parameters() if p.ndim == 2], strict=True):
        check_top_magnitudes([b], [p], max(1, b.numel() - round(sparsity * b.numel())))
    model = small()
    pared.prune(model, sparsity, scope="row")
    for b, p in zip(before, [p for p in model.parameters() if p.ndim == 2], strict=True):
        for row_before, row in zip(b, p, strict=True):
            check_top_magnitudes([row_before], [row], max(1, b.shape[1] - round(sparsity * b.shape[1])))


def test_ties_go_to_the_lowest_index() -> None:
    model = nn.Linear(8, 4, bias=False)
    nn.init.constant_(model.weight, -0.5)
    pared.prune(model, 0.75)
    assert torch.equal(model.weight.detach().flatten() != 0, torch.arange(32) < 8)


def test_zeros_are_true_zeros() -> None:
    model = small()
    pared.prune(model, 0.9)
    weight = model[0].weight.detach()
    assert not torch.signbit(weight[weight == 0]).any()


def test_a_mask_that_is_off_by_one_element_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = masks_module.choose

    def off_by_one(*args: object, **kwargs: object) -> list[torch.Tensor]:
        masks = choose(*args, **kwargs)  # type: ignore[arg-type]
        flat = masks[0].reshape(-1)
        i, j = int(flat.nonzero()[0]), int((~flat).nonzero()[0])
        flat[i], flat[j] = False, True  # the right count, the wrong element
        return masks

    monkeypatch.setattr("pared.pruning.oneshot.choose", off_by_one)
    with pytest.raises(AssertionError):
        test_global_against_a_sort(0.5)


# ---------------------------------------------------------------- patterns


def reference_blocks(
    w: torch.Tensor, r: int, c: int, groups: int
) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """Block -> the indices of its elements, written out from the definition."""
    blocks: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    per_group = w.shape[0] // groups
    for index in map(
        tuple, torch.cartesian_prod(*(torch.arange(s) for s in w.shape)).reshape(-1, w.ndim).tolist()
    ):
        o, i, *tap = index
        g, within = (0, o) if per_group % r == 0 else divmod(o, per_group)
        blocks.setdefault((g, within // r, i // c, *tap), []).append(index)
    return blocks


def block_cases() -> list[tuple[nn.Module, int]]:
    return [
        (nn.Linear(13, 9), 1),
        (nn.Linear(16, 32), 1),
        (nn.Conv2d(6, 8, 3), 1),
        (nn.Conv2d(8, 8, 1), 1),
        (nn.Conv2d(8, 12, 3, groups=4), 4),
        (nn.Conv2d(10, 10, 3, groups=2), 2),
        (nn.Conv2d(8, 8, 3, groups=8), 8),
        (nn.Conv1d(5, 7, 4), 1),
        (nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last), 1),
    ]


@pytest.mark.parametrize("pattern", ["1x4", "4x1", "4x4", "16x1", "3x5", "64x64"])
@pytest.mark.parametrize("case", range(len(block_cases())))
@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_blocks_go_whole_and_the_smallest_go_first(pattern: str, case: int, importance: str) -> None:
    torch.manual_seed(case)
    layer, groups = block_cases()[case]
    r, c = map(int, pattern.split("x"))
    before = layer.weight.detach().clone()
    blocks = reference_blocks(before, r, c, groups)
    pared.prune(layer, 0.6, pattern=pattern, importance=importance)
    after = layer.weight.detach()
    if importance == "magnitude":
        scores = before.abs()
    else:
        scores = Random().score(layer, Statistics("", "weight", before))
    size = {key: sum(float(scores[i]) for i in elements) for key, elements in blocks.items()}
    kept = set()
    for key, elements in blocks.items():
        values = [bool(after[i] != 0) for i in elements]
        assert all(values) or not any(values)  # whole blocks
        if all(values):
            kept.add(key)
            assert all(after[i] == before[i] for i in elements)
    assert len(kept) == max(1, len(blocks) - round(0.6 * len(blocks)))
    gone = [size[key] for key in blocks if key not in kept]
    if gone:  # sums of up to 4096 numbers in another order
        assert min(size[key] for key in kept) >= max(gone) * (1 - 4096 * 2**-24)


def test_blocks_compete_across_layers() -> None:
    model = seeded(nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(100)
    report = pared.prune(model, 0.5, pattern="1x4")
    # All of the second layer but the one block that no layer goes without, which the first gives up.
    assert zeros(model[0].weight) == 4
    assert zeros(model[1].weight) == 128 - 4
    assert report.notes == ("one weight or block is left in 1.weight: try scope='layer'",)
    report = pared.prune(seeded(nn.Linear(16, 8)), 0.5, pattern="1x4", scope="layer")
    assert report.kept == 64


@pytest.mark.parametrize("pattern", ["1x4", "4x2"])
@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_rows_of_blocks(pattern: str, importance: str) -> None:
    r, c = map(int, pattern.split("x"))
    model = seeded(nn.Conv2d(8, 8, 3), seed=3)
    pared.prune(model, 0.75, pattern=pattern, scope="row", importance=importance)
    w = model[0].weight.detach() != 0
    blocks = w.reshape(8 // r, r, 8 // c, c, 3, 3)
    assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
    n = 8 // c * 9
    assert (blocks.all(3).all(1).sum((1, 2, 3)) == n - round(0.75 * n)).all()


@pytest.mark.parametrize(
    ("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:2", 1, 2), ("1:16", 1, 16)]
)
@pytest.mark.parametrize("layer", [nn.Linear(32, 9), nn.Conv2d(16, 5, 3), nn.Linear(37, 4)], ids=str)
def test_n_of_m(pattern: str, n: int, m: int, layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    before = layer.weight.detach().clone()
    report = pared.prune(layer, pattern=pattern)
    after = layer.weight.detach()
    b, a = (t.reshape(*t.shape[:2], -1).permute(0, 2, 1) for t in (before, after))
    for start in range(0, b.shape[2], m):
        group_b, group_a = b[..., start : start + m].abs(), a[..., start : start + m]
        want = min(n, group_a.shape[-1])
        assert ((group_a != 0).sum(-1) == want).all()
        threshold = group_b.sort(descending=True).values[..., want - 1 : want]
        assert torch.equal(group_a != 0, group_b >= threshold)
    if before.shape[1] % m == 0:
        assert report.sparsity == 1 - n / m
        again = pared.prune(layer, 1 - n / m, pattern=pattern)
        assert "nothing changed" in again.notes[0]


def test_one_by_one_block_is_unstructured() -> None:
    a, b = small(), small()
    pared.prune(a, 0.7, pattern="1x1")
    pared.prune(b, 0.7)
    assert bytes_of(a) == bytes_of(b)


def test_channels_last_changes_nothing_but_ties() -> None:
    a = seeded(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3))
    b = copy.deepcopy(a).to(memory_format=torch.channels_last)
    strides = b[0].weight.stride()
    # Scaled, so that the layers do not tie with each other.
    for m in (a, b):
        with torch.no_grad():
            m[1].weight.mul_(0.99)
    for pattern, scope in [("unstructured", None), ("unstructured", "row"), ("1x4", None), ("2:4", None)]:
        x, y = copy.deepcopy(a), copy.deepcopy(b)
        for m in (x, y):
            pared.prune(m, 0.5, pattern=pattern, scope=scope)
        assert torch.equal(x[0].weight, y[0].weight)
        assert torch.equal(x[1].weight, y[1].weight)
        assert y[0].weight.stride() == strides


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    for pattern in ("unstructured", "1x4", "2:4"):
        m = copy.deepcopy(model)
        report = pared.prune(m, 0.5, pattern=pattern, scope="layer")
        assert report.sparsity == pytest.approx(0.5, abs=0.02)
        assert m[0].weight.dtype == dtype


def test_mixed_dtypes_compete() -> None:
    model = seeded(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].to(torch.bfloat16)
    assert pared.prune(model, 0.5).kept == 64


# ---------------------------------------------------------------- importance


def test_random_is_seeded_nested_and_differs_between_layers() -> None:
    def run(sparsity: float, seed: int) -> list[torch.Tensor]:
        model = seeded(nn.Linear(20, 20), nn.Linear(20, 20))
        pared.prune(model, sparsity, importance=Random(seed), scope="layer")
        return [m.weight.detach() != 0 for m in model]

    assert all(torch.equal(a, b) for a, b in zip(run(0.5, 1), run(0.5, 1), strict=True))
    assert not torch.equal(run(0.5, 1)[0], run(0.5, 2)[0])
    assert not torch.equal(run(0.5, 1)[0], run(0.5, 1)[1])
    assert not (run(0.9, 1)[0] & ~run(0.5, 1)[0]).any()


def test_the_norm_of_a_block() -> None:
    # By the sum the first block of four wins, by the Euclidean norm the second.
    model = nn.Linear(8, 1, bias=False)
    values = torch.tensor([[3.0, 3, 3, 3, 8, 0.5, 0.5, 0.5]])
    for p, kept in ((1, slice(0, 4)), (2, slice(4, 8))):
        with torch.no_grad():
            model.weight.copy_(values)
        pared.prune(model, 0.5, pattern="1x4", importance=Magnitude(p))
        assert torch.equal(model.weight.detach()[0, kept], values[0, kept])
        assert zeros(model.weight) == 4
    with pytest.raises(ValueError, match="p: expected 1 or 2, got 3"):
        Magnitude(3)


def test_global_selection_neither_copies_nor_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.Linear(8, 8))
    calls = []
    topk_mask = masks_module.ops.topk_mask

    def spy(scores: list[torch.Tensor], *args: object, **kwargs: object) -> object:
        calls.append([t.data_ptr() for t in scores])
        return topk_mask(scores, *args, **kwargs)

    monkeypatch.setattr(masks_module.ops, "topk_mask", spy)
    pared.prune(model, 0.5)
    assert calls == [[m.weight.data_ptr() for m in model]]


def test_callable_and_protocol() -> None:
    def smallest(module: nn.Module) -> torch.Tensor:
        return -module.weight.abs()

    model = seeded(nn.Linear(10, 10, bias=False))
    before = model[0].weight.detach().clone()
    report = pared.prune(model, 0.5, importance=smallest)
    assert report.importance == "smallest"
    kept = model[0].weight.detach() != 0
    assert before[kept].abs().max() <= before[~kept].abs().min()

    class Mine(Magnitude):
        name = "mine"
        scope = "row"

    report = pared.prune(seeded(nn.Linear(10, 10)), 0.5, importance=Mine())
    assert (report.importance, report.scope) == ("mine", "row")


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2x3", "2:4"])
@pytest.mark.parametrize("kind", ["linear", "grouped", "conv1d"])
def test_existing_zeros_go_first_whatever_the_scores_say(pattern: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = {
        "linear": lambda: nn.Linear(16, 8),
        "grouped": lambda: nn.Conv2d(32, 12, 3, groups=4),  # three outputs a group: blocks of two end inside
        "conv1d": lambda: FakeConv1D(8, 16),
    }[kind]()
    pared.prune(layer, 0.5, pattern=pattern)
    zero = layer.weight.detach() == 0
    report = pared.prune(layer, 0.5, pattern=pattern, importance=lambda m: -m.weight.abs() - 1)
    assert torch.equal(layer.weight.detach() == 0, zero)
    assert report.notes[0].startswith("nothing changed")


def test_scores_are_not_written_to() -> None:
    scores = torch.rand(8, 16)
    copy_of_scores = scores.clone()
    model = seeded(nn.Linear(16, 8))
    pared.prune(model, 0.25)
    pared.prune(model, 0.5, importance=lambda m: scores)
    assert torch.equal(scores, copy_of_scores)


# ---------------------------------------------------------------- modules and ties


@pytest.mark.parametrize(
    ("pattern", "scope"),
    [("unstructured", "global"), ("unstructured", "row"), ("1x4", "global"), ("4x1", "row"), ("2:4", None)],
)
@pytest.mark.parametrize("importance", ["magnitude", lambda m: m.weight.square()])
def test_transformers_conv1d_equals_the_transposed_linear(
    pattern: str, scope: str | None, importance: object
) -> None:
    conv = FakeConv1D(12, 20)
    linear = nn.Linear(20, 12)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
    for module in (conv, linear):
        pared.prune(module, 0.5, pattern=pattern, scope=scope, importance=importance)
    assert torch.equal(conv.weight.detach().t(), linear.weight.detach())
    assert conv.weight.is_contiguous()


def test_attention_and_recurrent_modules() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    report = pared.prune(layer, 0.5, scope="layer")
    assert [x.name for x in report.layers] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]
    assert all(x.sparsity == 0.5 for x in report.layers)
    assert torch.isfinite(layer(torch.randn(2, 3, 16))).all()

    cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=12)
    names = [x.name for x in pared.prune(cross, 0.5).layers]
    assert names == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]

    assert len(pared.prune(nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=4), 0.5).layers) == 12
    rnn = nn.LSTM(6, 8, num_layers=2, bidirectional=True)
    report = pared.prune(rnn, 0.5)
    assert len(report.layers) == 8
    assert report.kept == report.weights - round(0.5 * report.weights)
    out, _ = rnn(torch.randn(3, 1, 6))
    assert torch.isfinite(out).all()
    assert zeros(rnn.weight_hh_l0) > 0
    assert len(pared.prune(nn.GRUCell(4, 5), 0.5, scope="layer").layers) == 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(30, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.up2 = nn.Linear(8, 16)
        self.up2.weight = self.up.weight
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.wte.weight


def test_tied_weights_count_once_and_stay_tied() -> None:
    model = Tied()
    report = pared.prune(model, 0.5)
    assert [x.name for x in report.layers] == ["up.weight", "down.weight"]
    assert report.layers[0].tied == ("up2.weight",)
    assert model.up.weight is model.up2.weight
    assert model.head.weight is model.wte.weight
    assert report.kept == 128
    assert zeros(model.wte.weight) == 0
    assert (
        "head.weight",
        "tied to wte.weight; an embedding needs an include filter of its own",
    ) in report.dense


class Experts(nn.Module):
    """A mixture with its experts stacked, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.stack = nn.Linear(8, 2), nn.Parameter(torch.randn(2, 8, 8))
        self.token, self.up = nn.Parameter(torch.randn(1, 1, 8)), nn.ConvTranspose2d(4, 4, 2)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


def test_matrices_that_no_layer_knows_are_named() -> None:
    report = pared.prune(Experts(), 0.5, exclude="norm")
    assert report.dense == (
        ("norm.weight", "excluded"),
        ("stack", "no layer of Experts is pruned"),
        ("up.weight", "no layer of ConvTranspose2d is pruned"),
    )
    assert "left dense (no layer of Experts is pruned): stack" in str(report)
    assert pared.prune(Experts(), 0.5, include="router").dense == (("norm.weight", "not included"),)
    assert ("stack", "no layer of Experts is pruned") not in pared.prune(
        Experts(), 0.5, exclude=["norm", "stack"]
    ).dense


def test_embeddings_on_request() -> None:
    for include in ("wte", "head", nn.Embedding, re.compile("^head$")):
        model = Tied()
        report = pared.prune(model, 0.5, include=include)
        assert [x.name for x in report.layers] == ["head.weight"]
        assert report.layers[0].tied == ("wte.weight",)
        assert zeros(model.wte.weight) == 120
    assert len(pared.prune(Tied(), 0.5, include="*").layers) == 2
    assert len(pared.prune(Tied(), 0.5, include=["*", "head"]).layers) == 3
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    assert [x.name for x in pared.prune(model, 0.5).layers] == ["1.weight"]


def test_parameters_stay_the_same_objects_and_train_on() -> None:
    model = small()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    x = torch.randn(4, 16)
    model(x).sum().backward()
    pared.prune(model, 0.5)
    assert before == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    model(x).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_wrappers_are_looked_into() -> None:
    model = small()
    report = pared.prune(nn.DataParallel(model), 0.5, include="0")
    assert [x.name for x in report.layers] == ["0.weight"]
    compiled = torch.compile(small(), backend="eager")
    assert [x.name for x in pared.prune(compiled, 0.5, include="2").layers] == ["2.weight"]


# ---------------------------------------------------------------- filters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        self.fc = nn.Linear(8, 10)


ALL = ["conv1", "layer1.0", "layer1.2", "layer2.0", "layer2.2", "fc"]


def names(**kwargs: object) -> list[str]:
    report = pared.prune(Net(), 0.5, **kwargs)  # type: ignore[arg-type]
    return [x.name.removesuffix(".weight") for x in report.layers]


@pytest.mark.parametrize(
    ("filters", "want"),
    [
        ({}, ALL),
        ({"include": "layer2.*"}, ["layer2.0", "layer2.2"]),
        ({"include": "layer2"}, ["layer2.0", "layer2.2"]),
        ({"include": "*.0"}, ["layer1.0", "layer2.0"]),
        ({"include": ["layer1", "fc"]}, ["layer1.0", "layer1.2", "fc"]),
        ({"include": "re:^layer[12]\\.0$"}, ["layer1.0", "layer2.0"]),
        ({"include": re.compile("fc|conv")}, ["conv1", "fc"]),
        ({"include": nn.Linear}, ["fc"]),
        ({"include": nn.Sequential, "exclude": "*.2"}, ["layer1.0", "layer2.0"]),
        ({"include": lambda name, module: getattr(module, "kernel_size", None) == (3, 3)}, ALL[:-1]),
        ({"exclude": lambda name, module: name.startswith("layer")}, ["conv1", "fc"]),
        ({"exclude": ["conv1", nn.Linear]}, ALL[1:-1]),
        ({"exclude": nn.BatchNorm2d}, ALL),
        ({"keep_first": 1}, ALL[1:]),
        ({"keep_last": 2}, ALL[:-2]),
        ({"keep_first": 1, "keep_last": 1, "exclude": "conv1"}, ["layer1.2", "layer2.0", "layer2.2"]),
        ({"include": "fc.weight"}, ["fc"]),
    ],
)
def test_filters(filters: dict[str, object], want: list[str]) -> None:
    assert names(**filters) == want


def test_a_module_is_a_filter() -> None:
    net = Net()
    report = pared.prune(net, 0.5, exclude=[net.layer1, net.fc])
    assert [x.name for x in report.layers] == ["conv1.weight", "layer2.0.weight", "layer2.2.weight"]
    assert ("fc.weight", "excluded") in report.dense


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"include": "layer3.*"}, r"include: .* got 'layer3\.\*', which matches none; near misses: layer\d"),
        ({"exclude": "fcc"}, r"exclude: .* got 'fcc', which matches none; near misses: fc"),
        (
            {"include": "layer1.1"},
            r"include: expected a filter that matches a prunable weight, got 'layer1\.1'",
        ),
        ({"include": nn.Conv1d}, r"include: .*'Conv1d'.* module types here: BatchNorm2d, Conv2d, Linear"),
        (
            {"include": re.compile("nothing")},
            "include: .*'re:nothing', which matches none; prunable: conv1.weight",
        ),
        ({"include": "re:("}, r"include: expected a regular expression after 're:', got 're:\('"),
        ({"include": ["fc", "nope"]}, "include: .*'nope'"),
        ({"include": []}, "include: expected at least one filter or None, got an empty list"),
        ({"include": "fc", "exclude": nn.Linear}, "include, exclude: expected filters that leave something"),
        (
            {"keep_first": 4, "keep_last": 2},
            r"keep_first, keep_last: expected fewer than the 6 .* got 4 \+ 2",
        ),
        ({"keep_first": -1}, "keep_first: expected a number of layers >= 0, got -1"),
        ({"exclude": lambda name, module: False}, "exclude: .*matches none"),
    ],
)
def test_filters_that_are_wrong(filters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names(**filters)


@pytest.mark.parametrize("bad", [3, [3], int, {"a": 1}])
def test_filters_of_the_wrong_type(bad: object) -> None:
    with pytest.raises(TypeError, match="include: expected"):
        names(include=bad)


# ---------------------------------------------------------------- models that others pruned


def test_attached_masks_are_respected_and_baked() -> None:
    model = small()
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    torch_prune.l1_unstructured(model[0], "bias", amount=2)
    theirs = model[0].weight.detach() == 0
    param = model[0].weight_orig
    report = pared.prune(model, 0.75, scope="layer")
    assert model[0].weight is param
    assert not hasattr(model[0], "weight_mask")
    assert theirs[model[0].weight.detach() != 0].sum() == 0
    assert report.layers[0].sparsity_before == 0.5
    assert report.layers[0].sparsity == 0.75
    assert zeros(model[0].bias) == 2


def test_torch_ao_masks_are_respected_and_baked() -> None:
    from torch.ao.pruning import WeightNormSparsifier

    model = small()
    s = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    s.prepare(model, [{"tensor_fqn": "0.weight"}])
    s.step()
    theirs = model[0].weight.detach() == 0
    assert theirs.any()
    report = pared.prune(model, 0.75, scope="layer")
    assert type(model[0]) is nn.Linear
    assert not (theirs & (model[0].weight.detach() != 0)).any()
    assert report.layers[0].type == "Linear"


def test_masks_on_layers_that_are_not_pruned_stay() -> None:
    model = small()
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    pared.prune(model, 0.75, exclude="0")
    assert hasattr(model[0], "weight_mask")


def test_a_lower_sparsity_than_present_changes_nothing() -> None:
    model = small()
    pared.prune(model, 0.9)
    before = bytes_of(model)
    for scope in ("global", "layer", "row"):
        report = pared.prune(copy.deepcopy(model), 0.5, scope=scope)
        if scope == "global":
            assert "nothing changed: 90.0" in report.notes[0]
    report = pared.prune(model, 0.5)
    assert bytes_of(model) == before
    assert report.kept == report.before
    assert "nothing changed" in str(report)


def test_tied_weights_under_different_masks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(
        ValueError, match=r"model: expected tied weights with one mask, got different ones on 0\."
    ):
        pared.prune(model, 0.5)


def test_unknown_parametrisation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    before = bytes_of(model)
    with pytest.raises(
        ValueError, match=r"'1.weight': weight: .*unknown parametrisation of Linear: _WeightNorm"
    ):
        pared.prune(model, 0.5)
    assert bytes_of(model) == before
    pared.prune(model, 0.5, exclude="1")  # what is not pruned may be anything


# ---------------------------------------------------------------- errors


def poisoned(value: float) -> nn.Module:
    model = small()
    with torch.no_grad():
        model[2].weight[3, 5] = value
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: (small(), 1.0), r"sparsity: expected a number in \[0, 1\), got 1\.0"),
        (lambda: (small(), -0.1), r"sparsity: expected a number in \[0, 1\), got -0\.1"),
        (lambda: (small(), 90), r"sparsity: .* got 90; 90 % is 0\.9"),
        (lambda: (small(), float("nan")), "sparsity: .* got nan"),
        (
            lambda: (small(), 0.9, {"pattern": "2:4"}),
            r"sparsity: expected 0\.5 \(or None\), which pattern '2:4' fixes",
        ),
        (lambda: (small(), 0.5, {"pattern": "unstructred"}), "pattern: .*did you mean 'unstructured'"),
        (lambda: (small(), 0.5, {"pattern": "0x4"}), "pattern: expected .*, got '0x4'"),
        (lambda: (small(), 0.5, {"pattern": "4:4"}), "pattern: expected N:M with N < M, got '4:4'"),
        (lambda: (small(), 0.5, {"importance": "magnitud"}), "importance: .*did you mean 'magnitude'"),
        (
            lambda: (small(), 0.5, {"scope": "rows"}),
            "scope: expected 'global', 'layer', 'row' or None.* got 'rows'",
        ),
        (lambda: (nn.ReLU(), 0.5), "model: expected a module with prunable weights, got ReLU"),
        (lambda: (poisoned(float("nan")), 0.5), "model: expected finite weights, got NaN in '2.weight'"),
        (lambda: (poisoned(float("inf")), 0.5), "model: expected finite weights, got infinity in '2.weight'"),
        (
            lambda: (small(), 0.5, {"importance": lambda m: torch.ones(3)}),
            r"scores of shape \[24, 16\] of layer '0'",
        ),
        (
            lambda: (small(), 0.5, {"importance": lambda m: m.weight * float("nan")}),
            r"importance: expected scores without NaN of layer '0' \(weight\), got NaN from <lambda>",
        ),
        (
            lambda: (small(), 0.5, {"importance": lambda m: torch.ones_like(m.weight, dtype=torch.int64)}),
            "importance: expected floating-point scores of layer '0'",
        ),
        (
            lambda: (nn.LSTM(3, 4), 0.5, {"importance": lambda m: {"weight_ih_l0": torch.ones(16, 3)}}),
            "importance: expected <lambda> to score 'weight_hh_l0'",
        ),
        (lambda: (nn.LazyLinear(3), 0.5), "model: expected weights with values, got 'weight' without any"),
        (lambda: (nn.Linear(3, 3, device="meta"), 0.5), "model: expected weights with values"),
    ],
)
def test_errors_leave_the_model_untouched(call, message: str) -> None:  # type: ignore[no-untyped-def]
    model, sparsity, *rest = call()
    lazy = isinstance(model, nn.LazyLinear) or any(p.is_meta for p in model.parameters())
    if not lazy:
        before = bytes_of(model)
    with pytest.raises(ValueError, match=message):
        pared.prune(model, sparsity, **(rest[0] if rest else {}))
    if not lazy:
        assert bytes_of(model) == before


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.ones(3), 0.5), {}, "model: expected a torch.nn.Module, got Tensor"),
        ((nn.Linear(3, 3), "0.5"), {}, "sparsity: expected a number"),
        ((nn.Linear(3, 3), True), {}, "sparsity: expected a number"),
        ((nn.Linear(3, 3),), {}, "sparsity: expected a number.*got NoneType"),
        ((nn.Linear(3, 3), 0.5), {"pattern": (1, 4)}, "pattern: expected a string"),
        (
            (nn.Linear(3, 3), 0.5),
            {"importance": Magnitude},
            "importance: expected .* got the class Magnitude",
        ),
        ((nn.Linear(3, 3), 0.5), {"importance": 3}, "importance: expected .* got int"),
        (
            (nn.Linear(3, 3), 0.5),
            {"importance": lambda m: 3},
            "importance: expected <lambda> to return a tensor",
        ),
        ((nn.Linear(3, 3), 0.5), {"loss_fn": 3}, "loss_fn: expected a callable"),
        ((nn.Linear(3, 3), 0.5), {"keep_last": 1.0}, "keep_last: expected a number of layers, got float"),
    ],
)
def test_wrong_types(args: tuple[object, ...], kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pared.prune(*args, **kwargs)  # type: ignore[arg-type]


def test_masks_stay_attached_when_the_call_fails() -> None:
    model = poisoned(float("nan"))
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    before = bytes_of(model)
    with pytest.raises(ValueError, match="NaN"):
        pared.prune(model, 0.75)
    assert bytes_of(model) == before
    assert "0.weight_mask" in before


def test_weights_that_cannot_be_written() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.ones(1, 4).expand(4, 4), requires_grad=False)
    with pytest.raises(ValueError, match=r"got an expanded view in '1\.weight'"):
        pared.prune(model, 0.5)
    assert zeros(model[0].weight) == 0
    with torch.inference_mode():
        frozen = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="inference-mode tensor in 'weight'"):
        pared.prune(frozen, 0.5)


def test_a_global_scope_needs_one_device() -> None:
    def scored(device: str) -> masks_module.Scored:
        weight = torch.ones(2, 2, device=device)
        target = masks_module.Target(nn.Linear(2, 2), "", "weight")
        return masks_module.Scored(target, weight, weight)

    pattern = masks_module.Pattern("unstructured", "unstructured")
    with pytest.raises(ValueError, match=r"scope: expected 'layer' or 'row' .* got 'global' over cpu, meta"):
        masks_module.choose([scored("cpu"), scored("meta")], "abs", 0.5, pattern, "global")


def test_criteria_that_need_data_are_refused_without() -> None:
    class Needy(Magnitude):
        name = "needy"
        needs_data = True

    with pytest.raises(ValueError, match="data: expected batches, which 'needy' needs, got None"):
        pared.prune(small(), 0.5, importance=Needy())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "4x2", "2:4"])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_empty_layers(shape: tuple[int, int], pattern: str, scope: str) -> None:
    model = seeded(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.empty(shape))
    for importance in ("magnitude", "random"):
        report = pared.prune(model, 0.5, pattern=pattern, scope=scope, importance=importance)
        assert report.weights == 16
        assert report.layers[1].sparsity == 0.0
    assert report.kept >= 4


# ---------------------------------------------------------------- report and names


def test_report() -> None:
    model = small()
    report = pared.prune(model, 0.9, exclude="4")
    assert isinstance(report, PruneReport)
    data = json.loads(report.to_json())
    assert data["total"]["kept"] == report.kept == sum(x["kept"] for x in data["layers"])
    assert data["total"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert data["layers"][0] == {
        "name": "0.weight",
        "type": "Linear",
        "shape": [24, 16],
        "before": 384,
        "kept": report.layers[0].kept,
        "tied": [],
        "weights": 384,
        "sparsity_before": 0.0,
        "sparsity": report.layers[0].sparsity,
    }
    assert data["dense"] == [{"name": "4.weight", "reason": "excluded"}]
    text = str(report)
    for part in ("0.weight", "24x16", "90.", "left dense (excluded): 4.weight", "total"):
        assert part in text
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(report)
    assert "24x16" in console.export_text()


@pytest.mark.parametrize(("scope", "said"), [("global", True), ("layer", False)])
def test_the_report_names_layers_that_one_threshold_takes_most_of(scope: str, said: bool) -> None:
    model = seeded(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model.get_parameter("1.weight").mul_(0.5)
    report = pared.prune(model, 0.8, scope=scope)
    text = " ".join(str(report).replace("│", " ").split())
    assert ("less than a tenth of the average share was kept of 1.weight:" in text) is said
    # What was zero before is nobody's loss.
    assert "average share" not in str(pared.prune(model, 0.9, scope=scope))


@pytest.mark.parametrize("first", ["import pared.pruning", "from pared import prune"])
def test_pared_prune_is_the_function_whatever_is_imported_first(first: str) -> None:
    code = (
        f"import pared\n{first}\nimport pared.pruning.oneshot, pared.pruning.pruner\n"
        "assert callable(pared.prune) and pared.prune.__name__ == 'prune', pared.prune\n"
        "assert pared.Pruner.__name__ == 'Pruner'\n"
        "assert pared.schedules.OneShot(0.5)(1) == 0.5\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- counting and writing zeros


def odd_values(dtype: torch.dtype, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    if n > 8:
        tiny = torch.finfo(dtype).smallest_normal / 4
        x[:8] = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0, -1.0, 0.0, 65504.0], dtype=dtype)
        x[8::3] = 0.0
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 7, 1000, masks_module._PIECE + 1])
def test_counting_and_zeroing_agree_with_torch(dtype: torch.dtype, n: int) -> None:
    x = odd_values(dtype, n)
    assert masks_module.nonzeros(x) == int(torch.count_nonzero(x))
    dropped = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.5
    want = x.masked_fill(dropped, 0)
    parameter = nn.Parameter(x.clone())
    version = parameter._version
    masks_module.zero(parameter, dropped)
    bits = masks_module._BITS[dtype]
    assert torch.equal(parameter.detach().view(bits), want.view(bits))  # true zeros, and nothing else changed
    assert parameter._version > version or not n  # autograd notices a write after a save
    assert masks_module.nonzeros(parameter) == int(torch.count_nonzero(want))
    if n > 8:  # what the comparison is there for
        masks_module.zero(parameter, ~dropped)
        assert not torch.equal(parameter.detach(), want)


def test_zeroing_through_strides() -> None:
    x = torch.randn(6, 8, 3, 3).to(memory_format=torch.channels_last)
    for tensor in (x, torch.randn(5, 7).t(), torch.randn(4, 6)[:, ::2]):
        dropped = torch.rand(tensor.shape) < 0.5
        want = tensor.masked_fill(dropped, 0)
        masks_module.zero(tensor, dropped)
        assert torch.equal(tensor, want)
        assert masks_module.nonzeros(tensor) == int(torch.count_nonzero(want))


def test_a_layer_without_zeros_and_one_of_zeros_alone_are_counted() -> None:
    assert masks_module.nonzeros(torch.full((300,), 1e-30)) == 300
    assert masks_module.nonzeros(torch.zeros(300)) == 0
