"""Quantisation: grids, ranges, GPTQ, equalisation, training. The public name is `pared.quantize`."""

from pared.quant.distributions import DistributionReport, TensorDistribution, distributions
from pared.quant.equalize import equalize, smooth
from pared.quant.grid import Grid, QuantizedWeight
from pared.quant.observers import ActivationGrid, Distribution, InputRange
from pared.quant.qat import finish_qat, prepare_qat
from pared.quant.report import QuantLayer, QuantReport
from pared.quant.weights import int8_weight, quantize, quantized, simulate

__all__ = [
    "ActivationGrid",
    "Distribution",
    "DistributionReport",
    "Grid",
    "InputRange",
    "QuantLayer",
    "QuantReport",
    "QuantizedWeight",
    "TensorDistribution",
    "distributions",
    "equalize",
    "finish_qat",
    "int8_weight",
    "prepare_qat",
    "quantize",
    "quantized",
    "simulate",
    "smooth",
]
