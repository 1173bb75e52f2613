"""Use pared's operations on numpy arrays: no model, and torch is never imported.

python examples/functional_numpy.py
"""

import sys
import time

import numpy as np

import pared


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form, as GPT-2 has it."""
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def seconds(f, rounds: int = 20) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((1024, 512), dtype=np.float32)
    bias = rng.standard_normal(1024, dtype=np.float32)
    x = rng.standard_normal((256, 512), dtype=np.float32)

    # Keep the tenth of the weights that is largest in magnitude: exactly that many, ties to the lowest index.
    mask = pared.ops.topk_mask(w, w.size // 10)
    w = np.where(mask, w, np.float32(0))
    print(f"kept {mask.sum()} of {w.size} weights")

    # Pack once, use many times. The bias and the activation are part of the same pass over the output.
    packed = pared.ops.CSR.from_dense(w)
    print(packed)
    y = pared.ops.linear(x, packed, bias, activation="gelu_tanh")

    expected = gelu(x.astype(np.float64) @ w.T.astype(np.float64) + bias)
    error = np.abs(y - expected).max()
    print(f"largest difference to float64: {error:.1e}")
    assert error < 1e-4

    dense = seconds(lambda: x @ w.T + bias)
    sparse = seconds(lambda: pared.ops.linear(x, packed, bias))
    print(f"numpy {dense * 1e3:.3f} ms, pared {sparse * 1e3:.3f} ms, ratio {dense / sparse:.1f}")

    # 2:4: the two largest of every four along the input axis.
    print("2:4 keeps", pared.ops.nm_mask(w, 2, 4).mean())
    # The three largest, sorted.
    values, indices = pared.ops.topk(w.ravel(), 3)
    print("largest:", values, "at", indices)
    # What scipy has, goes in and comes out, without a dense array in between.
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
