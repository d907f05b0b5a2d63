"""Choosing the layers whose weight becomes a tensor network."""

from __future__ import annotations

from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.targets import (
    Targets,
    examples,
    frozen_parts,
    in_stacks,
    matching,
    named_layers,
    sharing_weight,
    task_heads,
)
from fiftyfold.modules.tensor_network.layers import TensorNetworkEmbedding, is_tensorizable


def find_matrices(model: nn.Module, targets: Targets = "default", exclude: Targets = ()) -> list[str]:
    """Find the layers to tensorize.

    Args:
        model: any module.
        targets: ``"default"``: the linear layers of the stacked layers, that is, attention and MLP, as CompactifAI
            does; of a model without stacked layers, all its linear layers. Frozen parts beside others that train and
            the task heads of transformers models are left out. Otherwise regular expressions, one of which must be
            found in a layer's name; embeddings can be chosen in this way.
        exclude: regular expressions; a layer whose name has one of them is left out.

    Returns:
        Names in the order of the model, without the parts that compiling adds. Layers that share a weight with a
        chosen one are chosen as well.

    Raises:
        FiftyfoldError: if nothing is found, or a pattern is wrong or finds nothing.
    """
    eligible = {name: module for name, module in named_layers(model) if is_tensorizable(module)}
    if not eligible:
        raise FiftyfoldError(f"{type(model).__name__} has no Linear, Embedding or Conv1D to tensorize.")
    if targets == "default":
        left_out = frozen_parts(model) | task_heads(model)
        linears = {
            name: module
            for name, module in eligible.items()
            if name not in left_out and not isinstance(module, nn.Embedding | TensorNetworkEmbedding)
        }
        chosen = in_stacks(model, linears) or set(linears)
    else:
        chosen = matching("targets", targets, eligible)
    chosen |= sharing_weight(chosen, eligible)
    if exclude:
        chosen -= matching("exclude", exclude, eligible)
    if not chosen:
        raise FiftyfoldError(
            f"targets {targets!r} without exclude {exclude!r} leave nothing to tensorize in {type(model).__name__}; "
            f"its layers are {examples(eligible)}."
        )
    return [name for name in eligible if name in chosen]
