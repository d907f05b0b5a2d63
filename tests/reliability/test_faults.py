"""Full disks, folders that refuse, losses without a value, signals, ranks and workers that die."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fiftyfold.app import training
from fiftyfold.callbacks import DurableCheckpointIO, RandomStates
from fiftyfold.datamodules import GLUEDataModule
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import FineTuningModule
from tests.reliability.commands import (
    Run,
    compress_words,
    export_hash,
    fit_words,
    said,
    training_hash,
)

pytestmark = pytest.mark.slow


class SlowSteps(Callback):
    """Gives a signal time to arrive."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (Path.cwd() / "started").touch()
        time.sleep(0.3)


def slow_down() -> None:
    from fiftyfold.app import trainer_cli

    make = trainer_cli.TrainerCLI.instantiate_trainer

    def instantiate_trainer(self, **options):
        trainer = make(self, **options)
        trainer.callbacks.insert(0, SlowSteps())
        return trainer

    trainer_cli.TrainerCLI.instantiate_trainer = instantiate_trainer


def wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} never came")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_and_the_resume_is_exact(place, fitted, number):
    (place / "started").unlink(missing_ok=True)
    folder = f"signal{int(number)}"
    run = Run(fit_words(folder), place, slow_down)
    wait_for(place / "started")
    run.send(number)
    assert run.wait() == 128 + number
    assert said(place).startswith(f"stopped by {number.name}; resume from ")
    stopped = Path(folder) / "stopped.ckpt"
    assert 0 < torch.load(place / stopped, weights_only=True)["global_step"] < 8
    assert Run(fit_words(folder, resume=stopped), place).wait() == 0
    assert training_hash(place / folder / "step=8.ckpt") == fitted


def test_slurm_requeues_and_the_next_run_goes_on_by_itself(place, fitted):
    (place / "started").unlink(missing_ok=True)
    folder = place / "slurm"
    folder.mkdir()
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {folder}/requeued\n')
    scontrol.chmod(0o755)

    def inside_slurm() -> None:
        os.environ |= {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
        os.environ |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{folder}:{os.environ['PATH']}"}
        slow_down()

    run = Run(fit_words("slurm"), place, inside_slurm)
    wait_for(place / "started")
    run.send(signal.SIGUSR1)
    assert run.wait() == 128 + signal.SIGUSR1
    assert (folder / "requeued").read_text() == "requeue 77\n"
    assert list(folder.glob("hpc_ckpt_*.ckpt"))
    assert Run(fit_words("slurm"), place, inside_slurm).wait() == 0
    assert training_hash(folder / "step=8.ckpt") == fitted


def limit_files(size: int):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_disk_that_takes_no_more_ends_the_fit_and_keeps_the_last_checkpoint(place, fitted):
    # The checkpoints grow by the quantizers' switches at step 3, and no more than that fits.
    size = (place / "whole" / "step=2.ckpt").stat().st_size + 100
    assert Run(fit_words("full"), place, limit_files(size)).wait() == 1
    assert "step=3.ckpt cannot be written (File too large)" in said(place)
    assert sorted(path.name for path in (place / "full").glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]
    assert not list((place / "full").glob(".*"))
    assert Run(fit_words("full", resume=Path("full/step=2.ckpt")), place).wait() == 0
    assert training_hash(place / "full" / "step=8.ckpt") == fitted


def test_a_full_disk_ends_a_compression_which_goes_on_when_there_is_room(place):
    assert Run(compress_words("undisturbed"), place).wait() == 0
    assert Run(compress_words("small"), place, limit_files(100_000)).wait() == 1
    assert "fiftyfold: error: the checkpoint small.work/last.ckpt cannot be written" in said(place)
    assert not (place / "small").exists()
    assert Run(compress_words("small"), place).wait() == 0
    assert export_hash(place / "small") == export_hash(place / "undisturbed")


def _others_may_enter(folder):
    return all(parent.stat().st_mode & 0o005 == 0o005 for parent in (folder, *folder.parents))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
@pytest.mark.skipif(
    not _others_may_enter(Path(sys.base_prefix)), reason="another user may not read this Python's own modules"
)
@pytest.mark.parametrize("words", [fit_words("locked/run"), compress_words("locked/small")], ids=["fit", "compress"])
def test_a_folder_that_may_not_be_written_is_one_sentence(place, words):
    locked = place / "locked"
    locked.mkdir(exist_ok=True)
    locked.chmod(0o555)
    for path in [place, *place.parents, *place.rglob("*.safetensors")]:
        path.chmod(path.stat().st_mode | 0o055)

    def become_nobody() -> None:
        cache = place / "nobody"
        cache.mkdir(exist_ok=True)
        cache.chmod(0o777)
        os.environ["XDG_CACHE_HOME"] = str(cache)
        os.setuid(65534)

    assert Run(words, place, become_nobody).wait() == 1
    assert "fiftyfold: error: " in said(place)
    assert "ermission denied" in said(place)
    assert not list(locked.iterdir())


def test_a_loss_without_a_value_ends_and_the_checkpoints_before_it_are_sound(place):
    status = Run(
        fit_words("nan", callbacks=False, model__optimizer="torch.optim.SGD", model__optimizer__lr="1e30"), place
    )
    assert status.wait() == 1
    assert "the loss is not a finite number at step" in said(place)
    for path in (place / "nan").glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(bool(tensor.isfinite().all()) for tensor in weights if tensor.is_floating_point()), path


class DeadWorkerError(FineTuningModule):
    """Kills one worker in mid-epoch.

    The newest, which is the training loader's. With validation's dead too, torch's handler speaks twice, and the second
    time may be inside the first one's clearing up, where an error can only be printed.
    """

    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            os.kill(max(child.pid for child in torch.multiprocessing.active_children()), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def test_a_worker_that_dies_ends_the_training_and_the_last_checkpoint_stays(place, tmp_path):
    data = GLUEDataModule(
        "sst2", str(place / "teacher"), str(place / "data"), batch_size=4, num_workers=1, cache_dir=str(tmp_path)
    )
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomStates(), saver],
        plugins=[DurableCheckpointIO()],
    )
    # Torch's own error, unless the worker dies while the batch that it had ready is being fetched.
    with pytest.raises((RuntimeError, ConnectionError), match=r"worker .* exited unexpectedly|killed by signal|peer"):
        trainer.fit(DeadWorkerError(str(place / "teacher")), datamodule=data)
    saved = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert torch.load(saved, weights_only=True)["global_step"] >= 2


RANKS = """
import os, signal, sys
from tests.reliability.test_faults import train_as_rank
train_as_rank(*sys.argv[1:])
"""


def train_as_rank(place: str, out: str) -> None:
    """One of two ranks; the second one dies at step 2."""

    class Die(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_rank == 1 and trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    data = GLUEDataModule("sst2", f"{place}/teacher", f"{place}/data", batch_size=4, cache_dir=f"{place}/cache")
    saver = ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomStates(), saver, Die()],
        plugins=[DurableCheckpointIO()],
    )
    trainer.fit(FineTuningModule(f"{place}/teacher"), datamodule=data)


def test_a_rank_that_dies_ends_the_other_too(place, tmp_path):
    """No rank waits for ever for one that is gone."""
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script), str(place), str(tmp_path / "out")],
        cwd=root,
        env=environment,
        timeout=180,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    saved = sorted(path.name for path in (tmp_path / "out").glob("*.ckpt"))
    assert saved[:2] == ["step=1.ckpt", "step=2.ckpt"]
    assert all(torch.load(tmp_path / "out" / name, weights_only=True) for name in saved)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken(place, fitted):
    damaged = place / "damaged.ckpt"
    content = bytearray((place / "whole" / "step=5.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert Run(fit_words("resumed", resume=Path("damaged.ckpt")), place).wait() == 1
    assert "is damaged" in said(place)
    with pytest.raises(FiftyfoldError, match="is damaged"):
        DurableCheckpointIO().load_checkpoint(damaged)
    assert training.SAVE_EVERY_STEPS > 1, "the forked runs change nothing here"
