"""LightningCLI as fiftyfold uses it: ``fit``, ``validate``, ``test`` and ``predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from typing_extensions import override

# Imported so that recipes can name these classes without their modules.
from fiftyfold.callbacks import LayerPruning, LayerReduction, QuantizationAwareTraining, RandomStates
from fiftyfold.datamodules import GLUEDataModule, LanguageModelingDataModule
from fiftyfold.modules import DistillationModule, FineTuningModule, HealingModule, LanguageModelingModule

RECIPES = Path(__file__).parents[1] / "configs"
"""The recipes that are shipped with the package."""

ADDRESSABLE = (
    DistillationModule,
    FineTuningModule,
    GLUEDataModule,
    HealingModule,
    LanguageModelingDataModule,
    LanguageModelingModule,
    LayerPruning,
    LayerReduction,
    QuantizationAwareTraining,
    RandomStates,
)
"""Classes that a recipe names by their bare class name."""


class TrainerCLI(LightningCLI):
    """LightningCLI in which what is typed wins over what a checkpoint remembers, and which keeps random states."""

    config: Any

    @override
    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        self._typed = parser.parse_args(args, defaults=False)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        # Without them a run cannot go on as if it had never stopped. They come first: other callbacks may draw numbers.
        if not any(isinstance(callback, RandomStates) for callback in trainer.callbacks):
            trainer.callbacks.insert(0, RandomStates())
        return trainer

    @override
    def _parse_ckpt_path(self) -> None:
        # LightningCLI lets the checkpoint's hyperparameters override the command line.
        super()._parse_ckpt_path()
        command = self.config.subcommand
        model = self._typed[command].get("model")
        if model is not None:
            self.config = self.parser.parse_object({command: {"model": model}}, self.config)


def run_trainer_command(words: list[str]) -> None:
    """Carry out one Trainer command.

    Args:
        words: the command line without the program's name, beginning with the Trainer's command.
    """
    sys.argv = ["fiftyfold"]
    TrainerCLI(
        args=[_shipped_recipe(word) for word in words],
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        save_config_kwargs={"overwrite": True},
    )


def _shipped_recipe(word: str) -> str:
    """Return the path of the recipe that a word such as ``xtc/w1a8`` names, or the word as it is."""
    option, equals, name = word.rpartition("=")
    path = RECIPES / f"{name}.yaml"
    if option not in ("", "-c", "--config") or "/" not in name or Path(name).exists() or not path.is_file():
        return word
    return f"{option}{equals}{path}"
