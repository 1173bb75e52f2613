"""Scikit-learn's handwritten digits (1797 images of 8x8 pixels): a small CNN and a wide MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import pared

BATCH = 64  # images in an optimiser step


class Split(NamedTuple):
    """Images ``[n, 1, 8, 8]`` float32 in [0, 1] and labels ``[n]`` int64, for training and for testing."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def load() -> Split:
    """The data, split 80 to 20 by class with a fixed seed. Comes with scikit-learn: nothing is downloaded."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).reshape(-1, 1, 8, 8).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    return Split(*(torch.from_numpy(a) for a in (x_train, y_train, x_test, y_test)))


def cnn(width: int = 64) -> nn.Sequential:
    """Three 3x3 convolutions, the last of stride 2, and a classifier, ``[n, 1, 8, 8] -> [n, 10]``."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * width * 16, 10),
    )


def mlp(width: int = 2048) -> nn.Sequential:
    """Two hidden layers of `width`, ``[n, 1, 8, 8] -> [n, 10]``: large enough to be worth measuring."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def steps_per_epoch(data: Split) -> int:
    """Optimiser steps that `train` takes in an epoch."""
    return -(-len(data.x_train) // BATCH)


def train(
    model: nn.Module,
    data: Split,
    *,
    epochs: int,
    lr: float = 1e-3,
    sparsity: float | None = None,
    seed: int = 0,
    advance: Callable[[], object] | None = None,
) -> None:
    """Train in place with Adam, a cosine schedule and cross-entropy.

    With `sparsity`, prune meanwhile: on a polynomial schedule from 0 in the first half, held in the second.
    `advance` is called after every step, for a progress bar.
    """
    steps = epochs * steps_per_epoch(data)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    pruner = None
    if sparsity is not None:
        ramp = pared.schedules.Polynomial(0.0, sparsity, begin=0, end=steps // 2)
        pruner = pared.Pruner(model, ramp, optimizer=optimizer, update_every=5)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(data.x_train), generator=generator), BATCH):
            loss = nn.functional.cross_entropy(model(data.x_train[index]), data.y_train[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if pruner is not None:
                pruner.step()
            if advance is not None:
                advance()
    if pruner is not None:
        pruner.finalize()
    model.eval()


def accuracy(model: nn.Module, data: Split) -> float:
    """Share of test images whose class is right."""
    with torch.inference_mode():
        return float((model(data.x_test).argmax(1) == data.y_test).double().mean())
