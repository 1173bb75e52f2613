"""Functional operations over numpy arrays and torch tensors: the same kind comes out as goes in."""

from pared.ops.attention import attention
from pared.ops.bitmap import Bitmap, BitmapCSR
from pared.ops.bsr import BSR, Dense
from pared.ops.bsr_int8 import BSRInt8
from pared.ops.chain import linear_chain
from pared.ops.conv import conv2d
from pared.ops.csr import CSR, TwoFour
from pared.ops.int4 import Int4
from pared.ops.int8 import Bitmap8, Int8, Int8WeightOnly, gemm_s8
from pared.ops.linear import linear
from pared.ops.normalization import layer_norm
from pared.ops.packed import PackedWeight
from pared.ops.pool import max_pool2d
from pared.ops.selection import Threshold, block_mask, nm_mask, select_threshold, topk, topk_mask

__all__ = [
    "BSR",
    "CSR",
    "BSRInt8",
    "Bitmap",
    "Bitmap8",
    "BitmapCSR",
    "Dense",
    "Int4",
    "Int8",
    "Int8WeightOnly",
    "PackedWeight",
    "Threshold",
    "TwoFour",
    "attention",
    "block_mask",
    "conv2d",
    "gemm_s8",
    "layer_norm",
    "linear",
    "linear_chain",
    "max_pool2d",
    "nm_mask",
    "select_threshold",
    "topk",
    "topk_mask",
]
