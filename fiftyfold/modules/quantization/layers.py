"""Layers that quantize their weight and their input as they compute, put in where a dense layer stands.

A quantized layer is the dense layer itself with another class: its parameters, hooks, name and aliases stay what they
are, so optimizers and distributed wrappers notice nothing. It is *dormant*, exactly the dense layer, until it gets its
settings. The settings are a plain attribute, because averaged copies of a model average buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.integer_forward import integer_linear, takes_integers
from fiftyfold.modules.quantization.quantizers import (
    check_shape,
    dequantize_weight,
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_weight,
)
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings
from fiftyfold.modules.tensor_network.layers import (
    TensorNetworkConv1D,
    TensorNetworkEmbedding,
    TensorNetworkLayer,
    TensorNetworkLinear,
)

RANGE_MOMENTUM = 0.95
"""Share of the old range that each training batch leaves, when ranges are static (XTC's code)."""

RANGE_BUFFERS = ("activation_low", "activation_high")
"""Names of a static range's buffers: float32 scalars, both 0 until a training batch was observed."""


class QuantizedLayer(nn.Module):
    """What quantized layers have in common.

    Attributes:
        settings: how the layer is quantized; ``None`` while it is dormant.
        earlier: how it was quantized before, oldest first.
    """

    weight: torch.Tensor
    activation_low: torch.Tensor
    activation_high: torch.Tensor
    settings: LayerSettings | None = None
    earlier: tuple[LayerSettings | None, ...] = ()

    def canonical_weight(self) -> torch.Tensor:
        """Return the latent weight as (output channels or rows, inputs)."""
        return self.weight

    def extra_repr(self) -> str:
        """Return the dense layer's description, and the settings."""
        return f"{super().extra_repr()}, settings={self.settings}"

    def _active_settings(self) -> LayerSettings:
        if self.settings is None:
            raise FiftyfoldError(f"this {type(self).__name__} is not quantized yet; call quantize first.")
        return self.settings

    def _fake_quantized_weight(self) -> torch.Tensor:
        return fake_quantize_weight(self.canonical_weight(), self._active_settings().weight)

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        settings, weight = self._active_settings(), self.canonical_weight()
        if takes_integers(x, weight, settings):
            static = settings.activation is not None and settings.activation.range == "static"
            limits = self._static_range(x, settings.activation) if static and settings.activation else None
            return integer_linear(x, weight, bias, settings, limits)
        return F.linear(self._fake_quantized_input(x), self._fake_quantized_weight(), bias)

    def _fake_quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        settings = self._active_settings().activation
        if settings is None or x.numel() == 0:
            return x
        if settings.range == "dynamic":
            return fake_quantize_activation(x, settings)
        return fake_quantize_activation(x, settings, *self._static_range(x, settings))

    @torch.no_grad()
    def _static_range(self, x: torch.Tensor, settings: ActivationSettings) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range to use, and observe ``x`` while training; before any observation, the range of ``x``."""
        stored = (self.activation_low, self.activation_high)
        # Chosen without a branch on the values, which would stop a GPU and break a compiled graph.
        unobserved = stored[0] == stored[1]
        found = [bound.float() for bound in x.aminmax()]
        if settings.clip is not None:
            found = [bound.clamp(-settings.clip, settings.clip) for bound in found]
        # One batch that overflows, as mixed precision meets and skips, must not spoil the range for good.
        usable = found[0].isfinite() & found[1].isfinite()
        found = [torch.where(usable, new, old.float()) for old, new in zip(stored, found, strict=True)]
        if self.training:
            for old, new in zip(stored, found, strict=True):
                old.copy_(torch.where(unobserved, new, torch.lerp(new, old.float(), RANGE_MOMENTUM)))
            return stored
        low, high = (torch.where(unobserved, new, old.float()) for old, new in zip(stored, found, strict=True))
        return low, high

    def _forget_ranges(self) -> None:
        for name in RANGE_BUFFERS:
            if name in self._buffers:
                getattr(self, name).zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.settings is None:
            for name in RANGE_BUFFERS:
                if name in self._buffers:
                    state_dict.setdefault(prefix + name, self._buffers[name])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with a quantized weight and input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the layer's output: (…, inputs) → (…, outputs)."""
        if self.settings is None:
            return super().forward(input)
        return self._linear(input, self.bias)

    def reset_parameters(self) -> None:
        """Draw new weights, and observe anew; sharding calls it on layers that had no data (meta device)."""
        super().reset_parameters()
        self._forget_ranges()


class QuantizedConv1D(QuantizedLayer, Conv1D):
    """GPT-2's ``Conv1D``, a linear layer whose weight is stored as (inputs, outputs)."""

    bias: torch.Tensor

    def canonical_weight(self) -> torch.Tensor:
        """Return the latent weight as (outputs, inputs), a view."""
        return self.weight.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output: (…, inputs) → (…, outputs)."""
        if self.settings is None:
            return super().forward(x)  # type: ignore[no-any-return]
        return self._linear(x, self.bias)


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """``nn.Embedding`` with a scale for each row; only the rows that are looked up are quantized."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows: (…) integers → (…, features)."""
        if self.settings is None:
            return super().forward(input)
        # Renormalization and sparse gradients need the lookup to happen on the parameter itself.
        if input.numel() <= self.num_embeddings or self.max_norm is not None or self.sparse:
            rows = super().forward(input)
            if rows.numel() == 0:
                return rows
            return fake_quantize_weight(rows.reshape(-1, self.embedding_dim), self.settings.weight).view(rows.shape)
        table = self._fake_quantized_weight()
        return F.embedding(input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class QuantizedNetworkLayer(QuantizedLayer, TensorNetworkLayer):
    """A tensor network whose cores are quantized, each unfolded to a matrix of its own."""

    def matrices(self) -> list[torch.Tensor]:
        """Return the matrices of numbers, quantized."""
        matrices = super().matrices()
        if self.settings is None:
            return matrices
        settings = self.settings.weight
        # A core that its identity block fills leaves a matrix without rows.
        return [fake_quantize_weight(matrix, settings) if matrix.numel() else matrix for matrix in matrices]

    def latent_matrices(self) -> list[torch.Tensor]:
        """Return the matrices of numbers in full precision."""
        return super().matrices()


class QuantizedNetworkLinear(QuantizedNetworkLayer, TensorNetworkLinear):
    """A linear layer that is a tensor network, with quantized cores and input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output: (…, inputs) → (…, outputs)."""
        return super().forward(x if self.settings is None else self._fake_quantized_input(x))


class QuantizedNetworkConv1D(QuantizedNetworkLinear, TensorNetworkConv1D):
    """GPT-2's ``Conv1D`` as a tensor network, with quantized cores and input."""


class QuantizedNetworkEmbedding(QuantizedNetworkLayer, TensorNetworkEmbedding):
    """An embedding that is a tensor network, with quantized cores."""


_QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    Conv1D: QuantizedConv1D,
    TensorNetworkLinear: QuantizedNetworkLinear,
    TensorNetworkEmbedding: QuantizedNetworkEmbedding,
    TensorNetworkConv1D: QuantizedNetworkConv1D,
}
_DENSE = {quantized: dense for dense, quantized in _QUANTIZED.items()}


def is_eligible(module: nn.Module) -> bool:
    """Tell whether ``module`` can be quantized, or is already.

    Subclasses of the dense layers compute in ways of their own and are left alone.
    """
    return _own_class(module) in _QUANTIZED or _own_class(module) in _DENSE


def install(module: nn.Module, activation: ActivationSettings | None = None) -> None:
    """Make ``module`` a dormant quantized layer; one that is installed already keeps its state.

    Args:
        module: an eligible layer.
        activation: the settings that will come; a static range needs its buffers before the model is wrapped.

    Raises:
        FiftyfoldError: if the layer cannot be quantized.
    """
    _check_eligible(module)
    own = _own_class(module)
    if own in _QUANTIZED:
        module.__class__ = _like(type(module), _QUANTIZED[own])
    static = activation is not None and activation.range == "static"
    for name in RANGE_BUFFERS:
        if static and name not in module._buffers:
            module.register_buffer(name, torch.zeros((), dtype=torch.float32, device=_weight(module).device))


def activate(module: nn.Module, settings: LayerSettings) -> None:
    """Quantize ``module`` from now on; earlier settings are replaced, observed ranges are kept.

    Raises:
        FiftyfoldError: if the layer cannot be quantized in this way.
    """
    check_settings(module, settings)
    install(module, settings.activation)
    if settings.activation is None or settings.activation.range != "static":
        _remove_ranges(module)
    assert isinstance(module, QuantizedLayer)
    module.earlier = (*module.earlier, module.settings)
    module.settings = settings


def deactivate(module: nn.Module) -> None:
    """Quantize ``module`` as it was quantized before the last :func:`activate`; static ranges are observed anew."""
    assert isinstance(module, QuantizedLayer)
    *earlier, module.settings = module.earlier
    module.earlier = tuple(earlier)
    _remove_ranges(module)
    if module.settings is not None:
        install(module, module.settings.activation)


def check_settings(module: nn.Module, settings: LayerSettings) -> None:
    """Refuse settings that do not fit a layer, dense or quantized.

    Raises:
        FiftyfoldError: if the module cannot be quantized, groups do not fit its weight, or an embedding is not to have
            a scale for each row.
    """
    _check_eligible(module)
    embedding = isinstance(module, nn.Embedding | TensorNetworkEmbedding)
    if embedding and (settings.weight.granularity != "per_channel" or settings.activation):
        raise FiftyfoldError("an embedding is quantized per row ('per_channel'), without its input.")
    if isinstance(module, TensorNetworkLayer):
        for shape in module.form.matrix_shapes:
            if shape[0]:
                check_shape(shape, settings.weight)
        return
    check_shape(_canonical_shape(module), settings.weight)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield the layers of ``model`` that are quantized now, with their names; dormant ones are left out."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.settings is not None:
            yield name, module


def remove_quantization(model: nn.Module) -> None:
    """Turn all quantized layers of ``model`` back into dense ones, with their latent weights."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            _remove_ranges(module)
            module.__dict__.pop("settings", None)
            module.__dict__.pop("earlier", None)
            module.__class__ = _DENSE[type(module)]  # type: ignore[assignment]


def codes_and_scale(layer: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the int8 codes (outputs or rows, inputs) and float16 scales that a quantized layer computes with."""
    return quantize_weight(layer.canonical_weight(), layer._active_settings().weight)


def effective_weight(layer: QuantizedLayer) -> torch.Tensor:
    """Return the weight that a quantized layer computes with, (outputs or rows, inputs), in the weight's type."""
    return dequantize_weight(*codes_and_scale(layer), layer.weight.dtype)


def _check_eligible(module: nn.Module) -> None:
    if not is_eligible(module):
        raise FiftyfoldError(f"a {type(module).__name__} cannot be quantized; only Linear, Embedding and Conv1D can.")


def _own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of ``module``; of one that ``fully_shard`` took itself, the class that it had before."""
    return type(module).__bases__[1] if isinstance(module, FSDPModule) else type(module)


def _like(found: type[nn.Module], wanted: type[nn.Module]) -> type[nn.Module]:
    """Return ``wanted``, sharded itself if ``found`` is."""
    if not issubclass(found, FSDPModule):
        return wanted
    return type(f"FSDP{wanted.__name__}", (FSDPModule, wanted), {"__deepcopy__": found.__deepcopy__})  # type: ignore[attr-defined]


def _canonical_shape(module: nn.Module) -> tuple[int, int]:
    """Return (output channels or rows, inputs); a sharded weight's own shape does not tell."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    assert isinstance(module, Conv1D)
    return module.nf, module.nx


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _remove_ranges(module: nn.Module) -> None:
    for name in RANGE_BUFFERS:
        module._buffers.pop(name, None)
