from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

class _Kernel(TypedDict):
    name: str
    op: str
    isa: str
    doc: str
    supported: bool

class _PackedInfo(TypedDict):
    kind: str
    entry_rows: int
    entries: int
    rows: int
    cols: int
    nnz: int
    dtype: str
    channels: int
    kh: int
    kw: int
    groups: int
    tile: int
    block_k: int

class _Threshold(TypedDict):
    value: float
    above: int
    ties: int
    equal: int
    nans: int
    path: str
    gathered: int

def isa() -> str: ...
def set_isa(name: str) -> str: ...
def supported_isas() -> list[str]: ...
def kernels() -> list[_Kernel]: ...
def take_dispatched() -> list[str]: ...
def num_threads() -> int: ...
def parallel_backend() -> str: ...
def set_parallel_backoff(on: bool) -> None: ...
def parallel_owed() -> float: ...
def cpu_brand() -> str: ...
def linear(x: Any, packed: Any, bias: Any, activation: Any, out: Any = None) -> Any: ...
def packed_info(packed: Any) -> _PackedInfo: ...
def packed_copy(packed: Any) -> NDArray[np.uint8]: ...
def packed_validate(packed: Any) -> None: ...
def packed_unpack_dense(packed: Any, out: Any) -> None: ...
def csr_pack_dense(
    weight: Any, groups: int = 1, kind: str = "csr", entry_rows: int = 1
) -> NDArray[np.uint8]: ...
def csr_pack_csr(
    crow_indices: Any,
    col_indices: Any,
    values: Any,
    rows: int,
    cols: int,
    kind: str = "csr",
    entry_rows: int = 1,
) -> NDArray[np.uint8]: ...
def bsr8_pack(
    weight: Any,
    scales: Any = None,
    groups: int = 1,
    entry_rows: int = 0,
    dtype: str = "float32",
    activations: tuple[float, int, int, int] | None = None,
) -> NDArray[np.uint8]: ...
def bsr8_unpack(packed: Any) -> tuple[NDArray[np.int8], NDArray[np.float32]]: ...
def csr_unpack(packed: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]: ...
def bitmap_pack_dense(weight: Any) -> NDArray[np.uint8]: ...
def pair_pack_dense(weight: Any) -> NDArray[np.uint8]: ...
def pair_few_tokens(packed: Any) -> int: ...

class EncoderLayer:
    def __init__(
        self,
        packed: Sequence[Any],
        bias: Sequence[Any],
        activation: Sequence[str],
        norm: Sequence[Any],
        eps: Sequence[float],
        heads: int,
        scale: float,
        norm_first: bool,
    ) -> None: ...
    def __call__(
        self, x: Any, mask: Any, out: Any, batch_first: bool = True, causal: bool = False
    ) -> bool: ...

def layer_norm(x: Any, residual: Any, weight: Any, bias: Any, out: Any, eps: float) -> None: ...
def attention_reference(
    q: Any, k: Any, v: Any, mask: Any, scale: float, causal: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def layer_norm_reference(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float
) -> NDArray[np.float64]: ...
def attention(q: Any, k: Any, v: Any, mask: Any, out: Any, scale: float, causal: bool) -> None: ...
def linear_chain(x: Any, weights: Any, biases: Any, activations: Any) -> Any: ...
def shares_inputs(a: Any, b: Any) -> bool: ...
def linear_shared(
    x: Any, packed: Sequence[Any], bias: Sequence[Any], out: Sequence[Any], activation: Sequence[str]
) -> None: ...
def int4_pack_dense(weight: Any, group: int) -> NDArray[np.uint8]: ...
def int4_pack_quantized(q: Any, scales: Any, group: int, dtype: str = "float32") -> NDArray[np.uint8]: ...
def int4_group(packed: Any) -> int: ...
def int4_unpack(packed: Any) -> tuple[NDArray[np.int8], NDArray[np.float32]]: ...
def int8_pack_dense(
    weight: Any,
    activations: tuple[float, int, int, int] | None = None,
    masked: bool = False,
    groups: int = 1,
) -> NDArray[np.uint8]: ...
def int8_pack_quantized(
    q: Any,
    scales: Any,
    dtype: str = "float32",
    activations: tuple[float, int, int, int] | None = None,
    masked: bool = False,
    groups: int = 1,
) -> NDArray[np.uint8]: ...
def int8_activations(packed: Any) -> tuple[float, int, int, int] | None: ...
def int8_unpack(packed: Any) -> tuple[NDArray[np.int8], NDArray[np.float32]]: ...
def gemm_s8(a: Any, b: Any, out: Any) -> None: ...
def conv2d_output_size(
    height: int,
    width: int,
    kh: int,
    kw: int,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]: ...
def conv2d(
    x: Any,
    packed: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
    residual: Any,
    out: Any = None,
) -> Any: ...
def max_pool2d_output_size(
    height: int,
    width: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil: bool,
) -> tuple[int, int]: ...
def max_pool2d(
    x: Any,
    out: Any,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil: bool = False,
) -> None: ...
def conv2d_reference(
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int = 1,
) -> None: ...
def linear_reference(
    x: NDArray[np.float64],
    row_ptr: NDArray[np.int64],
    columns: NDArray[np.int64],
    values: NDArray[np.float64],
    bias: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def random_families() -> list[str]: ...
def random_cases(family: str, seed: int, cases: int, fault: bool = False) -> tuple[int, int, str]: ...
def selection_reference(
    keys: NDArray[np.float32], k: int, order: NDArray[np.int64] | None = None
) -> tuple[
    NDArray[np.int64], NDArray[np.bool_], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]
]: ...
def select_threshold(
    scores: list[Any],
    k: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
) -> _Threshold: ...
def topk_mask(
    scores: list[Any],
    k: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
    out: list[Any],
    fresh: bool,
) -> _Threshold: ...
def topk_mask_rows(
    scores: list[Any],
    k: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
    out: list[Any],
    fresh: bool,
) -> None: ...
def topk(x: Any, k: int, key: str, other: list[Any] | None, nan: str, values: Any, indices: Any) -> None: ...
def block_mask(
    x: list[Any],
    k: int,
    r: int,
    c: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
    out: list[Any],
    fresh: bool,
) -> _Threshold: ...
def nm_mask(
    x: list[Any],
    n: int,
    m: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
    out: list[Any],
    fresh: bool,
) -> None: ...
def select_sample_positions(n: int) -> list[int]: ...
def machine_probe(
    probe: str, bytes: int, repeats: int, threads: int = 1, huge_pages: bool = False
) -> tuple[float, float, float]: ...
def clock_probe(steps: int) -> tuple[float, int]: ...
