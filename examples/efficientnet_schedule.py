"""An EfficientNet-B0 pruned while it trains: from 50 % to 80 % zeros, on a cubic, in steps 1000 to 2000.

python examples/efficientnet_schedule.py [--shorten 100] [--size 224]

--shorten divides the numbers of steps; data and weights are random: put your own in.
"""

import argparse

import torch
from torch.nn import functional as F
from transformers import EfficientNetConfig, EfficientNetForImageClassification

import pared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shorten", type=int, default=1, help="divide the numbers of steps by this")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    begin, end, steps = (n // args.shorten for n in (1000, 2000, 2400))
    torch.manual_seed(0)
    config = EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, num_labels=10)
    model = EfficientNetForImageClassification(config)
    for module in model.modules():  # torch's own start: the library's is for weights that are loaded
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    # s(t) = 0.8 + (0.5 - 0.8) (1 - (t - begin) / (end - begin))^3. Depthwise kernels are few and sensitive:
    # they stay. So do the first convolution and the classifier.
    schedule = pared.schedules.Polynomial(0.5, 0.8, begin=begin, end=end)
    print(f"half way the schedule asks for {schedule((begin + end) // 2):.2%}")
    pruner = pared.Pruner(
        model,
        schedule,
        optimizer=optimizer,
        exclude=["*depthwise_conv*", "*squeeze_excite*"],
        keep_first=1,
        keep_last=1,
    )
    model.train()
    for step in range(1, steps + 1):
        images, labels = torch.randn(args.batch, 3, args.size, args.size), torch.randint(0, 10, (args.batch,))
        optimizer.zero_grad()
        F.cross_entropy(model(pixel_values=images).logits, labels).backward()
        optimizer.step()
        pruner.step()
        if step % max(1, steps // 12) == 0:
            print(f"step {step}: {pruner.sparsity:.2%} zeros")
    zeros = pruner.finalize()
    print(f"{zeros.sparsity:.2%} zeros in {len(zeros.layers)} layers")
    model.eval()

    fast = pared.accelerate(model, {"pixel_values": torch.randn(1, 3, args.size, args.size)})
    report = pared.report(fast)
    print(report)
    print(f"{len(report.converted)} of {len(report.layers)} layers accelerated; model {report.speedup:.2f}x")


if __name__ == "__main__":
    main()
