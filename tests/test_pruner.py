"""pared.Pruner: masks hold under every optimiser, schedules are met exactly, runs resume bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn

import pared
from pared.pruning import Random
from pared.pruning import pruner as pruner_module
from pared.schedules import Linear, OneShot, Polynomial


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 2, 8, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator)


def backward(model: nn.Module, step: int) -> None:
    x, y = batch(step)
    nn.functional.cross_entropy(model(x), y).backward()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, pruner: pared.Pruner | None, steps: range
) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if pruner is not None:
            pruner.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for name, p in model.named_parameters() if p.ndim > 1]


def zeros(model: nn.Module) -> int:
    return sum(int((w == 0).sum()) for w in weights(model))


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {k: v.detach().contiguous().numpy().tobytes() for k, v in model.state_dict().items()}


# ---------------------------------------------------------------- masks hold


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_under_every_optimizer(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, None, range(3))  # momentum that would push pruned weights away from zero
    pruner = pared.Pruner(model, OneShot(0.8), optimizer=optimizer)
    total = sum(w.numel() for w in weights(model))
    train(model, optimizer, pruner, range(3, 4))
    masks = pruner.masks
    for step in range(4, 12):
        train(model, optimizer, pruner, range(step, step + 1))
        assert zeros(model) >= round(0.8 * total)
        for key, mask in pruner.masks.items():
            assert torch.equal(mask, masks[key])
            weight = model.get_parameter(key).detach()
            assert not weight[~mask].any()
            assert not torch.signbit(weight[~mask]).any()
    # Trained on: what is kept has moved.
    fresh = net()
    assert not torch.equal(model[3].weight[masks["3.weight"]], fresh[3].weight[masks["3.weight"]])


def revived(name: str, masked_state: bool) -> int:
    """Pruned weights that an optimiser step without any gradient moves off zero."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = pared.Pruner(model, OneShot(0.8), optimizer=optimizer if masked_state else None)
    train(model, optimizer, pruner, range(5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return sum(
        int(model.get_parameter(key).detach()[~mask].ne(0).sum()) for key, mask in pruner.masks.items()
    )


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "rmsprop", "nadam"])
def test_optimiser_state_of_pruned_weights_is_zeroed(name: str) -> None:
    assert revived(name, masked_state=True) == 0
    assert revived(name, masked_state=False) > 0  # the fault that the masking prevents


def test_momentum_revives_weights_when_the_state_masking_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruner_module, "_zero_state", lambda *args: None)
    with pytest.raises(AssertionError):
        test_optimiser_state_of_pruned_weights_is_zeroed("momentum")


def test_several_optimizers() -> None:
    model = net()
    optimizers = [
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(model[3:].parameters(), lr=0.1),
    ]
    pruner = pared.Pruner(model, OneShot(0.5), optimizer=optimizers)
    for step in range(3):
        backward(model, step)
        for one in optimizers:
            one.step()
        pruner.step()
    for key, mask in pruner.masks.items():
        for one in optimizers:
            for value in one.state.get(model.get_parameter(key), {}).values():
                if value.shape == mask.shape:
                    assert not value[~mask].any()


# ---------------------------------------------------------------- schedules


def test_the_schedule_is_met_exactly_and_masks_only_grow() -> None:
    model = net()
    schedule = Polynomial(0.3, 0.9, begin=3, end=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pared.Pruner(model, schedule)
    total = sum(w.numel() for w in weights(model))
    before: dict[str, torch.Tensor] = {}
    for step in range(1, 16):
        train(model, optimizer, pruner, range(step, step + 1))
        assert pruner.step_count == step
        assert zeros(model) == round(schedule(step) * total)
        assert pruner.sparsity == pytest.approx(schedule(step), abs=1 / total)
        for key, mask in before.items():
            assert not (pruner.masks[key] & ~mask).any()
        before = pruner.masks
    report = pruner.finalize()
    assert report.sparsity == pytest.approx(0.9, abs=1 / total)
    assert report.sparsity_before == 0.0
    assert report.target == 0.9


def test_finalize_catches_up_with_the_schedule() -> None:
    model = net()
    pruner = pared.Pruner(model, Linear(0.2, 0.8, begin=1, end=4), update_every=10)
    for _ in range(5):
        pruner.step()
    assert pruner.sparsity < 0.3
    report = pruner.finalize()
    assert report.target == 0.8
    assert report.sparsity == pytest.approx(0.8, abs=1e-3)


def test_update_every() -> None:
    model = net()
    pruner = pared.Pruner(model, Linear(0.0, 0.8, begin=2, end=10), update_every=3)
    seen = []
    for _ in range(14):
        pruner.step()
        seen.append(round(pruner.sparsity, 2))
    # The first choice is at step 3, where the schedule first asks for something; then every third step.
    assert seen == [0, 0, 0.1, 0.1, 0.1, 0.4, 0.4, 0.4, 0.7, 0.7, 0.7, 0.8, 0.8, 0.8]


def test_any_callable_is_a_schedule() -> None:
    model = net()
    pruner = pared.Pruner(model, lambda step: min(0.2 * step, 0.6), scope="layer")
    for want in (0.2, 0.4, 0.6, 0.6):
        pruner.step()
        assert pruner.sparsity == pytest.approx(want, abs=0.01)


def test_a_falling_schedule_leaves_the_masks() -> None:
    model = net()
    pruner = pared.Pruner(model, lambda step: 0.8 if step == 1 else 0.2)
    pruner.step()
    masks = pruner.masks
    pruner.step()
    assert all(torch.equal(masks[key], mask) for key, mask in pruner.masks.items())


def test_nothing_happens_before_the_schedule_begins() -> None:
    model = net()
    before = bytes_of(model)
    pruner = pared.Pruner(model, OneShot(0.9, at=3))
    pruner.step()
    pruner.step()
    assert bytes_of(model) == before
    assert pruner.masks == {}
    pruner.step()
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("pattern", ["1x4", "4x1"])
def test_blocks_in_training(pattern: str) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = pared.Pruner(model, Polynomial(0.2, 0.7, begin=1, end=6), pattern=pattern, optimizer=optimizer)
    train(model, optimizer, pruner, range(8))
    r, c = map(int, pattern.split("x"))
    mask = pruner.masks["3.weight"].reshape(20 // r, r, 288 // c, c)
    assert torch.equal(mask.any(3).any(1), mask.all(3).all(1))


def test_n_of_m_tightens_from_m_to_n() -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    pruner = pared.Pruner(model, Linear(0.0, 0.5, begin=0, end=4), pattern="4:8")
    kept = []
    for _ in range(6):
        pruner.step()
        kept.append(
            sorted({int(n) for n in (model[0].weight.detach() != 0).reshape(8, 4, 8).sum(-1).flatten()})
        )
    assert kept == [[7], [6], [5], [4], [4], [4]]


def test_random_masks_nest() -> None:
    model = net()
    before = [w.clone() for w in weights(model)]
    schedule = Linear(0.0, 0.9, begin=0, end=9)
    pruner = pared.Pruner(model, schedule, importance=Random(7), allow_regrowth=True)
    gone = [torch.zeros_like(w, dtype=torch.bool) for w in before]
    counts = []
    for _ in range(9):
        for w, b in zip(weights(model), before, strict=True):
            w.data.copy_(b)  # what was pruned may come back
        pruner.step()
        now = [w == 0 for w in weights(model)]
        assert all(bool((was <= is_).all()) for was, is_ in zip(gone, now, strict=True))
        gone = now
        counts.append(zeros(model))
    total = sum(w.numel() for w in weights(model))
    assert counts == [round(0.1 * i * total) for i in range(1, 10)]


def test_regrowth() -> None:
    model = nn.Sequential(nn.Linear(10, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 11.0))
    pruner = pared.Pruner(model, OneShot(0.5), allow_regrowth=True, update_every=2)
    pruner.step()
    assert model[0].weight.detach().flatten().tolist() == [0, 0, 0, 0, 0, 6, 7, 8, 9, 10]
    with torch.no_grad():
        model[0].weight[0, 0] = 20.0  # grew back
    pruner.step()  # no choice is due: it trains on
    assert model[0].weight.detach()[0, 0] == 20.0
    pruner.step()
    assert model[0].weight.detach().flatten().tolist() == [20, 0, 0, 0, 0, 0, 7, 8, 9, 10]
    with torch.no_grad():
        model[0].weight[0, 1] = 1.0
    report = pruner.finalize()
    assert report.kept == 5
    assert model[0].weight.detach()[0, 1] == 0.0


# ---------------------------------------------------------------- resume


def test_resuming_gives_the_same_run_bit_for_bit() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, pared.Pruner]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = Polynomial(0.2, 0.9, begin=2, end=14)
        return model, optimizer, pared.Pruner(model, schedule, optimizer=optimizer, update_every=2)

    model, optimizer, pruner = make()
    train(model, optimizer, pruner, range(20))

    half, half_optimizer, half_pruner = make()
    train(half, half_optimizer, half_pruner, range(9))
    file = io.BytesIO()
    states = {"m": half.state_dict(), "o": half_optimizer.state_dict(), "p": half_pruner.state_dict()}
    torch.save(states, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, resumed_optimizer, resumed_pruner = make()
    train(resumed, resumed_optimizer, resumed_pruner, range(100, 104))  # leave no luck to the initial state
    resumed.load_state_dict(state["m"])
    resumed_optimizer.load_state_dict(state["o"])
    resumed_pruner.load_state_dict(state["p"])
    assert resumed_pruner.step_count == 9
    assert all(torch.equal(m, resumed_pruner.masks[k]) for k, m in half_pruner.masks.items())
    train(resumed, resumed_optimizer, resumed_pruner, range(9, 20))
    assert bytes_of(resumed) == bytes_of(model)
    assert all(torch.equal(m, resumed_pruner.masks[k]) for k, m in pruner.masks.items())
    assert resumed_pruner.finalize().to_json() == pruner.finalize().to_json()


def test_masks_take_a_bit_a_weight() -> None:
    model = net()
    pruner = pared.Pruner(model, OneShot(0.5))
    assert pruner.state_dict()["masks"] == {}
    pruner.step()
    state = pruner.state_dict()
    assert sum(m["dropped"].numel() for m in state["masks"].values()) == sum(
        -(-w.numel() // 8) for w in weights(model)
    )


def test_masks_load_before_or_after_the_model() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pared.Pruner(model, OneShot(0.5))
    train(model, optimizer, pruner, range(3))
    other = net(seed=1)
    second = pared.Pruner(other, OneShot(0.5))
    second.load_state_dict(pruner.state_dict())
    assert zeros(other) == zeros(model)
    other.load_state_dict(model.state_dict(), assign=True)
    second.step()
    assert bytes_of(other) == bytes_of(model)


def test_a_finalized_state_loads_finalized() -> None:
    model = net()
    pruner = pared.Pruner(model, OneShot(0.5))
    pruner.step()
    report = pruner.finalize()
    again = pared.Pruner(model, OneShot(0.5))
    again.load_state_dict(pruner.state_dict())
    with pytest.raises(RuntimeError, match="step: expected a pruner that is not finalized"):
        again.step()
    assert again.finalize().to_json() == report.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=99), "state: expected version 1, got 99"),
        (lambda s: s.update(pattern="1x4"), "state: expected pattern 'unstructured', got '1x4'"),
        (lambda s: s.pop("masks"), r"state: expected what state_dict\(\) returned, got one without masks"),
        (lambda s: s["before"].pop("0.weight"), r"state: expected masks for the layers.*'0\.weight'"),
        (
            lambda s: s["masks"]["0.weight"].update(shape=[3, 3]),
            r"mask of shape \[8, 2, 3, 3\] for '0\.weight'",
        ),
    ],
)
def test_states_that_do_not_fit_change_nothing(
    change: Callable[[dict[str, object]], None], message: str
) -> None:
    model = net()
    pruner = pared.Pruner(model, OneShot(0.5))
    pruner.step()
    state = copy.deepcopy(pruner.state_dict())
    change(state)
    before, masks = bytes_of(model), pruner.masks
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(state)
    assert bytes_of(model) == before
    assert pruner.step_count == 1
    assert all(torch.equal(masks[k], m) for k, m in pruner.masks.items())
    with pytest.raises(TypeError, match="state: expected what"):
        pruner.load_state_dict(3)  # type: ignore[arg-type]


# ---------------------------------------------------------------- models that others pruned


def test_attached_masks_are_held() -> None:
    model = net()
    torch_prune.l1_unstructured(model[3], "weight", amount=0.6)
    theirs = model[3].weight.detach() == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pared.Pruner(model, OneShot(0.7, at=5), optimizer=optimizer)
    assert not hasattr(model[3], "weight_mask")
    assert torch.equal(pruner.masks["3.weight"], ~theirs)
    train(model, optimizer, pruner, range(4))  # before the schedule begins
    assert not model[3].weight.detach()[theirs].any()
    train(model, optimizer, pruner, range(4, 8))
    assert not model[3].weight.detach()[theirs].any()
    assert pruner.sparsity == pytest.approx(0.7, abs=1e-3)


def test_plain_zeros_are_held_and_count() -> None:
    model = net()
    pared.prune(model, 0.8)
    before = zeros(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pared.Pruner(model, OneShot(0.5), optimizer=optimizer) as pruner:
        train(model, optimizer, pruner, range(4))
        assert zeros(model) == before
    assert pruner.finalize().sparsity == pytest.approx(0.8, abs=1e-3)


def test_a_zero_initialised_layer_is_free_to_train() -> None:
    model = net()
    nn.init.zeros_(model[5].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pared.Pruner(model, OneShot(0.5, at=3), scope="layer")
    train(model, optimizer, pruner, range(2))
    assert model[5].weight.detach().any()


# ---------------------------------------------------------------- training set-ups


def test_context_manager_finalizes_unless_it_fails() -> None:
    model = net()
    with pared.Pruner(model, OneShot(0.5)) as pruner:
        pruner.step()
    with pytest.raises(RuntimeError, match="finalized"):
        pruner.step()
    with pytest.raises(KeyError), pared.Pruner(model, OneShot(0.6)) as pruner:
        raise KeyError
    pruner.step()


def test_parameters_stay_the_same_objects_and_autograd_notices() -> None:
    model = net()
    ids = [(id(p), p.data_ptr()) for p in model.parameters()]
    pruner = pared.Pruner(model, OneShot(0.5))
    loss = model(batch(0)[0]).sum()
    pruner.step()
    assert ids == [(id(p), p.data_ptr()) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # between forward and backward is the wrong place, and torch says so
    backward(model, 0)


def test_grad_scaler_skips() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pruner = pared.Pruner(model, OneShot(0.5), optimizer=optimizer)
    for step in range(6):
        optimizer.zero_grad()
        x, y = batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if step in (0, 3) else 1.0)).backward()  # these steps are skipped
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)
        assert all(torch.isfinite(w).all() for w in weights(model))
    assert pruner.step_count == 6


def test_compiled_training_matches_eager() -> None:
    def run(compiled: bool) -> dict[str, bytes]:
        model = net()
        run_model = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = pared.Pruner(run_model, Linear(0.0, 0.8, begin=0, end=4), optimizer=optimizer)
        assert list(pruner.state_dict()["before"]) == ["0.weight", "3.weight", "5.weight"]
        train(run_model, optimizer, pruner, range(6))
        pruner.finalize()
        return bytes_of(model)

    assert run(True) == run(False)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pared.Pruner(model, OneShot(0.5), optimizer=optimizer)
    for _ in range(4):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        pruner.step()
    assert model[0].weight is model[1].weight
    assert int((model[0].weight == 0).sum()) == 32
    assert len(pruner.masks) == 1


def test_filters_and_finalize_report() -> None:
    model = net()
    pruner = pared.Pruner(model, OneShot(0.5), include=nn.Linear, keep_last=1)
    pruner.step()
    report = pruner.finalize()
    assert [x.name for x in report.layers] == ["3.weight"]
    assert dict(report.dense) == {"0.weight": "not included", "5.weight": "keep_last"}
    assert pruner.finalize() is report


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"schedule": 0.5}, TypeError, "schedule: expected a callable .step. -> sparsity.*got float"),
        ({"schedule": OneShot}, TypeError, "schedule: .*got the class OneShot"),
        ({"update_every": 0}, ValueError, "update_every: expected a number of steps >= 1, got 0"),
        ({"update_every": 1.5}, TypeError, "update_every: expected a number of steps, got float"),
        ({"pattern": "2x"}, ValueError, "pattern: expected"),
        ({"pattern": "2:4", "schedule": OneShot(0.75)}, ValueError, r"sparsity: expected 0\.5 .*'2:4'"),
        ({"optimizer": "adam"}, TypeError, r"optimizer: expected a torch\.optim\.Optimizer.*got str"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)},
            ValueError,
            r"optimizer: expected one that trains the pruned weights, got none of 0\.weight",
        ),
    ],
)
def test_bad_arguments(kwargs: dict[str, object], kind: type[Exception], message: str) -> None:
    model = net()
    torch_prune.l1_unstructured(model[3], "weight", amount=0.5)
    with pytest.raises(kind, match=message):
        pared.Pruner(model, **{"schedule": OneShot(0.5), **kwargs})  # type: ignore[arg-type]
    assert hasattr(model[3], "weight_mask")  # untouched


@pytest.mark.parametrize(
    ("schedule", "kind", "message"),
    [
        (lambda step: 1.0, ValueError, r"schedule: expected a sparsity in \[0, 1\) at step 1, got 1\.0"),
        (lambda step: float("nan"), ValueError, "schedule: .* got nan"),
        (lambda step: None, TypeError, "schedule: .* at step 1, got NoneType"),
        (
            lambda step: 0.75,
            ValueError,
            r"schedule: expected at most 0\.5, which pattern '2:4' gives, at step 1",
        ),
    ],
)
def test_schedules_that_leave_the_range(
    schedule: Callable[[int], float], kind: type[Exception], message: str
) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = bytes_of(model)
    pruner = pared.Pruner(model, schedule, pattern="2:4")
    with pytest.raises(kind, match=message):
        pruner.step()
    assert pruner.step_count == 0
    assert bytes_of(model) == before


def test_a_weight_that_is_not_finite_is_named_and_nothing_changes() -> None:
    model = net()
    pruner = pared.Pruner(model, Linear(0.0, 0.8, begin=0, end=4))
    pruner.step()
    masks = pruner.masks
    with torch.no_grad():
        model[3].weight[2, 2] = float("nan")
    before = bytes_of(model)
    with pytest.raises(ValueError, match=r"model: expected finite weights, got NaN in '3\.weight'"):
        pruner.step()
    assert pruner.step_count == 1
    assert bytes_of(model) == before
    assert all(torch.equal(masks[k], m) for k, m in pruner.masks.items())


def test_repr() -> None:
    text = repr(pared.Pruner(net(), OneShot(0.5)))
    assert text.startswith("Pruner(schedule=OneShot(sparsity=0.5, at=0), pattern='unstructured'")


def test_what_the_optimiser_moved_does_not_count_twice() -> None:
    """A pruned weight that the optimiser has pushed away from zero, to the largest of all, is zero all the
    same when the next masks are chosen: the count stays exact."""
    torch.manual_seed(0)
    model = nn.Linear(10, 10, bias=False)
    pruner = pared.Pruner(model, pared.schedules.Linear(0.3, 0.5, begin=1, end=3))
    for want in (30, 40, 50):
        with torch.no_grad():
            model.weight[model.weight == 0] = 100.0
        pruner.step()
        assert int((model.weight == 0).sum()) == want
