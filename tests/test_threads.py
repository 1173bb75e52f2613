"""Operations called from many Python threads at once give what they give alone, to the bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pared import ops

RNG = np.random.default_rng(5)


def array(*shape: int, density: float = 1.0) -> Any:
    return (RNG.standard_normal(shape) * (RNG.random(shape) < density)).astype(np.float32)


W, SQUARE, FILTERS = array(96, 80, density=0.3), array(80, 96, density=0.3), array(24, 8, 3, 3, density=0.3)
# Of several sizes: threads meet in each other's scratch memory if it is shared.
INPUTS = [array(n, 80) for n in (1, 3, 40, 130)]
IMAGES = [array(1, 8, n, n + 3) for n in (4, 9, 20)]
KEYS = [array(n) for n in (50, 3000, 40_000)]
HEADS = [array(1, 4, n, 16) for n in (1, 17, 70)]
FORMATS = [getattr(ops, n) for n in ops.__all__ if hasattr(getattr(ops, n), "from_dense")]
LINEAR = [f for f in FORMATS if f is not ops.PackedWeight]


def linear(format: Any) -> list[Callable[[], Any]]:
    weight = format.from_dense(W)
    return [lambda x=x: ops.linear(x, weight, activation="gelu") for x in INPUTS]


def conv(format: Any) -> list[Callable[[], Any]]:
    weight = format.from_dense(FILTERS)
    return [lambda x=x, s=s: ops.conv2d(x, weight, stride=s, padding=1) for x in IMAGES for s in (1, 2)]


def chain(format: Any) -> list[Callable[[], Any]]:
    weights = [format.from_dense(W), format.from_dense(SQUARE)]
    return [lambda x=x: ops.linear_chain(x, weights, activations=["relu", None]) for x in INPUTS]


WORK: dict[str, Callable[[], list[Callable[[], Any]]]] = {
    **{f"linear {f.__name__}": lambda f=f: linear(f) for f in LINEAR},
    **{f"conv2d {f.__name__}": lambda f=f: conv(f) for f in (ops.CSR, ops.BSR, ops.Int8, ops.BSRInt8)},
    **{f"chain {f.__name__}": lambda f=f: chain(f) for f in (ops.CSR, ops.Int8, ops.BSRInt8)},
    "pack": lambda: [lambda f=f: np.asarray(f.from_dense(W).packed) for f in LINEAR],
    "gemm_s8": lambda: [
        lambda x=x: ops.gemm_s8((x * 40).astype(np.int8), (W * 40).astype(np.int8)) for x in INPUTS
    ],
    "attention": lambda: [
        lambda q=q, c=c: ops.attention(q, q, q, is_causal=c) for q in HEADS for c in (False, True)
    ],
    "max_pool2d": lambda: [lambda x=x, s=s: ops.max_pool2d(x, 3, s, 1) for x in IMAGES for s in (1, 2)],
    "layer_norm": lambda: [lambda x=x: ops.layer_norm(x, residual=x) for x in INPUTS],
    "topk_mask": lambda: [lambda x=x: ops.topk_mask(x, x.size // 3) for x in KEYS],
    "topk_mask, rows": lambda: [lambda x=x: ops.topk_mask(x, 20, dim=1) for x in INPUTS],
    "topk": lambda: [lambda x=x: np.concatenate(ops.topk(x, x.size // 5)) for x in KEYS],
    "block_mask": lambda: [lambda x=x: ops.block_mask(x, 7) for x in INPUTS],
    "nm_mask": lambda: [lambda x=x: ops.nm_mask(x, 2, 4) for x in INPUTS],
}


def disagreements(calls: list[Callable[[], Any]], threads: int = 6, rounds: int = 6) -> list[int]:
    """Which calls gave something else than alone, or raised, when all threads made all of them."""
    expected = [call() for call in calls]
    wrong: list[int] = []
    together = threading.Barrier(threads)

    def run(first: int) -> None:
        together.wait()
        for turn in range(rounds * len(calls)):
            i = (first + turn) % len(calls)
            try:
                same = np.array_equal(calls[i](), expected[i], equal_nan=True)
            except Exception:
                same = False
            if not same:
                wrong.append(i)

    workers = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    return sorted(set(wrong))


@pytest.mark.parametrize("torch_threads", [1, 2])
@pytest.mark.parametrize("work", WORK)
def test_many_threads_get_what_one_gets(work: str, torch_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        assert not disagreements(WORK[work]())
    finally:
        torch.set_num_threads(before)


def test_different_operations_at_once() -> None:
    assert not disagreements([call for work in WORK.values() for call in work()], threads=4, rounds=1)


def test_every_public_function_is_there() -> None:
    told = " ".join(WORK)
    functions = {n for n in ops.__all__ if n.islower() and n not in ("select_threshold", "linear_chain")}
    assert {f for f in functions if f not in told} == set()


def test_scratch_memory_that_threads_share_is_noticed() -> None:
    shared = np.zeros(4)

    def call(n: int) -> Any:
        shared[:] = n
        time.sleep(1e-4)  # another thread's turn
        return shared.copy()

    assert disagreements([lambda n=n: call(n) for n in range(4)])
