"""What: the LightningModules, the losses, the operations and the layers that they put in.

The operations are imported at once, because importing one teaches the structure log to replay it. The other public
names are imported when they are first used, so that loading an exported folder does not import Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fiftyfold.modules.layer_pruning import prune_layers
from fiftyfold.modules.layer_reduction import reduce_layers
from fiftyfold.modules.quantization.bitsandbytes_layers import quantize_bitsandbytes
from fiftyfold.modules.quantization.quantize import quantize
from fiftyfold.modules.tensor_network.compress_matrices import compress_matrices
from fiftyfold.modules.tensor_network.tensorize import tensorize

if TYPE_CHECKING:
    from fiftyfold.modules.checkpoint import load_from_checkpoint
    from fiftyfold.modules.distillation import DistillationModule
    from fiftyfold.modules.fine_tuning import FineTuningModule
    from fiftyfold.modules.healing import heal
    from fiftyfold.modules.healing_module import HealingModule
    from fiftyfold.modules.packed.ahead_of_time import compile_model
    from fiftyfold.modules.packed.compiled_program import load_compiled
    from fiftyfold.modules.packed.export import export
    from fiftyfold.modules.packed.load import load
    from fiftyfold.modules.text_module import LanguageModelingModule
    from fiftyfold.modules.vocabulary import trim_vocabulary

_HOMES = {
    "DistillationModule": "distillation",
    "FineTuningModule": "fine_tuning",
    "HealingModule": "healing_module",
    "LanguageModelingModule": "text_module",
    "compile_model": "packed.ahead_of_time",
    "export": "packed.export",
    "heal": "healing",
    "load": "packed.load",
    "load_compiled": "packed.compiled_program",
    "load_from_checkpoint": "checkpoint",
    "trim_vocabulary": "vocabulary",
}

__all__ = [
    "DistillationModule",
    "FineTuningModule",
    "HealingModule",
    "LanguageModelingModule",
    "compile_model",
    "compress_matrices",
    "export",
    "heal",
    "load",
    "load_compiled",
    "load_from_checkpoint",
    "prune_layers",
    "quantize",
    "quantize_bitsandbytes",
    "reduce_layers",
    "tensorize",
    "trim_vocabulary",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
