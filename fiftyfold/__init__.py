"""fiftyfold: make a fine-tuned transformer up to fifty times smaller, as a file on disk.

Importing the package makes exported folders known to transformers: afterwards ``AutoModel….from_pretrained`` and
``pipeline`` open them. It imports neither Lightning nor datasets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed import plugin as _plugin

if TYPE_CHECKING:
    from fiftyfold.modules import compile_model, export, load, load_compiled

__version__ = "0.1.0"

__all__ = ["FiftyfoldError", "__version__", "compile_model", "export", "load", "load_compiled"]

_plugin.register_plugin()


def __getattr__(name: str) -> Any:
    if name not in {"compile_model", "export", "load", "load_compiled"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fiftyfold import modules

    return getattr(modules, name)
