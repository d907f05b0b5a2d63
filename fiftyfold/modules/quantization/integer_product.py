"""A quantized layer's product in integers, as training and deployed layers compute it."""

from __future__ import annotations

import torch

from fiftyfold.kernels.operators import packed_linear
from fiftyfold.modules.quantization.settings import LayerSettings


def multiply_integers(
    x: torch.Tensor,
    arranged: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    settings: LayerSettings,
    largest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return an input's integer product with a weight.

    Args:
        x: (…, inputs).
        arranged: the weight and its scales, as :func:`.arrange_weight` returns them.
        bias: (outputs,) or none.
        settings: how weight and input are quantized; the input symmetrically.
        largest: of a static range; by default each token has its own.
    """
    activation = settings.activation
    assert activation is not None
    weight, scale = arranged
    return packed_linear(
        x,
        weight,
        scale,
        bias,
        bits=settings.weight.bits,
        activation_bits=activation.bits,
        full_range=activation.full_range,
        clip=activation.clip,
        largest=largest,
    )
