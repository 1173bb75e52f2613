"""A packed buffer that somebody writes to behind pared's back: wrong numbers or an error, no read outside.

What is outside is for the address sanitizer to see (make sanitize); here nothing may crash.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from packed_check import HEADER, aligned_copy, bitmap_bfloat16, header, to_bfloat16

from pared import _core, ops
from pared.ops._formats import FORMATS as ALL

FORMATS = [ops.CSR, ops.BSR, ops.Dense, ops.BSRInt8]


def sections(packed: np.ndarray) -> dict[str, np.ndarray]:
    """Views of what is behind the header."""
    h = header(packed)
    at = {name: int(h[f"{name}_at"]) for name in ("starts", "counts", "values", "offsets")}
    return {
        "starts": packed[at["starts"] : at["counts"]].view(np.uint32),
        "runs": packed[at["counts"] : at["values"]],  # pairs: entries, slot
        "offsets": packed[at["offsets"] :].view(np.uint16),
    }


def corrupted(rng, good: np.ndarray) -> np.ndarray:
    """A copy with some of its structure overwritten; the memory ends with the buffer."""
    packed = aligned_copy(good)
    for section in sections(packed).values():
        if rng.random() < 0.3:
            continue
        kind = rng.integers(4)
        where = rng.integers(0, section.size, section.size if kind == 0 else 3)
        top = np.iinfo(section.dtype).max
        value = rng.integers(0, top, where.size, endpoint=True) if kind < 2 else top if kind == 2 else 0
        section[where] = np.asarray(value)
    return packed


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shift", [1, 4, 8, 32, 63])
def test_misaligned_buffers_are_refused_by_every_entry(rng, name, shift):
    """Kernels load whole vectors of a weight: memory between two boundaries is an error, not a fault."""
    format = ALL[name]
    w = rng.standard_normal((20, 64)).astype(np.float32)
    good = np.asarray(format.weight.from_dense(w).packed)
    shifted = aligned_copy(np.zeros_like(good), extra=shift)[shift:]
    shifted[:] = good
    x, out = np.ones((3, 64), np.float32), np.empty((3, 20), np.float32)
    entries: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (_core.linear, (x, shifted, None, None, out)),
        (_core.packed_info, (shifted,)),
        (_core.packed_validate, (shifted,)),
        (_core.packed_unpack_dense, (shifted, np.empty_like(w))),
        (format.weight, (shifted,)),
    ]
    for entry, args in entries:
        with pytest.raises(ValueError, match=f"expected 64-byte aligned memory, got .* {shift} bytes past"):
            entry(*args)
    np.testing.assert_array_equal(format.weight._copied(shifted).packed, good)


def runs(kernel: Callable[..., None], *args: object) -> bool:
    """Whether the call came through; the only error allowed is that of the check in the loop."""
    try:
        kernel(*args)
    except ValueError as e:
        if not re.match(r"packed weight: expected (entries|offsets) inside the (buffer|K block)", str(e)):
            raise
        return False
    return True


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_linear(isa, rng, format, density):
    w = rng.standard_normal((37, 300)).astype(np.float32)
    w[rng.random(w.shape) > density] = 0
    good = format.from_dense(w).packed
    refused = 0
    for trial in range(240):
        x = np.ones(((1, 16, 130)[trial % 3], 300), np.float32)
        out = np.empty((len(x), 37), np.float32)
        refused += not runs(_core.linear, x, corrupted(rng, good), None, None, out)
    assert refused > 40
    _core.linear(x, good, None, None, out)
    # Of int8: half a step of the weights, and the ones are exact.
    step = np.abs(w).max() / 127 if ALL[format.kind].precision == "int8" else 0.0
    np.testing.assert_allclose(out, x @ w.T, atol=1e-3 + 300 * step / 2)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("step", [1, 2, 6, 33])
def test_offsets_between_vectors(isa, rng, format, step):
    """Offsets that no packer writes: read where they point, and never a fault."""
    w = rng.standard_normal((37, 300)).astype(np.float32)
    packed = aligned_copy(format.from_dense(w).packed)
    offsets = sections(packed)["offsets"]
    offsets += np.uint16(step)
    for tokens in (1, 16, 17, 65, 96, 130):
        out = np.empty((tokens, 37), np.float32)
        assert runs(_core.linear, np.ones((tokens, 300), np.float32), packed, None, None, out)


@pytest.mark.parametrize("format", FORMATS)
def test_conv2d(isa, rng, format):
    w = rng.standard_normal((20, 9, 3, 3)).astype(np.float32)
    w[rng.random(w.shape) > 0.3] = 0
    good = format.from_dense(w).packed
    x = np.ones((1, 9, 12, 12), np.float32)
    out = np.empty((1, 20, 12, 12), np.float32)
    refused = 0
    for _ in range(240):
        packed = corrupted(rng, good)
        refused += not runs(_core.conv2d, x, packed, None, 1, 1, 1, None, None, None, out)
    assert refused > 40


@pytest.mark.parametrize("channels", [1, 33, 130, 300])
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_planes_in_place(isa, rng, channels, density):
    """A 1x1 kernel on aligned planes reads the caller's memory, which ends with the last channel."""
    w = rng.standard_normal((37, channels, 1, 1)).astype(np.float32)
    w[rng.random(w.shape) > density] = 0
    good = ops.CSR.from_dense(w).packed
    x = aligned_copy(np.ones(channels * 48, np.float32).view(np.uint8)).view(np.float32)
    x = x.reshape(1, channels, 6, 8)
    out = np.empty((1, 37, 6, 8), np.float32)
    rest = (None, 1, 0, 1, None, None, None, out)
    for _ in range(30):
        runs(_core.conv2d, x, corrupted(rng, good), *rest)
    _core.conv2d(x, good, *rest)
    np.testing.assert_allclose(out[0, :, 0, 0], w.sum((1, 2, 3)), atol=1e-3)
    # One unit too far: the first entry of the last K block.
    packed = aligned_copy(good)
    h = header(packed)
    tile, block_k = int(h["tile"]), int(h["block_k"])
    blocks = -(-channels // block_k)
    starts, offsets = sections(packed)["starts"], sections(packed)["offsets"]
    entry = next(
        int(starts[g * (blocks + 1) + blocks - 1])
        for g in range(3)
        if starts[g * (blocks + 1) + blocks - 1] < starts[g * (blocks + 1) + blocks]
    )
    offsets[entry] = (channels - (blocks - 1) * block_k) * tile * 4
    with pytest.raises(ValueError, match="expected offsets inside the K block"):
        _core.conv2d(x, packed, *rest)


@pytest.mark.parametrize("format", FORMATS)
def test_one_entry_too_many_is_noticed(isa, rng, format):
    """The end of the buffer exactly: the last slot that has entries says one more than there are."""
    good = format.from_dense(rng.standard_normal((16, 40)).astype(np.float32)).packed
    packed = aligned_copy(good)
    h = header(packed)
    counts = sections(packed)["runs"][: 2 * (16 // int(h["entry_rows"])) : 2]
    x, out = np.ones((3, 40), np.float32), np.empty((3, 16), np.float32)
    counts[-1] += 1
    with pytest.raises(ValueError, match="expected entries inside the buffer"):
        _core.linear(x, packed, None, None, out)
    counts[-1] -= 1
    _core.linear(x, packed, None, None, out)


@pytest.mark.parametrize("format", FORMATS)
def test_objects_are_made_of_whole_buffers_alone(rng, format):
    good = format.from_dense(rng.standard_normal((16, 40)).astype(np.float32)).packed
    for _ in range(20):
        packed = corrupted(rng, good)
        if np.array_equal(packed, good):
            continue
        with pytest.raises(ValueError, match="packed weight: "):
            format(packed)


def entries(packed: np.ndarray) -> dict[str, Callable[[], object]]:
    """Every call of the extension that reads packed bytes, with operands of the sizes that they name."""
    h = header(packed)
    rows, cols = (min(max(int(h[name]), 0), 400) for name in ("rows", "cols"))
    image = tuple(min(max(int(h[name]), 0), 30) for name in ("channels", "kh", "kw", "groups"))
    dense = np.empty((rows, *image[:3]) if image[1] else (rows, cols), np.float32)
    calls: dict[str, Callable[[], object]] = {
        "info": lambda: _core.packed_info(packed),
        "validate": lambda: _core.packed_validate(packed),
        "dense": lambda: _core.packed_unpack_dense(packed, dense),
        "few_tokens": lambda: _core.pair_few_tokens(packed),
        "activations": lambda: _core.int8_activations(packed),
        "csr": lambda: _core.csr_unpack(packed),
        "int8": lambda: _core.int8_unpack(packed),
        "bsr8": lambda: _core.bsr8_unpack(packed),
        "int4": lambda: _core.int4_unpack(packed),
    }
    for tokens in (1, 16, 33):
        x, out = np.ones((tokens, cols), np.float32), np.empty((tokens, rows), np.float32)
        calls[f"linear {tokens}"] = lambda x=x, out=out: _core.linear(x, packed, None, None, out)
        for format in (ops.CSR, ops.Int8):
            after = format.from_dense(np.ones((3, rows), np.float32)).packed
            calls[f"chain {format.kind} {tokens}"] = lambda x=x, after=after: _core.linear_chain(
                x, [packed, after], None, None
            )
    pixels, to = np.ones((1, image[0] * image[3], 9, 9), np.float32), np.empty((1, rows, 9, 9), np.float32)
    calls["conv"] = lambda: _core.conv2d(pixels, packed, None, 1, 1, 1, None, None, None, to)
    return calls


def survived(packed: np.ndarray) -> list[str]:
    """The entries that gave a result, the others having refused with an error of the argument's."""
    done = []
    for name, call in entries(packed).items():
        try:
            call()
        except (ValueError, TypeError) as e:
            if not re.search(r"packed|^(x|w|weights|out|activations|activation_scale): expected", str(e)):
                raise AssertionError(f"{name}: not an error about an argument") from e
        else:
            done.append(name)
    return done


def weights(rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """One small weight of each format, and one of a convolution where there is a kernel for it."""
    out = []
    for name, format in ALL.items():
        for shape in ((37, 300), (20, 9, 3, 3)):
            if len(shape) == 4 and not format.conv2d:
                continue
            w = rng.standard_normal(shape).astype(np.float32)
            w[rng.random(shape) > 0.2] = 0
            out.append((f"{name}-{len(shape)}d", np.asarray(format.weight.from_dense(w).packed)))
            if name == "bitmap":
                w = to_bfloat16(w)
                out.append(("bitmap-bfloat16", bitmap_bfloat16(w, format.weight.from_dense(w).packed)))
    return out


def test_any_byte_of_any_format(isa, rng):
    """Bytes of nobody's: no entry reads or writes outside of the buffer, whatever is in it."""
    survivors = 0
    for name, good in weights(rng):
        whole = survived(aligned_copy(good))
        assert any(n.startswith(("linear", "conv")) for n in whole), (name, whole)
        assert {"info", "validate"} <= set(whole)
        for trial in range(24):
            packed = aligned_copy(good)
            behind = packed[HEADER.itemsize :]
            # A run of bytes, or a few anywhere; the first kilobytes are starts, counts and masks.
            first = int(rng.integers(behind.size if trial % 2 else min(behind.size, 1024)))
            where = (
                np.arange(first, min(first + int(rng.integers(1, 2000)), behind.size))
                if trial % 3
                else rng.integers(0, behind.size, 9)
            )
            behind[where] = (0xFF, 0x00, rng.integers(0, 256, where.size))[int(rng.integers(3))]
            if np.array_equal(packed, good):
                continue
            done = survived(packed)
            assert not {"validate", "dense"} & set(done), (name, trial)
            survivors += any(n.startswith(("linear", "conv")) for n in done)
    assert survivors > 50  # wrong numbers are allowed, so that the loops are looked at


def test_any_field_of_any_header(isa, rng):
    """A header that lies about sizes and places, its neighbours and its extremes."""
    for name, good in weights(rng):
        for field in HEADER.names or ():
            if field in ("magic", "reserved"):
                continue
            type_ = HEADER.fields[field][0]  # type: ignore[index]
            value, top = int(header(good)[field]), int(np.iinfo(type_).max)
            others = (
                value - 1,
                value + 1,
                value + 64,
                value - 64,
                2 * value,
                value // 2,
                0,
                1,
                top,
                top - 63,
            )
            for other in {o for o in others if np.iinfo(type_).min <= o <= top and o != value}:
                packed = aligned_copy(good)
                packed[: HEADER.itemsize].view(HEADER)[0][field] = other
                assert "validate" not in survived(packed), (name, field, other)
