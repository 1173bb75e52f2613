"""How long the conversion of a model takes: BERT-base (110 M parameters, random weights), 80 % of its Linear
weights zero, two threads. The goal is under a minute; a progress bar says what is being done meanwhile.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pared

GOAL_S = 60.0


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("tokens", [128, 1024])
def test_bert_base(benchmark: Any, capfd: Any, threads: int, tokens: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig()).eval()
    pared.prune(model, 0.8, include=nn.Linear)
    rows = tokens // 128
    inputs = {
        "input_ids": torch.randint(0, 30000, (rows, 128)),
        "attention_mask": torch.ones(rows, 128, dtype=torch.long),
    }
    with capfd.disabled():
        fast = benchmark.pedantic(pared.accelerate, args=(model, inputs), rounds=1)
        seconds, r = benchmark.stats.stats.min, pared.report(fast)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        verdict = "reached" if seconds <= GOAL_S else "missed"
        print(
            f"\nBERT-base, {millions:.0f} M parameters, {tokens} tokens: converted in {seconds:.1f} s (goal "
            f"{GOAL_S:g} s {verdict}); {len(r.converted)} layers, {r.speedup:.2f}x"
        )
    benchmark.extra_info.update(goal_s=GOAL_S, layers=len(r.converted), model_speedup=r.speedup)
