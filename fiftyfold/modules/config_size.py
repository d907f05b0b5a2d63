"""Refusing a configuration that commands more than its weight files hold, before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed.weights_file import read_headers

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_LEAST_BITS = 4
"""Nobody's dense folder holds a parameter in less; packed ones are checked tensor by tensor."""
_SLACK_BYTES = 64 * 2**20
"""For a new head."""


def refuse_too_many_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """Compare the number of layers with that of the tensors in the folder: even an empty skeleton takes memory.

    Args:
        folder: where weights may be; without safetensors files nothing is compared.
        config: the configuration's entries.

    Raises:
        FiftyfoldError: if there are more layers than tensors.
    """
    files = sorted(folder.glob("model*.safetensors"))
    tensors = sum(len(read_headers([file])) for file in files)
    for name in _LAYER_COUNTS:
        count = config.get(name)
        if files and isinstance(count, int) and count > tensors:
            raise FiftyfoldError(
                f"{folder / 'config.json'} says {name}={count}, but the weights beside it are {tensors} tensors; "
                "weights and configuration do not belong together."
            )


def refuse_oversized(auto_class: Any, folder: Path, config: PretrainedConfig) -> None:
    """Compare a dense model's size with that of its weight files, before transformers allocates it.

    Args:
        auto_class: transformers' automatic class.
        folder: where the weights are; without safetensors files nothing is compared.
        config: what to build.

    Raises:
        FiftyfoldError: if the files cannot hold the parameters.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files or getattr(config, "quantization_config", None) is not None:
        return
    refuse_too_many_layers(folder, config.to_dict())
    with torch.device("meta"):
        model = auto_class.from_config(config)
    bits = sum(parameter.numel() for parameter in model.parameters()) * _LEAST_BITS
    held = sum(file.stat().st_size for file in files)
    if bits > 8 * (held + _SLACK_BYTES):
        raise FiftyfoldError(
            f"{folder / 'config.json'} describes a model of {bits // _LEAST_BITS} parameters, but the weights beside "
            f"it are {held} bytes; weights and configuration do not belong together."
        )
