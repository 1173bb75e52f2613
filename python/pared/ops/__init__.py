"""Functional operations over numpy arrays and torch tensors: the same kind comes out as goes in."""

from pared.ops.conv import conv2d
from pared.ops.csr import CSR
from pared.ops.linear import linear

__all__ = ["CSR", "conv2d", "linear"]
