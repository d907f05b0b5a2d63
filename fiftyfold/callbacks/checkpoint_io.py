"""DurableCheckpointIO: a checkpoint is on the disk whole, or it is the one before."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_replacement import escaped, replaced_file
from fiftyfold.modules.checkpoint import check_checkpoint


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, waits for the disk, and renames it.

    Lightning's own way builds the file in memory and then in the folder for temporary files. Where that is another
    file system, the last step is a copy, which a kill cuts in half; and nothing waits for the disk, so that a power cut
    may leave an empty file under the checkpoint's name. Nor does its reading compare checksums.

    Example:
        ``Trainer(plugins=[DurableCheckpointIO()])``
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``; addresses such as ``s3://…`` are left to Lightning.

        Raises:
            FiftyfoldError: if the disk refuses; the file that was there before is then still whole.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        handled = sys.exception()
        try:
            # Asked first, lest an error from a signal's handler seem to come from a folder that is there already.
            if not place.parent.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(place) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            reason = _reason(error, handled)
            if not isinstance(reason, OSError):
                raise reason from None
            raise FiftyfoldError(
                f"the checkpoint {place} cannot be written ({reason.strerror or reason}); free some space or name "
                f"another folder, and {_way_on(place)}."
            ) from error

    @override
    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> Any:
        """Read a checkpoint.

        Raises:
            FiftyfoldError: if a bit of it was altered since it was written.
        """
        if "://" not in str(path):
            check_checkpoint(Path(path))
        return super().load_checkpoint(path, *arguments, **options)


def _way_on(place: Path) -> str:
    if any(place.parent.glob(f"*{escaped(place.suffix or place.name)}")):
        return "resume from the checkpoint before it, which is whole"
    return "repeat the command: there is no checkpoint before it in this folder"


def _reason(error: BaseException, handled: BaseException | None) -> BaseException:
    """Return what stopped the writing: torch's writer, stopped in the middle, raises an error of its own over it.

    Such a stop is the disk's, or an error from a signal's handler: Ctrl-C, or a loader's worker that died.

    Args:
        error: what came out of the writing.
        handled: what was being handled when the writing began, which is not its reason.
    """
    while error.__context__ not in (None, handled) and not error.__suppress_context__:
        error = error.__context__
    return error
