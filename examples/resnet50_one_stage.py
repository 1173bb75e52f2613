"""A ResNet-50 of which only the second stage is pruned ("layer2" elsewhere), found by a glob on its name.

python examples/resnet50_one_stage.py [--quick]

The weights are random here: put your own in, for example with from_pretrained(...).
"""

import argparse

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import pared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small images")
    size = 64 if parser.parse_args().quick else 224
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig()).eval()  # the defaults are ResNet-50's
    images = torch.randn(1, 3, size, size)

    # Everything whose name matches, and nothing else. In torchvision's ResNet the same stage is "layer2.*".
    pruned = pared.prune(model, 0.9, scope="layer", include="*encoder.stages.1.*")
    print(pruned)
    assert len(pruned.layers) == 13
    assert all("stages.1." in layer.name for layer in pruned.layers)

    fast = pared.accelerate(model, {"pixel_values": images})
    report = pared.report(fast)
    for layer in report.converted:
        print(f"{layer.name}: {layer.sparsity:.0%} zeros, {layer.kernel}, {layer.speedup:.2f}x")
    print(f"{len(report.converted)} of {len(report.layers)} layers accelerated; model {report.speedup:.2f}x")

    with torch.inference_mode():
        expected, got = model(pixel_values=images).logits, fast(pixel_values=images).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    print("outputs agree")


if __name__ == "__main__":
    main()
