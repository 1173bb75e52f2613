"""Estimated times, the machine's ceilings that they come from, and the shortlist that they lead to."""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from _ceilings import CEILINGS
from hypothesis import given
from hypothesis import strategies as st

import pared
from pared import _core, _machine, _select
from pared._select import facts_of, shortlist
from pared.ops import _estimate
from pared.ops._estimate import COEFFICIENTS, Facts, estimate, kernel_of, terms
from pared.ops._formats import FORMATS

KINDS = ("csr", "bsr", "dense", "bitmap", "bitmap8", "int8", "int4", "bsr8")
CONV_KINDS = ("csr", "bsr", "dense", "int8", "bsr8")


def blocks(shape: tuple[int, ...], density: float, block: tuple[int, int] = (1, 1), seed: int = 0) -> Any:
    """A weight whose zeros come in blocks of outputs by inputs."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g)
    w += torch.sign(w)  # nothing that 8 bits round to zero
    size = (-(-shape[0] // block[0]), -(-shape[1] // block[1]), *shape[2:])
    keep = torch.rand(size, generator=g) < density
    return w * keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


# -- the model


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (1, 4), (4, 4)])
@pytest.mark.parametrize("shape", [(768, 768), (50, 30), (64, 64, 3, 3), (50, 30, 3, 3)])
def test_what_is_known_before_packing_is_what_packing_gives(shape: Any, block: Any) -> None:
    for density in (1.0, 0.3, 0.03):
        w = blocks(shape, density, block)
        facts = facts_of(w)
        for kind in KINDS if len(shape) == 2 else CONV_KINDS:
            packed = FORMATS[kind].weight.from_dense(w)
            _, real = packed._work(1)
            guess = facts.work(kind)
            assert (guess.rows, guess.nnz, guess.taps) == (real.rows, real.nnz, real.taps)
            assert guess.cols == real.cols
            if kind in ("csr", "bsr", "dense", "bsr8"):
                assert (guess.entries, guess.entry_rows) == (real.entries, real.entry_rows), (kind, density)
                assert (guess.tile, guess.block_k) == (real.tile, real.block_k)
            # Headers, padding to lines, scales.
            assert abs(guess.nbytes - real.nbytes) <= 0.15 * real.nbytes + 20 * real.rows + 2048


def test_grouped_convolutions_are_block_diagonal() -> None:
    w = blocks((8, 6, 3, 3), 0.5)
    packed = pared.ops.CSR.from_dense(w, groups=2)
    assert facts_of(w, 2).cols == packed._work(1)[1].cols == 2 * 6 * 9


@given(
    kind=st.sampled_from(KINDS),
    rows=st.sampled_from([16, 384, 768, 3072]),
    cols=st.sampled_from([16, 384, 768, 3072]),
    share=st.floats(0.01, 0.5),
    tokens=st.integers(1, 512),
)
def test_more_work_is_not_estimated_to_be_faster(
    kind: str, rows: int, cols: int, share: float, tokens: int
) -> None:
    def facts(share: float) -> Facts:
        n = int(share * rows * cols)
        return Facts(rows, cols, rows * cols, n, n, n, n)

    once = estimate(kind, facts(share).work(kind), tokens, 1)
    assert 0 < once < 100
    assert estimate(kind, facts(share).work(kind), 2 * tokens, 1) >= 0.999 * once
    # Tiles are chosen by density: a step there may be worth a little.
    assert estimate(kind, facts(2 * share).work(kind), tokens, 1) >= 0.9 * once


def test_estimates_follow_the_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    w = pared.ops.CSR.from_dense(blocks((256, 256), 0.2))
    before = w.estimate(64, threads=1)
    assert w.estimate(64, threads=1) == before  # nothing is measured again
    rates = ("clock", "fma", "panel", "dot8", "pack", "store", "expand")
    levels = tuple(
        dataclasses.replace(level, load=level.load / 2, store=level.store / 2) for level in CEILINGS.levels
    )
    half = dataclasses.replace(CEILINGS, levels=levels, **{r: getattr(CEILINGS, r) / 2 for r in rates})
    monkeypatch.setattr(_estimate, "ceilings", lambda: half)
    assert w.estimate(64, threads=1) == pytest.approx(2 * before)


def test_every_format_estimates_itself() -> None:
    w = blocks((256, 256), 0.3)
    for f in FORMATS.values():
        packed = f.weight.from_dense(w)
        few, many = packed.estimate(1, threads=1), packed.estimate(4096, threads=1)
        assert 0 < few < many < 1
        assert packed.estimate(0) == 0.0
        assert packed.estimate(4096, threads=2) < many
    pair = pared.ops.BitmapCSR.from_dense(w)
    assert pair._work(pair.few_tokens)[0] == "bitmap"
    assert pair._work(pair.few_tokens + 1)[0] == "csr"
    assert pared.ops.CSR.from_dense(torch.zeros(0, 8)).estimate(5) == 0.0


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"tokens": -1}, ValueError, "tokens: expected an integer of at least 0, got -1"),
        ({"tokens": 1.5}, TypeError, "tokens: expected an integer, got float"),
        ({"tokens": True}, TypeError, "tokens: expected an integer, got bool"),
        ({"tokens": 1, "threads": 0}, ValueError, "threads: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], text: str) -> None:
    w = pared.ops.CSR.from_dense(torch.ones(2, 2))
    with pytest.raises(error, match=text):
        w.estimate(**kwargs)


def test_coefficients_go_with_the_terms() -> None:
    facts = Facts(64, 64, 4096, 400, 400, 400, 400)
    seen = set()
    for taps in (0, 9):
        for kind in KINDS if not taps else CONV_KINDS:
            for quads in (400, 100):  # single rows, and whole blocks of four
                work = dataclasses.replace(facts, taps=taps, word_quads=quads).work(kind)
                for n in (1, 100):
                    kernel = kernel_of(kind, work, n)
                    seen.add(kernel)
                    assert len(COEFFICIENTS[kernel]) == len(terms(kernel, work, n, 1))
    assert seen == set(COEFFICIENTS)


# -- the ceilings


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The measurements that are made; files go to a folder of this test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[int] = []

    def measure(threads: int) -> _machine.Ceilings:
        asked.append(threads)
        return dataclasses.replace(CEILINGS, isa=_core.isa())

    monkeypatch.setattr(_machine, "measure", measure)
    _machine._ceilings.cache_clear()
    return asked


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    _machine._ceilings.cache_clear()


def test_the_machine_is_measured_once(measured: list[int], tmp_path: Path) -> None:
    first = _machine.ceilings()
    assert _machine.ceilings() is first
    assert measured == [1]
    _machine._ceilings.cache_clear()  # another process
    assert _machine.ceilings() == first
    assert measured == [1]
    (key,) = json.loads((tmp_path / "pared" / "machine.json").read_text())["entries"]
    assert key == f"{_core.cpu_brand()} | {_core.isa()} | {pared.__version__}"


def test_another_instruction_set_is_another_machine(measured: list[int]) -> None:
    before = _core.isa()
    for isa in _core.supported_isas():
        _core.set_isa(isa)
        assert _machine.ceilings().isa == isa
    _core.set_isa(before)
    assert len(measured) == len(_core.supported_isas())


def test_threads_that_ask_at_once_do_not_measure_each_other(
    measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(threads: int, measure: Any = _machine.measure) -> _machine.Ceilings:
        time.sleep(0.05)
        found: _machine.Ceilings = measure(threads)
        return found

    monkeypatch.setattr(_machine, "measure", slowly)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(_machine.ceilings) for _ in range(4)]
    assert len({a.result() for a in asked}) == 1
    assert measured == [1]


@pytest.mark.parametrize("damage", ["{", "[]", '{"kind": "pared machine"}', None])
def test_a_damaged_file_is_measured_anew(measured: list[int], tmp_path: Path, damage: str | None) -> None:
    _machine.ceilings()
    file = tmp_path / "pared" / "machine.json"
    data = json.loads(file.read_text())
    (entry,) = data["entries"].values()
    entry["fma"] = 0  # no rate
    file.write_text(json.dumps(data) if damage is None else damage)
    _machine._ceilings.cache_clear()
    assert _machine.ceilings().fma == CEILINGS.fma
    assert measured == [1, 1]


def test_a_folder_that_cannot_be_written_is_no_hindrance(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _machine.ceilings().fma == CEILINGS.fma


def test_a_user_without_a_home_is_no_hindrance(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that no user has."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(RuntimeError):
        Path.home()
    assert _machine.ceilings().fma == CEILINGS.fma


def test_the_machine_is_really_measured() -> None:
    c = _machine.measure(1)
    assert c.isa == _core.isa()
    assert [level.name for level in c.levels] == ["L1", "L2", "L3", "memory"]
    assert _machine._parse(json.loads(json.dumps(dataclasses.asdict(c)))) == c


# -- the shortlist


def planted(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    monkeypatch.setattr(_select, "estimate", lambda kind, work, n, threads: n * seconds[kind])


FACTS = Facts(64, 64, 4096, 400, 300, 200, 100)


def test_the_promising_ones_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {"csr": 1.0, "bsr": 1.9, "bitmap": 2.4, "int8": 0.1, "bitmap8": 0.15, "bsr8": 0.3})
    found = shortlist(["bitmap", "csr", "bsr", "int8", "bitmap8", "bsr8"], FACTS, {1: 1, 10: 2}, 1)
    # Those with 8 bits do not keep the exact ones from being timed.
    assert found.timed == ["int8", "bitmap8", "csr", "bsr"]
    assert found.estimates["csr"] == 21.0
    assert found.passed_over == {
        "bitmap": "estimated to take 2.4 times as long as csr",
        "bsr8": "estimated to take 3.0 times as long as int8",
    }


def test_no_more_than_three_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {"csr": 1.0, "bsr": 1.1, "dense": 1.2, "bitmap": 1.3})
    different = dataclasses.replace(FACTS, quads=301)
    assert FACTS.work("bsr") != different.work("bsr")
    found = shortlist(["csr", "bsr", "bitmap", "bitmap+csr"], FACTS, {4: 1}, 1)
    assert found.timed == ["csr", "bitmap+csr", "bsr"]
    assert found.passed_over == {"bitmap": "estimated to be slower than csr, bitmap+csr, bsr"}


def test_two_names_of_one_kernel_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {"bsr": 1.0, "dense": 1.0})
    found = shortlist(["bsr", "dense"], FACTS, {4: 1}, 1)
    assert found.timed == ["bsr"]
    assert found.passed_over == {"dense": "the same kernel and zeros as bsr"}


def test_a_pair_takes_the_faster_part_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _select, "estimate", lambda kind, work, n, threads: n if kind == "bitmap" else 4.0 + 0.1 * n
    )
    found = shortlist(["csr", "bitmap", "bitmap+csr"], FACTS, {1: 1, 100: 1}, 1)
    assert found.estimates == {"csr": 18.1, "bitmap": 101.0, "bitmap+csr": 15.0}
