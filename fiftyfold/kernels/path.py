"""Which arithmetic a packed layer uses."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, get_args

from fiftyfold.errors import FiftyfoldError

Path = Literal["integer", "reference"]
"""``integer``, the default: the products are 8-bit integers, summed exactly and scaled at the end; a layer that has no
such form takes the reference. ``reference``: weights are unpacked to floats and activations are quantized as in
training, so that the outputs equal the trained model's bit for bit; slower.

A layer's outputs on the two paths agree to about ``1e-6 * (|x| @ |W|ᵀ + |bias|)``, the rounding of a float32 sum. In a
whole model such a rounding can move an input of a later layer to the neighbouring 8-bit code, so that outputs differ by
some steps of that grid: up to 0.02 where hidden states are normalized, as in the models of BERT's kind."""

_current: Path = "integer"


def current_path() -> Path:
    """Return the arithmetic in force."""
    return _current


class use_path:  # noqa: N801 - used as a function, like torch.set_grad_enabled
    """Choose the arithmetic of packed layers in this process, for good or for the length of a ``with`` block.

    Args:
        path: ``"integer"`` or ``"reference"``, see :data:`Path`.

    Raises:
        FiftyfoldError: if there is no such path.
    """

    def __init__(self, path: Path) -> None:
        if path not in get_args(Path):
            raise FiftyfoldError(f"there is no arithmetic {path!r}; choose one of {', '.join(get_args(Path))}.")
        self._before = current_path()
        _set(path)

    def __enter__(self) -> None:
        """Keep the path that the constructor set."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go back to the path that was in force before."""
        _set(self._before)


def _set(path: Path) -> None:
    global _current  # noqa: PLW0603 - one setting for every thread, as a pipeline may run the model in another
    _current = path
