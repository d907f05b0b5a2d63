"""LightningCLI as fiftyfold uses it: ``fit``, ``validate``, ``test`` and ``predict``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from typing_extensions import override

from fiftyfold.app.predictions import FILE_NAME, PredictionWriter
from fiftyfold.app.remembered import read_checkpoint, remembered_model
from fiftyfold.app.typed_settings import TypedSettings

# Imported so that recipes can name these classes without their modules.
from fiftyfold.callbacks import (
    DurableCheckpointIO,
    LayerPruning,
    LayerReduction,
    MatrixCompression,
    QuantizationAwareTraining,
    RandomStates,
    StopOnSignal,
    TensorNetworkDecomposition,
)
from fiftyfold.callbacks.operation_callback import OperationCallback
from fiftyfold.datamodules import GLUEDataModule, LanguageModelingDataModule
from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.kernels.float_products import use_fast_float_products
from fiftyfold.modules import DistillationModule, FineTuningModule, HealingModule, LanguageModelingModule
from fiftyfold.modules.task_module import TaskModule
from fiftyfold.modules.text_module import TextModule

_ONE_FILE = (SingleDeviceStrategy, DDPStrategy)

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
    MatrixCompression,
    QuantizationAwareTraining,
    RandomStates,
    StopOnSignal,
    TensorNetworkDecomposition,
)
"""Classes that a recipe names by their bare class name."""

_COMPRESSING = {kind.__name__ for kind in ADDRESSABLE if issubclass(kind, OperationCallback)}
_RECIPE_OPTIONS = ("-c", "--config")


class TrainerCLI(LightningCLI):
    """LightningCLI in which what is typed wins over what a checkpoint remembers, and which keeps random states."""

    config: Any

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--predictions",
                type=str | None,
                help=f"the file to write, tab-separated: index and prediction; by default {FILE_NAME} in the run's "
                "folder",
            )
        return parser

    @override
    def parse_arguments(self, parser: Any, args: Any) -> None:
        # What the checkpoint remembers goes before the words that were typed: the later word wins. LightningCLI lets
        # the checkpoint win, and merges what it remembers of one class into another.
        command, *words = args
        remembered = _remembered_words(command, words)
        try:
            super().parse_arguments(parser, [command, *remembered, *words])
        except (OSError, ValueError, RecursionError) as error:  # what is wrong with values exits with status 2
            raise FiftyfoldError(f"the command line or its recipe cannot be read: {first_line(error)}") from error
        _refuse_lost_callbacks(words, self.config)
        self._resumes = _last_option(words, "ckpt_path") is not None
        self._differs = self._resumes and _model_of(self.config) != _model_of(
            parser.parse_args([command, *words, *remembered])
        )

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: what the checkpoint remembers is among the arguments."""

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        # Without them a run cannot go on as if it had never stopped. They come first: other callbacks may draw numbers.
        if not any(isinstance(callback, RandomStates) for callback in trainer.callbacks):
            trainer.callbacks.insert(0, RandomStates())
        if not any(isinstance(callback, StopOnSignal) for callback in trainer.callbacks):
            trainer.callbacks.append(StopOnSignal())
        # Strategies that write a folder of their own take no CheckpointIO.
        strategy = trainer.strategy
        if isinstance(strategy, _ONE_FILE) and type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = DurableCheckpointIO()
        if self._resumes:
            trainer.callbacks.append(TypedSettings(optimizer=self._differs))
        return trainer

    def before_predict(self) -> None:
        """Let what is predicted be written; LightningCLI calls this before the Trainer's ``predict``.

        Raises:
            FiftyfoldError: if nobody would write anything.
        """
        if isinstance(self.model, TextModule):
            raise FiftyfoldError(
                "predict writes the labels that a classifier gives, and a language model gives none; score it with "
                "fiftyfold validate or evaluate, or export it and generate text with transformers."
            )
        if isinstance(self.model, TaskModule):
            self.trainer.callbacks.append(PredictionWriter(self._get(self.config_init, "predictions")))
        elif not any(isinstance(callback, BasePredictionWriter) for callback in self.trainer.callbacks):
            raise FiftyfoldError(
                f"nobody would write what {type(self.model).__name__} predicts; add a callback to the trainer that "
                "does, a BasePredictionWriter."
            )


def run_trainer_command(words: list[str]) -> None:
    """Carry out one Trainer command.

    Args:
        words: the command line without the program's name, beginning with the Trainer's command.
    """
    if words[0] == "fit":
        use_fast_float_products()
    _command_line(TrainerCLI, words)


def parse_trainer_command(words: list[str]) -> Any:
    """Return the configuration of a Trainer command without carrying it out.

    Args:
        words: as for :func:`run_trainer_command`.

    Raises:
        SystemExit: if the command line or its recipe is malformed; the reason stands on the standard error.
    """
    return _command_line(_Parser, words).config


class _Parser(TrainerCLI):
    """Stops when all is parsed."""

    @override
    def instantiate_classes(self) -> None: ...

    @override
    def _set_seed(self) -> None: ...

    @override
    def _run_subcommand(self, subcommand: str) -> None: ...


def _command_line(kind: type[TrainerCLI], words: list[str]) -> TrainerCLI:
    sys.argv = ["fiftyfold"]
    return kind(
        args=[_shipped_recipe(word) for word in words],
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        save_config_kwargs={"overwrite": True},
    )


def _remembered_words(command: str, words: Sequence[str]) -> list[str]:
    """Return what the checkpoint of a command line remembers of its model, as words of a command line."""
    path = _last_option(words, "ckpt_path")
    if not isinstance(path, str) or not Path(path).is_file():
        return []
    model = _last_option(words, "model")
    typed_class = model.get("class_path") if isinstance(model, dict) else model
    content = read_checkpoint(Path(path))
    if command == "fit" and "optimizer_states" not in content:
        raise FiftyfoldError(
            f"{path} holds weights alone, from which no training can go on; validate, test, predict and export take it."
        )
    remembered = remembered_model(content, path, typed_class)
    return [] if remembered is None else ["--model", json.dumps(remembered)]


def _last_option(words: Sequence[str], name: str) -> Any:
    """Return the value that an option has in the end, of the command line and the recipes that it names."""
    found = None
    for option, value in _options(words):
        if option == f"--{name}":
            found = value
        elif option in _RECIPE_OPTIONS:
            found = _recipe_entry(Path(value), name) or found
    return found


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield every word that may be an option, with what would be its value."""
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        yield option, value if equals else next(iter(words[place + 1 :]), "")


def _recipe_entry(path: Path, name: str) -> Any:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None  # the parser will say what is wrong with it
    return content.get(name) if isinstance(content, dict) else None


def _refuse_lost_callbacks(words: Sequence[str], config: Any) -> None:
    """Refuse a list of callbacks that takes the place of a recipe's compressing ones: lists do not add up."""
    trainer = config[config.subcommand].get("trainer") or {}
    have = _class_names(trainer.get("callbacks"))
    for option, value in _options(words):
        recipe = _recipe_entry(Path(value), "trainer") if option in _RECIPE_OPTIONS else None
        named = _class_names(recipe.get("callbacks")) if isinstance(recipe, dict) else []
        if lost := [name for name in named if name in _COMPRESSING and name not in have]:
            raise FiftyfoldError(
                f"{value} names {lost[0]}, but the list of callbacks of a later recipe or --trainer takes its place; "
                f"repeat it after that with --trainer.callbacks+={lost[0]}, or take it out of {value}."
            )


def _class_names(callbacks: Any) -> list[str]:
    """Return the bare class names in a list of callbacks, as a recipe or the parsed configuration writes it."""
    entries = callbacks if isinstance(callbacks, list) else []
    paths = [each.get("class_path") if hasattr(each, "get") else each for each in entries]
    return [str(path).rpartition(".")[2] for path in paths]


def _model_of(config: Any) -> Any:
    return config[config.subcommand].get("model")


def _shipped_recipe(word: str) -> str:
    """Return the path of the recipe that a word such as ``xtc/w1a8`` names, or the word as it is."""
    option, equals, name = word.rpartition("=")
    path = RECIPES / f"{name}.yaml"
    if option not in ("", *_RECIPE_OPTIONS) or "/" not in name or Path(name).exists() or not path.is_file():
        return word
    return f"{option}{equals}{path}"
