"""The accelerated ``nn.Linear``."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from typing_extensions import Self

from pared import _core, _cuda
from pared.nn._base import PackedModule, pack, quantized_parts
from pared.nn._joint import Joint
from pared.ops._device import DeviceWeight
from pared.ops._formats import FORMATS
from pared.ops._library import foldable, grad_error, linear_device_op, linear_op
from pared.ops.chain import chain_of
from pared.ops.packed import PackedWeight

_global = torch.nn.modules.module
_strided = torch.strided
_DONE = "_pared_chain"  # attribute of a tensor: the layer that computed it, its followers included
_SHARED = "_pared_shared"  # attribute of an input: outputs of other layers for it, and its version then
_grad_enabled = torch.is_grad_enabled
_mode_depth = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing


class _Calls(threading.local):
    """What goes on in each thread: the layers that may compute those behind them (see `pared.nn._chains`)."""

    heads: tuple[Linear, ...] = ()


calls = _Calls()


class Linear(PackedModule):
    """``activation(x @ W.T + bias)`` with a packed weight W [out_features, in_features].

    Build it with `from_module`, or from a packed weight.

    Parameters
    ----------
    weight : packed weight, for example ``pared.ops.CSR.from_dense(w)``.
    bias : [out_features] of any float dtype, copied as float32; or None.
    activation : None, "relu", "gelu" (erf), "gelu_tanh" or "silu".

    Attributes
    ----------
    in_features, out_features : as in ``nn.Linear``; see `PackedModule` for the others.
    """

    plain = nn.Linear
    # Layers that this one computes as well (see `hand_to`), and the one that computes this layer.
    _handed: tuple[Linear, ...] = ()
    _fed_by: Linear | None = None
    # The modules of a chain, whose hooks would see, or change, what is not there.
    _chained: tuple[nn.Module, ...] = ()
    # Whether layers that it computes go along only where a module around them says so.
    _bound = False
    # Layers that this one computes beside itself where they get the same input (see `share_with`), and the
    # one that does so for this layer.
    _sharers: tuple[Linear, ...] = ()
    _shares_of: Linear | None = None
    # Whether they are packed alike, so that the CPU computes them together; their weights on a device as one.
    _packed_alike = False
    _joint: Joint | None = None

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None
    ) -> None:
        super().__init__(weight, bias, activation)
        if len(weight.shape) != 2:
            raise ValueError(f"weight: expected a linear weight [out, in], got shape {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_module(
        cls,
        module: nn.Linear,
        *,
        format: str = "csr",
        activation: str | None = None,
        weight: PackedWeight | None = None,
        norm: nn.BatchNorm2d | None = None,
    ) -> Self:
        if norm is not None:
            raise ValueError("norm: expected None for a linear layer, got a batch normalisation")
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module: expected nn.Linear, got {type(module).__name__}")
        new = cls(pack(format, module.weight) if weight is None else weight, module.bias, activation)
        new._requires_grad = (module.weight.requires_grad, getattr(module.bias, "requires_grad", True))
        return new

    @classmethod
    def from_quantized(
        cls,
        module: nn.Module,
        *,
        activation_scale: float | None = None,
        activation_zero: int = 0,
        activation_dtype: str = "uint8",
    ) -> Self:
        return cls(*quantized_parts(module, "Linear", activation_scale, activation_zero, activation_dtype))

    def to_module(self) -> nn.Linear:
        w = torch.as_tensor(FORMATS[self.format].weight(self.packed).to_dense(), device=self._device())
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(w, self._requires_grad[0])
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.to(w.dtype, copy=True), self._requires_grad[1])
        return plain.eval()

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in_features] to [..., out_features], in the input's dtype.

        Raises
        ------
        RuntimeError : grad mode is on and the input, or the bias, requires a gradient.
        TypeError, ValueError : dtype, device or shape of the input.
        """
        x = input
        head = self._fed_by
        if head is not None and type(x) is Tensor and not is_compiling() and head._has_computed(x, self):
            return x
        if self._shares_of is not None and type(x) is Tensor and not is_compiling():
            shared = x.__dict__.get(_SHARED)
            if shared is not None and (y := self._take(x, shared)) is not None:
                return y
        buffers = self._buffers
        # A tracer has to see an operator; the dispatcher costs eager calls 6 us.
        if is_compiling() or type(x) is not Tensor or _mode_depth() or _tracing():
            return self._traced(x)
        if self._on_device is not None:
            joint = self._joint
            if joint is not None and x is input and x.numel() == self.in_features and not x.is_inference():
                layers = (self, *self._sharers)
                if joint.holds(layers):
                    return self._share_on_device(x, joint, layers)
            return self._on_device.linear(foldable(x), buffers["bias"], self.activation)
        if x.layout is not _strided:
            raise TypeError(f"x: expected a strided (dense) tensor, got layout {x.layout}")
        bias = buffers["bias"]
        if _grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            raise grad_error("pared.nn.Linear")
        if not x.is_contiguous():
            x = foldable(x)
        if self._handed and self._leads():
            return self._chain(x)
        if self._packed_alike and x is input and not x.is_inference():
            return self._share(x)
        return _core.linear(x, buffers["packed"], bias, self.activation)  # type: ignore[no-any-return]

    def hand_to(self, *followers: Linear, between: Sequence[nn.Module] = ()) -> None:
        """Compute these layers as well, each from the one before, in one call (`pared.ops.linear_chain`).

        For a model in which what comes out of this layer goes into the first of them and nowhere else, and so
        on: this layer then returns the last one's output, and they pass it on as it is. They compute as usual
        for any other input, and all do where the model is traced or compiled, and where one of them, or of
        the modules `between` them, has forward hooks or is in training. In a model that `pared.accelerate` or
        `pared.load` gives, they go in one call only in calls of the innermost module around them all, and
        while they are where they were. No followers: take it back.

        Raises
        ------
        TypeError, ValueError : a layer that `linear_chain` does not take, or that does not fit the last;
            something else than modules between them.
        """
        if not isinstance(between, list | tuple) or not all(isinstance(m, nn.Module) for m in between):
            raise TypeError(f"between: expected a list of modules, got {between!r:.60}")
        before: Linear = self
        for f in followers:
            if not isinstance(f, Linear) or chain_of([before.packed_weight(), f.packed_weight()]) is None:
                raise TypeError(
                    f"followers: expected Linear layers that go with {before.format} in one call, got {f}"
                )
            if f is self or f._handed or f.in_features != before.out_features:
                raise ValueError(f"followers: expected a layer of {before.out_features} inputs, got {f}")
            before = f
        for f in self._handed:
            f._refer("_fed_by", None)
        self._refer("_handed", followers)
        self._refer("_chained", (self, *followers, *between) if followers else ())
        for f in followers:
            f._refer("_fed_by", self)

    def share_with(self, *others: Linear) -> None:
        """Compute these layers as well, from the same input, which is then packed or quantized once.

        Formats that do on the CPU: CSR, BSR and Dense (where their tiles are the same), Int8, Bitmap8,
        BSRInt8; weights of one format, or of the first three, go together, and the results are the same bits.
        On a CUDA device: CSR, Int8, Bitmap, Bitmap8 and Int8WeightOnly, of one format and with the same
        activation (the last three: with a multiple of 64 outputs, but for the last layer), where the input is
        one token. Their weights become one there, which one launch reads, and each a part of its memory: do
        that before a CUDA graph captures them.

        For a model in which they are called with the very tensor that this one was called with before, as the
        projections of an attention block are. They take what was computed for them when that tensor comes,
        unchanged; for any other input, for inference tensors (which do not tell whether they were changed)
        and for tracers they compute as usual. No layers: take it back.

        Raises
        ------
        TypeError, ValueError : a layer of other inputs, or whose weight is of another format and does not
            share inputs with this one's.
        """
        packed_alike = bool(others)
        for other in others:
            if not isinstance(other, Linear):
                raise TypeError(f"others: expected Linear layers, got {type(other).__name__}")
            alone = other is not self and not (other._sharers or other._handed or other._fed_by)
            if not alone or self._handed or self._fed_by is not None:
                raise ValueError(f"others: expected layers that go with no others, got {other}")
            alike = _core.shares_inputs(self.packed, other.packed)
            if not alike and (self.format, self.in_features) != (other.format, other.in_features):
                raise ValueError(f"others: expected layers of the same inputs, packed alike, got {other}")
            packed_alike &= alike
        for other in self._sharers:
            other._refer("_shares_of", None)
        self._refer("_sharers", others)
        self._refer("_packed_alike", packed_alike)
        for other in others:
            other._refer("_shares_of", self)
        self._join()

    def _hold(self, weight: DeviceWeight | None) -> None:
        super()._hold(weight)
        head = self if self._shares_of is None else self._shares_of
        head._join()

    def _join(self) -> None:
        """Make the weights of the layers that share an input on a device one."""
        layers = (self, *self._sharers)
        joint = None
        if self._sharers and all(m._shares_of is self for m in self._sharers):
            if self._joint is not None and self._joint.holds(layers):
                return
            joint = Joint.of(layers)
        self._refer("_joint", joint)
        if joint is not None:
            for m, part in zip(layers, joint.parts, strict=True):
                super(Linear, m)._hold(part)

    def _share_on_device(self, x: Tensor, joint: Joint, layers: tuple[Linear, ...]) -> Tensor:
        outs = joint.linear(foldable(x), layers, self.activation)
        self._leave(x, outs[1:], _cuda.place_of(x).stream)
        return outs[0]

    def _share(self, x: Tensor) -> Tensor:
        layers = (self, *self._sharers)
        outs = [x.new_empty((*x.shape[:-1], m.out_features)) for m in layers]
        _core.linear_shared(
            x,
            [m._buffers["packed"] for m in layers],
            [m._buffers["bias"] for m in layers],
            outs,
            [m._act for m in layers],
        )
        self._leave(x, outs[1:], None)
        return outs[0]

    def _leave(self, x: Tensor, outs: Sequence[Tensor], stream: int | None) -> None:
        """Leave with `x` what the layers that share it are going to ask for, on a device's stream."""
        x.__dict__[_SHARED] = {
            m: (x._version, stream, m._buffers["packed"], m._buffers["bias"], y)
            for m, y in zip(self._sharers, outs, strict=True)
        }

    def _take(self, x: Tensor, shared: dict[Linear, Any]) -> Tensor | None:
        """What was computed for this layer from `x`; None where `x`, or this layer, is no longer the same."""
        version, stream, packed, bias, y = shared.pop(self, (None, None, None, None, None))
        if not shared:
            x.__dict__.pop(_SHARED, None)
        buffers = self._buffers
        if y is None or version != x._version or packed is not buffers["packed"]:
            return None
        if bias is not buffers["bias"] or _mode_depth() or _tracing():
            return None
        if stream is not None and stream != _cuda.place_of(x).stream:
            return None
        return y  # type: ignore[no-any-return]

    def _refer(self, name: str, value: Any) -> None:
        # Past nn.Module's own registration: layers of the model that are elsewhere in its tree.
        object.__setattr__(self, name, value)

    def _has_computed(self, x: Tensor, follower: Linear) -> bool:
        """Whether `x` is what this layer made for its followers; the last of them takes the mark off."""
        if x.__dict__.get(_DONE) is not self:
            return False
        if self._handed[-1] is follower:
            del x.__dict__[_DONE]
        return True

    def _leads(self) -> bool:
        """Whether this call may be that of the layers behind as well."""
        if self._bound and self not in calls.heads:
            return False
        if _global._global_forward_hooks or _global._global_forward_pre_hooks:
            return False
        return not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in self._chained)

    def _chain(self, x: Tensor) -> Tensor:
        layers = (self, *self._handed)
        out: Tensor = _core.linear_chain(
            x,
            [m._buffers["packed"] for m in layers],
            [m._buffers["bias"] for m in layers],
            [m._act for m in layers],
        )
        out.__dict__[_DONE] = self
        return out

    def _traced(self, x: Any) -> Tensor:
        if not hasattr(type(x), "__torch_function__"):
            raise TypeError(f"x: expected a torch tensor, got {type(x).__name__}")
        if self._on_device is not None:
            on_device: Tensor = linear_device_op(
                x, self._device_tensors, self.bias, self.out_features, self._device_layout, self._act
            )
            return on_device
        y: Tensor = linear_op(x, self.packed, self.bias, self.out_features, self._act)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_tail()}"
