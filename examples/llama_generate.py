"""Text generation by a Llama on the CPU: half of its weights removed by Wanda, then kernels for few tokens.

python examples/llama_generate.py [--quick] [--bits 8]

A step of generation reads every weight for one token, so bytes are its time: masks and the values that are
left, in 32 or 8 bits. The weights are random here, which time does not depend on: put your own in with
transformers.AutoModelForCausalLM.from_pretrained(...), and look at its perplexity after pruning.
"""

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pared

PROMPT, NEW = 32, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two narrow layers instead of eight")
    parser.add_argument("--bits", type=int, choices=(32, 8), default=32, help="of the weights that are left")
    given = parser.parse_args()
    torch.manual_seed(0)
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    small = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, **(small if given.quick else wide))).eval()

    # A criterion that looks at the inputs of each layer needs a few batches: of your own texts.
    data = [{"input_ids": torch.randint(0, 8000, (4, 64))} for _ in range(4)]
    print(pared.prune(model, 0.5, importance="wanda", data=data, exclude="lm_head"))

    # Timed for what generation will ask: one token, and a prompt. A layer may hold a packing for each.
    prompt = torch.randint(0, 8000, (1, PROMPT))
    examples = [{"input_ids": ids, "use_cache": False} for ids in (prompt[:, :1], prompt)]
    precision = "int8" if given.bits == 8 else "float32"
    fast = pared.accelerate(model, examples, precision=precision, max_error=0.1 if given.bits == 8 else None)
    print(pared.report(fast))

    def generate(model: torch.nn.Module) -> tuple[torch.Tensor, float]:
        """The tokens, greedily chosen, and how many came a second; the best of three."""
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            ids = model.generate(
                prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
            seconds.append(time.perf_counter() - begin)
        return ids[0, PROMPT:], NEW / min(seconds)

    with torch.inference_mode():
        expected, before = generate(model)
        got, after = generate(fast)
    same = int((expected == got).sum())
    print(f"{before:.0f} -> {after:.0f} tokens/s, {after / before:.2f}x; {same} of {NEW} tokens are the same")


if __name__ == "__main__":
    main()
