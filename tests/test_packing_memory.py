"""Packing a weight takes no more memory than the weight and what it is packed into."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pared import _core, nn, ops
from pared.ops._formats import FORMATS

# A process of its own, without torch: the kernel counts its resident memory, whoever asked for it.
PROGRAM = """
import json, sys
import numpy as np
from pared import ops

def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(name))

rng = np.random.default_rng(0)
w = np.empty((2048, 4096), np.float32)
rng.standard_normal(out=w, dtype=np.float32)
for rows in np.split(w, 512):  # four rows by four inputs are zero or not, which suits blocks too
    rows *= np.repeat(rng.random(1024) < 0.5, 4)
packers = {
    "csr": ops.CSR.from_dense,
    "bsr": lambda w: ops.BSR.from_dense(w, block=(4, 1)),
    "bsr, large blocks": lambda w: ops.BSR.from_dense(w, block=(32, 32)),
    "dense": ops.Dense.from_dense,
    "bitmap": ops.Bitmap.from_dense,
    "bitmap+csr": ops.BitmapCSR.from_dense,
    "int8": ops.Int8.from_dense,
    "bitmap8": ops.Bitmap8.from_dense,
    "bsr8": lambda w: ops.BSRInt8.from_dense(w, block=(1, 4)),
    "bsr8, 4x4": lambda w: ops.BSRInt8.from_dense(w, block=(4, 4)),
    "int4": lambda w: ops.Int4.from_dense(w, group=64),
    "a copy first": lambda w: ops.CSR.from_dense(w.copy()),
}
found = {}
for name, pack in packers.items():
    pack(w[:64])
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak begins anew
    before = status("VmRSS")
    packed = pack(w)
    found[name] = {"peak": status("VmHWM") - before, "packed": packed.nbytes, "dense": w.nbytes}
    del packed
json.dump(found, sys.stdout)
"""


@functools.cache
def measured() -> dict[str, dict[str, int]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        # Freed blocks go back to the system at once, lest the next packing take one that counts already.
        env=os.environ | {"PARED_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


CLEARS = Path("/proc/self/clear_refs")
linux = pytest.mark.skipif(
    not os.access(CLEARS, os.W_OK), reason="the system does not tell of a process's peak memory"
)
# Rows of tables, allocators, pages of 2 MB that begin anywhere.
SLACK = 4 << 20


HERE = [name for name, f in FORMATS.items() if "cpu" in f.devices]


def fits(row: dict[str, int]) -> bool:
    """The dense weight is there before and counts no more."""
    return row["peak"] <= row["packed"] + SLACK


@linux
@pytest.mark.parametrize("name", [*HERE, "bsr, large blocks", "bsr8, 4x4"])
def test_packing_takes_no_more_than_both(name: str) -> None:
    row = measured()[name]
    assert fits(row), row
    assert row["peak"] > 0.9 * row["packed"]  # the peak was seen


@linux
def test_a_copy_would_be_noticed() -> None:
    assert not fits(measured()["a copy first"])


HUGE_PAGE = 2 << 20


def mapping(address: int) -> tuple[bool, int]:
    """Whether the mapping that `address` is in was advised to have huge pages, and its resident bytes."""
    inside, resident = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, end = (int(bound, 16) for bound in name.split("-"))
            inside = first <= address < end
        elif inside and name == "Rss:":
            resident = int(rest[0]) << 10
        elif inside and name == "VmFlags:":
            return "hg" in rest, resident
    raise AssertionError(f"no mapping holds {address:#x}")


huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages to ask for"
)


def address(packed: object) -> int:
    return torch.as_tensor(packed).data_ptr()


def check_huge_pages(packed: object) -> None:
    begin, size = address(packed), torch.as_tensor(packed).nbytes
    assert size >= 128 << 10
    assert begin % 64 == 0
    assert mapping(begin)[0]
    # What is so large that it has a mapping of its own ends in smaller pages.
    end = begin + size if size <= 32 << 20 else (begin + size) // HUGE_PAGE * HUGE_PAGE
    assert mapping(end - 1)[0]


@huge_pages
@pytest.mark.parametrize("shape", [(3072, 2048), (512, 1024), (64, 40000)], ids=str)
@pytest.mark.parametrize("name", HERE)
def test_weights_lie_in_huge_pages(name: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    """Few tokens with weights from memory run 1.1 to 1.5 times as fast so."""
    w = rng.standard_normal(shape).astype(np.float32)
    check_huge_pages(FORMATS[name].weight.from_dense(w).packed)


@huge_pages
def test_so_do_copies_and_what_is_loaded(rng: np.random.Generator) -> None:
    w = rng.standard_normal((1024, 1024)).astype(np.float32)
    for given in (w, torch.from_numpy(w)):
        check_huge_pages(copy.deepcopy(ops.Dense.from_dense(given)).packed)
    one, other = (nn.Linear(ops.Dense.from_dense(torch.from_numpy(v))) for v in (w, 2 * w))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.packed, other.packed)
    check_huge_pages(one.packed)


@huge_pages
def test_weights_share_pages_and_give_them_back(rng: np.random.Generator) -> None:
    """Layers smaller than a huge page lie behind each other; one that goes leaves no hole for good."""
    packed = ops.Int8.from_dense(rng.standard_normal((768, 768)).astype(np.float32)).packed
    many = [_core.packed_copy(packed) for _ in range(40)]  # 24 MB: they find no old gap
    begins = sorted(address(p) for p in many)
    behind = [b - a for a, b in itertools.pairwise(begins)]
    assert statistics.median(behind) == packed.nbytes  # no padding to pages
    first, middle = begins[0], address(many[20])
    _, before = mapping(middle)
    for p in many[10:30]:
        assert np.array_equal(p, packed)
    del many[10:30], p
    _, after = mapping(middle)
    assert before - after >= 20 * packed.nbytes - 2 * HUGE_PAGE
    again = _core.packed_copy(packed)
    assert first <= address(again) <= begins[-1]
    assert np.array_equal(again, packed)
    assert all(np.array_equal(p, packed) for p in many)


@huge_pages
def test_weights_that_come_and_go_keep_to_their_own(rng: np.random.Generator) -> None:
    """No weight is where another one is."""
    rows = [8, 64, 500, 1000, 2000]
    packed = {n: ops.Int8.from_dense(rng.standard_normal((n, 1024)).astype(np.float32)).packed for n in rows}
    held: list[tuple[int, np.ndarray]] = []
    for _ in range(2000):
        if len(held) > 30 or (held and rng.random() < 0.45):
            n, p = held.pop(int(rng.integers(len(held))))
            assert np.array_equal(p, packed[n])
        else:
            n = int(rng.choice(rows))
            held.append((n, _core.packed_copy(packed[n])))
    spans = sorted((address(p), address(p) + p.nbytes) for _, p in held)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(np.array_equal(p, packed[n]) for n, p in held)


# A process of its own: no weight was there before.
GAPS = """
import numpy as np
from pared import _core, ops

def packed(rows):
    return ops.Int8.from_dense(np.ones((rows, 768), np.float32)).packed

small = packed(768)
many = [_core.packed_copy(small) for _ in range(40)]
first, end = many[10].ctypes.data, many[30].ctypes.data
order = [*range(10, 30, 2), *range(29, 10, -2)]  # next to none, then between two
for i in order:
    many[i] = None
large = packed(15 * 768)
assert first <= large.ctypes.data and large.ctypes.data + large.nbytes <= end
"""


@huge_pages
def test_gaps_that_meet_become_one() -> None:
    subprocess.run([sys.executable, "-c", GAPS], check=True, timeout=120)


@pytest.mark.parametrize("sanitizer", [True, False], ids=["thread sanitizer", "forks"])
def test_threads_and_children_get_memory_for_weights(tmp_path: Path, sanitizer: bool) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    root = Path(__file__).parents[1]
    binary = tmp_path / "stress"
    sources = [root / "tests" / "weight_memory_stress.cc", root / "csrc" / "core" / "weight_memory.cc"]
    command = [compiler, "-std=c++17", "-O1", "-g", "-I", root / "csrc", *sources]
    subprocess.run([*command, *["-fsanitize=thread"] * sanitizer, "-o", binary, "-pthread"], check=True)
    forks = [] if sanitizer else ["forks"]
    run = subprocess.run([binary, *forks], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr + run.stdout
    assert run.stdout == "ok\n"
