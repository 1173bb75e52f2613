"""The project's goals for its kernels, as numbers the tables compare with. Source: project goals.

A goal is a speed-up over the best of torch's dense float32 engines in the same run, warm unless it says
otherwise; the figure is the geometric mean over the shapes of a suite. A cell counts as reached at `ENOUGH`
of its ratio, or where the kernel attains `ENOUGH` of the limit that the roofline model gives for it.
"""

from __future__ import annotations

SOURCE = "project goals"
ENOUGH = 0.85

# For the better one of 4x1 and 16x1.
_BLOCKS = {"50 %": 2.0, "70 %": 3.2, "80 %": 4.5, "90 %": 7.0, "95 %": 10.0}
# suite -> cell (a column of the suite's table) -> speed-up.
GOALS: dict[str, dict[str, float]] = {
    "linear CSR float32, >= 128 tokens": {"50 %": 1.7, "70 %": 2.5, "80 %": 3.4, "90 %": 5.2, "95 %": 7.5},
    "linear chain CSR float32, >= 128 tokens": {
        "50 %": 1.8,
        "70 %": 2.7,
        "80 %": 3.8,
        "90 %": 6.5,
        "95 %": 10.0,
    },
    "linear Dense float32, >= 128 tokens": {"0 %": 1.15},
    "linear blocks 4x1 float32, >= 128 tokens": _BLOCKS,
    "linear blocks 16x1 float32, >= 128 tokens": _BLOCKS,
    "linear Bitmap float32, 1 token, cold": {"50 %": 1.7, "80 %": 3.6, "90 %": 6.0},
    "linear Bitmap int8, 1 token, cold": {"50 %": 5.8, "80 %": 9.5, "90 %": 12.0},
    "linear blocks 1x4 int8, >= 128 tokens": {"50 %": 4.8, "80 %": 9.5, "90 %": 13.0},
    "linear blocks 4x4 int8, >= 128 tokens": {"50 %": 6.0, "80 %": 11.0, "90 %": 15.0},
    "linear blocks 16x4 int8, >= 128 tokens": {"50 %": 6.0, "80 %": 11.0, "90 %": 15.0},
    "conv2d CSR float32, ResNet-50": {"80 %": 3.0, "90 %": 5.0},
    "conv2d CSR float32, ResNet-50, 8 images": {"80 %": 3.0, "90 %": 5.0},
    "ResNet-50 float32, whole model": {"90 %": 2.0},
    "whole models, 1x4 blocks and int8": {"BERT-base, 1 x 128 tokens": 5.0, "MiniLM-L6, 8 x 128 tokens": 2.8},
    "linear Int8, dynamic": {">= 128 tokens": 4.3, "16 tokens": 5.0},
    "linear Int8, dynamic, few tokens": {"1 token": 3.9},
    "selection, against torch.kthvalue": {"10^8 keys": 35.0},
    "selection, against numpy.partition": {"10^8 keys": 5.0},
}

_RIVAL = (
    "the rival, oneDNN with a prepacked weight, which eager torch does not use, is at 76 % of a dense limit"
)
_LINEAR = (
    "from L1 a non-zero takes 0.70 cycles a vector at 50 % zeros and 0.78 to 0.82 at 80 and 90 %, where "
    f"loads allow 0.56: the sums of a row and block come and go; packing and storing are a tenth; {_RIVAL}"
)
_CONVOLUTIONS = (
    "a non-zero takes 0.77 cycles a vector where loads allow 0.57, strided layers split their planes first "
    "(10-18 %), rows of 28 waste an eighth of a vector, and the dense calls between leave inputs in memory"
)
# suite -> what keeps its kernel from its limit where a cell falls short, as it was found with profiles on Zen
# 5 (ARCHITECTURE.md has the measurements).
REASONS = {
    "linear CSR float32, >= 128 tokens": _LINEAR,
    "linear chain CSR float32, >= 128 tokens": f"GELU is 19 multiply-adds and a division a vector; {_LINEAR}",
    "linear blocks 4x1 float32, >= 128 tokens": f"the sums of four rows and a block come and go; {_RIVAL}",
    "linear Dense float32, >= 128 tokens": _RIVAL,
    "conv2d CSR float32, ResNet-50": _CONVOLUTIONS,
    "conv2d CSR float32, ResNet-50, 8 images": _CONVOLUTIONS,
    "linear Int8, dynamic": "with 16 tokens half of a call is around the kernel: checks, output, a thread",
}
