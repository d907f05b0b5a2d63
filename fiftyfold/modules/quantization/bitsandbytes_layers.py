"""The operation "quantize_bitsandbytes": linear layers in bitsandbytes' 8-bit integers or 4-bit normal floats.

For what tensor networks leave (CompactifAI quantizes it to 4 bits by bitsandbytes after healing). Codes and scales are
bitsandbytes' own, made and read by its functions, which run on CPUs as on GPUs (tried with 0.50 on a CPU); the layers
are ours, so that they are exported and reloaded like everything else. They do not train.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.division import divided
from fiftyfold.modules.quantization.targets import Targets, matching, named_layers
from fiftyfold.modules.structure import Operation, apply_operation, register_operation, values_follow
from fiftyfold.modules.surgery import replace_module

OPERATION = "quantize_bitsandbytes"
"""Kind of a log's entry."""

Bits = Literal[4, 8]

BLOCK_SIZE = 64
"""Numbers that share a scale, in four bits."""


class BitsandbytesLinear(nn.Module):
    """A linear layer whose weight is held in bitsandbytes' codes; they are turned into numbers at each call.

    Args:
        in_features: inputs.
        out_features: outputs.
        bits: 8 (one scale an output) or 4 (normal floats, one scale for 64 numbers).
        bias: taken over.
        device: where the codes are.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bits: Bits, bias: nn.Parameter | None, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        numbers = in_features * out_features
        # One-dimensional, so that a reader which does not know it cannot take the codes for the matrix.
        codes, scales = (numbers, out_features) if bits == 8 else (-(-numbers // 2), -(-numbers // BLOCK_SIZE))
        self.register_buffer(
            "weight", torch.zeros(codes, dtype=torch.int8 if bits == 8 else torch.uint8, device=device)
        )
        self.register_buffer("scale", torch.zeros(scales, dtype=torch.float32, device=device))
        self.register_parameter("bias", bias)

    @torch.no_grad()
    def take_weight(self, weight: torch.Tensor) -> None:
        """Quantize a matrix (outputs, inputs)."""
        functional = _functional()
        if self.bits == 8:
            codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            self.weight.copy_(codes.reshape(-1))
            self.scale.copy_(divided(scales.reshape(-1).float(), 127))
        else:
            codes, state = functional.quantize_4bit(
                weight.float().contiguous(), blocksize=BLOCK_SIZE, compress_statistics=False, quant_type="nf4"
            )
            self.weight.copy_(codes.reshape(-1))
            self.scale.copy_(state.absmax)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix that the codes stand for, (outputs, inputs)."""
        shape = (self.out_features, self.in_features)
        if self.bits == 8:
            return (self.weight.view(shape).float() * self.scale.float().unsqueeze(1)).to(dtype)
        functional = _functional()
        state = functional.QuantState(
            absmax=self.scale.float(),
            shape=torch.Size(shape),
            code=functional.get_4bit_type("nf4", device=str(self.weight.device)),
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=torch.float32,
        )
        found: torch.Tensor = functional.dequantize_4bit(self.weight.view(-1, 1), state)
        return found.view(shape).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output: (…, inputs) → (…, outputs)."""
        return F.linear(x, self.dense_weight(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, bias={self.bias is not None}"


def quantize_bitsandbytes(
    model: nn.Module, bits: Bits = 4, *, targets: Targets = ".", exclude: Targets = (), step: int = 0
) -> list[str]:
    """Hold the weights of linear layers in bitsandbytes' codes, in place. They train no more.

    Args:
        model: any module.
        bits: 8 or 4.
        targets: regular expressions, one of which must be found in a layer's name; by default every ``nn.Linear``
            that is not the whole model. Layers that hold a tensor network, or share their weight with another layer,
            are left alone.
        exclude: regular expressions of names to leave out.
        step: the optimizer step at which this happens, for the log.

    Returns:
        The names of the layers.

    Raises:
        FiftyfoldError: if ``bits`` is neither, no layer is found, a weight is not finite, or bitsandbytes does not
            load. The model is then unchanged.
    """
    if bits not in (4, 8):
        raise FiftyfoldError(f"bitsandbytes quantizes to 4 or 8 bits, not {bits!r}; for others use quantize.")
    eligible = dense_linears(model)
    if not eligible:
        raise FiftyfoldError(f"{type(model).__name__} has no dense linear layer left to quantize.")
    chosen = matching("targets", targets, eligible)
    if exclude:
        chosen -= {name for name in matching("exclude", exclude, dict(named_layers(model))) if name in chosen}
    if not chosen:
        raise FiftyfoldError(f"targets {targets!r} without exclude {exclude!r} leave nothing to quantize.")
    for name in chosen:
        weight = eligible[name].weight
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):  # type: ignore[arg-type]
            raise FiftyfoldError(f"{name}: the weight has entries that are not finite.")
    _functional()
    names = [name for name in eligible if name in chosen]
    apply_operation(model, {"op": OPERATION, "targets": names, "bits": bits, "step": step})
    return names


def replay_bitsandbytes(model: nn.Module, operation: Operation) -> None:
    """Carry out a log's entry; what is done already stays.

    Raises:
        FiftyfoldError: if the entry cannot be read, or names a layer that is not there.
    """
    try:
        names, bits = [str(name) for name in operation["targets"]], operation["bits"]
    except (KeyError, TypeError) as error:
        raise FiftyfoldError(f"the log's entry {OPERATION!r} cannot be read; the file is corrupt.") from error
    if bits not in (4, 8):
        raise FiftyfoldError(f"the log's entry {OPERATION!r} has {bits!r} bits; the file is corrupt.")
    layers = dict(named_layers(model))
    for name in names:
        layer = layers.get(name)
        if isinstance(layer, BitsandbytesLinear) and layer.bits == bits:
            continue
        if type(layer) is not nn.Linear:
            raise FiftyfoldError(f"the log quantizes {name!r}, which is no linear layer of {type(model).__name__}.")
        weight = layer.weight
        packed = BitsandbytesLinear(layer.in_features, layer.out_features, bits, layer.bias, weight.device)
        if not values_follow() and not weight.is_meta:
            packed.take_weight(weight)
        replace_module(model, layer, packed.train(layer.training))


def dense_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of ``model`` whose weight is a matrix of their own, by name."""
    linears = {name: module for name, module in named_layers(model) if type(module) is nn.Linear and name}
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {name: module for name, module in linears.items() if uses[id(module.weight)] == 1}


def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except (ImportError, RuntimeError, OSError) as error:
        raise FiftyfoldError(
            f"bitsandbytes does not load here ({error}); quantize(weight_bits=8 or 4) is fiftyfold's own quantizer."
        ) from error
    return functional


register_operation(OPERATION, replay_bitsandbytes)
