"""A pytest plugin, ``-p without_torch``: torch cannot be imported, as where it is not installed."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
