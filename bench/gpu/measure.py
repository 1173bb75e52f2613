"""What the GPU suites share: a case, a clock of events around graph replays, data that rotates past the L2.

Host overhead is kept out by replaying CUDA graphs, a cache that is warmer than in a model by rotating among
copies of the data that together exceed three times the L2, and a drifting clock frequency by interleaving: in
a round each candidate runs once, in a random order, and figures are medians over rounds of ratios within one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench.gpu import emulated
from pared import _cuda
from pared._timing import Timings
from pared._timing_cuda import Clock, captured, copies_beyond, sample_rounds
from pared.nn import PackedModule
from pared.ops._device import DeviceWeight

# A goal counts as reached at this share of its ratio, or of the limit.
ENOUGH = 0.85
# What `copy_rate` copies: far more than any L2, and a small part of any device's memory.
COPY_BYTES = 1 << 29
# That the rounds of a case may take: a baseline that is a thousand times slower gets fewer of them.
CASE_S = 4.0


@dataclass(frozen=True)
class Machine:
    """Where a suite runs. In a dry run that is the emulator, whose device has the CPU's memory."""

    device: str  # "cuda", or "cpu" in a dry run
    name: str
    l2: int  # bytes
    dry: bool = False

    def copies(self, nbytes: int) -> int:
        """How many copies of `nbytes` exceed the L2 often enough; at least two."""
        return 2 if self.dry else copies_beyond(self.l2, nbytes)

    def place(self, module: Any) -> Any:
        """A model or layer of `pared.nn`, moved to the device."""
        if not self.dry:
            return module.to(self.device)
        for m in module.modules():
            if isinstance(m, PackedModule):
                m._hold(m._device_weight(torch.device(self.device)))
        return module

    def facts(self) -> dict[str, Any]:
        """For the result file."""
        facts: dict[str, Any] = {"name": self.name, "l2": self.l2, "torch": torch.__version__}
        facts |= {"python": platform.python_version(), "host": platform.machine()}
        if self.device == "cuda":
            p = torch.cuda.get_device_properties(0)
            facts |= {"capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count}
            facts |= {"memory": p.total_memory, "cuda": torch.version.cuda}
        return facts


def this_machine() -> Machine:
    """The first CUDA device. Raises ``RuntimeError`` that says what is missing."""
    _cuda.kernels(0)
    p = torch.cuda.get_device_properties(0)
    return Machine("cuda", p.name, p.L2_cache_size)


def emulated_machine(accesses: bool = False) -> Machine:
    """The emulator, as `emulated.load` has it: from here on CPU tensors stand for tensors on a device."""
    _cuda._emulated = emulated.load(accesses)
    return Machine("cpu", "dry run", 1 << 20, dry=True)


def copies_of(weight: DeviceWeight, n: int) -> list[Any]:
    """A weight and copies of it elsewhere in the device's memory, `n` in all."""
    layout, tensors = weight.parts()
    more = (DeviceWeight.from_parts(layout, [t.clone() for t in tensors]) for _ in range(n - 1))
    return [weight, *more]


@dataclass(frozen=True)
class Goal:
    """The time of the best of `baselines` over the target's should be at least `ratio`."""

    baselines: Sequence[str]
    ratio: float

    def __str__(self) -> str:
        return f"{self.ratio:g} x {' / '.join(self.baselines)}"


@dataclass
class Case:
    """One line of the table.

    Attributes
    ----------
    calls : name -> function of a copy's number that enqueues one operation. "pared" is the target.
    copies : how many copies of the data the functions know.
    nbytes : what the operation cannot avoid to move: GB/s, and their share of what a copy reaches.
    operations : multiply-adds times two: TFLOP/s.
    limit_s : seconds that the hardware allows.
    check : called before anything is timed; raises if the results are wrong.
    eager : calls that no CUDA graph can hold; they are timed with their host overhead.
    """

    suite: str
    name: str
    calls: Mapping[str, Callable[[int], object]]
    copies: int
    goals: Sequence[Goal] = ()
    nbytes: float = 0.0
    operations: float = 0.0
    limit_s: float | None = None
    check: Callable[[], None] | None = None
    eager: Sequence[str] = ()
    target: str = "pared"
    facts: Mapping[str, Any] = field(default_factory=dict)


def forced(force: Callable[[int], None], choice: int, call: Callable[[int], Any]) -> Callable[[int], Any]:
    """`call` while the extension is made to take one of its kernels: what the choice is between."""

    def alone(i: int) -> Any:
        force(choice)
        try:
            return call(i)
        finally:
            force(-1)

    return alone


def not_capturable(calls: Mapping[str, Callable[[int], object]], names: Sequence[str]) -> list[str]:
    """Which of these calls no CUDA graph can hold: found out by trying, after a warm-up. A call that fails
    without one as well is among them: `measure` says so."""
    refused = []
    for name in names:
        try:
            calls[name](0)
            torch.cuda.synchronize()
            captured(partial(calls[name], 0))
        except Exception:  # as a rival's compiler may raise
            refused.append(name)
    return refused


def lost() -> bool:
    """Whether a kernel has failed on the device, so that nothing runs there any more in this process. A
    library's refusal is called a CUDA error as well, and is none of that kind."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def copy_rate(machine: Machine, clock: Clock, rounds: int) -> float:
    """Bytes a second that a copy within the device's memory moves, read and written ones both."""
    source = torch.rand((1 << 12 if machine.dry else COPY_BYTES) // 4, device=machine.device)
    target = torch.empty_like(source)
    copy = {"copy": clock.prepare(lambda i: target.copy_(source), 1, True)}
    return 2 * source.nbytes / sample_rounds(copy, rounds).median("copy")


def measure(case: Case, clock: Clock, rounds: int, copied: float, seed: int = 0) -> dict[str, Any]:
    """One line of the result file: seconds, ratios with their intervals, rates, goals. `copied`: the
    machine's `copy_rate`."""
    if case.target not in case.calls:
        raise ValueError(f"calls: expected one named {case.target!r} in {case.name}, got {list(case.calls)}")
    missing = {b for g in case.goals for b in g.baselines} - case.calls.keys()
    if missing:
        raise ValueError(f"goals: expected names of calls in {case.name}, got {sorted(missing)}")
    if case.check is not None:
        case.check()
    samplers, without = {}, {}
    for name, call in case.calls.items():
        try:
            samplers[name] = clock.prepare(call, case.copies, name not in case.eager)
        except Exception as e:  # a rival that cannot do it is no reason to measure nothing
            if name == case.target or lost():
                raise
            without[name] = f"{type(e).__name__}: {e}"
    out = line(case, sample_rounds(samplers, rounds, seed, CASE_S), copied)
    return {**out, "without": without} if without else out


def line(case: Case, timings: Timings, copied: float) -> dict[str, Any]:
    """The figures of a case from its samples."""
    seconds = timings.median(case.target)
    out: dict[str, Any] = {"suite": case.suite, "case": case.name, "target": case.target, **case.facts}
    out["times"] = timings.summary(None)
    out["ratios"] = {}
    for name in timings.samples:
        if name != case.target:
            r = timings.speedup(case.target, name)
            out["ratios"][name] = {"value": r.value, "low": r.low, "high": r.high}
    if case.nbytes:
        out["gbytes_s"] = case.nbytes / seconds * 1e-9
        out["copy_share"] = case.nbytes / seconds / copied
    if case.operations:
        out["tflops"] = case.operations / seconds * 1e-12
    if case.limit_s is not None:
        out["limit_share"] = case.limit_s / seconds
    out["goals"] = []
    for goal in case.goals:
        rivals = [out["ratios"][b]["value"] for b in goal.baselines if b in out["ratios"]]
        if not rivals:
            continue
        got = min(rivals)
        near = case.limit_s is not None and case.limit_s / seconds >= ENOUGH
        reached = got >= ENOUGH * goal.ratio or near
        out["goals"].append({"text": str(goal), "ratio": goal.ratio, "got": got, "reached": reached})
    return out


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table that is printed: a line a case, times in microseconds."""
    rows = [("case", "us", "GB/s", "of a copy", "TFLOP/s", "against (times its time)", "goals")]
    verdict = {True: "yes", False: "NO"}
    for r in lines:
        ratios = ", ".join(f"{n} {v['value']:.2f}" for n, v in r["ratios"].items())
        ratios += "".join(f", without {n}" for n in r.get("without", {}))
        goals = ", ".join(f"{g['text']}: {g['got']:.2f} {verdict[g['reached']]}" for g in r["goals"])
        rows.append(
            (
                f"{r['suite']}: {r['case']}",
                f"{r['times'][r['target']]['median_s'] * 1e6:.1f}",
                f"{r['gbytes_s']:.0f}" if "gbytes_s" in r else "",
                f"{r['copy_share']:.0%}" if "copy_share" in r else "",
                f"{r['tflops']:.0f}" if "tflops" in r else "",
                ratios,
                goals,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)
