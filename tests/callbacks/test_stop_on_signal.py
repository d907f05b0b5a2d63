"""A signal ends the training where a resume is exact; the command line's side is in tests/reliability."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fiftyfold.callbacks import LayerReduction, RandomStates, StopOnSignal
from fiftyfold.callbacks.stop_on_signal import StoppedBySignal
from tests.strangers import BertUser, OddUser, assert_same_training, make_trainer


class Sender(Callback):
    """Sends a signal to its own process in a hook."""

    def __init__(self, hook, step, number=signal.SIGTERM):
        self.step, self.number = step, number
        setattr(self, hook, self.send)

    def send(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def trainer(folder, *further, **options):
    callbacks = [RandomStates(), LayerReduction(start=3), *further, StopOnSignal(folder / "stopped.ckpt")]
    return make_trainer(callbacks, folder / "steps", **options)


@pytest.mark.parametrize(
    ("hook", "step", "options", "saved"),
    [
        ("on_train_batch_start", 2, {}, 3),
        ("on_before_optimizer_step", 2, {}, 3),
        ("on_train_batch_start", 3, {}, 4),  # the epoch's last batch
        ("on_train_batch_start", 1, {"accumulate_grad_batches": 2}, 2),
        ("on_validation_batch_start", 2, {"limit_val_batches": 1, "val_check_interval": 2}, 2),
        ("on_validation_batch_start", 4, {"limit_val_batches": 1}, 4),
        ("on_train_epoch_end", 4, {}, 4),
    ],
)
@pytest.mark.parametrize("module_class", [BertUser, OddUser])
def test_it_saves_at_the_next_whole_step(hook, step, options, saved, module_class, tmp_path, capfd):
    before = {number: signal.getsignal(number) for number in StopOnSignal.SIGNALS}
    whole = trainer(tmp_path / "whole", num_sanity_val_steps=0, **options)
    whole.fit(module_class(seed=0))
    stopped = trainer(tmp_path, Sender(hook, step), num_sanity_val_steps=0, **options)
    with pytest.raises(StoppedBySignal) as caught:
        stopped.fit(module_class(seed=0))
    assert caught.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; resume from " in capfd.readouterr().err
    assert torch.load(tmp_path / "stopped.ckpt", weights_only=True)["global_step"] == saved
    resumed = trainer(tmp_path / "again", num_sanity_val_steps=0, **options)
    resumed.fit(module_class(seed=1), ckpt_path=tmp_path / "stopped.ckpt")
    assert_same_training(whole, resumed, f"stopped in {hook}")
    assert {number: signal.getsignal(number) for number in StopOnSignal.SIGNALS} == before


def test_a_best_checkpoint_is_not_lost_at_an_epochs_end(tmp_path):
    """It is chosen at the epoch's end by the scores of a validation that a resume does not repeat."""

    def best(folder):
        return ModelCheckpoint(folder, filename="{step}", monitor="loss", save_top_k=-1)

    options = {"limit_val_batches": 1, "num_sanity_val_steps": 0}
    stopping = trainer(tmp_path, Sender("on_validation_batch_start", 4), best(tmp_path / "best"), **options)
    with pytest.raises(StoppedBySignal):
        stopping.fit(BertUser(seed=0))
    assert (tmp_path / "best" / "step=4.ckpt").exists()


def test_a_handler_from_c_gives_way_to_the_systems_own(tmp_path, monkeypatch):
    """Python reads it as None and cannot put it back."""
    install = signal.signal
    monkeypatch.setattr(signal, "signal", lambda *arguments: install(*arguments) and None)
    stop = StopOnSignal()
    before = {number: signal.getsignal(number) for number in StopOnSignal.SIGNALS}
    try:
        stop.on_train_start(None, None)
        stop.on_train_end(None, None)
        assert {signal.getsignal(number) for number in StopOnSignal.SIGNALS} == {signal.SIG_DFL}
    finally:
        for number, handler in before.items():
            install(number, handler)


def test_a_signal_after_the_last_step_is_passed_on(tmp_path):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        trainer(tmp_path, Sender("on_train_end", 8)).fit(BertUser(seed=0))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM]
