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
    Expect("decode_kernelI6__half", (r"HMMA\.16816\.F32",)),
    Expect("decode_kernelI13__nv_bfloat16", (r"HMMA\.16816\.F32\.BF16",)),
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
    Expect("quantize_rows_kernelI.*Lb1E", (LOAD,)),
    Expect("select_count_kernelI6__half", (LOAD, r"HSET2\.GE", r"ATOMS\.POPC\.INC")),
    Expect("select_count_kernelI13__nv_bf", (r"HSET2\.BF16_V2\.GE",), 90),
    Expect("select_gather_kernel", (LOAD,)),
    Expect("select_mask_kernel", (LOAD,)),
]
# A block that counts those that are done, to find out whether it is the last: what it has written is behind a
# fence before, and what it reads after another, which drops what L1 holds.
TICKET = re.compile(r"ATOMG\.E\.(ADD|CAS\.64)\.STRONG\.GPU")
FENCES = (r"MEMBAR\.(SC|ALL)\.GPU", r"CCTL\.IVALL")
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


def kernels(lines: Iterator[str]) -> Iterator[tuple[int, str, Counter[str]]]:
    """(architecture, mangled name, instructions) of each kernel in a dump."""
    architecture, name, counts = 0, "", Counter[str]()
    for line in lines:
        if match := FUNCTION.match(line):
            if name:
                yield architecture, name, counts
            name, counts = match[1], Counter()
        elif match := ARCHITECTURE.match(line):
            if name:
                yield architecture, name, counts
            architecture, name, counts = int(match[1]), "", Counter()
        elif match := INSTRUCTION.search(line):
            counts[match[1]] += 1
    if name:
        yield architecture, name, counts


def faults(found: list[tuple[int, str, Counter[str]]]) -> list[str]:
    """What is wrong, a line each."""
    wrong = [
        f"sm_{sm} {name}: local memory ({sum(n for i, n in counts.items() if LOCAL.match(i))} instructions)"
        for sm, name, counts in found
        if any(LOCAL.match(i) for i in counts)
    ]
    for sm, name, counts in found:
        if "cutlass" in name or not any(TICKET.match(i) for i in counts):
            continue
        for fence in FENCES:
            if (n := sum(n for i, n in counts.items() if re.match(fence, i))) < 2:
                wrong.append(f"sm_{sm} {name}: a ticket between {n} of two {fence}")
    for expect in EXPECTED:
        matching = [k for k in found if k[0] >= expect.from_sm and re.search(expect.kernel, k[1])]
        optional = "cutlass" in expect.kernel or all(sm < expect.from_sm for sm, *_ in found)
        if not matching and not optional:
            wrong.append(f"no kernel {expect.kernel}")
        for sm, name, counts in matching:
            wrong += [
                f"sm_{sm} {name}: no {pattern}"
                for pattern in expect.instructions
                if not any(re.match(pattern, i) for i in counts)
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
