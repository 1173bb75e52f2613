"""A small convolutional network for 32x32 images, pruned in three ways: by weight, by node, by layer.

python examples/prune_cnn.py [--quick]
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

import pared


class Residual(nn.Module):
    """A block that can be left out: what goes in has the shape of what comes out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.bn(self.conv(x)))


def network() -> nn.Sequential:
    """Channels 3-16-32, then two blocks of 32."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        Residual(32), Residual(32), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def images(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for your data: ten patterns of colour, [n, 3, 32, 32], under heavy noise."""
    patterns = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    x = F.interpolate(patterns, size=32)[labels]
    return x + 4 * torch.randn(x.shape, generator=generator), labels


def train(model: nn.Module, steps: int, pruner: pared.Pruner | None = None, lr: float = 2e-3) -> None:
    x, y = images(2048, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)  # after channels went: parameters are new objects
    model.train()
    for step in range(steps):
        rows = torch.arange(step * 64, step * 64 + 64) % len(x)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()
    model.eval()


def accuracy(model: nn.Module) -> float:
    x, y = images(500, seed=2)
    with torch.inference_mode():
        return float((model(x).argmax(1) == y).double().mean())


def nonzeros(model: nn.Module) -> int:
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())


def seconds(models: list[nn.Module], x: torch.Tensor, rounds: int = 25) -> list[float]:
    """Median time of each, taken in turns so that a busy moment hits them all."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(rounds):
            for model, own in zip(models, times, strict=True):
                start = time.perf_counter()
                model(x)
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def by_weight(model: nn.Module, steps: int) -> nn.Module:
    """Zeros: the shapes stay, sparse kernels make the time."""
    ramp = pared.schedules.Polynomial(0.5, 0.9, begin=1, end=max(2, steps // 2))
    pruner = pared.Pruner(model, ramp, scope="layer", keep_first=1, keep_last=1)
    train(model, steps, pruner)
    print(pruner.finalize())
    return model


def by_node(model: nn.Module, steps: int) -> nn.Module:
    """Whole channels: smaller dense layers, faster on anything."""
    print(pared.prune_channels(model, images(4, seed=3)[0], 0.5))
    train(model, steps)
    return model


def by_layer(model: nn.Module, steps: int) -> nn.Module:
    """Whole blocks: the one that changes its input least goes."""
    print(pared.prune_layers(model, images(64, seed=3)[0], 1, include=Residual))
    train(model, steps)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few training steps only")
    steps = 24 if parser.parse_args().quick else 300
    torch.manual_seed(0)
    dense = network()
    train(dense, steps)
    x = images(32, seed=4)[0]
    lines = [f"dense: accuracy {accuracy(dense):.3f}, {nonzeros(dense):,} parameters"]
    for how in (by_weight, by_node, by_layer):
        model = how(copy.deepcopy(dense), steps)
        fast = pared.accelerate(model, x)
        print(pared.report(fast))
        before, after = seconds([dense, fast], x)
        lines.append(
            f"{how.__name__}: accuracy {accuracy(fast):.3f}, {nonzeros(model):,} parameters not zero, "
            f"{before * 1e3:.2f} -> {after * 1e3:.2f} ms, {before / after:.2f} times the dense model's speed"
        )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
