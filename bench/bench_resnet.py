"""A whole ResNet-50 at 224x224, 90 % of its weights zero, against torch's dense engines.

The architecture is transformers', with random weights and random statistics of its batch normalisations:
both sides compute the same. Rivals: eager torch in both memory layouts, torch's frozen graph in both
(``torch.jit.optimize_for_inference`` folds the normalisations and keeps oneDNN's blocked layout between
convolutions), which is the fastest dense engine that torch has, and ONNX Runtime and OpenVINO where they are
installed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import pared
from pared._peers import whole_models

THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)


class Logits(nn.Module):
    """The model as a function of one tensor, which is what tracing takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=x, return_dict=False)[0]
        return logits


def resnet50() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = Logits(transformers.ResNetForImageClassification(transformers.ResNetConfig())).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in (
                (m.running_var, 0.5, 1.5),
                (m.weight, 0.5, 1.5),
                (m.running_mean, -0.1, 0.1),
            ):
                t.data.uniform_(low, high)
    return model


def frozen(model: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(copy.deepcopy(model), x, check_trace=False)
        graph = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        for _ in range(3):  # the profiling executor settles
            graph(x)
    return graph  # type: ignore[no-any-return]


@THREADS
@pytest.mark.parametrize("images", [1, pytest.param(8, marks=pytest.mark.full)])
@torch.inference_mode(False)
def test_resnet50(versus, images: int, threads: int) -> None:
    model = resnet50()
    pared.prune(model, 0.9, scope="layer")
    x = torch.randn(images, 3, 224, 224)
    x_last = x.contiguous(memory_format=torch.channels_last)
    model_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    fast = pared.accelerate(model, x)
    graph, graph_last = frozen(model, x), frozen(model_last, x_last)
    with torch.no_grad():
        calls = {
            "contiguous": lambda: model(x),
            "channels_last": lambda: model_last(x_last),
            "frozen": lambda: graph(x),
            "frozen channels_last": lambda: graph_last(x_last),
            "pared": lambda: fast(x),
            **whole_models(model, [x], threads, int8=False),
        }
        expected = calls["contiguous"]()
        for call in calls.values():
            torch.testing.assert_close(torch.as_tensor(call()), expected, rtol=1e-3, atol=1e-3)
        versus(
            calls,
            suite="ResNet-50 float32, whole model",
            case=f"{images} image{'s' if images > 1 else ''}",
            cell="90 %",
            rivals=[name for name in calls if name != "pared"],
            facts={"images": images, "sparsity": 0.9, "dtype": "float32"},
            budget=4.0,
        )
