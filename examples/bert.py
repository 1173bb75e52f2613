"""A BERT, half of its weights removed without training: SparseGPT on a few batches, then fast kernels.

python examples/bert.py [--quick]

The weights are random here: put your own in with transformers.BertModel.from_pretrained(...).
"""

import argparse

import torch
from torch import nn
from transformers import BertConfig, BertModel

import pared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two narrow layers instead of twelve")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    config = BertConfig(**(small if quick else {}))
    model = BertModel(config, add_pooling_layer=False).eval()

    def batch(n: int) -> dict[str, torch.Tensor]:
        """Stands for tokenised text: lengths differ, the mask says where a text ends."""
        ids = torch.randint(0, config.vocab_size, (n, 64))
        mask = (torch.arange(64) < torch.randint(32, 65, (n, 1))).long()
        return {"input_ids": ids, "attention_mask": mask}

    # Every matrix loses the weights whose removal the others can best make up for, and the others do.
    data = [batch(8) for _ in range(4)]
    print(pared.prune(model, 0.5, importance="sparsegpt", include=nn.Linear, data=data))

    inputs = batch(4)
    fast = pared.accelerate(model, inputs)
    report = pared.report(fast)
    print(report)
    with torch.inference_mode():
        expected, got = model(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    print(f"outputs agree; whole model {report.speedup:.2f}x")


if __name__ == "__main__":
    main()
