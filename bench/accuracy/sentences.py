"""What pruning and rounding without any training cost a sentence encoder: MiniLM on Python's docstrings.

The encoder's weights are real, and so is the text: a query is the first sentence of a docstring of the
standard library, its document the rest of the same docstring. A seed draws the texts to calibrate on and the
pairs to measure on; all models of a seed see the same ones.

- Retrieval: share of queries whose nearest document, by cosine, is their own.
- Cosine: mean cosine between the documents' embeddings and those of the dense model.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

import pared
from pared._demo import minilm

SETTINGS = {"pairs": 200, "calibration texts": 64, "tokens": 48}
CRITERIA = ("magnitude", "wanda", "sparsegpt")
PATTERNS = {"50 %": "unstructured", "2:4": "2:4"}
WORK = 2 + len(CRITERIA) * len(PATTERNS)

Advance = Callable[[str], object]


@cache
def _pairs() -> list[minilm.Pair]:
    return minilm.corpus(minilm.library_files())


@cache
def _model() -> tuple[nn.Module, Any]:
    return minilm.load()


def draw(seed: int, settings: dict[str, int]) -> tuple[list[str], list[minilm.Pair]]:
    """Texts to calibrate on, and pairs to measure on; no docstring is in both."""
    pairs = list(_pairs())
    random.Random(seed).shuffle(pairs)
    n, m = settings["calibration texts"], settings["pairs"]
    if n + m > len(pairs):
        raise ValueError(f"settings: expected at most {len(pairs)} texts and pairs together, got {n + m}")
    return [p.body for p in pairs[:n]], pairs[n : n + m]


def measure(
    model: nn.Module, tokenizer: Any, pairs: Sequence[minilm.Pair], tokens: int
) -> tuple[float, torch.Tensor]:
    """Retrieval, and the documents' embeddings."""
    queries = minilm.embed(model, tokenizer, [p.query for p in pairs], tokens=tokens)
    documents = minilm.embed(model, tokenizer, [p.body for p in pairs], tokens=tokens)
    return minilm.recall_at_1(queries, documents), documents


def run(
    seed: int, advance: Advance = lambda what: None, settings: dict[str, int] = SETTINGS
) -> dict[str, float]:
    """Retrieval and cosines (0 to 1) of one seed."""
    model, tokenizer = _model()
    texts, pairs = draw(seed, settings)
    tokens = settings["tokens"]
    data = [minilm.tokenize(tokenizer, texts[i : i + 16], tokens) for i in range(0, len(texts), 16)]
    out: dict[str, float] = {}
    advance("sentences: dense")
    out["retrieval, dense"], reference = measure(model, tokenizer, pairs, tokens)

    def add(name: str, changed: nn.Module) -> None:
        out[f"retrieval, {name}"], documents = measure(changed, tokenizer, pairs, tokens)
        out[f"cosine, {name}"] = minilm.cosine(documents, reference)

    for label, pattern in PATTERNS.items():
        for criterion in CRITERIA:
            advance(f"sentences: {label}, {criterion}")
            # Within a layer: over all of them at once magnitude would empty some.
            scope = "layer" if criterion == "magnitude" and pattern == "unstructured" else None
            changed = copy.deepcopy(model)
            pared.prune(
                changed,
                0.5,
                pattern=pattern,
                importance=criterion,
                scope=scope,
                include=nn.Linear,
                data=None if criterion == "magnitude" else data,
            )
            add(f"{criterion}, {label}", changed)
    advance("sentences: 8 bits")
    changed = copy.deepcopy(model)
    pared.quantize(changed, data, bits=8, include=nn.Linear)
    with pared.quant.simulate(changed):
        add("int8", changed)
    return out
