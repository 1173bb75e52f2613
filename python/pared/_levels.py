"""`pared.levels`: one model at several sparsities, which a server switches between while it serves."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pared._accelerate import accelerate
from pared._errors import check_ascending, is_integer
from pared._format import Bytes, Entry, Reader, Writer, expect_list, expect_object, refuse, require
from pared._io import _collect, load
from pared._report import Report, report
from pared._size import memory_bytes
from pared._surgery import copy_model
from pared.pruning.importance import Importance, resolve
from pared.pruning.linears import open_layers
from pared.pruning.oneshot import check_sparsity, prune
from pared.pruning.patterns import parse_pattern
from pared.pruning.targets import collect, unwrap

__all__ = ["Levels", "levels"]


class Levels(nn.Module):
    """A model at several sparsities, densest first; made by `levels` or `pared.load`. For inference.

    `set_level` is one assignment: nothing is packed or copied, and any thread may call it at any time. A call
    of the model reads the level once: it runs on that level to its end, whatever is set meanwhile. What the
    model offers besides (``config``, ``generate``) is that of the level at the moment.

    Memory: every level has packed weights of its own, ready to run; what levels share (biases, embeddings,
    layers that stayed dense) is there once. `memory_bytes` says how much it is. In a file the values of the
    densest level are stored once, and one bit for each of them and each level above.

    Attributes
    ----------
    sparsities : of the levels, ascending.
    """

    _level: int

    def __init__(self, models: Sequence[nn.Module], sparsities: Sequence[float]) -> None:
        super().__init__()
        listed = isinstance(models, Sequence) and len(models) > 0
        if not listed or not all(isinstance(m, nn.Module) for m in models):
            raise TypeError(f"models: expected a list of modules, got {models!r:.200}")
        plain = parse_pattern("unstructured")
        self.models = nn.ModuleList(models)
        self.sparsities = check_ascending(
            "sparsities", sparsities, lambda s: check_sparsity(s, plain, "sparsities")
        )
        if len(self.sparsities) != len(models):
            raise ValueError(f"sparsities: expected {len(models)}, one for each model, got {sparsities!r}")
        self._ready = tuple(models)  # past ModuleList's own look-up
        self._level = 0
        self.eval()

    @property
    def level(self) -> int:
        """The level that calls run on, 0 the densest."""
        return self._level

    def set_level(self, level: int) -> None:
        """Let calls that begin from now on run on this level; negative ones count from the sparsest."""
        if not is_integer(level):
            raise TypeError(f"level: expected a number, got {type(level).__name__}")
        n = len(self._ready)
        if not -n <= level < n:
            raise ValueError(f"level: expected {-n} to {n - 1}, of {n} levels, got {level!s:.20}")
        self._level = int(level) % n

    @property
    def memory_bytes(self) -> int:
        """Of the parameters and buffers of all levels, shared ones once."""
        return memory_bytes(self)

    def reports(self) -> list[Report]:
        """`pared.report` of each level."""
        return [report(m) for m in self._ready]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._ready[self._level](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("_ready", "_level"):
                raise
            return getattr(self._ready[self._level], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Levels:
        new = Levels([copy.deepcopy(m, memo) for m in self._ready], self.sparsities)
        new._level = self._level
        return new

    def extra_repr(self) -> str:
        return f"sparsities={[round(s, 4) for s in self.sparsities]}, level={self._level}"


def levels(
    model: nn.Module | Sequence[nn.Module],
    example_inputs: Any,
    sparsities: Sequence[float] = (0.5, 0.8, 0.9),
    *,
    pattern: str = "unstructured",
    importance: Importance = "magnitude",
    scope: str | None = None,
    data: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    include: Any = None,
    exclude: Any = None,
    **options: Any,
) -> Levels:
    """One model at several sparsities, each accelerated: ``fast.set_level(i)`` switches while serving.

    Parameters
    ----------
    model : as in `pared.prune`; it is not changed. Each level is pruned from the one before, so that a weight
        that is zero at one is zero at all sparser ones. Or the levels themselves, densest first: models that
        differ only in further zeros, such as one that was trained at all levels together.
    example_inputs, options : as in `pared.accelerate`, in float32.
    sparsities : ascending; 0 is the model as it is. Not with a list of models.
    pattern, importance, scope, data, loss_fn, include, exclude : as in `pared.prune`. Criteria that rewrite
        the weights that stay (SparseGPT) give levels without common values: `ValueError`.

    Returns
    -------
    Levels : at level 0. `pared.save` writes it to one file, `pared.load` reads it.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    """
    if options.get("precision", "float32") != "float32":
        raise ValueError(
            f"precision: expected 'float32', in which levels have common values, got {options['precision']!r}"
        )
    if isinstance(model, nn.Module):
        if hasattr(resolve(importance), "reconstruct"):
            raise ValueError(
                "importance: expected a criterion that leaves the weights that stay as they are, got "
                f"{resolve(importance).name!r}"
            )
        parsed = parse_pattern(pattern)
        wanted = check_ascending(
            "sparsities",
            sparsities,
            lambda s: 0.0 if type(s) in (int, float) and s == 0 else check_sparsity(s, parsed, "sparsities"),
        )
        current, plain = copy_model(unwrap(model)), []
        for sparsity in wanted:
            if sparsity:
                prune(
                    current,
                    sparsity,
                    pattern=pattern,
                    importance=importance,
                    scope=scope,
                    data=data,
                    loss_fn=loss_fn,
                    include=include,
                    exclude=exclude,
                )
            plain.append(copy_model(current))
    else:
        if isinstance(model, str) or not isinstance(model, Iterable):
            raise TypeError(f"model: expected a module or a list of modules, got {type(model).__name__}")
        plain = [unwrap(m) for m in model]
        if not plain:
            raise ValueError("model: expected at least one level, got an empty list")
    for sparse, dense in zip(plain[1:], plain, strict=False):
        _check_nested(dense, sparse)
    fast = [accelerate(m, example_inputs, **options) for m in plain]
    if any(report(m).opened for m in fast):
        # Common values need common names: what is opened at one level is opened at all.
        fast = []
        for m in plain:
            linears, opened = open_layers(copy_model(m), skip=True)
            fast.append(accelerate(linears, example_inputs, **options))
            report(fast[-1]).opened |= opened
    for other in fast[1:]:
        _share(fast[0], other)
    return Levels(fast, [_sparsity(m) for m in plain])


def _sparsity(model: nn.Module) -> float:
    weights = [t.weight for t in collect(model, None, None, 0, 0)[0]]
    return 1.0 - sum(int(torch.count_nonzero(w)) for w in weights) / max(1, sum(w.numel() for w in weights))


def _check_nested(dense: nn.Module, sparse: nn.Module) -> None:
    a, b = dense.state_dict(), sparse.state_dict()
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        raise ValueError("model: expected levels of one architecture, got tensors of other names or shapes")
    for name, old in a.items():
        if not bool(((b[name] == old) | (b[name] == 0)).all()):
            raise ValueError(
                f"model: expected levels that differ from the denser one only in further zeros, got other "
                f"values in {name!r}"
            )


def _share(first: nn.Module, other: nn.Module) -> None:
    """Let `other` use the tensors of `first` that are the same under the same name."""
    mine = {**dict(first.named_parameters()), **dict(first.named_buffers())}
    for prefix, module in other.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                twin = mine.get(f"{prefix}.{name}" if prefix else name)
                if tensor is None or twin is None or type(twin) is not type(tensor):
                    continue
                if twin.shape == tensor.shape and twin.dtype == tensor.dtype and torch.equal(twin, tensor):
                    store[name] = twin


# ---------------------------------------------------------------- files


def _given(data: Bytes) -> Bytes:
    return data


class _Tap(Writer):
    """A writer that also holds the bytes of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.raw: dict[str, Bytes] = {}

    def add(
        self, name: str, kind: str, dtype: str, shape: Iterable[int], source: Callable[[], Bytes]
    ) -> Entry:
        data = np.array(source())
        self.raw[name] = data
        return super().add(name, kind, dtype, shape, partial(_given, data))

    def discard(self, name: str) -> None:
        super().discard(name)
        self.raw.pop(name, None)

    def words(self, name: str) -> NDArray[Any]:
        return self.raw[name].view(f"<u{self.entries[name].type.itemsize}")


def collect_levels(model: Levels, writer: Writer) -> dict[str, Any]:
    """Give the writer the densest level and what the others leave of it; returns the metadata."""
    before: _Tap | None = None
    first: _Tap | None = None
    found: list[dict[str, Any]] = []
    for k, inner in enumerate(model._ready):
        tap = _Tap()
        level: dict[str, Any] = {"about": _collect(inner, tap), "masks": [], "own": []}
        if first is None or before is None:
            for name, entry in tap.entries.items():
                writer.add(name, entry.kind, entry.dtype, entry.shape, partial(_given, tap.raw[name]))
            first = tap
        elif tap.entries.keys() != first.entries.keys():
            raise ValueError("model: expected levels that store the same tensors, got other names in one")
        else:
            for name, entry in tap.entries.items():
                old, new = before.words(name), tap.words(name)
                if np.array_equal(old, new):
                    continue
                if entry.dtype == first.entries[name].dtype and bool(((new == old) | (new == 0)).all()):
                    level["masks"].append(name)
                    bits = np.packbits(new[old != 0] != 0)
                    writer.add(f"@{k}.{name}", "buffer", "uint8", bits.shape, partial(_given, bits))
                else:
                    level["own"].append(name)
                    writer.add(
                        f"@{k}.{name}", entry.kind, entry.dtype, entry.shape, partial(_given, tap.raw[name])
                    )
        before = tap
        found.append(level)
    return {"levels": found, "sparsities": list(model.sparsities)}


def load_levels(reader: Reader, model: nn.Module | Callable[[], nn.Module]) -> Levels:
    """What `collect_levels` gave, as `pared.load` does it: each level packed for this machine."""
    where = "file: metadata"
    data = expect_object(reader.about, where, ["levels", "sparsities"])
    found = [
        expect_object(x, f"{where}: level", ["about", "masks", "own"])
        for x in expect_list(data["levels"], where)
    ]
    sparsities = expect_list(data["sparsities"], where)
    require(found and len(found) == len(sparsities), f"{where}: levels: expected a sparsity for each")
    require(all(isinstance(s, float) and 0 <= s <= 1 for s in sparsities), f"{where}: sparsities: no shares")
    base = {name: entry for name, entry in reader.tensors.items() if not name.startswith("@")}
    current = {name: _read(reader, entry) for name, entry in base.items()}
    made: list[nn.Module] = []
    for k, level in enumerate(found):
        for name in expect_list(level["masks"], where):
            entry = reader.tensors.get(f"@{k}.{name}")
            if not isinstance(name, str) or name not in current or entry is None or entry.dtype != "uint8":
                refuse(f"file: level {k}: expected a mask of a known tensor, got {name!r}")
            words = current[name].view(f"<u{base[name].type.itemsize}").copy()
            kept = np.flatnonzero(words)
            require(entry.size == -(-kept.size // 8), f"file: level {k}: mask of {name!r} is of another size")
            words[kept[np.unpackbits(_read(reader, entry), count=kept.size) == 0]] = 0
            current[name] = words.view(np.uint8)
        for name in expect_list(level["own"], where):
            entry = reader.tensors.get(f"@{k}.{name}")
            if (
                not isinstance(name, str)
                or name not in current
                or entry is None
                or entry.nbytes != base[name].nbytes
            ):
                refuse(f"file: level {k}: expected a tensor like that of level 0, got {name!r}")
            current[name] = _read(reader, entry)
        writer = Writer()
        for name, entry in base.items():
            writer.add(name, entry.kind, entry.dtype, entry.shape, partial(_given, current[name]))
        whole = io.BytesIO()
        writer.write(whole, expect_object(level["about"], where, list(level["about"])))
        whole.seek(0)
        made.append(load(whole, model))
        if k:
            _share(made[0], made[k])
    return Levels(made, sparsities)


def _read(reader: Reader, entry: Entry) -> Bytes:
    data = np.empty(entry.nbytes, np.uint8)
    if data.size:
        reader.read(entry, data)
    return data
