"""Packing a weight takes no more memory than the weight and what it is packed into."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pared import nn, ops
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


def wants_huge_pages(address: int) -> bool:
    """Whether the mapping that `address` is in was advised so."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, end = (int(bound, 16) for bound in name.split("-"))
            inside = first <= address < end
        elif inside and name == "VmFlags:":
            return "hg" in rest
    raise AssertionError(f"no mapping holds {address:#x}")


huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages to ask for"
)


def check_huge_pages(address: int, size: int) -> None:
    assert size >= HUGE_PAGE
    assert address % HUGE_PAGE == 0
    assert wants_huge_pages(address)
    assert wants_huge_pages(address + size // HUGE_PAGE * HUGE_PAGE - 1)


@huge_pages
@pytest.mark.parametrize("name", HERE)
def test_large_weights_lie_in_huge_pages(name: str, rng: np.random.Generator) -> None:
    """Few tokens with weights from memory run 1.1 to 1.5 times as fast so."""
    w = rng.standard_normal((3072, 2048)).astype(np.float32)
    packed = FORMATS[name].weight.from_dense(w).packed
    check_huge_pages(packed.ctypes.data, packed.nbytes)


@huge_pages
def test_so_do_copies_and_what_is_loaded(rng: np.random.Generator) -> None:
    w = rng.standard_normal((1024, 1024)).astype(np.float32)
    for given in (w, torch.from_numpy(w)):
        copied = copy.deepcopy(ops.Dense.from_dense(given)).packed
        check_huge_pages(torch.as_tensor(copied).data_ptr(), copied.nbytes)
    one, other = (nn.Linear(ops.Dense.from_dense(torch.from_numpy(v))) for v in (w, 2 * w))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.packed, other.packed)
    check_huge_pages(one.packed.data_ptr(), one.packed.nbytes)
