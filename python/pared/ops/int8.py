"""Int8 weights, and the plain integer product."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from pared import _core
from pared._errors import is_integer
from pared._types import Array
from pared.ops._arrays import dtype_of_kind, empty_like_kind, integer, is_torch, number, require_array, word
from pared.ops._device import DeviceWeight, device_of
from pared.ops.packed import PackedWeight

if TYPE_CHECKING:
    from typing_extensions import Self

Q = TypeVar("Q", bound="QuantizedWeight")

# How a layer's input becomes bytes, as _core takes it: (scale, zero, low, high), the last three unsigned.
Activations = tuple[float, int, int, int]


def check_activations(scale: float | None, zero: int, dtype: str) -> Activations | None:
    """Static activation parameters as the kernels take them; None where activations are dynamic."""
    if word(dtype, "activation_dtype") not in ("int8", "uint8"):
        raise ValueError(f"activation_dtype: expected 'int8' or 'uint8', got {dtype!r}")
    offset = 128 if dtype == "int8" else 0
    if not is_integer(zero) or not -offset <= zero <= 255 - offset:
        raise ValueError(f"activation_zero: expected an integer in the range of {dtype}, got {zero!r}")
    if scale is None:
        if zero != 0:
            raise ValueError("activation_zero: expected 0 without an activation_scale: dynamic is symmetric")
        return None
    factor = number(scale, "activation_scale")
    if not 0 < factor < math.inf:
        raise ValueError(f"activation_scale: expected a positive number or None, got {scale!r}")
    return factor, int(zero) + offset, 0, 255


def output_scales(scales: Any, rows: int) -> Array:
    """One scale an output, of a vector or of a number for all. Raises ``TypeError``."""
    if isinstance(scales, (int, float)) or getattr(scales, "ndim", 1) == 0:
        return np.full(rows, number(scales, "scales"), np.float32)
    if isinstance(scales, list | tuple):
        scales = np.array([number(s, "scales") for s in scales])
    require_array(scales, "scales")
    real = scales.is_floating_point() if is_torch(scales) else scales.dtype.kind == "f"
    if not real or isinstance(scales, np.ma.MaskedArray):
        got = f"{type(scales).__name__} of {scales.dtype}"
        raise TypeError(f"scales: expected a number or an array of floating-point numbers, got {got}")
    if is_torch(scales):
        s = scales.detach().float()
        return s.cpu() if s.is_cuda else s
    return np.ascontiguousarray(scales, dtype=np.float32)


def check_quantized(q: Any) -> None:
    """Raise unless `q` is an array of a weight's shape."""
    require_array(q, "q")
    if q.ndim not in (2, 4):
        raise ValueError(f"q: expected [out, in] or [out, in/groups, kh, kw], got shape {list(q.shape)}")


class IntegerWeight(PackedWeight):
    """Integers and their scales, which a file holds in place of the dense weight, to the bit."""

    __slots__ = ()

    @property
    def activations(self) -> Activations | None:
        """How the input becomes bytes, ``(scale, zero, low, high)``; None where it is quantized by token."""
        return None

    def stored(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """The integers and scales as a file holds them."""
        raise NotImplementedError

    @classmethod
    def stored_like(
        cls, shape: tuple[int, ...], scales: tuple[int, ...]
    ) -> tuple[tuple[str, tuple[int, ...]], tuple[int, ...]]:
        """What `stored` gives for a weight of that shape: dtype and shape of the integers, shape of the
        scales. Where that leaves a choice, it is `scales`, the shape in a file, that decides.
        """
        raise NotImplementedError

    @classmethod
    def from_stored(
        cls,
        shape: tuple[int, ...],
        integers: Array,
        scales: Array,
        dtype: str,
        activations: Activations | None,
        groups: int = 1,
    ) -> Self:
        """The weight of that shape from what `stored`, `dtype`, `activations` and `groups` gave."""
        raise NotImplementedError


class QuantizedWeight(IntegerWeight):
    """An int8 weight with one scale an output: ``w[n, k]`` is about ``scales[n] * q[n, k]``.

    `pared.ops.linear` quantizes its input on the way in: by token, symmetrically, by the token's own largest
    magnitude; or with a given scale and zero point. `pared.ops.conv2d` does the same by image. Sums are exact
    in int32, the same bits on every instruction set. A token (an image) that holds NaN or infinity gives NaN
    in all of its outputs.

    Build it with `from_dense` or `from_quantized`. At most 65793 inputs an output.
    """

    __slots__ = ()
    _masked: ClassVar[bool]  # zeros are not stored (csrc/formats/bitmap8.h)

    @classmethod
    def from_dense(
        cls: type[Q],
        weight: Array,
        *,
        groups: int = 1,
        activation_scale: float | None = None,
        activation_zero: int = 0,
        activation_dtype: str = "int8",
    ) -> Q:
        """Quantize a dense weight: ``scales[n] = max|w[n]| / 127``, ``q = round(w / scales)``.

        Parameters
        ----------
        weight : [out, in], or for `Int8` a convolution's [out, in/groups, kh, kw]; float32, bfloat16 or
            float16. Outputs whose largest magnitude is below 2**-100 are zero.
        groups : of a convolution; 1 for a linear weight.
        activation_scale, activation_zero, activation_dtype : None for activations that are quantized by
            token; else ``x`` is about ``activation_scale * (q - activation_zero)`` with q of ``"int8"`` or
            ``"uint8"``.

        Raises
        ------
        TypeError, ValueError : naming the argument; NaN or infinity in the weight.
        """
        require_array(weight, "weight")
        _check_groups(groups, weight.ndim)
        activations = check_activations(activation_scale, activation_zero, activation_dtype)
        dense = weight.detach() if is_torch(weight) else weight
        return cls(_core.int8_pack_dense(dense, activations, cls._masked, groups))

    @classmethod
    def from_quantized(
        cls: type[Q],
        q: Array,
        scales: Any,
        *,
        groups: int = 1,
        dtype: str = "float32",
        activation_scale: float | None = None,
        activation_zero: int = 0,
        activation_dtype: str = "int8",
    ) -> Q:
        """Take over a weight that is quantized already; nothing is rounded a second time.

        Parameters
        ----------
        q : shaped as for `from_dense`, int8, any values (-128 included).
        groups : of a convolution; 1 for a linear weight.
        scales : [out] or a number, finite and at least 0.
        dtype : float dtype that `to_dense` gives a tensor.
        activation_scale, activation_zero, activation_dtype : as for `from_dense`.

        Raises
        ------
        TypeError, ValueError : naming the argument, what was expected and what came.
        """
        check_quantized(q)
        _check_groups(groups, q.ndim)
        s = output_scales(scales, q.shape[0])
        activations = check_activations(activation_scale, activation_zero, activation_dtype)
        return cls(_core.int8_pack_quantized(q, s, word(dtype, "dtype"), activations, cls._masked, groups))

    @classmethod
    def from_torch(
        cls: type[Q],
        source: Any,
        *,
        groups: int | None = None,
        activation_scale: float | None = None,
        activation_zero: int = 0,
        activation_dtype: str = "uint8",
    ) -> Q:
        """Take over the weight of a layer that torch or torchao quantized; nothing is rounded a second time.

        Parameters
        ----------
        source : a ``torch.ao.nn.quantized`` Linear, Conv1d or Conv2d (also with its fused ReLU, which is the
            caller's to apply), a ``torch.ao.nn.quantized.dynamic`` Linear, an ``nn.Linear`` or ``nn.Conv2d``
            whose weight is torchao's ``Int8Tensor``, or such a weight: qint8 with one scale a tensor or an
            output and zero points of 0; ``Int8Tensor`` with one scale an output. Of a Conv1d comes the weight
            [out, in/groups, 1, taps].
        groups : of a convolution's bare weight; a module has its own.
        activation_scale, activation_zero, activation_dtype : of the tensors that a static layer is called
            with, as torch's quint8 has them; None to quantize inputs by token, as dynamic layers do.

        Returns
        -------
        A weight whose products are the source's own integers times its scales. With the same input bytes (a
        static layer's) outputs equal the source's before it rounds them, but for three float32 roundings.

        Raises
        ------
        TypeError, ValueError : a weight of another kind, with zero points, or with scales of groups.
        """
        q, scales, dtype = _torch_weight(source)
        q = q[:, :, None] if q.ndim == 3 else q  # a sequence is an image of height 1
        return cls.from_quantized(
            q,
            scales,
            groups=getattr(source, "groups", 1) if groups is None else groups,
            dtype=dtype,
            activation_scale=activation_scale,
            activation_zero=activation_zero,
            activation_dtype=activation_dtype,
        )

    @property
    def activation(self) -> tuple[float, int] | None:
        """``(scale, zero)`` of the input, zero as of uint8; None where it is quantized by token."""
        found = _core.int8_activations(self.packed)
        return None if found is None else (found[0], found[1])

    @property
    def activations(self) -> Activations | None:
        return _core.int8_activations(self.packed)

    @classmethod
    def from_parts(
        cls: type[Q],
        q: Array,
        scales: Array,
        dtype: str,
        activations: Activations | None,
        groups: int = 1,
    ) -> Q:
        """From what `to_quantized`, `dtype`, `activations` and `groups` gave."""
        return cls(_core.int8_pack_quantized(q, scales, dtype, activations, cls._masked, groups))

    def to_quantized(self) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """``(q, scales)``: int8 in the weight's shape, float32 [out]."""
        q, scales = _core.int8_unpack(self.packed)
        return q.reshape(self.shape), scales

    def stored(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        return self.to_quantized()

    @classmethod
    def stored_like(
        cls, shape: tuple[int, ...], scales: tuple[int, ...]
    ) -> tuple[tuple[str, tuple[int, ...]], tuple[int, ...]]:
        return ("int8", shape), (shape[0],)

    @classmethod
    def from_stored(
        cls: type[Q],
        shape: tuple[int, ...],
        integers: Array,
        scales: Array,
        dtype: str,
        activations: Activations | None,
        groups: int = 1,
    ) -> Q:
        return cls.from_parts(integers, scales, dtype, activations, groups)


class Int8(QuantizedWeight):
    """A dense int8 weight, linear or a convolution's, one byte an element (the channels of a group padded to
    four, its filters to 16). See `QuantizedWeight` for the numbers."""

    __slots__ = ()
    kind: ClassVar[str] = "int8"
    _masked: ClassVar[bool] = False

    def to(self, device: Any, dtype: Any = None) -> DeviceWeight:
        from pared._cuda_int8 import DeviceInt8

        if len(self.shape) != 2:
            raise ValueError(
                f"device: expected a linear weight for {device}, got one of shape {list(self.shape)}"
            )
        return DeviceInt8.from_int8(self, device_of(device))


class Int8WeightOnly(Int8):
    """An `Int8` linear weight whose input a CUDA device takes as it comes, in 16 bits: for few tokens, where
    reading the weight is the cost and rounding the input gains nothing.

    The same bytes as `Int8`; they differ in what `to` makes of them. On a CPU the input is quantized as
    `Int8`'s is.
    """

    __slots__ = ()

    def to(self, device: Any, dtype: Any = None) -> DeviceWeight:
        return _few_tokens(self, device, dtype, "dense8")


class Bitmap8(QuantizedWeight):
    """An unstructured sparse int8 weight: a byte a non-zero and one bit an element.

    For any number of tokens: few read the weight once and expand it in registers; many expand it tile by
    tile in the cache, for the kernels of `Int8`. The outputs are those of `Int8`, to the bit. See
    `QuantizedWeight` for the numbers. A CUDA device takes the input as it comes, in 16 bits; one or two
    tokens at a time as integers of 22 bits below their largest magnitude, where one that holds NaN or
    infinity gives NaN.
    """

    __slots__ = ()
    kind: ClassVar[str] = "bitmap8"
    _masked: ClassVar[bool] = True

    def to(self, device: Any, dtype: Any = None) -> DeviceWeight:
        return _few_tokens(self, device, dtype, "bitmap8")


def _few_tokens(
    w: QuantizedWeight, device: Any, dtype: Any, format: Literal["bitmap8", "dense8"]
) -> DeviceWeight:
    """The weight for a device's kernels that read it once and do not round their input to 8 bits."""
    import torch

    from pared._cuda_decode import DecodeWeight

    given = w._device_dtype(dtype)
    if w.activations is not None:
        raise ValueError(
            f"device: {type(w).__name__} on CUDA does not quantize its input, got static activations"
        )
    device = device_of(device)
    q, scales = (torch.from_numpy(a).to(device) for a in w.to_quantized())
    return DecodeWeight.from_quantized(q, scales, given, format)


def _check_groups(groups: Any, ndim: int) -> None:
    if integer(groups, "groups") < 1 or (ndim == 2 and groups != 1):
        raise ValueError(f"groups: expected 1, or a convolution's groups, got {groups!r}")


def _torch_weight(source: Any) -> tuple[Any, Any, str]:
    """``(q, scales, dtype)`` of what torch or torchao quantized."""
    import torch

    w: Any = getattr(source, "weight", source)
    if callable(w) and not isinstance(w, torch.Tensor):  # torch.ao's modules have a method
        w = w()
    if not isinstance(w, torch.Tensor) or w.ndim not in (2, 3, 4):
        raise TypeError(f"source: expected a quantized layer or weight, got {type(source).__name__}")
    if w.is_quantized:
        per_tensor = w.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
        if w.dtype != torch.qint8 or not (per_tensor or w.q_per_channel_axis() == 0):
            raise ValueError(f"source: expected qint8 with a scale a tensor or output, got {w.dtype}")
        zeros = torch.tensor(w.q_zero_point(), device="cpu") if per_tensor else w.q_per_channel_zero_points()
        scales = torch.tensor(w.q_scale(), device="cpu") if per_tensor else w.q_per_channel_scales()
        q, dtype = w.int_repr(), "float32"
    elif hasattr(w, "qdata") and hasattr(w, "scale"):
        q, scales, dtype = w.qdata, w.scale, str(w.dtype).removeprefix("torch.")
        given = getattr(w, "zero_point", None)
        zeros = torch.zeros(1, device="cpu") if given is None else given
        if getattr(w, "act_pre_scale", None) is not None:
            raise ValueError(
                "source: expected inputs taken as they come, got scales for them (act_pre_scale)"
            )
        if q.dtype != torch.int8 or scales.numel() not in (1, q.shape[0]):
            raise ValueError(
                f"source: expected int8 with one scale an output, got {q.dtype} with {scales.numel()} scales"
            )
        scales = scales.reshape(-1) if scales.numel() > 1 else scales.reshape(())
    else:
        raise TypeError(f"source: expected a quantized layer or weight, got {type(source).__name__}")
    if bool(zeros.any()):
        raise ValueError("source: expected zero points of 0 in the weight, got others")
    return q.contiguous(), scales.float(), dtype


def gemm_s8(a: Array, b: Array) -> Array:
    """``a @ b.T`` of int8 matrices, exact in int32.

    Parameters
    ----------
    a : [M, K], int8; b : [N, K], int8. All values, -128 included; K at most 131071. Rows may lie apart.

    Returns
    -------
    [M, N], int32, of `a`'s kind. On a CPU `b` is packed on every call: keep an `Int8` weight where it stays
    the same. On a CUDA device the product runs on torch's current stream, and nothing waits.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    """
    require_array(a, "a")
    require_array(b, "b")
    for x, name in ((a, "a"), (b, "b")):
        if x.ndim != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {list(x.shape)}")
    if is_torch(a) and a.is_cuda and is_torch(b):
        from pared import _cuda_int8

        return _cuda_int8.gemm_s8(a, b)
    out = empty_like_kind(a, (a.shape[0], b.shape[0]), dtype_of_kind(a, "int32"))
    _core.gemm_s8(a, b, out)
    return out
