"""Make your own model faster: prune it, accelerate it, look at the report, save it, load it.

python examples/swap_layers.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import pared


class Net(nn.Module):
    """Stands for your model: nothing in it knows of pared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(256, 1024)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(1024), nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 1024))
            for _ in range(2)
        )
        self.head = nn.Linear(1024, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def main() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(256, 256)

    # 1. Zeros. In place; here at once and without training, which a real model needs: see pared.Pruner.
    #    A model that another tool has pruned starts at step 2.
    print(pared.prune(model, 0.9, scope="layer", exclude="head"))
    with torch.inference_mode():
        expected = model(x)

    # 2. Time. A new model: each layer runs the kernel that was fastest with inputs of these shapes.
    fast = pared.accelerate(model, x)
    print(pared.report(fast))
    with torch.inference_mode():
        y = fast(x)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)

    # 3. One file, without pickle; the kernels are chosen and packed anew where it is loaded.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pared"
        pared.save(fast, path)
        dense_bytes = sum(p.nbytes for p in model.parameters())
        print(f"file: {path.stat().st_size / 1e6:.1f} MB, the dense weights: {dense_bytes / 1e6:.1f} MB")
        loaded = pared.load(path, Net)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), expected, rtol=1e-3, atol=1e-4)

    # 4. Back to plain torch.nn modules, with the same weights: to train on, to export.
    plain = pared.restore(fast)
    with torch.inference_mode():
        torch.testing.assert_close(plain(x), expected, rtol=1e-3, atol=1e-4)
    print("outputs agree: pruned, accelerated, loaded, restored")


if __name__ == "__main__":
    main()
