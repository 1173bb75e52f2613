from typing import TypedDict

class _DeviceInfo(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    supported: bool

ARCHITECTURES: str

def device_count() -> int: ...
def device_info(device: int) -> _DeviceInfo: ...
def self_check(name: str, a: int, b: int, c: int, device: int, stream: int) -> None: ...
def threshold_mask(
    x: int, dtype: str, n: int, threshold: int, mask: int, device: int, stream: int
) -> None: ...
def plan_mask(
    x: int, mask: int, n: int, item_bytes: int, multiprocessors: int
) -> tuple[int, int, int, bool, int]: ...
