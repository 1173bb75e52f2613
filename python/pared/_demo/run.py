"""From dense to pruned, converted and measured, for each model of the demonstration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

import pared
from pared._demo import digits, minilm
from pared._demo.measure import Candidate, accelerate, bar, compare
from pared._demo.results import Result


@dataclass(frozen=True)
class Settings:
    """How much of everything; `quick` is for a first look and for the tests."""

    console: Console
    quick: bool = False
    verbose: bool = False


def _digits(
    s: Settings,
    title: str,
    make: Callable[[], nn.Module],
    *,
    batch: int,
    sparsity: float,
    channels_last: bool,
) -> Result:
    """Train, prune on a polynomial schedule while fine-tuning, accelerate, measure."""
    data = digits.load()
    epochs, more = (4, 8) if s.quick else (8, 10)
    per_epoch = digits.steps_per_epoch(data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = make()
    with bar(s.console, f"{title}: training", epochs * per_epoch) as advance:
        digits.train(dense, data, epochs=epochs, advance=advance)
    pruned = copy.deepcopy(dense)
    with bar(
        s.console, f"{title}: pruning to {100 * sparsity:.0f} % while fine-tuning", more * per_epoch
    ) as advance:
        digits.train(pruned, data, epochs=more, sparsity=sparsity, advance=advance)

    x = data.x_train[:batch]
    fast = accelerate(s.console, title, pruned, (x,), s.verbose)
    layouts: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {"dense": (dense, (x,))}
    if channels_last:
        other = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        layouts["dense, channels_last"] = (other, (x.contiguous(memory_format=torch.channels_last),))
    return compare(
        s.console,
        title,
        f"batch {batch}",
        dense=layouts,
        metrics={"accuracy": digits.accuracy(dense, data)},
        candidates=[
            Candidate(
                f"{100 * sparsity:.0f} % pruned", pruned, fast, {"accuracy": digits.accuracy(fast, data)}
            )
        ],
        inputs=(x,),
        seconds=0.5 if s.quick else 5.0,
        note=f"{epochs} epochs dense, {more} more while pruning; {len(data.x_test)} test images, "
        "so one standard error is about 0.8 points",
    )


def digits_cnn(s: Settings) -> Result:
    """A small CNN on the digits, 90 % of its weights removed."""
    return _digits(
        s, "digits CNN", lambda: digits.cnn(16 if s.quick else 64), batch=64, sparsity=0.9, channels_last=True
    )


def digits_mlp(s: Settings) -> Result:
    """A wide MLP on the digits, 90 % of its weights removed."""
    return _digits(
        s,
        "digits MLP",
        lambda: digits.mlp(512 if s.quick else 2048),
        batch=256,
        sparsity=0.9,
        channels_last=False,
    )


def sentence_encoder(s: Settings) -> Result:
    """MiniLM on docstrings: one-shot at 50 and 80 %, and 80 % with a few steps of distillation."""
    title = "MiniLM-L6"
    console = s.console
    dense, tokenizer = minilm.load()
    questions, steps, rows, tokens = (40, 4, 1, 64) if s.quick else (300, 60, 8, 128)
    files = minilm.library_files()[:: 5 if s.quick else 1]
    with bar(console, f"{title}: reading the standard library's docstrings", len(files)) as advance:
        pairs = minilm.corpus(files, advance=advance)
    test, train = pairs[:questions], pairs[questions:]

    def embed(model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        with bar(console, f"{title}: embedding with {name}", 2 * len(test)) as advance:
            return (
                minilm.embed(model, tokenizer, [p.query for p in test], tokens=64, advance=advance),
                minilm.embed(model, tokenizer, [p.body for p in test], tokens=128, advance=advance),
            )

    queries, bodies = embed(dense, "dense")

    def metrics(q: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
        same = minilm.cosine(torch.cat([q, b]), torch.cat([queries, bodies]))
        return {"recall@1": minilm.recall_at_1(q, b), "cosine": same}

    # Full rows of real text: no row is padded, so the time is that of rows x tokens.
    text = " ".join(p.body for p in test)
    full = minilm.tokenize(tokenizer, [text[i * 200 :] for i in range(rows)], tokens)
    inputs = (full["input_ids"], full["attention_mask"])

    candidates = []

    def add(name: str, pruned: nn.Module) -> None:
        fast = accelerate(console, f"{title} {name}", pruned, inputs, s.verbose)
        candidates.append(Candidate(name, pruned, fast, metrics(*embed(fast, name))))

    for sparsity in (0.5,) if s.quick else (0.5, 0.8):
        pruned = copy.deepcopy(dense)
        pared.prune(pruned, sparsity, include=nn.Linear)
        add(f"{100 * sparsity:.0f} % pruned, one-shot", pruned)

    pruned = copy.deepcopy(dense)
    texts = [t for p in train for t in p]
    with bar(console, f"{title}: pruning to 80 % while distilling", steps) as advance:
        minilm.distill(pruned, dense, tokenizer, texts, sparsity=0.8, steps=steps, advance=advance)
    add("80 % pruned, distilled", pruned)

    return compare(
        console,
        title,
        f"{rows} text{'s' if rows > 1 else ''} of {tokens} tokens",
        dense={"dense": (dense, inputs)},
        metrics=metrics(queries, bodies),
        candidates=candidates,
        inputs=inputs,
        seconds=1.0 if s.quick else 12.0,
        note=f"recall@1: a docstring's body found by its first sentence, among {len(test)}. cosine: "
        "between the dense and the pruned model's embeddings of a text. Pruned are the Linear layers, "
        "not the embedding table (half of the weights). Distilled: "
        f"{steps} steps, a taste; a real run takes thousands",
    )


MODELS: dict[str, Callable[[Settings], Result]] = {
    "digits-cnn": digits_cnn,
    "digits-mlp": digits_mlp,
    "minilm": sentence_encoder,
}


def run(settings: Settings, models: Sequence[str]) -> list[Result]:
    """Every model named in `models`, keys of `MODELS`, in that order."""
    results = []
    for name in models:
        settings.console.print(f"[bold]{name}[/]: {(MODELS[name].__doc__ or '').strip()}", highlight=False)
        results.append(MODELS[name](settings))
    return results
