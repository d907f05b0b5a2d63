"""Loading a compressed checkpoint without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from fiftyfold.modules.structure import replaying

_Module = TypeVar("_Module", bound=LightningModule)


def load_from_checkpoint(module_class: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """Load a checkpoint of any LightningModule into the structure that it was saved with.

    ``module_class.load_from_checkpoint(path)`` alone involves no callback: it fails on the first missing or unexpected
    key, or, with ``strict=False``, silently leaves weights at their random values.

    Args:
        module_class: the class that was trained; it need know nothing of fiftyfold.
        path: the checkpoint file.
        **kwargs: handed to ``module_class.load_from_checkpoint``.

    Returns:
        The module, compressed as it was when the checkpoint was saved.

    Raises:
        FiftyfoldError: if the structure log in the checkpoint does not fit the module.
    """
    with replaying():
        return module_class.load_from_checkpoint(path, **kwargs)  # type: ignore[no-any-return]
