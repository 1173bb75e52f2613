"""The least time that this machine's ceilings allow a kernel.

Model of a panel product: ``t_nnz + t_io``. Each non-zero is a multiply-add with a memory operand for every
position (and a broadcast for every eight vectors), at the rate that the same loop reaches on a panel in L1;
where rows share the loaded vectors, at up to the rate of multiply-adds in registers.
Input and output move once: the input is loaded, transposed into the panel and stored there; the output is
stored; at the rates of the cache level that holds them. The weight streams beside the multiply-adds.
"""

from __future__ import annotations

from pared._machine import Ceilings, Level

__all__ = [
    "conv_int8_limit",
    "conv_limit",
    "expand_limit",
    "int8_limit",
    "linear_limit",
    "read_limit",
]


def linear_limit(
    c: Ceilings, out: int, inputs: int, tokens: int, nnz: int, shared: int = 1, itemsize: int = 4
) -> float:
    """The least seconds that the ceilings allow ``[tokens, inputs] x [out, inputs]^T`` with `nnz` non-zeros.

    `shared` rows use each vector that was loaded: 1 for unstructured weights, 4 for blocks of four rows.
    """
    t_nnz = 2.0 * nnz * tokens / min(c.fma, shared * c.panel)
    x, y = float(itemsize * tokens * inputs), float(itemsize * tokens * out)
    panel = 4.0 * tokens * inputs
    t_io = x / c.level(x / c.threads).load + panel / c.levels[0].store + y / c.level(y / c.threads).store
    return t_nnz + t_io


def int8_limit(c: Ceilings, out: int, inputs: int, tokens: int, nnz: int | None = None) -> float:
    """The least seconds for the int8 product of float32 tokens, quantized on the way in; `nnz`: all of them.

    The products at the rate of registers; the input read twice (for its largest magnitudes, and to round) and
    its bytes written; the output stored. The weight streams beside the products.
    """
    work = 2.0 * tokens * (out * inputs if nnz is None else nnz)
    return _int8_limit(c, work, 4.0 * tokens * inputs, 4.0 * tokens * out)


def conv_int8_limit(
    c: Ceilings, products: float, channels: int, pixels: int, filters: int, outputs: int
) -> float:
    """The same for a convolution of float32 images of `pixels` each to `outputs` each."""
    return _int8_limit(c, 2.0 * products, 4.0 * channels * pixels, 4.0 * filters * outputs)


def _int8_limit(c: Ceilings, work: float, x: float, y: float) -> float:
    level = c.level(x / c.threads)
    t_io = x / level.load + x / c.levels[0].load + x / 4 / c.levels[0].store
    return work / c.dot8 + t_io + y / c.level(y / c.threads).store


def expand_limit(
    c: Ceilings, out: int, inputs: int, tokens: int, nbytes: int, cold: bool, itemsize: int = 4
) -> float:
    """The least seconds for few tokens against a bitmap weight of `nbytes`: the slowest of three things that
    overlap. The weight moves once; every vector (64 bytes when expanded) is expanded once; every token has
    its multiply-adds with it, zeros included.
    """
    vectors = out * inputs * itemsize / 64
    products = 2.0 * out * inputs * tokens / (c.dot8 if itemsize == 1 else c.fma)
    return max(read_limit(c, nbytes, cold), vectors / c.expand, products)


def read_limit(c: Ceilings, nbytes: float, cold: bool) -> float:
    """The least seconds in which `nbytes` are read: from memory if `cold`, else from what holds them."""
    return nbytes / _level(c, nbytes / c.threads, cold).load


def _level(c: Ceilings, nbytes: float, cold: bool) -> Level:
    return c.levels[-1] if cold else c.level(nbytes)


def conv_limit(
    one: Ceilings,
    c: Ceilings,
    *,
    channels: int,
    filters: int,
    kernel: int,
    stride: int,
    size: int,
    images: int,
    nnz: int,
    nbytes: int,
) -> float:
    """The least seconds for a float32 convolution with `nnz` non-zeros in a packed weight of `nbytes`.

    Non-zeros at the rate of a multiply-add with a panel in L1, while the weight streams beside them; the rows
    of the input that the kernel reads, and the output; larger kernels store each input element into the panel
    once a tap. Input, output and weight come from the level that holds what a round of four calls (dense in
    two layouts, packed in two) passes through the caches. `one` are the ceilings of one thread: what a core
    has to itself is that times the threads of `c`, which a busy machine seldom lets them show together.
    """
    positions = images * ((size - 1) // stride + 1) ** 2
    x, y = 4.0 * images * channels * size**2, 4.0 * positions * filters
    w = 4.0 * filters * channels * kernel**2
    moved = (2 * (x + y + w) + nbytes) / c.threads
    load = max(c.level(moved).load, one.level(moved).load)
    store = max(c.level(moved).store, one.level(moved).store)
    t_nnz = max(2.0 * nnz * positions / (c.threads * one.panel), nbytes / load)
    read = x / stride if kernel == 1 else x
    panel = 4.0 * positions * channels * kernel**2 if kernel > 1 else 0.0
    return t_nnz + read / load + panel / (c.threads * one.levels[0].store) + y / store
