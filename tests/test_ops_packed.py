"""Packed bytes of every format: no changed bit passes the checks, no header leads outside of the buffer."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from packed_check import HEADER, aligned_copy, checksum, header

from pared import _core
from pared.ops._formats import FORMATS

CONVOLUTIONS = [f"{name} conv2d" for name, f in FORMATS.items() if f.conv2d]
REFUSED = r"packed weight: |activation|out: "


@pytest.fixture(params=[*FORMATS, *CONVOLUTIONS])
def packed(request, rng) -> np.ndarray:
    name = request.param.removesuffix(" conv2d")
    w = rng.standard_normal((40, 264)).astype(np.float32)
    w[:, 2::4] = w[:, 3::4] = 0  # what 2:4 takes
    w[rng.random(w.shape) < 0.6] = 0
    if request.param in CONVOLUTIONS:
        w = w.reshape(40, 66, 2, 2)
    return aligned_copy(np.asarray(FORMATS[name].weight.from_dense(w).packed))


def test_every_flipped_bit_is_noticed(packed, rng):
    """Every byte of the header and of what follows it, where some formats have more fields; a sample of all
    sections and their padding."""
    _core.packed_validate(packed)
    places = [*range(2 * HEADER.itemsize), *rng.integers(HEADER.itemsize, packed.size, 600).tolist()]
    for at in places:
        for bit in (1, 1 << int(rng.integers(1, 8))):
            packed[at] ^= bit
            with pytest.raises(ValueError, match=REFUSED):
                _core.packed_validate(packed)
            packed[at] ^= bit
    _core.packed_validate(packed)


@pytest.mark.parametrize("field", [f for f in HEADER.names if f not in ("magic", "reserved", "checksum")])
@pytest.mark.parametrize("value", [0, 1, 3, 255, 2**31 - 1, 2**62, 2**63 - 1, -1, "+1", "*2"])
def test_hostile_header_fields_never_crash(packed, field, value):
    """The checksum tells. With one that is right, nothing crashes; that nothing outside is read, the address
    sanitizer sees (make sanitize)."""
    h = header(packed)
    old = int(h[field])
    info = np.iinfo(HEADER[field])
    new = old + 1 if value == "+1" else old * 2 if value == "*2" else value
    new = (new - info.min) % (info.max - info.min + 1) + info.min
    if new == old:
        return
    h[field] = new
    with pytest.raises(ValueError, match=REFUSED):
        _core.packed_validate(packed)
    # Many fields say nothing to some formats, or describe another weight that fits: no error then.
    h["checksum"] = checksum(packed)
    for call in (_core.packed_validate, unpack):
        with contextlib.suppress(ValueError):
            call(packed)


def unpack(packed: np.ndarray) -> None:
    i = _core.packed_info(packed)
    shape = (i["rows"], i["channels"], i["kh"], i["kw"]) if i["kh"] else (i["rows"], i["cols"])
    if np.prod([float(n) for n in shape]) < 1e6:
        _core.packed_unpack_dense(packed, np.empty(shape, np.float32))
