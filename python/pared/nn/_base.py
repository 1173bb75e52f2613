"""What every accelerated module shares: one packed weight, for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self

from pared import _core
from pared.ops._device import DeviceWeight
from pared.ops._formats import FORMATS, Format
from pared.ops._library import aligned
from pared.ops.int4 import Int4, int4_group
from pared.ops.int8 import Int8, IntegerWeight, QuantizedWeight, check_activations
from pared.ops.packed import PackedWeight

# What the kernels' epilogues compute, as torch does.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
}


class DenseWeightError(AttributeError, RuntimeError):
    """Code outside the layer computes with ``layer.weight``, which an accelerated layer does not hold.

    Attributes
    ----------
    layer : the accelerated module.
    """

    def __init__(self, layer: PackedModule) -> None:
        super().__init__(
            f"weight: {type(layer).__name__} holds a packed {layer.format} weight, not a dense one; call the "
            "layer, or use layer.packed_weight().to_dense(), or keep this layer dense"
        )
        self.layer = layer


class WeightStandIn(Tensor):
    """What ``layer.weight`` gives: shape, dtype and device of the dense weight, and no memory.

    Model code that looks at ``layer.weight.dtype`` goes on working; computing with it raises
    `DenseWeightError`. Fused paths such as ``nn.TransformerEncoderLayer``'s see a tensor subclass and call
    the layer.
    """

    layer: PackedModule

    @staticmethod
    def __new__(cls, layer: PackedModule) -> WeightStandIn:
        self: WeightStandIn = Tensor._make_wrapper_subclass(cls, layer.weight_shape, dtype=layer.weight_dtype)
        self.layer = layer
        return self

    @property
    def data(self) -> Tensor:
        raise DenseWeightError(self.layer)

    @data.setter
    def data(self, value: Any) -> None:  # torch would give the stand-in, not the layer, other numbers
        raise DenseWeightError(self.layer)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WeightStandIn(shape={list(self.shape)}, dtype={self.dtype}, of={type(self.layer).__name__})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Present so that has_torch_function() is true, which is what fused paths ask before they use a
        # weight.
        return super().__torch_function__(  # type: ignore[no-untyped-call]
            func, types, args, kwargs or {}
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for a in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(a, WeightStandIn):
                raise DenseWeightError(a.layer)
        raise RuntimeError(f"{func}: expected an accelerated layer's weight among the arguments")


# A packed buffer that load_state_dict replaced, and by what: layers that shared the old one share the new
# one.
_replaced: WeakIdKeyDictionary = WeakIdKeyDictionary()


class PackedModule(nn.Module):
    """Base of the accelerated modules. Inference only; always in eval mode.

    The packed weight is a uint8 buffer (``packed``, in the state dict), 64-byte aligned; ``load_state_dict``,
    ``deepcopy`` and unpickling align it again and check it. The bias is a float32 buffer.

    Dtypes: the output has the input's dtype (float32, bfloat16 or float16), whatever ``half()`` or
    ``to(dtype)`` did: the packed weight and the bias are not affected by them. Autocast does not change the
    computation either: the input is taken as it comes.

    The kernels rely on what is in ``packed``: it is checked wherever it enters, and not to be written to.

    Several threads may call one module at once.

    Linear layers with int8, int8wo, bitmap8, bsr8, csr, or 16-bit 2:4, bsr or bitmap weights move to CUDA
    devices: a copy of the weight goes there in the layout of the kernels, ``packed`` stays in the CPU's
    memory, so that the state dict and files are the same. So do convolutions of 1x1 without padding and
    groups, whose pixels are the tokens of the same product; 8 bits have a scale a pixel there and one an
    image on the CPU, so that their outputs differ within that rounding. Other formats and geometries refuse
    to move.

    Attributes
    ----------
    packed : uint8 tensor.
    bias : float32 tensor [out], or None.
    activation : ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, or None; fused into the kernel.
    format : name of the packed format, ``"csr"``.
    weight_shape, weight_dtype : of the dense weight.
    """

    packed: Tensor
    bias: Tensor | None
    # The weight in the memory of a CUDA device, where the module was moved to one; `packed` stays on the CPU.
    _on_device: DeviceWeight | None = None
    # What `_apply` is to hold, in a tuple, once `_prepare` has made it.
    _prepared: tuple[DeviceWeight | None] | None = None
    # Its parts, for tracers: they see a string and tensors.
    _device_layout: str = ""
    _device_tensors: list[Tensor] = []  # noqa: RUF012  # replaced, never written to
    # The class that pared.restore gives back.
    plain: ClassVar[type[nn.Module]]

    def __init__(self, weight: PackedWeight, bias: Tensor | None, activation: str | None) -> None:
        super().__init__()
        if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)} or None, got {activation!r}"
            )
        self.format = format_name(weight)
        self.activation = activation
        self._act = activation or ""
        self.weight_shape = weight.shape
        self.weight_dtype: torch.dtype = getattr(torch, weight.dtype)
        self._requires_grad = (True, True)  # of the plain weight and bias, for restore
        packed = weight.packed if isinstance(weight.packed, Tensor) else torch.from_numpy(weight.packed)
        if packed.device.type != "cpu":
            raise ValueError(f"weight: expected a packed weight on the CPU, got one on {packed.device}")
        self.register_buffer("packed", aligned(packed))
        if bias is not None:
            rows = weight.shape[0]
            if not isinstance(bias, Tensor):
                raise TypeError(f"bias: expected a torch tensor or None, got {type(bias).__name__}")
            if not bias.is_floating_point() or bias.layout is not torch.strided or bias.is_meta:
                got = f"{bias.dtype} in layout {bias.layout} on {bias.device}"
                raise TypeError(f"bias: expected a dense floating-point tensor, got {got}")
            if tuple(bias.shape) != (rows,):
                raise ValueError(f"bias: expected shape [{rows}], got {list(bias.shape)}")
            bias = bias.detach().to(dtype=torch.float32, copy=True, memory_format=torch.contiguous_format)
        self.register_buffer("bias", bias)
        self.training = False

    @classmethod
    def from_module(
        cls,
        module: Any,
        *,
        format: str = "csr",
        activation: str | None = None,
        weight: PackedWeight | None = None,
        norm: nn.BatchNorm2d | None = None,
    ) -> Self:
        """Convert a plain module; the tensors of the original are copied.

        Parameters
        ----------
        module : the plain module, for example ``nn.Linear``.
        format : packed format.
        activation : activation to fuse behind it.
        weight : the packed weight, where it has been packed already (tied modules).
        norm : batch normalisation in eval mode to fold into a convolution, before the activation; `weight` is
            then not taken.

        Raises
        ------
        TypeError, ValueError : naming the argument; also for weights that are not finite.
        """
        raise NotImplementedError

    @classmethod
    def from_quantized(
        cls,
        module: nn.Module,
        *,
        activation_scale: float | None = None,
        activation_zero: int = 0,
        activation_dtype: str = "uint8",
    ) -> Self:
        """Take over a layer that torch or torchao quantized: its integers, scales, bias and fused ReLU.

        The new layer takes and returns float tensors; a static layer's own rounding of its outputs to 8 bits
        is the only one that it leaves out.

        Parameters
        ----------
        module, activation_scale, activation_zero, activation_dtype : as for ``pared.ops.Int8.from_torch``.

        Raises
        ------
        TypeError, ValueError : a layer of another kind, with zero points in its weight, or with scales of
            groups.
        """
        raise NotImplementedError

    def to_module(self) -> nn.Module:
        """The plain module again, with dense weights, in eval mode, without the fused activation."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """What a file holds of the layer: the plain layer's parameters, with integers as ``weight`` and their
        ``weight_scale`` where it is quantized, unless they are those of a folded weight: these come out the
        same when it is quantized again."""
        tensors: dict[str, Tensor] = dict(self.to_module().named_parameters())
        weight = self.packed_weight()
        if isinstance(weight, IntegerWeight) and "fold_scale" not in self._buffers:
            q, scales = weight.stored()
            tensors["weight"] = torch.from_numpy(q)
            tensors["weight_scale"] = torch.from_numpy(scales)
        return tensors

    def packed_weight(self) -> PackedWeight:
        """The packed weight as a `pared.ops` object: ``.sparsity``, ``.to_dense()``, ..."""
        return FORMATS[self.format].weight(self.packed)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            if is_compiling():  # a tracer knows no wrapper; computing with a tensor on meta fails as well
                return torch.empty(self.weight_shape, dtype=self.weight_dtype, device="meta")
            return WeightStandIn(self)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.func.functional_call sets what it is given, and would not notice that a weight is not used.
        if name == "weight" or (name == "bias" and isinstance(value, nn.Parameter)):
            raise TypeError(
                f"{name}: expected none to be set, got a {type(value).__name__}; {type(self).__name__} holds "
                f"a packed {self.format} weight for inference: set it on the plain layer that pared.restore "
                "gives"
            )
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> Self:
        raise TypeError(
            f"torch.jit.script: expected plain layers, got an accelerated {type(self).__name__}; "
            "torch.jit.trace and torch.export take it"
        )

    def train(self, mode: bool = True) -> Self:
        """Does nothing: an accelerated layer is always in eval mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._prepare(fn)
        self._hold(*cast(tuple[DeviceWeight | None], self._prepared))
        self._prepared = None
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers["packed"] = before["packed"]  # stays on the CPU
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old
        self._align()
        return self

    def _prepare(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Have ready what `_apply` with `fn` is to hold. Raises ``RuntimeError`` where there is no kernel."""
        if self._prepared is None:
            device = fn(torch.empty(0, dtype=torch.uint8, device=self._device())).device
            self._prepared = (self._moved(device),)

    def _moved(self, device: torch.device) -> DeviceWeight | None:
        """The weight on `device`; None for the CPU. Raises ``RuntimeError`` where it has no kernel."""
        if device.type == "cpu":
            return None
        try:
            if device.type != "cuda":
                raise ValueError(f"device: expected cpu, got {device}")
            return self._device_weight(device)
        except ValueError as e:
            raise RuntimeError(
                f"device: {type(self).__name__} has no {self.format} kernel for {device} ({e}); "
                "pared.restore(model) gives plain modules that run anywhere"
            ) from e

    def _device_weight(self, device: torch.device) -> DeviceWeight:
        """The weight in the memory of a CUDA device. Raises ``ValueError`` where it has no kernel."""
        return self.packed_weight().to(device)

    def _hold(self, weight: DeviceWeight | None) -> None:
        """Run `weight`, which stands for the packed one, on its device; None: on the CPU."""
        self._on_device = weight
        self._device_layout, self._device_tensors = ("", []) if weight is None else weight.parts()

    def _align(self) -> None:
        packed = self._buffers["packed"]
        if type(packed) is Tensor and packed.device.type == "cpu":
            self._buffers["packed"] = aligned(packed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._align()
        packed = self._buffers["packed"]
        if type(packed) is Tensor and packed.device.type == "cpu":
            self.packed_weight()  # checks the buffer: it may come from a file

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "packed"
        if key in state_dict:
            try:
                self._buffers["packed"] = self._checked(state_dict[key])
            except (TypeError, ValueError) as e:
                error_msgs.append(f'While loading the packed weight "{key}": {e}')
            # The sizes of two packed weights differ with their zeros: torch's own code would refuse that.
            state_dict = {**state_dict, key: self._buffers["packed"]}
            if self._on_device is not None and not error_msgs:
                self._hold(self._device_weight(self._on_device.device))
        delta = state_dict.get(prefix + "fold_delta")
        if "fold_delta" in self._buffers and isinstance(delta, Tensor) and delta.dtype == torch.int8:
            self._buffers["fold_delta"] = delta.detach().clone()  # one byte a non-zero: sizes differ as well
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        bias = self._buffers["bias"]
        if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):  # assign=True
            self._buffers["bias"] = bias.detach().float().contiguous()

    def _device(self) -> torch.device:
        """Where inputs have to be."""
        return torch.device("cpu") if self._on_device is None else self._on_device.device

    def _checked(self, packed: Any) -> Tensor:
        """A private, aligned copy of a packed buffer from outside, every invariant checked."""
        if not isinstance(packed, Tensor) or packed.device.type != "cpu":
            raise TypeError(f"packed: expected a CPU tensor, got {type(packed).__name__}")
        old = self.packed
        known = _replaced.get(old)  # type: ignore[no-untyped-call]
        if known is not None and torch.equal(known, packed):
            return known  # type: ignore[no-any-return]
        new = torch.from_numpy(_core.packed_copy(packed.detach().contiguous()))
        weight = FORMATS[self.format].weight(new)
        mine = self.packed_weight()
        if weight.shape != mine.shape or weight.groups != mine.groups:
            raise ValueError(
                f"packed: expected a weight of shape {list(mine.shape)} in {mine.groups} group(s), got "
                f"{list(weight.shape)} in {weight.groups}"
            )
        if "fold_delta" not in self._buffers:
            self.weight_dtype = getattr(torch, weight.dtype)
        _replaced[old] = new
        return new

    def _repr_tail(self) -> str:
        w = self.packed_weight()
        tail = f"bias={self.bias is not None}, format={self.format}, sparsity={w.sparsity:.3f}"
        return f"{tail}, activation={self.activation}" if self.activation else tail


def quantized_parts(
    module: nn.Module,
    kind: str,
    activation_scale: float | None,
    activation_zero: int,
    activation_dtype: str,
) -> tuple[Int8, Tensor | None, str | None]:
    """``(weight, bias, activation)`` of a quantized layer; `kind` is the name of torch's float layer."""
    name = type(module).__name__
    if not isinstance(module, nn.Module) or not hasattr(module, "weight"):
        raise TypeError(f"module: expected a quantized {kind}, got {name}")
    check_activations(activation_scale, activation_zero, activation_dtype)
    try:
        weight = Int8.from_torch(
            module,
            activation_scale=activation_scale,
            activation_zero=activation_zero,
            activation_dtype=activation_dtype,
        )
    except TypeError:
        raise TypeError(f"module: expected a quantized {kind}, got {name}") from None
    if len(weight.shape) != (2 if kind == "Linear" else 4):
        raise TypeError(f"module: expected a quantized {kind}, got {name}")
    bias: Any = module.bias
    bias = bias() if callable(bias) and not isinstance(bias, Tensor) else bias
    return weight, bias, "relu" if "ReLU" in name else None


def format_name(weight: PackedWeight) -> str:
    """The registered name of a packed weight's format."""
    for f in FORMATS.values():
        if type(weight) is f.weight:
            return f.name
    raise TypeError(f"weight: expected a packed weight ({', '.join(FORMATS)}), got {type(weight).__name__}")


def as_images(weight: Tensor) -> Tensor:
    """The weight [out, in / groups, taps] of an ``nn.Conv1d`` as that of a convolution over images of height
    1; any other as it is."""
    return weight.unsqueeze(2) if weight.ndim == 3 else weight


def pack(format: str, weight: Tensor, groups: int = 1, record: Any = None) -> PackedWeight:
    """Pack a dense weight into the named format; `as_images` where it is of one dimension.

    `record` is what `pared.quantize` left on the layer, or None: a quantized format takes its integers and
    scales over where the weight still lies on their grid.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    cls = FORMATS[format].weight
    if record is not None and issubclass(cls, IntegerWeight):
        taken = _taken_over(cls, weight.detach(), record)
        if taken is not None:
            return cls(torch.from_numpy(taken.packed))
    # A tensor from here on: modules that share it share one object, which deepcopy and pickle keep shared.
    dense = as_images(weight.detach()).contiguous()
    return cls(torch.from_numpy(cls.from_dense(dense, groups=groups).packed))


def off_grid(bits: int) -> float:
    """What an element may be off its grid, of a scale: seven steps rounded to bfloat16, or less."""
    return 0.03 if bits <= 4 else 0.01


def on_grid(weight: Tensor, record: Any) -> Tensor | None:
    """The integers of a weight on the grid that `record` describes; None where it has changed since, or its
    dtype is too coarse: an element is off by more than `off_grid`."""
    q, scale = record.codes(weight), record.scale.float()
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(record.group, 1)[:, : weight.shape[1]]
    off = (q.float() * scale - weight.float()).abs() > off_grid(record.bits) * scale
    return None if bool(off.any()) else q


def _taken_over(cls: type[IntegerWeight], weight: Tensor, record: Any) -> PackedWeight | None:
    """The integers of a weight on its own grid; None where the format cannot hold it."""
    four = int4_group(record.bits, record.symmetric, record.group, record.activation_scale)
    one_scale = record.bits <= 8 and record.symmetric and record.scale.shape[1] == 1
    if weight.ndim != 2 or not (four if cls is Int4 else one_scale):
        return None
    q = on_grid(weight, record)
    if q is None:
        return None
    dtype = str(weight.dtype).removeprefix("torch.")
    codes, scale = q.contiguous().numpy(), record.scale.float()
    if four is not None and issubclass(cls, Int4):
        scale = scale.expand(-1, -(-weight.shape[1] // four)) if scale.shape[1] == 1 else scale
        return cls.from_quantized(codes, scale.contiguous().numpy(), group=four, dtype=dtype)
    fixed = check_activations(record.activation_scale, record.activation_zero, record.activation_dtype)
    return cast(type[QuantizedWeight], cls).from_parts(codes, scale.reshape(-1).numpy(), dtype, fixed)


__all__ = [
    "ACTIVATIONS",
    "DenseWeightError",
    "Format",
    "PackedModule",
    "WeightStandIn",
    "as_images",
    "format_name",
    "pack",
    "quantized_parts",
]
