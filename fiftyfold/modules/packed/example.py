"""An input to compare a model and its reloaded copy by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from fiftyfold.kernels.path import use_path

Example = torch.Tensor | Sequence[Any] | Mapping[str, Any]
"""Arguments of a model's forward: one tensor, several in order, or several by name."""

_TOKENS = 16
_STRIDE = 7919


def default_example(model: nn.Module) -> Example | None:
    """Return an input for a transformers model that reads tokens; nothing for others.

    It is one row of tokens from all over the vocabulary, the same every time.
    """
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return None
    if model.config.is_encoder_decoder:
        return None
    tokens = torch.arange(1, _TOKENS + 1) * _STRIDE % int(model.config.get_text_config().vocab_size)
    return {"input_ids": tokens.unsqueeze(0)}


@torch.no_grad()
def compute(model: nn.Module, example: Example) -> list[torch.Tensor]:
    """Return the floating-point outputs of ``model`` on the reference path, on the CPU.

    Args:
        model: in evaluation mode.
        example: input; moved to the CPU.
    """
    example = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, example)
    with use_path("reference"):
        if isinstance(example, torch.Tensor):
            output = model(example)
        elif isinstance(example, Mapping):
            output = model(**example)
        else:
            output = model(*example)
    # A transformers output may hold caches; its first entry is the logits or the hidden states.
    output = output[0] if isinstance(model, PreTrainedModel) else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
