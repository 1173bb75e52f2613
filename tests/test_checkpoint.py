"""Items of a run: whole or not there, refused for other settings, removed at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pared import _files
from pared._checkpoint import Checkpoint, fingerprint


def test_items_come_back(tmp_path: Path) -> None:
    done = Checkpoint(tmp_path / "run", {"a": 1})
    assert done.get("x") is None
    assert not (tmp_path / "run").exists()  # nothing is made before there is something to keep
    weight = torch.randn(4, 3)
    name = "layers/0.weight " + "long" * 80
    done.put(name, {"metric": 0.1 + 0.2, "none": None}, {"w": weight, "tied": weight, "t": weight.t()})
    done.put("empty")
    again = Checkpoint(tmp_path / "run", {"a": 1})
    item = again.get(name)
    assert item is not None
    assert item.values == {"metric": 0.1 + 0.2, "none": None}
    assert torch.equal(item.tensors["w"], weight)
    assert torch.equal(item.tensors["t"], weight.t())
    empty = again.get("empty")
    assert empty is not None
    assert empty.values == empty.tensors == {}
    again.drop("empty")
    assert again.get("empty") is None
    with pytest.raises(ValueError, match="resume: expected a folder of the same model and settings"):
        Checkpoint(tmp_path / "run", {"a": 2})
    again.finish()
    assert not (tmp_path / "run").exists()
    nothing = Checkpoint(None, {})
    nothing.put("x")
    assert nothing.get("x") is None
    nothing.finish()


def test_a_part_is_kept_until_the_whole_is_done(tmp_path: Path) -> None:
    whole = Checkpoint(tmp_path / "run", {})
    whole.put("first")
    part = Checkpoint(whole.part("quantize: 0.5"), {})
    part.put("layer")
    part.finish()
    assert Checkpoint(whole.part("quantize: 0.5"), {}).get("layer") is not None
    (tmp_path / "run" / "notes.txt").write_text("the user's own")
    whole.finish()
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_kill_while_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    done = Checkpoint(tmp_path, {})
    done.put("x", {"n": 1})

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "write":
            patch.setattr("pared._checkpoint.save_file", killed)
        else:
            patch.setattr(_files.os, at, killed)
        with pytest.raises(KeyboardInterrupt):
            done.put("x", {"n": 2})
    item = done.get("x")
    assert item is not None
    assert item.values == {"n": 1}
    assert sorted(os.listdir(tmp_path)) == ["run.json", "x.safetensors"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    done = Checkpoint(tmp_path, {}, "checkpoint")
    done.put("x", {"n": 1}, {"w": torch.ones(100)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(
        ValueError, match="checkpoint: expected the files of an earlier run, got a damaged one"
    ):
        done.get("x")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="checkpoint: expected a folder, got a file"):
        Checkpoint(tmp_path / "file", {}, "checkpoint")


def test_a_fingerprint_sees_every_bit_and_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model[1].running_mean[2] = 1e-30
    assert fingerprint(model) != before
    assert fingerprint(nn.Sequential(model)) != fingerprint(model)
