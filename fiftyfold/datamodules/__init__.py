"""On what: GLUE and its augmentation, and text for language models."""

from fiftyfold.datamodules.glue import GLUEDataModule
from fiftyfold.datamodules.language_modeling import LanguageModelingDataModule

__all__ = ["GLUEDataModule", "LanguageModelingDataModule"]
