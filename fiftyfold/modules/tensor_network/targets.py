"""Choosing the layers whose weight becomes a tensor network."""

from __future__ import annotations

from torch import nn

from fiftyfold.modules.quantization.targets import Targets, choose_layers_by_name, in_stacks, named_layers
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

    def linears(candidates: dict[str, nn.Module]) -> set[str]:
        embeddings = nn.Embedding | TensorNetworkEmbedding
        found = {name: module for name, module in candidates.items() if not isinstance(module, embeddings)}
        return in_stacks(model, found) or set(found)

    return choose_layers_by_name(model, eligible, targets, exclude, {"default": linears}, purpose="tensorize")
