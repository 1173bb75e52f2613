"""Operations called from many Python threads at once give what they give alone, to the bit.

Without a global interpreter lock all of it runs at once; with one the kernels do.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pared
from pared import _core, ops

try:
    import torch
except ImportError:  # there are no wheels for every Python; pared's own pool runs the loops then
    torch = None  # type: ignore[assignment]

Call = Callable[[], Any]
RNG = np.random.default_rng(5)
UNIT = 2.0**-24  # float32's unit roundoff


def array(*shape: int, density: float = 1.0) -> Any:
    return (RNG.standard_normal(shape) * (RNG.random(shape) < density)).astype(np.float32)


W, SQUARE, FILTERS = array(96, 80, density=0.3), array(80, 96, density=0.3), array(24, 8, 3, 3, density=0.3)
# Of several sizes: threads meet in each other's scratch memory if it is shared.
INPUTS = [array(n, 80) for n in (1, 3, 40, 130, 700)]
IMAGES = [array(1, 8, n, n + 3) for n in (4, 9, 20)]
KEYS = [array(n) for n in (50, 3000, 40_000)]
HEADS = [array(1, 4, n, 16) for n in (1, 17, 70)]
FORMATS = [getattr(ops, n) for n in ops.__all__ if hasattr(getattr(ops, n), "from_dense")]
LINEAR = [f for f in FORMATS if f is not ops.PackedWeight]


def linear(format: Any) -> list[Call]:
    weight = format.from_dense(W)
    return [lambda x=x: ops.linear(x, weight, activation="gelu") for x in INPUTS]


def own_weight(format: Any) -> list[Call]:
    """Each call packs a weight for itself."""
    return [lambda x=x: ops.linear(x, format.from_dense(W)) for x in INPUTS]


def conv(format: Any) -> list[Call]:
    weight = format.from_dense(FILTERS)
    return [lambda x=x, s=s: ops.conv2d(x, weight, stride=s, padding=1) for x in IMAGES for s in (1, 2)]


def chain(format: Any) -> list[Call]:
    weights = [format.from_dense(W), format.from_dense(SQUARE)]
    return [lambda x=x: ops.linear_chain(x, weights, activations=["relu", None]) for x in INPUTS]


def shared(format: Any) -> list[Call]:
    """Two weights on one input, as layers that share it call them."""
    packed = [format.from_dense(W).packed for _ in range(2)]

    def call(x: Any) -> Any:
        out = [np.empty((len(x), len(W)), np.float32) for _ in packed]
        _core.linear_shared(x, packed, [None, None], out, ["", "relu"])
        return out

    return [lambda x=x: call(x) for x in INPUTS]


def weight_itself(format: Any) -> list[Call]:
    """What does not multiply, on one weight of all threads."""
    weight = format.from_dense(W)

    def validate() -> Any:
        weight.validate()
        return [weight.nnz, *weight.shape, weight.nbytes, weight.sparsity]

    return [
        weight.to_dense,
        validate,
        lambda: np.asarray(format.from_dense(W).packed),
        *(
            lambda c=c: np.asarray(c(weight).packed)
            for c in (copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)))
        ),
    ]


def refusals() -> list[Call]:
    """Errors of several threads at once are each thread's own."""

    def text(call: Call) -> str:
        with pytest.raises((TypeError, ValueError)) as e:
            call()
        return str(e.value)

    weight, masked = ops.CSR.from_dense(W), np.ma.masked_array(INPUTS[1])
    wrong: list[Call] = [
        *(lambda n=n: ops.linear(np.zeros((2, n), np.float32), weight) for n in range(4)),
        lambda: ops.linear(masked, weight),
        lambda: ops.linear(INPUTS[0], weight, activation="tanh"),
        lambda: ops.CSR(np.zeros(64, np.uint8)),
        lambda: ops.topk_mask(KEYS[0], 51),
    ]
    return [lambda call=call: text(call) for call in wrong]


def what_runs_here() -> list[Call]:
    return [
        lambda: [pared.isa(), _core.parallel_backend(), _core.cpu_brand(), *_core.supported_isas()],
        lambda: [str(k) for k in pared.kernels()],
        _core.num_threads,
    ]


WORK: dict[str, Callable[[], list[Call]]] = {
    **{f"linear {f.__name__}": lambda f=f: linear(f) for f in LINEAR},
    **{f"own weight {f.__name__}": lambda f=f: own_weight(f) for f in LINEAR},
    **{f"weight {f.__name__}": lambda f=f: weight_itself(f) for f in LINEAR},
    **{f"conv2d {f.__name__}": lambda f=f: conv(f) for f in (ops.CSR, ops.BSR, ops.Int8, ops.BSRInt8)},
    **{f"linear_chain {f.__name__}": lambda f=f: chain(f) for f in (ops.CSR, ops.Int8, ops.BSRInt8)},
    **{f"shared {f.__name__}": lambda f=f: shared(f) for f in (ops.CSR, ops.Int8, ops.Bitmap8, ops.BSRInt8)},
    "gemm_s8": lambda: [
        lambda x=x: ops.gemm_s8((x * 40).astype(np.int8), (W * 40).astype(np.int8)) for x in INPUTS
    ],
    "attention": lambda: [
        lambda q=q, c=c: ops.attention(q, q, q, is_causal=c) for q in HEADS for c in (False, True)
    ],
    "max_pool2d": lambda: [lambda x=x, s=s: ops.max_pool2d(x, 3, s, 1) for x in IMAGES for s in (1, 2)],
    "layer_norm": lambda: [lambda x=x: ops.layer_norm(x, residual=x) for x in INPUTS],
    "select_threshold": lambda: [lambda x=x: ops.select_threshold([x, x[:9]], x.size // 3) for x in KEYS],
    "topk_mask": lambda: [lambda x=x: ops.topk_mask(x, x.size // 3) for x in KEYS],
    "topk_mask, rows": lambda: [lambda x=x: ops.topk_mask(x, 20, dim=1) for x in INPUTS],
    "topk": lambda: [lambda x=x: np.concatenate(ops.topk(x, x.size // 5)) for x in KEYS],
    "block_mask": lambda: [lambda x=x: ops.block_mask(x, 7) for x in INPUTS],
    "nm_mask": lambda: [lambda x=x: ops.nm_mask(x, 2, 4) for x in INPUTS],
    "refusals": refusals,
    "what runs here": what_runs_here,
}


FEW, MANY = (3, 1024, 2048), (300, 192, 160)


def product(format: Any, tokens: int, rows: int, cols: int) -> Call:
    return partial(ops.linear, array(tokens, cols), format.from_dense(array(rows, cols)), array(rows))


def packing(format: Any) -> Call:
    weight = array(1024, 1024, density=0.3)
    return lambda: np.asarray(format.from_dense(weight).packed)


def two_layers(format: Any) -> Call:
    weights = [format.from_dense(array(192, 128)), format.from_dense(array(128, 192))]
    return partial(ops.linear_chain, array(300, 128), weights, activations=["gelu", None])


# One call with work for several threads.
SHARED: dict[str, Callable[[], Call]] = {
    **{f"linear {f.__name__}": lambda f=f: product(f, *MANY) for f in LINEAR},
    **{f"linear {f.__name__}, few tokens": lambda f=f: product(f, *FEW) for f in LINEAR},
    **{f"packing {f.__name__}": lambda f=f: packing(f) for f in LINEAR},
    **{
        f"conv2d {f.__name__}": lambda f=f: partial(
            ops.conv2d, array(2, 16, 72, 72), f.from_dense(array(64, 16, 3, 3)), stride=2, padding=1
        )
        for f in (ops.CSR, ops.BSR, ops.Int8, ops.BSRInt8)
    },
    **{f"linear_chain {f.__name__}": lambda f=f: two_layers(f) for f in (ops.CSR, ops.Int8, ops.BSRInt8)},
    "gemm_s8": lambda: partial(ops.gemm_s8, *((array(n, 256) * 40).astype(np.int8) for n in (300, 192))),
    "attention": lambda: partial(ops.attention, *(array(2, 4, 128, 32) for _ in range(3))),
    "max_pool2d": lambda: partial(ops.max_pool2d, array(2, 64, 60, 60), 3, 2, 1),
    "layer_norm": lambda: partial(ops.layer_norm, array(700, 512)),
    "select_threshold": lambda: partial(ops.select_threshold, array(2_000_000), 100_000),
    "topk_mask": lambda: partial(ops.topk_mask, array(2_000_000), 100_000),
    "topk_mask, rows": lambda: partial(ops.topk_mask, array(1000, 1000), 100, dim=1),
    "topk": lambda: partial(ops.topk, array(2_000_000), 100_000),
    "block_mask": lambda: partial(ops.block_mask, array(1000, 1000), 5000),
    "nm_mask": lambda: partial(ops.nm_mask, array(1000, 1000), 2, 4),
}


def same_bits(got: Any, expected: Any) -> bool:
    return np.array_equal(got, expected)


def near(got: Any, expected: Any, products: int) -> bool:
    """Sums of so many products in another order."""
    return bool(np.allclose(got, expected, rtol=0, atol=2 * (products + 12) * UNIT * np.abs(expected).max()))


def disagreements(
    calls: list[Call],
    threads: int = 6,
    rounds: int = 6,
    same: Callable[[Any, Any], bool] = same_bits,
    expected: list[Any] | None = None,
) -> list[int]:
    """Which calls gave something else than alone, or raised, when all threads made all of them."""
    alone = [call() for call in calls] if expected is None else expected
    wrong: list[int] = []
    together = threading.Barrier(threads)

    def run(first: int) -> None:
        together.wait()
        for turn in range(rounds * len(calls)):
            i = (first + turn) % len(calls)
            try:
                agrees = same(calls[i](), alone[i])
            except Exception:
                agrees = False
            if not agrees:
                wrong.append(i)

    workers = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # with an interpreter lock: hand it on, so that calls are under way together
    try:
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    finally:
        sys.setswitchinterval(interval)
    return sorted(set(wrong))


@pytest.fixture(params=["pared's pool"] if torch is None else [1, 2])
def pool(request: pytest.FixtureRequest) -> Iterator[None]:
    """Who runs the loops: torch's pool of one or two threads, or pared's own."""
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("work", WORK)
def test_many_threads_get_what_one_gets(work: str, pool: None) -> None:
    assert not disagreements(WORK[work]())


def test_different_operations_at_once() -> None:
    assert not disagreements([call for work in WORK.values() for call in work()], threads=4, rounds=1)


@pytest.mark.parametrize("table", [WORK, SHARED], ids=["many callers", "one call"])
def test_every_public_function_is_there(table: dict[str, Any]) -> None:
    told = {word for name in table for word in name.replace(",", "").split()}
    assert {n for n in ops.__all__ if n.islower()} <= told


@pytest.mark.parametrize("name", SHARED)
def test_threads_that_share_a_call_give_what_one_gives(name: str) -> None:
    """Without torch two calls of several threads: for the thread sanitizer to look at."""
    call, threads = SHARED[name](), 1 if torch is None else torch.get_num_threads()
    found = []
    try:
        for n in (1, 4):
            if torch is not None:
                torch.set_num_threads(n)
            found.append(call())
    finally:
        if torch is not None:
            torch.set_num_threads(threads)
    # The tokens that go through a chain together depend on the threads, the order of a sum on their number.
    assert near(*found, 128 + 192) if name == "linear_chain CSR" else same_bits(*found)


WHICH_ARE_SHARED = """
import os, sys
sys.modules["torch"] = None
sys.path.insert(0, sys.argv[1])
import test_threads

test_threads._core.set_parallel_backoff(False)
calls = {name: make() for name, make in test_threads.SHARED.items()}
calls["a small one"] = test_threads.WORK["linear CSR"]()[0]
for name, call in calls.items():
    if os.fork():
        os.wait()
    else:  # alone, and without workers until there is work for them
        assert len(os.listdir("/proc/self/task")) == 1
        call()
        print(name, len(os.listdir("/proc/self/task")), sep=": ", flush=True)
        os._exit(0)
"""


def test_several_threads_share_such_a_call() -> None:
    env = os.environ | {"PARED_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"}
    told = in_new_process(WHICH_ARE_SHARED, str(Path(__file__).parent), env=env).split("\n")
    threads = {name: int(n) for name, _, n in (line.rpartition(": ") for line in told if line)}
    assert threads.pop("a small one") == 1
    assert threads.keys() == SHARED.keys()
    assert not [name for name, n in threads.items() if n == 1]


@contextlib.contextmanager
def changing_levels() -> Iterator[None]:
    """Another thread sets one instruction-set level after the other all the time."""
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for level in _core.supported_isas():
                _core.set_isa(level)
                time.sleep(1e-5)

    before, changer = _core.isa(), threading.Thread(target=change)
    changer.start()
    try:
        yield
    finally:
        done.set()
        changer.join()
        _core.set_isa(before)


def test_a_level_that_changes_meanwhile() -> None:
    """A call may take kernels of several levels then: what one hands to the next is laid out alike on all."""
    calls = [call for name, work in WORK.items() if name != "what runs here" for call in work()]
    before, everywhere = _core.isa(), []
    for level in _core.supported_isas():
        _core.set_isa(level)
        everywhere.append([call() for call in calls])
    _core.set_isa(before)
    # What is the same on every level stays so. The rest are sums of 64 to 96 products.
    exact = [all(same_bits(r[i], everywhere[0][i]) for r in everywhere) for i in range(len(calls))]
    assert sum(exact) > len(calls) // 3

    def agrees(got: Any, known: tuple[bool, Any]) -> bool:
        is_exact, one = known
        return same_bits(got, one) if is_exact else near(got, one, 96)

    known = list(zip(exact, everywhere[0], strict=True))
    with changing_levels():
        assert not disagreements(calls, threads=3, rounds=1, same=agrees, expected=known)


def test_a_call_that_needs_one_level_is_noticed() -> None:
    def call() -> bool:
        first = _core.isa()
        time.sleep(1e-3)
        return _core.isa() == first

    with changing_levels():
        noticed = disagreements([call], rounds=20, expected=[True])
    assert noticed or _core.supported_isas() == ["scalar"]


def test_scratch_memory_that_threads_share_is_noticed() -> None:
    shared = np.zeros(4)

    def call(n: int) -> Any:
        shared[:] = n
        time.sleep(1e-4)  # another thread's turn
        return shared.copy()

    assert disagreements([lambda n=n: call(n) for n in range(4)])


FIRST_USE = """
import sys, threading, warnings
locked = getattr(sys, "_is_gil_enabled", lambda: True)()
warnings.simplefilter("error")  # an extension that needs the lock says so
import numpy as np

together = threading.Barrier(8)
results, errors = [], []

def first_use():
    try:
        together.wait()
        import pared
        w = pared.ops.CSR.from_dense(np.arange(48 * 64, dtype=np.float32).reshape(48, 64) % 5)
        y = pared.ops.linear(np.ones((300, 64), np.float32), w)
        m = pared.ops.topk_mask(np.arange(300_000, dtype=np.float32), 1000)
        results.append((y.tobytes(), m.tobytes(), pared.isa(), len(pared.kernels())))
    except BaseException as e:
        errors.append(e)

threads = [threading.Thread(target=first_use) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not errors, errors
assert len(results) == 8 and len(set(results)) == 1
assert getattr(sys, "_is_gil_enabled", lambda: True)() == locked
"""


def in_new_process(code: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_first_use_by_many_threads_at_once() -> None:
    """What is looked up once, is looked up by all of them; and importing leaves the lock off."""
    in_new_process(FIRST_USE)


TORCH_ARRIVES = """
import threading, time
import numpy as np
from pared import _core, ops

w = ops.CSR.from_dense(np.arange(96 * 64, dtype=np.float32).reshape(96, 64) % 5)
x = np.ones((300, 64), np.float32)
expected = ops.linear(x, w)
done, wrong = threading.Event(), []

def work():
    try:
        while not done.is_set():
            wrong.extend([] if np.array_equal(ops.linear(x, w), expected) else [1])
            time.sleep(2e-3)  # the import needs the interpreter too
    except BaseException as e:
        wrong.append(e)

threads = [threading.Thread(target=work) for _ in range(2)]
for t in threads: t.start()
import torch
assert _core.parallel_backend() == "torch"
y = ops.linear(torch.from_numpy(x), w.from_dense(torch.from_numpy(w.to_dense())))
done.set()
for t in threads: t.join()
assert not wrong, wrong
assert np.array_equal(y.numpy(), expected)
"""


@pytest.mark.skipif(torch is None, reason="no torch here")
def test_torch_is_imported_while_threads_compute() -> None:
    """Loops change from one pool to the other, and arrays are numpy's until torch is whole."""
    in_new_process(TORCH_ARRIVES)
