"""Every kernel once on a small problem, against a reference: which one faults, before anything is measured.

``python -m bench.gpu.smoke``: a line a kernel, PASS or FAIL with its reason. A process runs them one after
the other; one that crashes or hangs is a FAIL, and another process goes on behind it, because an illegal
access or a hung kernel spoils everything that a process does afterwards.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

import pared
from bench.gpu.measure import Machine, emulated_machine, forced, lost, this_machine
from pared._cuda_block_sparse import DeviceBlocks
from pared._cuda_decode import DecodeWeight, Format, pack_in_torch
from pared._cuda_int8 import gemm_s8
from pared._cuda_sparse import DeviceCSR
from pared._cuda_weight import Place
from pared._timing_cuda import captured

KERNEL_S = 30.0  # that the slowest may take, its share of starting the process included
BEGIN = 60.0  # for torch, the context and the modules

Check = Callable[[], None]


def checks(machine: Machine) -> Iterator[tuple[str, Check]]:
    """Names and functions that raise. Nothing is computed before they are called."""
    at = Place.of(torch.empty(0, device=machine.device))
    yield from _selections(machine)
    yield from _int8(machine, at)
    yield from _decode(machine, at)
    yield from _blocks(machine, at)
    yield from _csr(machine, at)
    yield "conv 1x1", partial(_conv, machine)
    if not machine.dry:
        yield "2:4 cuSPARSELt", partial(_two_four, machine)
        if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:  # where a graph's memory comes from
            yield "graphs and streams", partial(_graphs, machine)
            yield "a capture that fails", partial(_failed_capture, machine)


def _random(machine: Machine, *shape: int, dtype: torch.dtype = torch.float32, zeros: float = 0.0) -> Any:
    torch.manual_seed(len(shape) + sum(shape))
    x = torch.randn(*shape)
    return (x * (torch.rand(*shape) >= zeros)).to(dtype).to(machine.device)


def _same(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    if not torch.equal(got.cpu(), want.cpu()):
        wrong = int((got.cpu() != want.cpu()).sum())
        raise RuntimeError(f"{what}: {wrong} of {want.numel()} values differ")


def _close(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Within the rounding of the output and of float32 sums."""
    x, w = x.double().cpu(), w.double().cpu()
    error, size = (got.double().cpu() - x @ w.T).abs(), x.abs() @ w.abs().T
    bound = (torch.finfo(got.dtype).eps + x.shape[-1] * 2.0**-23) * size + 1e-6
    if not bool((error <= bound).all()):
        raise RuntimeError(f"off by {float((error / bound).nan_to_num(torch.inf).max()):.3g} times the bound")


def _selections(machine: Machine) -> Iterator[tuple[str, Check]]:
    n = 70_001 if machine.dry else 3_000_001

    def threshold(dtype: torch.dtype, zeros: float) -> None:
        x, k = _random(machine, n, dtype=dtype, zeros=zeros), n // 3
        got = pared.ops.select_threshold(x, k, nan="lowest")
        want = torch.kthvalue(x.abs().float().cpu(), n - k + 1).values
        if float(got.value) != float(want):
            raise RuntimeError(f"expected {float(want)}, got {float(got.value)}")

    def mask(dtype: torch.dtype, zeros: float) -> None:
        x, k = _random(machine, n, dtype=dtype, zeros=zeros), 2 * n // 3
        order = torch.sort(x.abs().float().cpu(), descending=True, stable=True).indices[:k]
        _same("mask", pared.ops.topk_mask(x, k), torch.zeros(n, dtype=torch.bool).index_fill(0, order, True))

    def top() -> None:
        x = _random(machine, n)
        values, indices = pared.ops.topk(x, 100)
        _same("values", values.abs(), torch.topk(x.cpu().abs(), 100).values)
        _same("indices", x[indices], values)

    def groups(of: Callable[[Any], Any], size: int, kept: int) -> None:
        x = _random(machine, 96, 256)
        got = of(x).view(-1, size).sum(1)
        _same("counts", got, torch.full_like(got, kept))

    def blocks() -> None:
        got = pared.ops.block_mask(_random(machine, 96, 256), 100, block=(4, 8)).view(24, 4, 32, 8)
        kept = got.sum((1, 3))
        if int((kept == 32).sum()) != 100 or int(kept.sum()) != 3200:
            raise RuntimeError("expected 100 blocks")

    for dtype in (torch.float32, torch.bfloat16):
        for zeros in (0.0, 0.5):
            kind = f"{str(dtype)[6:]}, {zeros:.0%} zeros"
            yield f"select_threshold {kind}", partial(threshold, dtype, zeros)
            yield f"topk_mask {kind}", partial(mask, dtype, zeros)
    yield "topk", top
    yield "topk_mask of rows", partial(groups, lambda x: pared.ops.topk_mask(x, 100, dim=1), 256, 100)
    yield "nm_mask", partial(groups, lambda x: pared.ops.nm_mask(x, 2, 4), 4, 2)
    yield "block_mask", blocks


def _int8(machine: Machine, at: Place) -> Iterator[tuple[str, Check]]:
    def tile(number: int, dtype: torch.dtype, tokens: int) -> None:
        w = pared.ops.Int8.from_dense(_random(machine, 200, 272).cpu())
        x, there = _random(machine, tokens, 272, dtype=dtype), w.to(machine.device)
        bias = _random(machine, 200)
        run = forced(at.kernels.force_int8_tile, number, lambda i: there.linear(x, bias))
        _same("bits", run(0), pared.ops.linear(x.cpu(), w, bias.cpu()))

    def exact() -> None:
        a, b = (torch.randint(-128, 128, (m, 131), dtype=torch.int8) for m in (37, 70))
        got = gemm_s8(a.to(machine.device), b.to(machine.device))
        _same("sums", got, (a.long() @ b.long().T).int())

    yield "gemm_s8", exact
    tiles = at.kernels.INT8_TILES
    wgmma = at.kernels.int8_wgmma(at.device)
    if not wgmma and not machine.dry:
        yield "int8 wgmma", partial(_absent, at, "int8 products on wgmma", "CUTLASS's headers")
    for number, (rows, columns) in enumerate(tiles if wgmma else tiles[:4]):
        name = "mma.sync" if number < 4 else "wgmma"
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            kind = f"int8 {name} {rows}x{columns} {str(dtype)[6:]}"
            yield kind, partial(tile, number, dtype, 130 if number >= 4 else rows - 3)


def _absent(at: Place, what: str, needs: str) -> None:
    if torch.cuda.get_device_capability(at.device) == (9, 0):
        raise RuntimeError(f"this build has no {what}: it was built without {needs}")


def _decode(machine: Machine, at: Place) -> Iterator[tuple[str, Check]]:
    formats: tuple[Format, ...] = ("bitmap16", "pairs16", "bitmap8", "dense8")

    def product(format: Format, tokens: int, bulk: bool) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            dense = _random(machine, 200, 328, dtype=dtype, zeros=0.6)
            x = _random(machine, tokens, 328, dtype=dtype)
            if format.endswith("16"):
                w = DecodeWeight.from_dense(dense, format=format)
            else:
                scales = _random(machine, 200).abs() * 0.01
                q = (dense.float() * 40).round().clamp(-127, 127).to(torch.int8)
                w = DecodeWeight.from_quantized(q, scales, dtype, format)
                dense = q.double() * scales.double()[:, None]
            _close(w.linear(x, bulk=bulk), x, dense)

    def same_bytes() -> None:
        w = _random(machine, 200, 328, dtype=torch.bfloat16, zeros=0.6)
        for format in formats[:2]:
            want = pack_in_torch(w, format, None)
            got = DecodeWeight.from_dense(w, format=format)
            _same("offsets", got.offsets, want[1])
            _same("blocks", got.blocks, want[0])

    def expanded() -> None:
        w = _random(machine, 200, 328, dtype=torch.bfloat16, zeros=0.6)
        for format in formats[:2]:
            _same("expanded", DecodeWeight.from_dense(w, format=format).to_dense() + 0, w + 0)

    yield "decode pack", same_bytes
    yield "decode expand", expanded
    bulks = (True, False) if at.kernels.bulk_copies(at.device) else (False,)
    for format in formats:
        for tokens in (1, 2, 7, 16, 32):
            for bulk in bulks:
                kind = "bulk copies" if bulk else "cp.async"
                yield f"decode {format}, {tokens} tokens, {kind}", partial(product, format, tokens, bulk)


def _blocks(machine: Machine, at: Place) -> Iterator[tuple[str, Check]]:
    def product(block: int, tokens: int, kernel: int, quantized: bool) -> None:
        keep = torch.rand(-(-320 // block), -(-384 // block)) < 0.5
        mask = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)[:320, :384].to(machine.device)
        w = _random(machine, 320, 384, dtype=torch.bfloat16) * mask
        x = _random(machine, tokens, 384, dtype=torch.bfloat16)
        if not quantized:
            there = DeviceBlocks.from_dense(w, (block, block))
            run = forced(at.kernels.force_block_sparse_kernel, kernel, lambda i: there.linear(x))
            return _close(run(0), x, w)
        q = (w.float() * 30).round().clamp(-127, 127).to(torch.int8)
        scales = _random(machine, 320).abs() * 0.01 + 0.001
        there = DeviceBlocks.from_dense(q, (block, block), scales)
        run = forced(at.kernels.force_block_sparse_kernel, kernel, lambda i: there.linear(x))
        same = pared.ops.Int8.from_parts(q.cpu().numpy(), scales.cpu().numpy(), "bfloat16", None)
        _same("bits", run(0), pared.ops.linear(x.cpu(), same))

    wgmma = at.kernels.block_sparse_wgmma(at.device)
    if not wgmma and not machine.dry:
        yield "blocks wgmma", partial(_absent, at, "block-sparse products on wgmma", "sm_90a")
    for quantized in (False, True):
        kind = "blocks of 8 bits" if quantized else "blocks of 16 bits"
        for block in (16, 32, 64, 128):
            for tokens in (5, 150):
                yield (
                    f"{kind}, {block}, {tokens} tokens, mma.sync",
                    partial(product, block, tokens, 0, quantized),
                )
            for rows in (128, 256) if wgmma and block >= 64 else ():
                yield f"{kind}, {block}, wgmma {rows}", partial(product, block, 150, rows, quantized)


def _csr(machine: Machine, at: Place) -> Iterator[tuple[str, Check]]:
    def product(dtype: torch.dtype, tokens: int, few: int, near: bool) -> None:
        w = _random(machine, 200, 600, dtype=dtype, zeros=0.9)
        x = _random(machine, tokens, 600, dtype=dtype)
        _close(DeviceCSR.from_dense(w, near=near).linear(x, few=few), x, w)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for tokens, few, kind in ((3, 16, "gathers"), (8, 16, "gathers for 8"), (70, 0, "panels")):
            for near in (False, True):
                way = ", near columns" if near else ""
                yield f"csr {str(dtype)[6:]}, {kind}{way}", partial(product, dtype, tokens, few, near)


def _conv(machine: Machine) -> None:
    from pared._cuda_conv import conv2d

    w, x = _random(machine, 40, 36, zeros=0.9), _random(machine, 2, 36, 5, 7)
    got = conv2d(x, DeviceCSR.from_dense(w), None, (1, 1), None)
    _close(got.permute(0, 2, 3, 1).reshape(-1, 40), x.permute(0, 2, 3, 1).reshape(-1, 36), w)


def _two_four(machine: Machine) -> None:
    from pared._cuda_two_four import DeviceTwoFour

    w = _random(machine, 256, 512, dtype=torch.bfloat16)
    w = w * pared.ops.nm_mask(w, 2, 4)
    x = _random(machine, 64, 512, dtype=torch.bfloat16)
    _close(DeviceTwoFour.from_dense(w).tuned(64).linear(x), x, w)


def _graphs(machine: Machine) -> None:
    # Long rows, which several blocks of threads share.
    w = _random(machine, 256, 8192, dtype=torch.bfloat16, zeros=0.6)
    x = _random(machine, 4, 8192, dtype=torch.bfloat16)
    packed, int8 = DecodeWeight.from_dense(w), pared.ops.Int8.from_dense(w.cpu()).to(machine.device)
    blocks = DeviceBlocks.from_dense(w, (64, 64))
    calls = [
        lambda: packed.linear(x),
        lambda: int8.linear(x),
        lambda: blocks.linear(x),
        lambda: pared.ops.topk_mask(x, 9, nan="lowest"),
    ]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for call in calls:
        want = call()
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000)
            on_side = call()
        side.synchronize()
        _same("on another stream", on_side, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        for _ in range(2):
            got.zero_()
            graph.replay()
            torch.cuda.synchronize()
            _same("replayed", got, want)


def _failed_capture(machine: Machine) -> None:
    """What `captured` puts right is torch's own, and differs from version to version."""
    x, stream = torch.zeros(64, device=machine.device), torch.cuda.current_stream()
    for _ in range(2):
        try:
            captured(lambda: x.sum().item())
        except RuntimeError:
            pass
        else:
            raise RuntimeError("a graph holds a wait")
        if torch.cuda.current_stream() != stream:
            raise RuntimeError("another stream is the current one")
        torch.cuda.empty_cache()
        captured(lambda: x.add_(1.0)).replay()
    _same("added", x, torch.full_like(x, 2.0))


# ---- processes


def work(machine: Machine, names: Sequence[str]) -> None:
    """Run those of the checks that are named, or all; a line when one begins and one when it ends."""
    print("ready", flush=True)
    for name, check in checks(machine):
        if names and name not in names:
            continue
        print(f"begin\t{name}", flush=True)
        begin = time.monotonic()
        try:
            check()
            if not machine.dry:
                torch.cuda.synchronize()
        except Exception as e:  # the rest of this process may be spoilt
            text = " ".join(f"{type(e).__name__}: {e}".split())
            print(f"FAIL\t{name}\t{text}", flush=True)
            if lost():
                os._exit(1)
        else:
            print(f"PASS\t{name}\t{time.monotonic() - begin:.2f} s", flush=True)


def supervise(
    command: Sequence[str], names: Sequence[str], kernel_s: float, begin_s: float
) -> Iterable[tuple[str, str, str]]:
    """(PASS or FAIL, name, text) of each check; `command` and names behind it start a process that works."""
    left = list(names)
    while left:
        worker = subprocess.Popen([*command, *left], stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(worker.stdout, lines))
        reader.start()
        current, allowed = left[0], begin_s
        try:
            while left:
                line = lines.get(timeout=allowed)
                if line is None:
                    break
                verdict, *rest = line.rstrip("\n").split("\t")
                allowed = kernel_s
                if verdict == "begin":
                    current = rest[0]
                elif verdict in ("PASS", "FAIL"):
                    left.remove(rest[0])
                    current = left[0] if left else ""
                    yield verdict, rest[0], rest[1]
            if left and worker.wait() == 0:
                raise RuntimeError(f"smoke: expected a check named {left[0]!r}, there is none")
            reason = f"the process ended with {worker.returncode}"
        except queue.Empty:
            reason = f"no answer in {allowed:.0f} s"
        finally:
            worker.kill()
            worker.wait()
            reader.join()
        # An end behind a FAIL that was reported belongs to that one.
        if left and (reason.startswith("no answer") or worker.returncode != 1):
            left.remove(current)
            yield "FAIL", current, reason


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.smoke", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="in the emulator")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--work", nargs="*", metavar="NAME", help="these or all, in this process")
    options = parser.parse_args(arguments)
    machine = emulated_machine() if options.dry_run else this_machine()
    if options.work is not None:
        work(machine, options.work)
        return 0
    names = [n for n, _ in checks(machine) if options.only in n]
    command = [sys.executable, "-m", "bench.gpu.smoke", *(["--dry-run"] if options.dry_run else []), "--work"]
    failed = 0
    # How long the emulator takes says nothing of a kernel.
    seconds = (600.0, 600.0) if options.dry_run else (KERNEL_S, BEGIN)
    for verdict, name, text in supervise(command, names, *seconds):
        print(f"{verdict}  {name}  {text}", flush=True)
        failed += verdict != "PASS"
    print(f"smoke: {len(names) - failed} of {len(names)} passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
