"""A checkpoint is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from fiftyfold.callbacks import DurableCheckpointIO, checkpoint_io
from fiftyfold.errors import FiftyfoldError
from tests.strangers import BertUser, assert_same_training, make_trainer

OLD, NEW = {"step": 1, "weight": torch.zeros(500)}, {"step": 2, "weight": torch.ones(900)}


@pytest.fixture
def path(tmp_path):
    DurableCheckpointIO().save_checkpoint(OLD, tmp_path / "folder" / "last [1].ckpt")
    return tmp_path / "folder" / "last [1].ckpt"


def test_it_reads_what_it_wrote(path):
    DurableCheckpointIO().save_checkpoint(NEW, path)
    content = DurableCheckpointIO().load_checkpoint(path)
    assert content["step"] == 2
    assert torch.equal(content["weight"], NEW["weight"])
    assert list(path.parent.iterdir()) == [path]


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_refuses_the_first_one_leaves_none_to_resume_from(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(FiftyfoldError, match=r"No space left on device.*repeat the command: there is no checkpoint"):
        DurableCheckpointIO().save_checkpoint(NEW, tmp_path / "first.ckpt")


@pytest.mark.parametrize("name", ["last [1].ckpt", "step=2.ckpt"])
@pytest.mark.parametrize("victim", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_one(path, victim, name, monkeypatch):
    monkeypatch.setattr(os, victim, refuse)
    with pytest.raises(FiftyfoldError, match=r"cannot be written .No space left on device.*the checkpoint before it"):
        DurableCheckpointIO().save_checkpoint(NEW, path.with_name(name))
    monkeypatch.undo()
    assert DurableCheckpointIO().load_checkpoint(path)["step"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_what_a_kill_left_goes_with_the_next_save(path):
    (path.parent / f".{path.name}.0123456789ab.tmp").write_bytes(b"torn")
    (path.parent / ".last 1.ckpt.0123456789ab.tmp").write_bytes(b"of another file")
    DurableCheckpointIO().save_checkpoint(NEW, path)
    assert sorted(each.name for each in path.parent.iterdir()) == [".last 1.ckpt.0123456789ab.tmp", path.name]


def test_one_flipped_bit_is_noticed(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert TorchCheckpointIO().load_checkpoint(path, weights_only=True), "torch itself does not look"
    with pytest.raises(FiftyfoldError, match="is damaged"):
        DurableCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("size", [0, 10, 500, -30])
def test_a_torn_file_is_noticed(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FiftyfoldError, match="is damaged"):
        DurableCheckpointIO().load_checkpoint(path, weights_only=True)


def test_a_mistake_in_the_content_is_no_matter_of_the_disk(path):
    with pytest.raises(Exception, match=r"pickle|lambda"):
        DurableCheckpointIO().save_checkpoint({"odd": lambda: 0}, path)
    assert DurableCheckpointIO().load_checkpoint(path)["step"] == 1


def save_while_handling(error, path):
    try:
        if error:
            raise error
    except OSError:
        DurableCheckpointIO().save_checkpoint(NEW, path)
    else:
        DurableCheckpointIO().save_checkpoint(NEW, path)


@pytest.mark.parametrize("stop", [KeyboardInterrupt("a signal"), RuntimeError("a worker died of a signal")])
@pytest.mark.parametrize("handled", [None, OSError(2, "another matter")])
def test_what_a_signals_handler_raises_in_mid_write_is_said(path, stop, handled, monkeypatch):
    """torch's writer, stopped in the middle of a write, says ``unexpected pos 64 vs 0`` over it."""
    whole = checkpoint_io.replaced_file

    @contextlib.contextmanager
    def interrupted(place):
        with whole(place) as file:
            file.write = mock.Mock(side_effect=[30, 16, 18, stop])
            yield file

    monkeypatch.setattr(checkpoint_io, "replaced_file", interrupted)
    with pytest.raises(type(stop), match="a signal"):
        save_while_handling(handled, path)
    monkeypatch.undo()
    assert DurableCheckpointIO().load_checkpoint(path)["step"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_second_resume_counts_its_epochs(tmp_path):
    """Lightning takes the epoch after a resume at an epoch's last batch for the rest of the one before."""
    from fiftyfold.callbacks import LayerReduction

    def trainer(folder):
        return make_trainer([LayerReduction(start=3)], folder, plugins=[DurableCheckpointIO()])

    whole, second = trainer(tmp_path / "whole"), trainer(tmp_path / "second")
    whole.fit(BertUser(seed=0))
    trainer(tmp_path / "first").fit(BertUser(seed=1), ckpt_path=tmp_path / "whole" / "step=4.ckpt")
    second.fit(BertUser(seed=2), ckpt_path=tmp_path / "first" / "step=6.ckpt")
    assert second.global_step == whole.global_step
    assert_same_training(whole, second, "resumed from a resumed run")
