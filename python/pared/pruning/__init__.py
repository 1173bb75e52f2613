"""Pruning: which weights go, and how the zeros are held while the rest is trained.

The public names are `pared.prune` (a function), `pared.Pruner` and `pared.schedules`. This package is called
``pruning`` because importing a submodule binds its name in the parent package: a package called
``pared.prune`` would replace the function `pared.prune` as soon as anything imported it.
"""

from pared.pruning.calibration import Observer
from pared.pruning.channel_budget import ChannelPlan, GroupPlan, search_channels
from pared.pruning.criteria import (
    LAMP,
    Activation,
    BNScale,
    ChangeRate,
    Entropy,
    Fisher,
    GeometricMedian,
    Gradient,
    MutualInformation,
    OutputWeight,
    Propagation,
    Taylor,
    Wanda,
)
from pared.pruning.distributed import process_group
from pared.pruning.importance import Criterion, Magnitude, Random, Statistics
from pared.pruning.linears import as_linears
from pared.pruning.oneshot import prune
from pared.pruning.progressive import BlockReport, ProgressiveReport, prune_progressively
from pared.pruning.pruner import Pruner
from pared.pruning.reconstruct import OBC, SparseGPT
from pared.pruning.report import LayerReport, PruneReport
from pared.pruning.structured import ChannelReport, LayerRemovalReport, prune_channels, prune_layers
from pared.pruning.thresholds import threshold
from pared.pruning.woodfisher import WoodFisher

__all__ = [
    "LAMP",
    "OBC",
    "Activation",
    "BNScale",
    "BlockReport",
    "ChangeRate",
    "ChannelPlan",
    "ChannelReport",
    "Criterion",
    "Entropy",
    "Fisher",
    "GeometricMedian",
    "Gradient",
    "GroupPlan",
    "LayerRemovalReport",
    "LayerReport",
    "Magnitude",
    "MutualInformation",
    "Observer",
    "OutputWeight",
    "ProgressiveReport",
    "Propagation",
    "PruneReport",
    "Pruner",
    "Random",
    "SparseGPT",
    "Statistics",
    "Taylor",
    "Wanda",
    "WoodFisher",
    "as_linears",
    "process_group",
    "prune",
    "prune_channels",
    "prune_layers",
    "prune_progressively",
    "search_channels",
    "threshold",
]
