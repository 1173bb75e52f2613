"""Two processes with half of the data each choose the masks of one that sees all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from two_processes import JOBS, everything, loss_fn, network

import pared
from pared.pruning import distributed

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("job")
    script = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    source = str(Path(pared.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
    jobs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder / "store"), str(folder / "out")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [job.communicate(timeout=300)[0] for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()
    for job, text in zip(jobs, texts, strict=True):
        assert job.returncode == 0, text
    return [torch.load(folder / f"out.{rank}", weights_only=True) for rank in range(2)]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same masks exactly; values (sums taken in another order) to rounding."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        assert torch.equal(found[name] == 0, want == 0), name
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_do_what_one_does(name: str, results: list[dict[str, Any]]) -> None:
    expected = JOBS[name](everything())
    first, second = (r["states"][name] for r in results)
    check(first, expected)
    assert all(torch.equal(first[k], second[k]) for k in first), "the replicas differ"


def test_without_the_reduction_it_would_be_noticed(results: list[dict[str, Any]]) -> None:
    alone = [r["states"]["alone"] for r in results]
    assert any(not torch.equal(alone[0][k] == 0, alone[1][k] == 0) for k in alone[0])
    with pytest.raises(AssertionError):
        check(alone[1], JOBS["wanda"](everything()))


def test_what_needs_no_data_exchanges_nothing(results: list[dict[str, Any]]) -> None:
    check(results[0]["states"]["by one"], JOBS["magnitude"](everything()))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("exhausted", "at least one batch, got none"),
        ("exhausted, in a walk", "at least one batch, got none"),
        ("NaN", "finite"),
        ("NaN, in a walk", "finite activations"),
        ("NaN, units", "finite outputs"),
        ("no gradient", "without a gradient"),
    ],
)
def test_what_one_process_raises_all_raise(name: str, text: str, results: list[dict[str, Any]]) -> None:
    first, second = (r["failures"][name] for r in results)
    assert text in second
    assert "from process 1" in first
    assert text in first


def test_sharded_weights_are_pruned_where_they_are_whole(results: list[dict[str, Any]]) -> None:
    expected = JOBS["magnitude"](everything())
    for result in results:
        weights, texts = result["sharded"]["weights"], result["sharded"]["texts"]
        check(weights, {name: expected[name] for name in weights})
        assert len(weights) == 8
        pruned, accelerated, saved, stepped = texts
        assert "expected the whole weight of Conv2d" in pruned
        assert accelerated == saved
        assert "got a model in FullyShardedDataParallel" in saved
        assert "as when the pruner was made" in stepped
        assert all("summon_full_params" in text for text in (pruned, stepped))


def test_a_single_process_reduces_nothing(tmp_path: Path) -> None:
    assert distributed.current() is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert distributed.current() is None
        pared.prune(network(), 0.5, importance="taylor", data=everything(), loss_fn=loss_fn)
    finally:
        dist.destroy_process_group()


def test_an_observer_that_cannot_be_reduced_says_so() -> None:
    observer = distributed.Processes(None, 0, 2)
    with pytest.raises(ValueError, match=r"observer with reduce\(\) in a job of 2 processes, got Observer"):
        pared.pruning.Observer().reduce(observer)
