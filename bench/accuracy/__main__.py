"""What the methods cost, against their bars: tables, JSON, docs/accuracy.md.

python -m bench.accuracy                              # everything: a quarter of an hour
python -m bench.accuracy --parts digits --seeds 0 1   # a piece of it; what is in the file already stays
python -m bench.accuracy --parts --seeds              # the tables and the document again, from the file
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.accuracy import digits, layers, results, sentences
from pared import _core

ROOT = Path(__file__).parents[2]
PARTS = {"layers": layers, "digits": digits, "sentences": sentences}
# A seed of the digits takes seconds, and 360 test images have a standard error of 0.8 points; one of the
# layers already compares 36 of them in three patterns.
SEEDS = {"layers": 3, "digits": 20, "sentences": 5}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.accuracy",
    )
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=None, help="0 1 2 ...")
    parser.add_argument("--threads", type=int, default=1, help="sums differ in their last bits by it")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "accuracy.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "accuracy.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    study = results.read(args.json)
    machine = f"torch {torch.__version__.partition('+')[0]}, {_core.cpu_brand()}"
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        seeds = {p: range(SEEDS[p]) if args.seeds is None else args.seeds for p in args.parts}
        work = sum(PARTS[p].WORK * len(seeds[p]) for p in args.parts)
        task = progress.add_task("", total=work)
        done = 0
        for part in args.parts:
            module = PARTS[part]
            if study.get(part, {}).get("settings") != module.SETTINGS:  # of another study
                study[part] = {"settings": dict(module.SETTINGS), "machine": machine, "seeds": {}}
            for seed in seeds[part]:
                measured = module.run(seed, lambda what: progress.update(task, advance=1, description=what))
                study[part]["seeds"][str(seed)] = {k: round(v, 6) for k, v in measured.items()}
                results.write(args.json, study)  # a study that is stopped loses one seed at most
                done += module.WORK
                progress.update(task, completed=done)
    for part in study:
        console.print(results.table(study, part))
    args.docs.write_text(results.rewrite(args.docs.read_text(), study))
    console.print(f"written: {args.json}, {args.docs}")


if __name__ == "__main__":
    main()
