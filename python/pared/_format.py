"""The `.pared` container: a safetensors file with sparse encodings, checksums and one JSON string of
metadata.

The byte layout is specified in docs/format.md; this module is its one reader and writer. It knows numpy
arrays and files, not modules: `pared._io` puts models in and takes them out. Nothing here trusts a byte that
it has not checked, and nothing allocates by what a file says before the caller has compared the sizes with
its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

VERSION = 1
# A header is parsed before anything else is known about a file: JSON takes up to 30 times its size then.
MAX_HEADER = 32 << 20
# A sparse encoding adds an entry of about this size to the header; it has to save more.
_PART_OVERHEAD = 128
_ALIGNMENT = 64
_DIGEST_BYTES = 16
_PREFIX = b'{"__metadata__":{"blake2b":"'

Bytes = NDArray[np.uint8]
_Source = Callable[[], Bytes]


class FormatError(ValueError):
    """The file is corrupt, truncated, foreign, of a later version, or of another architecture than the
    model.
    """


def refuse(message: str) -> NoReturn:
    """Raise `FormatError`."""
    raise FormatError(message)


def require(condition: object, message: str) -> None:
    """Raise `FormatError` unless `condition` holds."""
    if not condition:
        raise FormatError(message)


def digest(*chunks: Any) -> str:
    """BLAKE2b of the chunks' bytes, as hexadecimal."""
    h = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for chunk in chunks:
        h.update(chunk)
    return h.hexdigest()


@dataclass(frozen=True)
class DType:
    """How a torch dtype is stored: safetensors' tag, axes that a complex number adds, bytes an element."""

    tag: str
    axes: tuple[int, ...]
    itemsize: int


# By the names that torch uses. Complex numbers are pairs of floats; the fnuz formats have no tag of their
# own.
DTYPES: dict[str, DType] = {
    "float64": DType("F64", (), 8),
    "float32": DType("F32", (), 4),
    "float16": DType("F16", (), 2),
    "bfloat16": DType("BF16", (), 2),
    "float8_e4m3fn": DType("F8_E4M3", (), 1),
    "float8_e5m2": DType("F8_E5M2", (), 1),
    "float8_e4m3fnuz": DType("U8", (), 1),
    "float8_e5m2fnuz": DType("U8", (), 1),
    "int64": DType("I64", (), 8),
    "int32": DType("I32", (), 4),
    "int16": DType("I16", (), 2),
    "int8": DType("I8", (), 1),
    "uint64": DType("U64", (), 8),
    "uint32": DType("U32", (), 4),
    "uint16": DType("U16", (), 2),
    "uint8": DType("U8", (), 1),
    "bool": DType("BOOL", (), 1),
    "complex64": DType("F32", (2,), 8),
    "complex128": DType("F64", (2,), 16),
}
_TAG_SIZES = {t.tag: t.itemsize // math.prod(t.axes) for t in DTYPES.values()}


# -- encodings -------------------------------------------------------------------------------------
#
# A tensor is a flat sequence of words, its elements' bit patterns. A word is "zero" when all its bits are, or
# all but the highest and the signs of zeros are stored beside: half of the zeros that multiplying with a mask
# leaves are -0.0. So denormals and NaN payloads are values like any other, and every encoding is exact.

_GAP_BITS = {"gaps4": 4, "gaps8": 8, "gaps16": 16}
_INDEX = {"bitmap": "..bitmap", **dict.fromkeys(_GAP_BITS, "..gaps")}
_ENCODINGS = ("dense", *_INDEX)


@dataclass(frozen=True)
class Encoded:
    """One tensor as it is stored.

    Attributes
    ----------
    encoding : one of ``_ENCODINGS``.
    values : words that are stored.
    signs : whether the signs of zeros are stored.
    parts : as `Entry.parts` lists them; for "dense" the data.
    """

    encoding: str
    values: int
    signs: bool
    parts: tuple[NDArray[Any], ...]


def _words(data: Bytes, itemsize: int) -> NDArray[Any]:
    return data.view(f"<u{itemsize}")


def _pack_gaps(gaps: NDArray[np.int64], bits: int) -> NDArray[Any]:
    """Zeros before each value as codes of `bits` bits; the highest code skips that many and holds no
    value.
    """
    skip = (1 << bits) - 1
    skips = gaps // skip
    codes = np.full(gaps.size + int(skips.sum()), skip, np.uint16 if bits == 16 else np.uint8)
    codes[np.cumsum(skips + 1) - 1] = gaps % skip
    if bits == 4:
        if codes.size % 2:
            codes = np.append(codes, np.uint8(skip))
        return np.asarray(codes[0::2] | codes[1::2] << 4)
    return codes


def _unpack_gaps(codes: NDArray[Any], bits: int) -> NDArray[np.int64]:
    """The positions of the values."""
    if bits == 4:
        nibbles = np.empty(2 * codes.size, np.uint8)
        nibbles[0::2] = codes & 15
        nibbles[1::2] = codes >> 4
        codes = nibbles
    skip = (1 << bits) - 1
    is_value = codes != skip
    end = np.cumsum(codes + is_value, dtype=np.int64)
    return np.asarray(end[is_value] - 1)


def _gaps(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.diff(np.flatnonzero(mask), prepend=-1) - 1


def _cheapest(mask: NDArray[np.bool_], itemsize: int) -> tuple[int, str]:
    """``(bytes, encoding)`` of the smallest sparse encoding of the words under the mask."""
    values = int(np.count_nonzero(mask))
    index = {"bitmap": (mask.size + 7) // 8}
    # Four bits a value is the least that gaps take, one bit an element what a bitmap takes.
    if 4 * values < mask.size:
        gaps = _gaps(mask)
        for name, bits in _GAP_BITS.items():
            index[name] = ((values + int((gaps // ((1 << bits) - 1)).sum())) * bits + 7) // 8
    best = min(index, key=lambda name: index[name])
    return _PART_OVERHEAD + index[best] + values * itemsize, best


def encode(data: Bytes, itemsize: int) -> Encoded:
    """Store the elements in `data` by the encoding that takes the fewest bytes; the earlier one on a tie."""
    dense = Encoded("dense", data.size // itemsize, False, (data,))
    if itemsize > 8:
        return dense
    words = _words(data, itemsize)
    mask = words != 0
    size, encoding = _cheapest(mask, itemsize)
    signs = False
    minus = words == 1 << (8 * itemsize - 1)
    if minus.any():
        nonzero = mask & ~minus
        zeros = mask.size - int(np.count_nonzero(nonzero))
        other, name = _cheapest(nonzero, itemsize)
        other += _PART_OVERHEAD + (zeros + 7) // 8
        if other < size:
            mask, size, encoding, signs = nonzero, other, name, True
    if size >= data.size:
        return dense
    bits = _GAP_BITS.get(encoding)
    index = _pack_gaps(_gaps(mask), bits) if bits else np.packbits(mask, bitorder="little")
    parts = [index, words[mask]]
    if signs:
        parts.append(np.packbits(words[~mask] != 0, bitorder="little"))
    return Encoded(encoding, parts[1].size, signs, tuple(parts))


def _unpack_bits(packed: Bytes, count: int, what: str) -> NDArray[np.bool_]:
    bits = np.unpackbits(packed, bitorder="little").view(np.bool_)
    require(not bits[count:].any(), f"{what}: bits are set behind its end")
    return np.asarray(bits[:count])


def _decode(entry: Entry, out: Bytes, index: Bytes, values: Bytes, signs: Bytes | None = None) -> None:
    """Write the sparse tensor into `out`."""
    words = _words(out, entry.type.itemsize)
    at: NDArray[Any]
    what = f"tensor {shorten(entry.name)}"
    if entry.encoding == "bitmap":
        at = _unpack_bits(index, words.size, what)
        found = int(np.count_nonzero(at))
    else:
        bits = _GAP_BITS[entry.encoding]
        at = _unpack_gaps(index.view("<u2") if bits == 16 else index, bits)
        found = at.size
        require(not found or at[-1] < words.size, f"{what}: its index leads behind its end")
    require(found == entry.values, f"{what}: expected {entry.values} values, its index has {found}")
    out[:] = 0
    if signs is not None:
        zero = np.ones(words.size, np.bool_)
        zero[at] = False
        minus = _unpack_bits(signs, words.size - found, what)
        words[zero] = minus.astype(words.dtype) << (8 * words.itemsize - 1)
    words[at] = _words(values, entry.type.itemsize)


# -- entries ---------------------------------------------------------------------------------------

_KINDS = ("parameter", "buffer", "local")  # local: a buffer that the state_dict leaves out


@dataclass(frozen=True)
class Entry:
    """A logical tensor in the file's table."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    values: int  # elements that are stored
    signs: bool  # whether the signs of zeros are stored beside
    blake2b: str  # of the parts' bytes, in order

    @property
    def type(self) -> DType:
        return DTYPES[self.dtype]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        return self.size * self.type.itemsize

    @property
    def content(self) -> tuple[object, ...]:
        """Equal for tensors of the same type, shape and bits."""
        return (self.dtype, self.shape, self.encoding, self.values, self.signs, self.blake2b)

    def parts(self) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
        """``(name, tag, shape)`` of each safetensors tensor that holds it; shape None: any length, one
        axis.
        """
        if self.encoding == "dense":
            yield self.name, self.type.tag, (*self.shape, *self.type.axes)
            return
        index = self.name + _INDEX[self.encoding]
        if self.encoding == "bitmap":
            yield index, "U8", ((self.size + 7) // 8,)
        else:
            yield index, "U16" if self.encoding == "gaps16" else "U8", None
        yield self.name + "..values", self.type.tag, (self.values, *self.type.axes)
        if self.signs:
            yield self.name + "..signs", "U8", ((self.size - self.values + 7) // 8,)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "name"}

    @classmethod
    def from_json(cls, name: str, data: object) -> Entry:
        where = f"tensor {shorten(name)}"
        d = expect_object(data, where, [f.name for f in fields(cls) if f.name != "name"])
        require(d["kind"] in _KINDS, f"{where}: unknown kind {shorten(d['kind'])}")
        require(
            isinstance(d["dtype"], str) and d["dtype"] in DTYPES,
            f"{where}: unknown dtype {shorten(d['dtype'])}",
        )
        encoding = d["encoding"]
        known = isinstance(encoding, str) and encoding in _ENCODINGS
        require(known, f"{where}: unknown encoding {shorten(encoding)}, known are {', '.join(_ENCODINGS)}")
        shape = expect_sizes(d["shape"], where)
        values, signs, size = d["values"], d["signs"], math.prod(shape)
        require(type(values) is int and 0 <= values <= size, f"{where}: invalid number of values")
        require(type(signs) is bool, f"{where}: invalid signs")
        if encoding == "dense":
            require(values == size and not signs, f"{where}: dense, but not all elements are stored")
        else:
            require(DTYPES[d["dtype"]].itemsize <= 8, f"{where}: {d['dtype']} is always dense")
        require(isinstance(d["blake2b"], str), f"{where}: expected a checksum")
        return cls(name, d["kind"], d["dtype"], shape, encoding, values, signs, d["blake2b"])


@dataclass(frozen=True)
class _Part:
    tag: str
    shape: tuple[int, ...]
    begin: int
    end: int


# -- reading JSON that nobody vouches for ----------------------------------------------------------


def shorten(value: object) -> str:
    """`repr`, cut to a length that an error message can carry."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise FormatError("file: a name occurs twice in the header")
    return result


def _no_constant(text: str) -> NoReturn:
    raise FormatError(f"file: {text} in the header")


def parse_json(text: bytes | str, what: str) -> Any:
    """Parse strict JSON: UTF-8, no duplicate names, no NaN."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except FormatError:
        raise
    except (
        ValueError,
        RecursionError,
    ) as e:  # JSONDecodeError, UnicodeDecodeError, numbers of too many digits
        raise FormatError(f"file: expected {what}, got something else ({type(e).__name__})") from None


def expect_object(data: object, where: str, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """`data` as an object with exactly `keys`, where given."""
    if not isinstance(data, dict):
        refuse(f"{where}: expected an object, got {shorten(data)}")
    if keys is not None and data.keys() != set(keys):
        refuse(f"{where}: expected the fields {sorted(keys)}, got {shorten(sorted(data))}")
    return data


def expect_list(data: object, where: str) -> list[Any]:
    """`data` as a list."""
    if not isinstance(data, list):
        refuse(f"{where}: expected a list, got {shorten(data)}")
    return data


def expect_sizes(data: object, where: str) -> tuple[int, ...]:
    """`data` as a list of sizes whose product is an array's size on this machine."""
    sizes = expect_list(data, where)
    require(
        len(sizes) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in sizes),
        f"{where}: invalid shape",
    )
    require(math.prod(max(n, 1) for n in sizes) < 1 << 59, f"{where}: shape {shorten(sizes)} is too large")
    return tuple(sizes)


def sign(header: bytes) -> bytes:
    """The header with its checksum in place: over all of it, the checksum's own digits taken as zeros."""
    digits = 2 * _DIGEST_BYTES
    rest = header[len(_PREFIX) + digits :]
    return _PREFIX + digest(_PREFIX, b"0" * digits, rest).encode() + rest


# -- writing ---------------------------------------------------------------------------------------


class Writer:
    """Collects tensors, encoded, and writes the container.

    Sparse tensors are held encoded until then; dense ones are asked for again, so that writing a model takes
    no second copy of it.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._sparse: dict[str, NDArray[Any]] = {}
        self._sources: dict[str, _Source] = {}

    def add(self, name: str, kind: str, dtype: str, shape: Iterable[int], source: _Source) -> Entry:
        """Add a tensor; ``source()`` gives its flat bytes: now and, if it is stored dense, in `write`."""
        if name == "__metadata__" or "" in name.split("."):  # an empty component marks a part
            raise ValueError(f"model: expected tensor names without empty components, got {name!r}")
        encoded = encode(source(), DTYPES[dtype].itemsize)
        checksum = digest(*encoded.parts)
        entry = Entry(
            name, kind, dtype, tuple(shape), encoded.encoding, encoded.values, encoded.signs, checksum
        )
        self.entries[name] = entry
        if entry.encoding == "dense":
            self._sources[name] = source
        else:
            self._sparse |= {part[0]: data for part, data in zip(entry.parts(), encoded.parts, strict=True)}
        return entry

    def discard(self, name: str) -> None:
        """Take a tensor back."""
        entry = self.entries.pop(name)
        self._sources.pop(name, None)
        for part, _, _ in entry.parts():
            self._sparse.pop(part, None)

    def write(self, file: IO[bytes], about: Mapping[str, Any]) -> None:
        """Write everything, with `about`'s fields beside ``version`` and ``tensors``, by ``file.write``
        alone.
        """
        # Widest elements first: every part is then aligned to its element, as readers that map the file need.
        table = [
            (name, tag, self._sparse[name].shape if shape is None else shape)
            for entry in self.entries.values()
            for name, tag, shape in entry.parts()
        ]
        table.sort(key=lambda row: -_TAG_SIZES[row[1]])
        metadata = {"version": VERSION, **about, "tensors": {n: e.to_json() for n, e in self.entries.items()}}
        text = json.dumps(metadata, separators=(",", ":"), allow_nan=False)
        header: dict[str, Any] = {"__metadata__": {"blake2b": "0" * (2 * _DIGEST_BYTES), "pared": text}}
        at = 0
        for name, tag, shape in table:
            end = at + math.prod(shape) * _TAG_SIZES[tag]
            header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(len(raw) + 8) % _ALIGNMENT)
        if len(raw) > MAX_HEADER:
            raise ValueError(f"model: too many tensors: {len(raw)} bytes of header, at most {MAX_HEADER}")
        file.write(struct.pack("<Q", len(raw)) + sign(raw))
        for name, _, _ in table:
            data = self._sparse[name] if name in self._sparse else self._sources[name]()
            if data.size:
                file.write(data.data.cast("B"))


# -- reading ---------------------------------------------------------------------------------------


class Reader:
    """A container opened for reading: the header is checked as a whole, the data tensor by tensor.

    Attributes
    ----------
    about : the metadata's fields beside ``version`` and ``tensors``; their content is the caller's to check.
    tensors : name -> `Entry`. Their sizes are what the file says: compare before allocating.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        start = file.tell()
        length = file.seek(0, os.SEEK_END) - start
        file.seek(start)
        first = self._read_bytes(min(8, length))
        require(len(first) == 8, f"file: expected at least 8 bytes, got {length}")
        (header_size,) = struct.unpack("<Q", first)
        if header_size > min(MAX_HEADER, length - 8):
            refuse(
                _foreign(first)
                or f"file: header of {header_size} bytes in a file of {length}: truncated or foreign"
            )
        raw = self._read_bytes(header_size)
        self._data = start + 8 + header_size

        header = expect_object(parse_json(raw, "a safetensors header"), "file: header")
        metadata = expect_object(header.pop("__metadata__", {}), "file: __metadata__")
        if not isinstance(metadata.get("pared"), str):
            refuse("file: expected one that pared.save wrote, got a safetensors file of another origin")
        about = expect_object(parse_json(metadata["pared"], "pared's metadata"), "file: metadata")
        version = about.pop("version", None)
        require(type(version) is int and version >= 1, f"file: invalid version {shorten(version)}")
        require(version <= VERSION, f"file is version {version}, this pared reads up to {VERSION}")

        require(sign(raw) == raw, "file: the header's checksum does not match: corrupt")

        tensors = expect_object(about.pop("tensors", None), "file: tensors")
        self.about = about
        self.tensors = {name: Entry.from_json(name, data) for name, data in tensors.items()}
        self._parts = self._check_parts(header, length - 8 - header_size)

    def _check_parts(self, header: dict[str, Any], data_size: int) -> dict[str, _Part]:
        """The safetensors table: the parts of each tensor, nothing else, covering the data once and
        wholly.
        """
        parts: dict[str, _Part] = {}
        for name, data in header.items():
            where = f"stored tensor {shorten(name)}"
            d = expect_object(data, where, ("dtype", "shape", "data_offsets"))
            require(isinstance(d["dtype"], str) and d["dtype"] in _TAG_SIZES, f"{where}: unknown dtype")
            offsets = d["data_offsets"]
            valid = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
            require(
                valid and 0 <= offsets[0] <= offsets[1] <= data_size, f"{where}: offsets outside the file"
            )
            part = _Part(d["dtype"], expect_sizes(d["shape"], where), *offsets)
            size = math.prod(part.shape) * _TAG_SIZES[part.tag]
            require(
                part.end - part.begin == size,
                f"{where}: {part.end - part.begin} bytes where its shape needs {size}",
            )
            parts[name] = part
        at = 0
        for part in sorted(parts.values(), key=lambda p: (p.begin, p.end)):
            require(
                part.begin == at,
                f"file: stored tensors overlap or leave a hole at byte {min(at, part.begin)}",
            )
            at = part.end
        require(
            at == data_size, f"file: expected {at} bytes of data, got {data_size}: truncated or appended to"
        )

        used = set()
        for entry in self.tensors.values():
            for name, tag, shape in entry.parts():
                found = parts.get(name)
                right = (
                    found
                    and found.tag == tag
                    and (len(found.shape) == 1 if shape is None else found.shape == shape)
                )
                require(
                    right,
                    f"tensor {shorten(entry.name)}: {shorten(name)} is missing or of another type or shape",
                )
                require(
                    name not in used, f"tensor {shorten(entry.name)}: {shorten(name)} belongs to two tensors"
                )
                used.add(name)
        require(
            used == parts.keys(),
            f"file: stored tensors that belong to none: {shorten(sorted(parts.keys() - used))}",
        )
        return parts

    def _read_bytes(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self._file.read(count - len(data))
            if not chunk:
                refuse(f"file: expected {count} bytes, got {len(data)}: truncated")
            data = data + chunk if data else chunk
        return data

    def _read_into(self, name: str, out: Bytes) -> None:
        part = self._parts[name]
        self._file.seek(self._data + part.begin)
        view = out.data
        readinto = getattr(self._file, "readinto", None)
        while view:
            if readinto is not None:
                count = readinto(view)
            else:
                chunk = self._file.read(len(view))
                count = len(chunk)
                view[:count] = chunk
            if not count:
                refuse(f"file: {shorten(name)}: truncated")
            view = view[count:]

    def _read_part(self, name: str) -> Bytes:
        part = np.empty(self._parts[name].end - self._parts[name].begin, np.uint8)
        self._read_into(name, part)
        return part

    def _check_digest(self, entry: Entry, *parts: Bytes) -> None:
        right = digest(*parts) == entry.blake2b
        require(right, f"tensor {shorten(entry.name)}: the checksum does not match: corrupt")

    def read(self, entry: Entry, out: Bytes) -> None:
        """Write a tensor's elements into `out`, ``entry.nbytes`` flat bytes. Raises `FormatError`."""
        if entry.encoding == "dense":
            self._read_into(entry.name, out)
            self._check_digest(entry, out)
        else:
            parts = [self._read_part(name) for name, _, _ in entry.parts()]
            self._check_digest(entry, *parts)
            _decode(entry, out, *parts)
        # Torch reads a bool's byte as it is: anything but 0 and 1 misbehaves later.
        if entry.dtype == "bool":
            require(not (out > 1).any(), f"tensor {shorten(entry.name)}: expected bytes 0 and 1")


def _foreign(first: bytes) -> str:
    """What a file that is no safetensors file is, when its first bytes tell."""
    if first.startswith(b"PK\x03\x04"):
        return "file: expected one that pared.save wrote, got a zip archive (from torch.save?)"
    if first.startswith(b"\x80"):
        return "file: expected one that pared.save wrote, got a pickle, which pared never loads"
    return ""
