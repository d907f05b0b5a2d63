"""Opening models of transformers, with an explanation where that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.modules.config_size import refuse_oversized
from fiftyfold.modules.packed.layers import PackedLayer
from fiftyfold.modules.packed.plugin import FiftyfoldQuantizer
from fiftyfold.modules.packed.trainable import make_trainable

Objective = Literal["causal", "masked"]
"""How a language model was trained: to predict the next token, or to fill in hidden ones."""

_LANGUAGE_MODELS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


def open_pretrained(
    auto_class: Any,
    source: str,
    *,
    role: str,
    kind: str,
    adapt: Callable[[PretrainedConfig], bool] = lambda _: False,
) -> tuple[PreTrainedModel, list[str]]:
    """Open a model in float32.

    Args:
        auto_class: transformers' automatic class.
        source: a folder or hub id.
        role: how messages call the model.
        kind: what messages say that it should be.
        adapt: changes the configuration, and tells whether weights may have another shape than the file's and are then
            made anew. Elsewhere a difference means a damaged or packed file, which must not come up as random weights.

    Returns:
        The model, and the sorted names of weights that the source lacks.

    Raises:
        FiftyfoldError: if there is no such model, or it cannot be read.
    """
    local = Path(source).expanduser()
    if not local.exists() and (local.is_absolute() or source.startswith((".", "~"))):
        raise FiftyfoldError(f"the {role} {source!r} is not there; name the folder where it is now ({role}=...).")
    place = str(local) if local.is_dir() else source
    try:
        config = AutoConfig.from_pretrained(place)
        other_shapes = adapt(config)
        refuse_oversized(auto_class, Path(place), config)
        model, loading = auto_class.from_pretrained(
            place, config=config, ignore_mismatched_sizes=other_shapes, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # a configuration can make any part of transformers stumble
        raise FiftyfoldError(
            f"the {role} {source!r} cannot be loaded as a transformers {kind} ({first_line(error)}); give a "
            "folder that save_pretrained wrote, or a hub id."
        ) from error
    if isinstance(getattr(model, "hf_quantizer", None), FiftyfoldQuantizer) and not has_packed_layers(model):
        # An export of a model that nothing had quantized; transformers would not change its dtype.
        make_trainable(model)
    return model, sorted(loading["missing_keys"])


def load_language_model(source: str, role: str, objective: Objective) -> PreTrainedModel:
    """Open a language model, in float32; an exported folder's packed layers stay packed.

    Args:
        source: a folder or hub id.
        role: how messages call the model.
        objective: what it was trained for.

    Raises:
        FiftyfoldError: if there is no such model, it cannot be read, or a part of it would have random weights.
    """
    model, missing = open_pretrained(_LANGUAGE_MODELS[objective], source, role=role, kind=f"{objective} language model")
    if missing:
        raise FiftyfoldError(
            f"the {role} {source!r} has no weights for {missing[0]!r}: it is no {objective} language model, or its "
            "file is incomplete."
        )
    return model


def load_trainable_language_model(source: str, role: str, objective: Objective) -> PreTrainedModel:
    """Open a language model, ready to train; an exported folder's packed layers become quantized ones.

    Raises:
        FiftyfoldError: as :func:`load_language_model` does.
    """
    model = load_language_model(source, role, objective)
    if has_packed_layers(model):
        make_trainable(model)
    return model.requires_grad_(True).float().train()


def has_packed_layers(model: torch.nn.Module) -> bool:
    """Tell whether a layer of ``model`` holds its weight packed."""
    return any(isinstance(module, PackedLayer) for module in model.modules())
