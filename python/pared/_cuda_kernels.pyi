from typing import TypedDict

class _DeviceInfo(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    supported: bool

ARCHITECTURES: str

_SelectMatrix = tuple[int, int, int, int, str, str, int, int, str]

def device_count() -> int: ...
def device_info(device: int) -> _DeviceInfo: ...
def self_check(name: str, a: int, b: int, c: int, device: int, stream: int) -> None: ...
def select_workspace(sizes: list[int], k: int, device: int) -> int: ...
def select_threshold(
    members: list[tuple[int, int, str, str, int, int, str, int]],
    k: int,
    workspace: int,
    workspace_bytes: int,
    value: int,
    counts: int,
    device: int,
    stream: int,
) -> None: ...
def select_mask(
    sizes: list[int], k: int, workspace: int, workspace_bytes: int, device: int, stream: int
) -> None: ...
def select_compact(
    size: int,
    k: int,
    workspace: int,
    workspace_bytes: int,
    keys: int,
    indices: int,
    device: int,
    stream: int,
) -> None: ...
def select_groups(
    x: _SelectMatrix, k: int, group: int, taps: int, mask: int, nans: int, device: int, stream: int
) -> None: ...
def select_block_scores(
    x: _SelectMatrix, block: tuple[int, int, int], scores: int, device: int, stream: int
) -> None: ...
def select_expand_blocks(
    rows: int, cols: int, block: tuple[int, int, int], chosen: int, mask: int, device: int, stream: int
) -> None: ...
def plan_select(sizes: list[int], k: int, multiprocessors: int) -> dict[str, int]: ...

INT8_ALIGN: int
INT8_TILES: tuple[tuple[int, int], ...]

def multiprocessors(device: int) -> int: ...
def quantize_rows(
    x: int,
    dtype: str,
    rows: int,
    cols: int,
    x_stride: int,
    activations: tuple[float, int, int, int],
    q: int,
    q_stride: int,
    scales: int,
    device: int,
    stream: int,
) -> None: ...
def pad_rows(
    x: int,
    rows: int,
    cols: int,
    x_stride: int,
    column_stride: int,
    out: int,
    out_stride: int,
    device: int,
    stream: int,
) -> None: ...
def plan_int8(
    tokens: int, outputs: int, cols: int, multiprocessors: int
) -> tuple[int, int, int, int, int, int]: ...
def int8_wgmma_tile(tokens: int, outputs: int, multiprocessors: int) -> int: ...
def force_int8_tile(tile: int) -> None: ...
def int8_wgmma(device: int) -> bool: ...
def int8_product(
    a: int,
    b: int,
    tokens: int,
    outputs: int,
    cols: int,
    a_stride: int,
    b_stride: int,
    x_scales: int,
    w_scales: int,
    correction: int,
    bias: int,
    activation: str,
    dtype: str,
    y: int,
    y_stride: int,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...

_DecodeWeight = tuple[int, int, str, str, int, int, int]

def bulk_copies(device: int) -> bool: ...
def shared_limit(device: int) -> int: ...
def plan_decode(
    tokens: int,
    outputs: int,
    cols: int,
    largest_block: int,
    format: str,
    multiprocessors: int,
    shared_limit: int,
) -> dict[str, int]: ...
def decode_workspace(
    tokens: int,
    outputs: int,
    cols: int,
    largest_block: int,
    format: str,
    multiprocessors: int,
    shared_limit: int,
) -> int: ...
def decode_product(
    w: _DecodeWeight,
    x: int,
    tokens: int,
    x_stride: int,
    scales: int,
    bias: int,
    activation: str,
    y: int,
    y_stride: int,
    workspace: int,
    workspace_bytes: int,
    bulk: bool,
    device: int,
    stream: int,
) -> None: ...

_DecodeDense = tuple[int, int, int, int, str, int]

def decode_pack_sizes(w: _DecodeDense, units: int, largest: int, device: int, stream: int) -> None: ...
def decode_pack(w: _DecodeDense, offsets: int, blocks: int, device: int, stream: int) -> None: ...
def decode_expand(w: _DecodeWeight, scales: int, out: int, device: int, stream: int) -> None: ...

_BlockSparseWeight = tuple[int, int, str, int, int, int, int, int]

def block_sparse_workspace(tokens: int, slots: int, block_rows: int) -> int: ...
def force_block_sparse_kernel(kernel: int) -> None: ...
def block_sparse_wgmma(device: int) -> bool: ...
def block_sparse_product(
    w: _BlockSparseWeight,
    items: int,
    item_count: int,
    slots: int,
    x: int,
    tokens: int,
    x_stride: int,
    x_scales: int,
    w_scales: int,
    bias: int,
    activation: str,
    dtype: str,
    y: int,
    y_stride: int,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...

CSR_FOUR: int
CSR_GROUP: int
CSR_WARPS: int
CSR_GATHER_SUMS: int
CSR_INDEX_SLOTS: int

_CsrWeight = tuple[int, int, int, str, int, int, int, int, int, int]

class _CsrPlan(TypedDict):
    panel: bool
    tokens: int
    rows: int
    token_tiles: int
    row_tiles: int
    chunk_blocks: int
    grid: int
    shared_bytes: int
    workspace_bytes: int

def csr_block_cols(cols: int, shared_limit: int) -> int: ...
def plan_csr(
    tokens: int,
    outputs: int,
    cols: int,
    block_cols: int,
    item_bytes: int,
    items: int,
    multiprocessors: int,
    shared_limit: int,
    few: int = -1,
) -> _CsrPlan: ...
def csr_product(
    w: _CsrWeight,
    x: int,
    tokens: int,
    x_stride: int,
    bias: int,
    activation: str,
    y: int,
    y_stride: int,
    workspace: int,
    workspace_bytes: int,
    few: int,
    device: int,
    stream: int,
) -> None: ...
