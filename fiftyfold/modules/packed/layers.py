"""Layers as they are deployed: weights packed into bits, activations quantized as in training.

A packed layer takes the place of an ``nn.Linear``, an ``nn.Embedding`` or a transformers ``Conv1D``, keeps its name and
its bias, and is for inference. Its ``weight`` is a one-dimensional uint8 parameter, a shape that no dense weight has:
whoever loads the file without fiftyfold gets an error and not a model of random weights.

On the reference path (see :mod:`fiftyfold.kernels.path`) the outputs equal those of the layer that was trained, bit for
bit. On the integer path they differ by rounding in float32 alone, see
:func:`fiftyfold.kernels.operators.packed_linear`.
Where gradients are asked for, a layer takes the reference path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fiftyfold.kernels.backends import PACKED_BITS, backend_for
from fiftyfold.kernels.linear import largest_inputs
from fiftyfold.kernels.operators import FLOAT_TYPES, arrange_weight, packed_embedding
from fiftyfold.kernels.packing import check_packed, packed_bytes, unpack_codes
from fiftyfold.kernels.path import current_path
from fiftyfold.kernels.table_linear import arrange_for_tables, has_tables, table_linear
from fiftyfold.modules.quantization.integer_product import multiply_integers
from fiftyfold.modules.quantization.layers import RANGE_BUFFERS
from fiftyfold.modules.quantization.quantizers import (
    check_shape,
    dequantize_weight,
    fake_quantize_activation,
    scale_shape,
)
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings

STORED_BUFFERS = ("weight_scale", *RANGE_BUFFERS)
"""Names of a packed layer's buffers; their types do not follow the model's."""


class PackedLayer(nn.Module):
    """What packed layers have in common: the bits, and the scales in float16 whatever the model is cast to.

    Args:
        rows: output channels of the weight; for an embedding, its entries.
        columns: inputs of the weight; for an embedding, its width.
        settings: how the layer is quantized.
        device: where the tensors are created, without values.
    """

    weight: nn.Parameter
    weight_scale: torch.Tensor
    activation_low: torch.Tensor | None
    activation_high: torch.Tensor | None
    # What an earlier version pickled has none of its own.
    _tabled: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, rows: int, columns: int, settings: LayerSettings, device: torch.device | None = None) -> None:
        super().__init__()
        check_shape((rows, columns), settings.weight)
        self.rows = rows
        self.columns = columns
        self.settings = settings
        self._codes: torch.Tensor | None = None
        self._arranged: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tabled = None
        content = torch.empty(packed_bytes(rows * columns, settings.weight.bits), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(content, requires_grad=False)
        scales = scale_shape((rows, columns), settings.weight)
        self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.float16, device=device))
        self.register_ranges(device)

    def register_ranges(self, device: torch.device | None) -> None:
        """Make room for a static range where the settings ask for one."""
        static = self.settings.activation is not None and self.settings.activation.range == "static"
        for name in RANGE_BUFFERS:
            bound = torch.empty((), dtype=torch.float32, device=device) if static else None
            self.register_buffer(name, bound)

    def codes(self) -> torch.Tensor:
        """Return the codes of the weight, int8 (rows, columns); kept for the next call.

        Raises:
            FiftyfoldError: if the bytes are none that packing writes.
        """
        if self._codes is None:
            self._codes = self.unpacked()
        return self._codes

    def unpacked(self) -> torch.Tensor:
        """Return what :meth:`codes` does, and keep nothing.

        Raises:
            FiftyfoldError: if the bytes are none that packing writes.
        """
        codes = unpack_codes(self.weight, self.settings.weight.bits, self.rows * self.columns)
        return codes.view(self.rows, self.columns)

    def arranged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and its scales as this device's kernels read them; kept for the next call.

        Raises:
            FiftyfoldError: if the bytes are none that packing writes.
        """
        if self._arranged is None:
            codes = self.unpacked() if self._codes is None else self._codes
            self._arranged = arrange_weight(codes, self.weight_scale, self.settings.weight.bits)
        return self._arranged

    def tabled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and its scales as products by tables read them; kept for the next call.

        Raises:
            FiftyfoldError: if the bytes are none that packing writes.
        """
        if self._tabled is None:
            codes = self.unpacked() if self._codes is None else self._codes
            scale = self.weight_scale.float().expand(self.rows, 1).flatten().contiguous()
            self._tabled = arrange_for_tables(codes, self.settings.weight.bits), scale
        return self._tabled

    def prepare(self) -> None:
        """Do now what the first call would do for its device: compile kernels, arrange the weight for them."""

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that the bits stand for, (rows, columns)."""
        return dequantize_weight(self.codes(), self.weight_scale, dtype)

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize an input as the trained layer does in evaluation."""
        settings = self.settings.activation
        if settings is None or x.numel() == 0:
            return x
        if settings.range == "dynamic":
            return fake_quantize_activation(x, settings)
        return fake_quantize_activation(x, settings, *self._static_range(x, settings))

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        return f"{self.columns}, {self.rows}, weight={self.settings.weight}, activation={self.settings.activation}"

    def forget_codes(self) -> None:
        """Drop what :meth:`codes`, :meth:`arranged` and :meth:`tabled` kept."""
        self._codes = self._arranged = self._tabled = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_codes": None, "_arranged": None, "_tabled": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        """Return a copy that is as ready as this layer, since ``torch.compile`` can make nothing ready."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if self._is_prepared() and not self.weight.is_meta:
            copied.prepare()
        return copied

    def _is_prepared(self) -> bool:
        return any(kept is not None for kept in (self._codes, self._arranged, self._tabled))

    def _static_range(self, x: torch.Tensor, settings: ActivationSettings) -> list[torch.Tensor]:
        """Return the observed range; a layer that observed nothing takes that of ``x``, as it does untrained."""
        limit = float("inf") if settings.clip is None else settings.clip
        stored = [bound for bound in (self.activation_low, self.activation_high) if bound is not None]
        found = [bound.float().clamp(-limit, limit) for bound in x.detach().aminmax()]
        unobserved = stored[0] == stored[1]
        return [torch.where(unobserved, new, old) for old, new in zip(stored, found, strict=True)]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLayer:
        stored = {
            name: tensor for name, tensor in self._buffers.items() if tensor is not None and name in STORED_BUFFERS
        }
        prepared = self._is_prepared()
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self.forget_codes()
        if prepared and not self.weight.is_meta:
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_codes()


def prepare_layers(model: nn.Module) -> None:
    """Make the packed layers of ``model`` ready for its device, so that no call has to; ``torch.compile`` needs it."""
    for layer in model.modules():
        if isinstance(layer, PackedLayer) and not layer.weight.is_meta:
            layer.prepare()


class PackedLinear(PackedLayer):
    """An ``nn.Linear`` as it is deployed."""

    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        settings: LayerSettings,
        bias: nn.Parameter | None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(out_features, in_features, settings, device)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias`` with quantized weight and input.

        Args:
            x: (…, in_features).

        Returns:
            (…, out_features), in the type of ``x``.
        """
        if self.takes_integers(x):
            return multiply_integers(x, self.arranged(), self.bias, self.settings, self._largest_input(x))
        x = self.quantize_input(x)
        if self._takes_tables(x):
            return table_linear(x, *self.tabled(), self.bias, bits=self.settings.weight.bits)
        return F.linear(x, self.dense_weight(x.dtype), self.bias)

    def prepare(self) -> None:
        """Do now what the first call would do for its device: compile kernels, arrange the weight for them."""
        if current_path() == "reference":
            self.codes()
        elif self._multiplies_integers():
            self.arranged()
        elif self._has_tables(self.weight.device):
            self.tabled()
        else:
            self.codes()

    def takes_integers(self, x: torch.Tensor) -> bool:
        """Tell whether the layer computes an input in integers, and not by fake quantization."""
        if not self._multiplies_integers() or current_path() == "reference" or self._has_gradient(x):
            return False
        return x.numel() > 0

    def _multiplies_integers(self) -> bool:
        settings = self.settings.activation
        return settings is not None and settings.symmetric and self.columns <= largest_inputs(settings.bits)

    def _takes_tables(self, x: torch.Tensor) -> bool:
        """Tell whether the layer multiplies an input, which stays in floating point, by tables."""
        if x.numel() == 0 or x.dtype not in FLOAT_TYPES or current_path() == "reference" or self._has_gradient(x):
            return False
        return self._tabled is not None if torch.compiler.is_compiling() else self._has_tables(x.device)

    def _has_tables(self, device: torch.device) -> bool:
        shared = self.weight_scale.shape[1] == 1 and self.settings.weight.bits in PACKED_BITS
        return shared and device.type == "cpu" and has_tables()

    def _has_gradient(self, x: torch.Tensor) -> bool:
        bias = self.bias is not None and self.bias.requires_grad
        return torch.is_grad_enabled() and (x.requires_grad or bias)

    def _largest_input(self, x: torch.Tensor) -> torch.Tensor | None:
        settings = self.settings.activation
        if settings is None or settings.range == "dynamic":
            return None
        low, high = self._static_range(x, settings)
        return torch.maximum(low.abs(), high.abs())


class PackedConv1D(PackedLinear):
    """The ``Conv1D`` of GPT-2 as it is deployed; the packed weight is (outputs, inputs), as for a linear layer."""

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that the bits stand for, (outputs, inputs), laid out in memory as the trained one is."""
        return super().dense_weight(dtype).t().contiguous().t()


class PackedEmbedding(PackedLayer):
    """An ``nn.Embedding`` as it is deployed: only the rows that are looked up are unpacked.

    Args:
        rows: entries.
        columns: width of an entry.
        settings: how it is quantized.
        device: where the tensors are created, without values.
        padding_idx: the dense layer's, for those who read it.
        dtype: type of what it returns; follows the model when that is cast.
    """

    output_type: torch.Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        settings: LayerSettings,
        device: torch.device | None = None,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(rows, columns, settings, device)
        self.num_embeddings = rows
        self.embedding_dim = columns
        self.padding_idx = padding_idx
        self.register_buffer("output_type", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def prepare(self) -> None:
        """Do now what the first call would do for its device, compile kernels; and look at all rows at once.

        Raises:
            FiftyfoldError: if the bytes are none that packing writes.
        """
        check_packed(self.weight, self.settings.weight.bits)
        backend_for(self.weight.device.type)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows: (…) integers → (…, embedding_dim).

        Raises:
            IndexError: if a number is not that of a row.
        """
        return packed_embedding(
            tokens,
            self.weight,
            self.weight_scale,
            bits=self.settings.weight.bits,
            columns=self.columns,
            dtype=self.output_type.dtype,
        )
