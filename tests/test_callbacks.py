"""The callbacks in the real libraries' loops: schedules, masks that hold, resumed trainings, errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pared
from pared.callbacks._held import Held

# What the libraries themselves warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 8
SCHEDULE = pared.schedules.Polynomial(0.2, 0.75, begin=2, end=6)


class Classifier(nn.Module):
    """Returns what transformers' Trainer asks for: a dict with the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.second(torch.relu(self.first(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def examples() -> list[dict[str, torch.Tensor]]:
    """The same four again and again: a resumed Lightning epoch begins with its first batch."""
    generator = torch.Generator().manual_seed(1)
    four = [
        {"x": torch.randn(8, generator=generator), "labels": torch.randint(0, 3, (), generator=generator)}
        for _ in range(4)
    ]
    return four * STEPS


def zeros(model: nn.Module) -> int:
    return sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, nn.Linear))


def check_trained(model: nn.Module, callback: Any, steps: int = STEPS) -> None:
    """The schedule's end was reached, in as many steps as the optimiser took, and the zeros are there."""
    assert callback.pruner.step_count == steps
    assert callback.report.sparsity == pytest.approx(SCHEDULE(steps), abs=0.01)
    assert zeros(model) == callback.report.weights - callback.report.kept


# ---------------------------------------------------------------- transformers


def trainer(folder: Path, model: nn.Module, callbacks: list[Any], **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "weight_decay": 0.01,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "remove_unused_columns": False,
            **options,
        },
    )
    return transformers.Trainer(model, arguments, train_dataset=examples(), callbacks=callbacks)


class Watch:
    """Zeros after every step of an optimiser, and whether its moments are zero there too."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.counts: list[int] = []
        self.clean: list[bool] = []
        self.model = model
        optimizer.register_step_pre_hook(self)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.counts.append(zeros(self.model))
        for m in self.model.modules():
            if isinstance(m, nn.Linear) and "exp_avg" in optimizer.state.get(m.weight, {}):
                moment = optimizer.state[m.weight]["exp_avg"]
                self.clean.append(bool((moment[m.weight == 0] == 0).all()))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer(tmp_path: Path, accumulation: int) -> None:
    model = Classifier()
    callback = pared.callbacks.TrainerPruner(SCHEDULE)
    t = trainer(tmp_path, model, [callback], gradient_accumulation_steps=accumulation)
    t.create_optimizer()
    watch = Watch(t.optimizer, model)
    t.train()
    check_trained(model, callback)
    weights = callback.report.weights
    want = [round(SCHEDULE(step) * weights) for step in range(STEPS)]
    assert watch.counts == pytest.approx(want, abs=1)
    assert watch.clean
    assert all(watch.clean)


def test_transformers_trainer_resumes(tmp_path: Path) -> None:
    whole = Classifier()
    options = {"save_strategy": "steps", "save_steps": 4, "seed": 3}
    first = pared.callbacks.TrainerPruner(SCHEDULE)
    trainer(tmp_path / "a", whole, [first], **options).train()
    checkpoint = tmp_path / "a" / "checkpoint-4"
    saved = torch.load(checkpoint / "pared_pruner.pt", weights_only=True)
    assert saved["step_count"] == 4

    again = Classifier()
    second = pared.callbacks.TrainerPruner(SCHEDULE)
    trainer(tmp_path / "a", again, [second], **options).train(resume_from_checkpoint=str(checkpoint))
    check_trained(again, second)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)

    (checkpoint / "pared_pruner.pt").unlink()
    third = trainer(tmp_path / "a", Classifier(), [pared.callbacks.TrainerPruner(SCHEDULE)], **options)
    with pytest.raises(ValueError, match=r"resume: expected the folder .* which has no pared_pruner\.pt"):
        third.train(resume_from_checkpoint=str(checkpoint))


def test_transformers_trainer_feeds_movement(tmp_path: Path) -> None:
    model = Classifier()
    movement = pared.training.Movement(model)
    callback = pared.callbacks.TrainerPruner(SCHEDULE, importance=movement)
    trainer(tmp_path, model, [callback]).train()
    check_trained(model, callback)
    assert set(movement.sums) == {"first.weight", "second.weight"}


# ---------------------------------------------------------------- Lightning


def lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if name in sys.modules:
            return sys.modules[name]
    try:
        import lightning.pytorch as found
    except ModuleNotFoundError:
        found = pytest.importorskip("pytorch_lightning")
    return found


def fit(folder: Path, callback: Any, *, checkpoint: str | None = None, **options: Any) -> tuple[Any, Watch]:
    library = lightning()

    class Module(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Classifier()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            self.watch = Watch(optimizer, self.model)
            return optimizer

    module = Module()
    loader = torch.utils.data.DataLoader(examples(), batch_size=4)
    run = library.Trainer(
        **{
            "default_root_dir": str(folder),
            "max_steps": STEPS,
            "callbacks": [callback],
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    run.fit(module, loader, ckpt_path=checkpoint)
    if checkpoint is None:
        run.save_checkpoint(folder / "last.ckpt")
    return module.model, module.watch


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning_trainer(tmp_path: Path, accumulation: int) -> None:
    lightning()
    callback = pared.callbacks.LightningPruner(SCHEDULE)
    model, watch = fit(tmp_path, callback, accumulate_grad_batches=accumulation)
    check_trained(model, callback)
    want = [round(SCHEDULE(step) * callback.report.weights) for step in range(STEPS)]
    assert watch.counts == pytest.approx(want, abs=1)
    assert watch.clean
    assert all(watch.clean)


def test_lightning_trainer_resumes(tmp_path: Path) -> None:
    library = lightning()
    whole, _ = fit(tmp_path / "whole", pared.callbacks.LightningPruner(SCHEDULE))
    saver = library.callbacks.ModelCheckpoint(tmp_path / "half", every_n_train_steps=4, save_top_k=-1)
    half = pared.callbacks.LightningPruner(SCHEDULE)
    fit(tmp_path / "half", half, max_steps=4, callbacks=[half, saver], enable_checkpointing=True)
    (checkpoint,) = (tmp_path / "half").glob("*step=4.ckpt")
    callback = pared.callbacks.LightningPruner(SCHEDULE)
    model, _ = fit(tmp_path / "half", callback, checkpoint=str(checkpoint))
    check_trained(model, callback)
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_lightning_trainer_feeds_movement(tmp_path: Path) -> None:
    lightning()

    class Late(pared.training.Movement):
        """The module exists only inside `fit`: made when training begins."""

        def __init__(self) -> None:
            pass

    movement = Late()
    callback = pared.callbacks.LightningPruner(SCHEDULE, importance=movement)
    begin = callback._held.begin

    def make(model: nn.Module, optimizers: Any) -> Any:
        pared.training.Movement.__init__(movement, model)
        return begin(model, optimizers)

    callback._held.begin = make  # type: ignore[method-assign]
    model, _ = fit(tmp_path, callback)
    check_trained(model, callback)


# ---------------------------------------------------------------- both


def test_without_the_callback_it_would_be_noticed(tmp_path: Path) -> None:
    model = Classifier()
    callback = pared.callbacks.TrainerPruner(SCHEDULE)
    trainer(tmp_path, model, [callback], max_steps=3).train()
    with pytest.raises(AssertionError):
        check_trained(model, callback)
    with torch.no_grad():
        model.first.weight += 1
    with pytest.raises(AssertionError):
        check_trained(model, callback, steps=3)


def test_the_model_is_the_trainers_to_give() -> None:
    with pytest.raises(TypeError, match="optimizer: expected none, the trainer has it, got SGD"):
        Held(SCHEDULE, {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)})


def test_names_are_looked_up_late(monkeypatch: pytest.MonkeyPatch) -> None:
    import pared.callbacks as callbacks

    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = callbacks.Trainer
    monkeypatch.delitem(vars(callbacks), "LightningPruner", raising=False)
    monkeypatch.delitem(sys.modules, "pared.callbacks._lightning", raising=False)
    for name in [n for n in sys.modules if n.split(".")[0] in ("lightning", "pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"LightningPruner needs lightning or pytorch-lightning"):
        _ = callbacks.LightningPruner
