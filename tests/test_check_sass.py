"""tools/check_sass.py on dumps as cuobjdump writes them, right and wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools/check_sass.py"


@pytest.fixture(scope="module")
def check_sass():
    spec = importlib.util.spec_from_file_location("check_sass", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dump(sm, **bodies):
    lines = ["Fatbin elf code:", f"arch = sm_{sm}a", "code for sm_90a"]
    for name, instructions in bodies.items():
        lines.append(f"\t\tFunction : _ZN5pared4cuda{name}Ev")
        for at, instruction in enumerate(instructions):
            lines.append(f"        /*{at * 16:04x}*/                   {instruction} ;    /* 0x000 */")
            lines.append("                                              /* 0x000fe20000000000 */")
    return lines


FENCED = [
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "MEMBAR.SC.GPU",
    "CCTL.IVALL",
    "@!P0 ATOMG.E.ADD.STRONG.GPU PT, R2, [R2.64], R5",
    "MEMBAR.SC.GPU",
    "CCTL.IVALL",
    "BAR.RED.OR.DEFER_BLOCKING 0x0, P0",
]
GOOD = {
    "select_ties_kernel": FENCED,
    "cutlass6kernelI": ["ATOMG.E.ADD.STRONG.GPU PT, R2, [R2.64], R5"],  # theirs
    "int8_product_kernelI": [
        "IMMA.16832.S8.S8 R4",
        "LDSM.16.M88.4 R8",
        "@!P0 LDGSTS.E.BYPASS.128.ZFILL [R3]",
    ],
    "decode_kernelI6__halfLi2ELb0E": ["HMMA.16816.F32 R4, R8", "@P1 UBLKCP.S.G [UR4]"],
    "decode_kernelI6__halfLNS_12DecodeFormatE0ELi1ELb0E": [
        "HMMA.16816.F32 R4, R8",
        "UBLKCP.S.G [UR4]",
        "IDP.4A.U8.U8 R3, R2",
        "IDP.2A.LO.U16.U8 R3, R2",
        "IDP.2A.HI.U16.U8 R3, R2",
    ],
    "decode_kernelI6__halfLNS_12DecodeFormatE3ELi1ELb0E": [
        "HMMA.16816.F32 R4, R8",
        "UBLKCP.S.G [UR4]",
        "IDP.4A.U8.U8 R3, R2",
        "R2P PR, R33, 0x7e",
    ],
    "decode_kernelI13__nv_bfloat16Li2ELb0E": ["HMMA.16816.F32.BF16 R4", "UBLKCP.S.G [UR4]"],
    "decode_kernelI13__nv_bfloat16LNS_12DecodeFormatE1ELi1ELb1E": [
        "IMMA.16832.S8.S8 R4",
        "UBLKCP.S.G [UR4]",
        "SHF.R.W.U32 R3, R2",
        "IDP.4A.U8.U8 R3, R2",
        "IDP.2A.LO.U16.U8 R3, R2",
        "IDP.2A.HI.U16.U8 R3, R2",
    ],
    "block_sparse_wgmma_kernelI": ["HGMMA.64x128x16.F32.BF16 R24", "@P0 UTMALDG.2D [UR8]"],
    "block_sparse_kernelI": ["HMMA.16816.F32 R4", "LDSM.16.M88.4 R8", "LDGSTS.E.BYPASS.128 [R3]"],
    "csr_gather_kernelIfLi1ELb0E": ["LDG.E.128.CONSTANT R4", "IDP.2A.LO.U16.U8 R3, R2"],
    "csr_gather_kernelI6__halfLi8ELb1E": [
        "LDG.E.64.CONSTANT R4",
        "IDP.2A.LO.U16.U8 R3, R2",
        "IDP.4A.U8.U8 R3, R2",
    ],
    "csr_panel_kernelIfLi4ELb0E": ["LDS.64 R4, [R2]", "LDGSTS.E.BYPASS.128 [R3]"],
    "quantize_rows_kernelIfLb1E": ["LDG.E.128.CONSTANT R4"],
    "select_count_kernelI6__half": [
        "LDG.E.NA.128.CONSTANT R4",
        "HSET2.GE.AND R45, R44, R24",
        "ATOMS.POPC.INC.32 RZ, [R48+UR14]",
    ],
    "select_count_kernelI13__nv_bfloat16": ["HSET2.BF16_V2.GE.AND R45, R44, R24"],
    "select_gather_kernel": ["LDG.E.NA.128.CONSTANT R4"],
    "select_mask_kernel": ["LDG.E.128 R4"],
}


def faults(check_sass, lines):
    return check_sass.faults(list(check_sass.kernels(iter(lines))))


def test_what_is_right_passes(check_sass):
    assert faults(check_sass, dump(90, **GOOD)) == []


@pytest.mark.parametrize(
    ("kernel", "instructions", "says"),
    [
        ("select_mask_kernel", ["LDG.E.128 R4", "@P0 LDL.64 R4, [R1]"], "local memory"),
        ("select_mask_kernel", ["LDG.E.64 R4"], r"no LDG\.E"),
        ("int8_product_kernelI", ["IMMA.16832.S8.S8 R4", "LDSM.16.M88.4 R8"], "no LDGSTS"),
        ("cutlass13device_kernelS32S8S8", ["IMMA.16832.S8.S8 R4", "UTMALDG.3D", "UTMASTG.3D"], "no IGMMA"),
        ("decode_kernelI6__halfLi2ELb0E", ["HMMA.16816.F32 R4"], "no UBLKCP"),
        (
            "decode_kernelI6__halfLNS_12DecodeFormatE0ELi1ELb0E",
            ["HMMA.16816.F32 R4", "UBLKCP.S.G [UR4]", "IDP.4A.U8.U8 R3", "IDP.2A.LO.U16.U8 R3"],
            r"no IDP\.2A\.HI",
        ),
        (
            "decode_kernelI13__nv_bfloat16LNS_12DecodeFormatE1ELi1ELb1E",
            [
                "HMMA.16816.F32.BF16 R4",
                "UBLKCP.S.G [UR4]",
                "SHF.R.W.U32 R3",
                "IDP.4A.U8.U8 R3, R2",
                "IDP.2A.LO.U16.U8 R3, R2",
                "IDP.2A.HI.U16.U8 R3, R2",
            ],
            r"no IMMA\.16832",
        ),
        ("select_ties_kernel", FENCED[:4] + FENCED[6:], "got barrier fence drop ticket barrier"),
        ("select_ties_kernel", FENCED[:5] + FENCED[6:], "got barrier fence drop ticket fence barrier"),
        ("select_ties_kernel", FENCED[:1] + FENCED[3:], "got barrier ticket fence drop barrier"),
        # Each thread's own fence before the barrier says nothing of another thread's counting behind it.
        (
            "select_ties_kernel",
            [*FENCED[1:3], FENCED[0], "ATOMG.E.CAS.64.STRONG.GPU PT, R2, [R2], R4, R6", *FENCED[4:]],
            "got fence drop barrier ticket fence drop barrier",
        ),
        ("select_ties_kernel", [*FENCED[:4], FENCED[6], *FENCED[4:6]], "ticket barrier fence drop"),
        ("csr_gather_kernelIfLi1ELb0E", ["LDG.E.128.CONSTANT R4"], r"no IDP\.2A"),
        (
            "csr_gather_kernelI6__halfLi8ELb1E",
            ["LDG.E.64.CONSTANT R4", "IDP.2A.LO.U16.U8 R3, R2"],
            r"no IDP\.4A",
        ),
        ("csr_panel_kernelIfLi4ELb0E", ["LDS R4, [R2]", "LDGSTS.E.BYPASS.128 [R3]"], r"no LDS\.64"),
    ],
)
def test_what_is_wrong_is_named(check_sass, kernel, instructions, says):
    (wrong,) = faults(check_sass, dump(90, **(GOOD | {kernel: instructions})))
    assert kernel in wrong
    assert says.replace("\\", "") in wrong.replace("\\", "")


def test_a_kernel_that_is_gone_is_missed(check_sass):
    left = {name: body for name, body in GOOD.items() if name != "select_mask_kernel"}
    assert faults(check_sass, dump(90, **left)) == ["no kernel select_mask_kernel"]


def test_bulk_copies_are_asked_of_sm_90_alone(check_sass):
    before = {name: [i for i in body if "UBLKCP" not in i] for name, body in GOOD.items()}
    assert faults(check_sass, [line.replace("sm_80a", "sm_80") for line in dump(80, **before)]) == []
