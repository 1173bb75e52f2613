"""Checks the machine code of the CUDA part: what speed rests on is there, local memory is not, and what the
last block of a grid reads of the others is behind fences, which the emulator cannot miss.

    python tools/check_sass.py build/cuda/_cuda_kernels*.so

Needs cuobjdump and nvdisasm, of the toolkit or of nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm. `make cuda`
runs it. A compiler that unrolls an array's loop no more, or splits a 16-byte copy, fails here, not as a
benchmark of some later day.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Expect(NamedTuple):
    kernel: str  # of the mangled name
    instructions: tuple[str, ...]  # regular expressions; each has to occur
    from_sm: int = 80


COPY = r"LDGSTS\.E\.BYPASS\.128"  # cp.async of 16 bytes, past L1
LOAD = r"LDG\.E\.(NA\.)?128"
EXPECTED = [
    Expect("int8_product_kernel", (r"IMMA\.16832\.S8\.S8", r"LDSM\.16\.M88\.4", COPY)),
    Expect("cutlass13device_kernel.*S32S8S8", (r"IGMMA\.64", r"UTMALDG\.3D", r"UTMASTG\.3D"), 90),
    Expect("decode_kernelI6__half.*Lb0E", (r"HMMA\.16816\.F32",)),
    Expect("decode_kernelI13__nv_bfloat16.*Lb0E", (r"HMMA\.16816\.F32\.BF16",)),
    Expect("decode_kernelI.*Lb1E", (r"IMMA\.16832\.S8\.S8", r"SHF\.R\.W")),
    Expect("decode_kernel", (r"UBLKCP\.S\.G",), 90),
    # Selectors and addresses by products of bytes, on the units that multiply.
    Expect("decode_kernelI.*DecodeFormatE[01]E", (r"IDP\.4A", r"IDP\.2A\.LO", r"IDP\.2A\.HI")),
    # Which pairs are there: predicates of several bits at a time.
    Expect("decode_kernelI.*DecodeFormatE3E", (r"IDP\.4A", r"R2P")),
    Expect("block_sparse_wgmma_kernel", (r"[HI]GMMA\.64x(64|128)x", r"UTMALDG\.2D"), 90),
    Expect("block_sparse_kernel", (r"[HI]MMA\.", r"LDSM\.16\.M88\.4", COPY)),
    Expect("csr_gather_kernelIf", (LOAD, r"IDP\.2A\.LO")),
    Expect("csr_gather_kernelI(6__half|13__nv_bf)", (r"LDG\.E\.64", r"IDP\.2A\.LO")),
    Expect("csr_panel_kernelI", (r"LDS\.64", COPY)),
    Expect("csr_(gather|panel)_kernelI.*Lb1E", (r"IDP\.4A",)),
    Expect("quantize_rows_kernelI.*Lb1E", (LOAD,)),
    Expect("select_count_kernelI6__half", (LOAD, r"HSET2\.GE", r"ATOMS\.POPC\.INC")),
    Expect("select_count_kernelI13__nv_bf", (r"HSET2\.BF16_V2\.GE",), 90),
    Expect("select_gather_kernel", (LOAD,)),
    Expect("select_mask_kernel", (LOAD,)),
]
# A block that counts those that are done, to find out whether it is the last. The thread that does so has a
# fence between the barrier to which the others came with their writes and the counter, and another, which
# drops what L1 holds, between that and the barrier from which they go on to read.
ORDERED = {
    "barrier": re.compile(r"BAR\."),
    "fence": re.compile(r"MEMBAR\.(SC|ALL)\.GPU"),
    "drop": re.compile(r"CCTL\.IVALL"),
    "ticket": re.compile(r"ATOMG\.E\.(ADD|CAS\.64)\.STRONG\.GPU"),
}
LAST_BLOCK = "barrier fence drop ticket fence drop barrier"
LOCAL = re.compile(r"\b(LDL|STL)\b")
FUNCTION = re.compile(r"^\s*Function : (\S+)")
ARCHITECTURE = re.compile(r"^arch = sm_(\d+)(a?)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)")


def disassembler() -> tuple[str, dict[str, str]]:
    """cuobjdump and the environment in which it finds nvdisasm."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"
    environment = os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", ""), str(folder)])}
    found = shutil.which("cuobjdump", path=environment["PATH"])
    if found is None or shutil.which("nvdisasm", path=environment["PATH"]) is None:
        sys.exit("check_sass: no cuobjdump, nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found, environment


class Kernel(NamedTuple):
    sm: int
    name: str  # mangled
    counts: Counter[str]  # of instructions
    order: list[str]  # of those that ORDERED names


def kernels(lines: Iterator[str]) -> Iterator[Kernel]:
    """Each kernel in a dump."""
    kernel = Kernel(0, "", Counter(), [])
    for line in lines:
        if match := FUNCTION.match(line) or ARCHITECTURE.match(line):
            if kernel.name:
                yield kernel
            if match.re is FUNCTION:
                kernel = Kernel(kernel.sm, match[1], Counter(), [])
            else:
                kernel = Kernel(int(match[1]), "", Counter(), [])
        elif match := INSTRUCTION.search(line):
            kernel.counts[match[1]] += 1
            kernel.order.extend(name for name, pattern in ORDERED.items() if pattern.match(match[1]))
    if kernel.name:
        yield kernel


def faults(found: list[Kernel]) -> list[str]:
    """What is wrong, a line each."""
    wrong = []
    for k in found:
        if local := sum(n for i, n in k.counts.items() if LOCAL.match(i)):
            wrong.append(f"sm_{k.sm} {k.name}: local memory ({local} instructions)")
        if "ticket" in k.order and LAST_BLOCK not in " ".join(k.order) and "cutlass" not in k.name:
            wrong.append(f"sm_{k.sm} {k.name}: expected {LAST_BLOCK}, got {' '.join(k.order)}")
    for expect in EXPECTED:
        matching = [k for k in found if k.sm >= expect.from_sm and re.search(expect.kernel, k.name)]
        optional = "cutlass" in expect.kernel or all(k.sm < expect.from_sm for k in found)
        if not matching and not optional:
            wrong.append(f"no kernel {expect.kernel}")
        for k in matching:
            wrong += [
                f"sm_{k.sm} {k.name}: no {pattern}"
                for pattern in expect.instructions
                if not any(re.match(pattern, i) for i in k.counts)
            ]
    return wrong


def main(objects: list[str]) -> None:
    command, environment = disassembler()
    found = []
    for path in objects:
        dump = subprocess.Popen(
            [command, "--dump-sass", path], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert dump.stdout is not None
        found += list(kernels(dump.stdout))
        if dump.wait():
            sys.exit(f"check_sass: {command} failed on {path}")
    wrong = faults(found)
    for line in wrong:
        print(line)
    print(f"check_sass: {len(found)} kernels, {len(wrong)} faults")
    sys.exit(bool(wrong) or not found)


if __name__ == "__main__":
    main(sys.argv[1:])
