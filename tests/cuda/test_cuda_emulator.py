"""The emulator finds the faults that it is there for, and agrees with the hardware on ptx.h."""

from __future__ import annotations

import numpy as np
import pytest
import torch

FAULTS = {
    "half_of_a_barrier": r"\(the first is 32\) have ended; 32 threads \(the first is 0\) wait at barrier 0",
    "two_barriers": r"some threads are at this __syncthreads, others in faults.cu:\d+",
    "left_before_the_barrier": r"1 threads \(the first is 63\) have ended",
    "missing_lane": r"wait at __shfl_sync in faults.cu:\d+ for lanes 0xffffffff",
    "lane_outside_its_mask": "the calling lane is not in its mask",
    "reads_outside_the_mask": "a shuffle reads from a lane that is not in its mask",
    "different_shuffles": r"32 threads \(the first is 1\) wait at __shfl_sync",
    "more_static_than_thought": "53248 bytes of static and dynamic shared memory, where 49152 are granted",
    "writes_behind_shared": "wrote behind its dynamic shared memory",
    "misaligned_load": "misaligned address",
    "bulk_copy_nobody_awaits": "a bulk copy for which nobody has waited",
    "mbarrier_nobody_completes": "wait at an mbarrier",
    "wgmma_off_the_swizzle": "wgmma: expected an operand at a multiple of 1024 bytes",
}
# Found where all accesses are noted: test_cuda_banks.py.
NOTED = {"wgmma_without_fence", "bulk_copy_over_written", "missing_syncwarp", "filled_while_read"}
SILENT = {"shared_never_written", "copy_never_awaited", "missing_barrier", "order_of_blocks"}


@pytest.fixture(params=[0, 1, 7])
def order(emulated, request):
    emulated.set_order(request.param)
    yield request.param
    emulated.set_order(0)


def test_every_fault_has_its_test(emulated):
    others = {name for name in emulated.fault_names() if not name.startswith("turns_")}  # test_cuda_banks.py
    assert others == FAULTS.keys() | SILENT | NOTED


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_an_error_that_names_kernel_and_place(emulated, order, name):
    if emulated.SANITIZED and name in {"writes_behind_shared", "misaligned_load"}:
        pytest.skip("the sanitizers end the process at this fault")
    with pytest.raises(RuntimeError, match=rf"^{name}: block 0,0,0: .*({FAULTS[name]})"):
        emulated.run_fault(name)
    # The machine is as good as new.
    with pytest.raises(RuntimeError, match="the calling lane is not in its mask"):
        emulated.run_fault("lane_outside_its_mask")


@pytest.mark.parametrize("name", ["shared_never_written", "copy_never_awaited"])
def test_what_was_never_written_is_poison(emulated, order, name):
    got = np.array(emulated.run_fault(name), np.uint32)
    assert np.all(got == 0xFFFFFFFF)
    assert np.all(np.isnan(got.view(np.float32)))


def test_the_order_of_threads_and_blocks_reveals_a_race(emulated):
    def outcomes(name):
        try:
            seen = []
            for seed in range(4):
                emulated.set_order(seed)
                seen.append(tuple(emulated.run_fault(name)))
            return seen
        finally:
            emulated.set_order(0)

    for name in ("missing_barrier", "order_of_blocks"):
        first, *others = outcomes(name)
        assert any(other != first for other in others), name


def test_unknown_names(emulated):
    with pytest.raises(ValueError, match="name: expected the name of a fault, got 'x'"):
        emulated.run_fault("x")
    with pytest.raises(ValueError, match="name: expected the name of a check, got 'x'"):
        emulated.self_check("x", 0, 0, 0, 0, 0)


# ---- ptx.h


def check(backend, name, a, b, c):
    """What a check makes of `c`."""
    tensors = [None if t is None else torch.tensor(t, device=backend.device) for t in (a, b, c)]
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    backend.module.self_check(name, *pointers, 0, backend.stream)
    return tensors[2].cpu().numpy()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_mma_of_16_bits(backend, rng, dtype):
    # Small integers: exact in every type and order of summation, so that only the fragments can be wrong.
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (8, 16))
    c = rng.integers(-99, 100, (16, 8)).astype(np.float32)
    bits = [torch.from_numpy(x).to(kind).view(torch.int16).numpy() for x in (a, b)]
    np.testing.assert_array_equal(check(backend, f"mma_{dtype}", *bits, c), c + a @ b.T)


def test_mma_of_int8(backend, rng):
    a, b = (rng.integers(-128, 128, (n, 32)).astype(np.int8) for n in (16, 8))
    c = rng.integers(-(10**6), 10**6, (16, 8)).astype(np.int32)
    np.testing.assert_array_equal(
        check(backend, "mma_s8", a, b, c), c + a.astype(np.int32) @ b.T.astype(np.int32)
    )


def test_tickets_need_no_cleared_counters(backend, rng):
    number, stale = 0x0123456789 << 24, 0x0123456788 << 24
    random = rng.integers(0, 1 << 63, 8)
    for before in (0, -1, number, number + 5, number + 6, stale + 3, stale + 5, random):
        counters = np.zeros((2, 8), np.int64)
        counters[0] = before
        # The second time as a graph that is replayed.
        for runs in (1, 2):
            counters = check(backend, "tickets", np.array([number]), None, counters)
            np.testing.assert_array_equal(counters, [[number + 5] * 8, [runs] * 8])


def test_load_matrices(backend):
    a = np.arange(256, dtype=np.int16).reshape(4, 8, 8)  # [matrix, row, column]
    got = (
        check(backend, "load_matrices", a, None, np.zeros((12, 32), np.int32))
        .view(np.int16)
        .reshape(12, 32, 2)
    )
    lanes = a.reshape(4, 32, 2)  # lane 4 r + t holds columns 2t and 2t + 1 of row r
    turned = np.ascontiguousarray(a.transpose(0, 2, 1)).reshape(4, 32, 2)
    np.testing.assert_array_equal(got, np.concatenate([lanes, lanes[:2], turned, turned[:2]]))


def test_words(backend, rng):
    x, y, z = words = rng.integers(0, 1 << 32, (3, 32), dtype=np.uint64)
    got = check(backend, "words", words.astype(np.uint32).view(np.int32), None, np.zeros((19, 32), np.int32))
    lanes = np.arange(32)
    eight = np.concatenate([[v >> (8 * i) & 255 for i in range(4)] for v in (x, y)])
    permuted = sum(eight[z >> (4 * i) & 7, lanes] << (8 * i) for i in range(4))
    memory = x.astype(np.uint32).view(np.uint8).astype(np.uint64)
    at = y % 126
    even = at & ~np.uint64(1)
    bytes_x, bytes_y = eight[:4], eight[4:]
    taken, some, more = (at & 0x78) // 4, y >> 3 & 1, z >> 3 & 1
    want = [
        (x & y) | z,
        (x ^ y) | z,
        permuted,
        *(x + np.where(lanes >= d, np.roll(x, d), 0) for d in (1, 16)),
        memory[at],
        memory[even] + 256 * memory[even + 1],
        z + (bytes_x * bytes_y).sum(0),
        z + (x & 0xFFFF) * bytes_y[0] + (x >> 16) * bytes_y[1],
        z + (x & 0xFFFF) * bytes_y[2] + (x >> 16) * bytes_y[3],
        x[taken] * some,
        x[taken + some] * more,
        4 * (taken + some + more),
        *(x[(at >> 3) * 2 + i] for i in range(2)),
        *(x[(at >> 4) * 4 + i] for i in range(4)),
    ]
    np.testing.assert_array_equal(got.view(np.uint32), np.stack(want).astype(np.uint32))


@pytest.mark.parametrize("name", ["copy_async", "copy_bulk"])
def test_pipelined_copies(backend, rng, name):
    if name == "copy_bulk" and backend.device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        return  # bulk copies came with 9.0; there is nothing to compare with before it
    a = rng.integers(0, 1 << 20, (7, 256)).astype(np.int32)
    np.testing.assert_array_equal(check(backend, name, a, None, np.zeros(256, np.int32)), a.sum(axis=0))
