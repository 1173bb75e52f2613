"""A 784-128-10 classifier of digits: trained with an L1 penalty, pruned where that made zeros, in 8 bits.

python examples/mlp_l1_8bit.py [--quick]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import pared


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Scikit-learn's handwritten digits, enlarged to 28x28 and flattened: [1797, 784], and their labels."""
    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 16
    return F.interpolate(images, size=28, mode="bilinear").flatten(1), torch.from_numpy(y).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    epochs = 6 if parser.parse_args().quick else 40
    torch.manual_seed(0)
    x, y = digits()
    order = torch.randperm(len(x))
    train, test = order[:1437], order[1437:]

    def accuracy(model: nn.Module) -> float:
        with torch.inference_mode():
            return float((model(x[test]).argmax(1) == y[test]).double().mean())

    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    # The proximal step of the L1 norm: sign(w) max(|w| - lr strength, 0). Weights that the loss does not need
    # reach zero exactly, and stay there.
    l1 = pared.training.Proximal(model, optimizer, strength=0.2, include="0")
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            l1.step()
    model.eval()
    zeros = 1 - float(torch.count_nonzero(model[0].weight)) / model[0].weight.numel()
    print(f"after training: {zeros:.1%} zeros in the first layer, accuracy {accuracy(model):.3f}")

    # 8 bits. Zeros stay zeros: zero is on every grid.
    print(pared.quantize(model, list(x[train].split(256)), bits=8))
    fast = pared.accelerate(model, x[test], precision="int8")
    report = pared.report(fast)
    print(report)
    print(f"8 bits: accuracy {accuracy(fast):.3f}, {report.speedup:.2f} times as fast as before")


if __name__ == "__main__":
    main()
