"""A tagger with an LSTM: its weights are pruned while it trains, and the report says what that is worth.

python examples/lstm.py [--quick]
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import pared


class Tagger(nn.Module):
    """Tokens [n, t] to scores [n, t, tags]."""

    def __init__(self, words: int = 64, width: int = 128, tags: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.hidden = nn.Linear(width, 4 * width)
        self.tags = nn.Linear(4 * width, tags)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tags(F.relu(self.hidden(self.rnn(self.embed(tokens))[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    steps = 60 if parser.parse_args().quick else 600
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ramp = pared.schedules.Polynomial(0.3, 0.8, begin=steps // 6, end=steps // 2)
    # All four matrices of the LSTM and both Linear layers; embeddings stay unless they are asked for.
    pruner = pared.Pruner(model, ramp, scope="layer", optimizer=optimizer)
    for _ in range(steps):
        tokens = torch.randint(0, 64, (16, 24))
        wanted = tokens.roll(1, dims=1)  # the tag is the word before: only memory can know it
        optimizer.zero_grad()
        F.cross_entropy(model(tokens)[:, 1:].flatten(0, 1), wanted[:, 1:].flatten()).backward()
        optimizer.step()
        pruner.step()
    print(pruner.finalize())
    model.eval()

    tokens = torch.randint(0, 64, (16, 24))
    fast = pared.accelerate(model, tokens)
    with torch.inference_mode():
        right = (fast(tokens)[:, 1:].argmax(-1) == tokens[:, :-1]).double().mean()
    # The zeros of the LSTM make the file smaller and the model simpler; no kernel here makes them time. The
    # Linear layers around it gain.
    report = pared.report(fast)
    print(report)
    print(f"{right:.1%} of the tags right; whole model {report.speedup:.2f}x")


if __name__ == "__main__":
    main()
