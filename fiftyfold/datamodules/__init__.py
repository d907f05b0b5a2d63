"""On what: GLUE and its augmentation."""

from fiftyfold.datamodules.glue import GLUEDataModule

__all__ = ["GLUEDataModule"]
