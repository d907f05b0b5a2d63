"""What each process of a run over two hosts does: train, keep every step, and go on from the last one."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from tests.cases import CASES
from tests.strangers import OddUser, make_trainer

STALLS_AT = 5
"""Optimizer step before which the second rank waits to be killed, once."""


class Stall(Callback):
    """Says that the middle is reached, and waits there; not a second time."""

    def __init__(self, folder: Path) -> None:
        self.reached = folder / "reached"

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STALLS_AT and trainer.global_rank == 1 and not self.reached.exists():
            self.reached.touch()
            time.sleep(600)


def train(folder: Path, start: Path | None, callbacks: list[Callback], **options: Any) -> dict[str, torch.Tensor]:
    """Train with every operation, writing ``step=k.ckpt`` into ``folder``; return the weights at the end."""
    torch.set_num_threads(1)
    module = OddUser(seed=0 if start is None else 1)
    trainer = make_trainer(
        [*CASES[-1].callbacks(), *callbacks],
        folder,
        strategy="ddp",
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, ckpt_path=start)
    return module.state_dict()


def main() -> None:
    """Run on one of two hosts, started by torchrun."""
    folder = Path(sys.argv[1])
    saved = sorted(folder.glob("step=*.ckpt"))
    state = train(folder, saved[-1] if saved else None, [Stall(folder)], devices=1, num_nodes=2)
    if torch.distributed.get_rank() == 0:
        torch.save({"state": state, "from": saved[-1].name if saved else None}, folder / "end.pt")


if __name__ == "__main__":
    main()
