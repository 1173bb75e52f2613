"""The packed formats: one line each, read by the operators, the modules and `pared.accelerate`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from pared._types import Array
from pared.ops.bitmap import Bitmap, BitmapCSR
from pared.ops.bsr import BSR, Dense
from pared.ops.bsr_int8 import BSRInt8
from pared.ops.csr import CSR, TwoFour
from pared.ops.int4 import Int4
from pared.ops.int8 import Bitmap8, Int8, Int8WeightOnly
from pared.ops.packed import PackedWeight


@dataclass(frozen=True)
class Format:
    """A packed format and the kernels that read it.

    Attributes
    ----------
    name : what the user reads in reports, for example ``"csr"``.
    kind : ``PackedKind`` in the buffer's header (csrc/formats/packed.h).
    weight : the class with ``from_dense``, ``to_dense``, ``packed``, ``sparsity``.
    conv2d : whether ``_core.conv2d`` takes it. All have the linear operation: ``_core.linear``.
    chain : what lies between two linear products in one call, ``_core.linear_chain``, or None where there is
        no such call; formats with the same one go together.
    precision : ``"float32"``: the products are float32's own, so that the error bound of float32 holds.
        ``"int8"``: weights and activations are rounded to 8 bits. ``"int4"``: weights to 4, with a scale for
        a group of inputs.
    suits : whether it is worth trying, from what is known before anything is timed: ``(density, quads,
        positions)``, the shares of non-zero weights and of non-zero blocks of four outputs by one input, and
        the output positions (tokens, pixels) of a call.
    combines : formats that it holds, for layers whose calls do not all suit the same one.
    devices : where `pared.accelerate` may choose it; other devices run it all the same where they can.
    """

    name: str
    kind: int
    weight: type[PackedWeight]
    conv2d: bool
    precision: Literal["float32", "int8", "int4"]
    suits: Callable[[float, float, int], bool]
    combines: tuple[str, ...] = ()
    chain: Literal["panel", "rows"] | None = None
    devices: tuple[str, ...] = ("cpu",)

    def worth_trying(self, density: float, quads: float, positions: Collection[int]) -> bool:
        """Whether it suits a layer whose calls have these numbers of positions."""
        if not self.combines:
            return any(self.suits(density, quads, n) for n in positions)
        suited = [{n for n in positions if FORMATS[part].suits(density, quads, n)} for part in self.combines]
        return all(suited) and any(s != suited[0] for s in suited)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            "csr",
            1,
            CSR,
            True,
            "float32",
            lambda d, q, n: d <= 0.85,
            chain="panel",
            devices=("cpu", "cuda"),
        ),
        # The same bytes, for a device's sparse tensor cores.
        Format(
            "2:4",
            1,
            TwoFour,
            False,
            "float32",
            lambda d, q, n: d <= 0.5,
            chain="panel",
            devices=("cuda",),
        ),
        # Where the four rows of a quad share few non-zeros, a row of its own is the faster way to each.
        Format(
            "bsr",
            2,
            BSR,
            True,
            "float32",
            lambda d, q, n: q <= min(0.85, 2 * d),
            chain="panel",
            devices=("cpu", "cuda"),
        ),
        # Below a tile of positions, reading the weight is the cost, and torch's copy is no larger.
        Format(
            "dense",
            3,
            Dense,
            True,
            "float32",
            lambda d, q, n: d > 0.4 and n >= 32,
            chain="panel",
        ),
        # For few positions: its multiply-adds do not get fewer with the zeros.
        Format(
            "bitmap",
            5,
            Bitmap,
            False,
            "float32",
            lambda d, q, n: d <= 0.85 and n <= min(48, 16 + 100 * d),
            devices=("cpu", "cuda"),
        ),
        Format(
            "int8",
            4,
            Int8,
            True,
            "int8",
            lambda d, q, n: True,
            chain="rows",
            devices=("cpu", "cuda"),
        ),
        # The same bytes; a device of its own choice takes inputs in 16 bits.
        Format(
            "int8wo",
            4,
            Int8WeightOnly,
            False,
            "int8",
            lambda d, q, n: True,
            chain="rows",
            devices=("cuda",),
        ),
        # Only where `pared.quantize` has put the weight on such a grid, or the user names the format.
        Format(
            "int4",
            8,
            Int4,
            False,
            "int4",
            lambda d, q, n: True,
            chain="rows",
        ),
        Format(
            "bitmap8",
            6,
            Bitmap8,
            False,
            "int8",
            lambda d, q, n: d <= 0.85,
            chain="rows",
            devices=("cpu", "cuda"),
        ),
        Format(
            "bitmap+csr",
            9,
            BitmapCSR,
            False,
            "float32",
            lambda d, q, n: False,
            combines=("bitmap", "csr"),
        ),
        # Not known here: whether the zeros come in blocks of four inputs. Without, it is nearly dense.
        Format(
            "bsr8",
            7,
            BSRInt8,
            True,
            "int8",
            lambda d, q, n: d <= 0.7,
            chain="rows",
            devices=("cpu", "cuda"),
        ),
    )
}

_KIND_AT = 8  # byte of PackedHeader.kind, behind the magic


def format_of(packed: Array) -> Format:
    """The format that the header of `packed` names; raises ``ValueError`` for a buffer that names none."""
    if len(packed) > _KIND_AT + 1:
        kind = int(packed[_KIND_AT]) + 256 * int(packed[_KIND_AT + 1])
        for f in FORMATS.values():
            if f.kind == kind:
                return f
    raise ValueError(
        f"packed: expected a packed weight of format {', '.join(FORMATS)}, got {len(packed)} bytes of other "
        "data"
    )


__all__ = ["FORMATS", "Format", "format_of"]
