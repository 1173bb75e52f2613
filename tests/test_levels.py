"""pared.levels: nested supports, one level a call whatever is set meanwhile, weights once in a file."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared._levels import Levels
from pared.nn import PackedModule

OPTIONS: dict[str, Any] = {"formats": ["csr"], "min_speedup": 0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.one, self.two, self.act = nn.Linear(24, 64), nn.Linear(64, 24), nn.ReLU()
        self.norm = nn.LayerNorm(24)
        self.config = "of the model"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.two(self.act(self.one(self.words(x)))))
        return y


def model_and_input() -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randint(0, 50, (8, 5))


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.packed_weight().to_dense() for n, m in model.named_modules() if isinstance(m, PackedModule)}  # type: ignore[misc]


def test_levels_nest_and_switch() -> None:
    model, x = model_and_input()
    before = copy.deepcopy(model.state_dict())
    fast = pared.levels(model, x, (0.0, 0.5, 0.9), **OPTIONS)
    assert fast.sparsities == (0.0, pytest.approx(0.5, abs=1e-3), pytest.approx(0.9, abs=1e-3))
    weights = [packed(m) for m in fast.models]
    for dense, sparse in itertools.pairwise(weights):
        for name, w in sparse.items():
            assert bool(((w == dense[name]) | (w == 0)).all())
            assert int(torch.count_nonzero(w)) < int(torch.count_nonzero(dense[name]))
    pruned = copy.deepcopy(model)
    for i, sparsity in enumerate((0.0, 0.5, 0.9)):
        if sparsity:
            pared.prune(pruned, sparsity)
        fast.set_level(i)
        assert fast.level == i
        torch.testing.assert_close(fast(x), pruned(x), rtol=1e-4, atol=1e-5)
    fast.set_level(-3)
    assert fast.level == 0
    assert fast.config == "of the model"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert len(fast.reports()) == 3
    again = copy.deepcopy(fast)
    again.set_level(2)
    assert (fast.level, again.level) == (0, 2)
    assert torch.equal(again(x), fast.models[2](x))


def test_what_levels_share_is_there_once() -> None:
    model, x = model_and_input()
    fast = pared.levels(model, x, (0.5, 0.9), **OPTIONS)
    one, two = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in fast.models)
    for name, shared in {
        "words.weight": True,
        "norm.weight": True,
        "one.bias": True,
        "one.packed": False,
    }.items():
        assert (one[name] is two[name]) == shared, name
    separate = sum(pared.report(m).memory_after for m in fast.models)
    assert fast.memory_bytes < separate - 50 * 24 * 4 + 1


def test_switching_packs_and_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_and_input()
    fast = pared.levels(model, x, (0.5, 0.9), **OPTIONS)
    before = {n: t.data_ptr() for n, t in fast.state_dict().items()}

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("packed at a switch")

    monkeypatch.setattr(pared.ops.CSR, "from_dense", never)
    for i in (1, 0, 1):
        fast.set_level(i)
        fast(x)
    assert {n: t.data_ptr() for n, t in fast.state_dict().items()} == before


def of_one_level(fast: Any, inside: nn.Module, x: torch.Tensor, want: list[torch.Tensor]) -> bool:
    """Whether a call that begins on level 0 ends on it, though the level is set when `inside` has run."""
    fast.set_level(0)
    handle = inside.register_forward_hook(lambda *_: fast.set_level(1))
    y = fast(x)
    handle.remove()
    assert fast.level == 1
    return torch.equal(y, want[0])


def test_a_call_sees_one_level_whatever_is_set_meanwhile() -> None:
    model, x = model_and_input()
    fast = pared.levels(model, x, (0.0, 0.7), **OPTIONS)
    want = [m(x) for m in fast.models]
    assert of_one_level(fast, fast.models[0].one, x, want)
    assert torch.equal(fast(x), want[1])


def test_layers_that_look_up_the_level_one_by_one_are_caught() -> None:
    class Layer(nn.Module):
        def __init__(self, root: list[Any]) -> None:
            super().__init__()
            self.root = root

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 10 ** self.root[0].level

    class Mixed(nn.Sequential):
        level = 0

        def set_level(self, level: int) -> None:
            self.level = level

    root: list[Any] = []
    root.append(Mixed(Layer(root), Layer(root)))
    assert not of_one_level(root[0], root[0][0], torch.zeros(1), [torch.tensor([2.0]), torch.tensor([20.0])])


def test_threads_that_call_while_another_switches() -> None:
    model, x = model_and_input()
    fast = pared.levels(model, x, (0.0, 0.7, 0.9), **OPTIONS)
    want = [m(x) for m in fast.models]
    stop = threading.Event()
    right: list[bool] = []

    def serve() -> None:
        with torch.no_grad():
            for _ in range(30):
                y = fast(x)
                right.append(any(torch.equal(y, w) for w in want))

    def switch() -> None:
        i = 0
        while not stop.wait(1e-4):
            i += 1
            fast.set_level(i % 3)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    switcher = threading.Thread(target=switch)
    for t in (switcher, *threads):
        t.start()
    for t in threads:
        t.join()
    stop.set()
    switcher.join()
    assert right == [True] * 90


def test_a_file_holds_the_weights_once(tmp_path: Path) -> None:
    model, x = model_and_input()
    fast = pared.levels(model, x, (0.4, 0.7, 0.9), **OPTIONS)
    pared.save(fast, tmp_path / "levels.pared")
    with torch.device("meta"):
        empty = Net()
    again = pared.load(tmp_path / "levels.pared", empty)
    assert isinstance(again, Levels)
    assert again.sparsities == fast.sparsities
    for i in range(3):
        fast.set_level(i)
        again.set_level(i)
        assert torch.equal(again(x), fast(x))
        assert pared.report(again.models[i]) == pared.report(fast.models[i])
    assert again.memory_bytes == fast.memory_bytes
    wide = nn.Sequential(nn.Linear(256, 256))
    many = pared.levels(wide, torch.randn(4, 256), (0.4, 0.7, 0.9), **OPTIONS)
    pared.save(many, tmp_path / "many")
    pared.save(many.models[0], tmp_path / "one")
    sizes = [(tmp_path / name).stat().st_size for name in ("many", "one")]
    kept = 0.6 * 256 * 256
    bits = (kept + kept / 2) / 8  # one for each weight that the level before has
    assert sizes[0] < sizes[1] + bits + 8000  # and the reports


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    model, x = model_and_input()
    path = tmp_path / "levels.pared"
    pared.save(pared.levels(model, x, (0.4, 0.9), **OPTIONS), path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(pared.FormatError):
        pared.load(tmp_path / "bad", Net)
    with pytest.raises(pared.FormatError, match="model: expected"):
        pared.load(path, lambda: nn.Linear(3, 3))


def test_levels_of_ones_own() -> None:
    model, x = model_and_input()
    sparse = copy.deepcopy(model)
    pared.prune(sparse, 0.8, importance="random")
    fast = pared.levels([model, sparse], x, **OPTIONS)
    fast.set_level(1)
    torch.testing.assert_close(fast(x), sparse(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="only in further zeros, got other values in '"):
        pared.levels([sparse, model], x, **OPTIONS)
    sparse.norm.bias.add_(1.0)
    with pytest.raises(ValueError, match=r"other values in 'norm.bias'"):
        pared.levels([model, sparse], x, **OPTIONS)
    with pytest.raises(ValueError, match="model: expected levels of one architecture"):
        pared.levels([model, nn.Linear(2, 2)], x, **OPTIONS)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsities": (0.9, 0.5)}, "sparsities: expected ascending numbers"),
        ({"sparsities": ()}, "sparsities: expected ascending numbers"),
        (
            {"precision": "int8"},
            "precision: expected 'float32', in which levels have common values, got 'int8'",
        ),
        ({"importance": "sparsegpt"}, "importance: expected a criterion that leaves the weights"),
        ({"model": []}, "model: expected at least one level"),
    ],
)
def test_errors(kwargs: dict[str, Any], message: str) -> None:
    model, x = model_and_input()
    with pytest.raises(ValueError, match=message):
        pared.levels(**{"model": model, "example_inputs": x, **kwargs})


def test_levels_that_are_not_there() -> None:
    model, x = model_and_input()
    fast = pared.levels(model, x, (0.5,), **OPTIONS)
    with pytest.raises(ValueError, match="level: expected -1 to 0, of 1 levels, got 1"):
        fast.set_level(1)
    with pytest.raises(TypeError, match="level: expected a number, got float"):
        fast.set_level(0.5)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        _ = fast.nothing
