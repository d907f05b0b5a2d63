"""A teacher that Lightning does not see."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.attention_scores import capture_attention_scores
from fiftyfold.modules.hidden_states import capture_hidden_states
from fiftyfold.modules.layer_stack import find_layer_stack
from fiftyfold.modules.surgery import replace_module

TeacherPrecision = Literal["full", "8bit", "4bit"]


@dataclass(frozen=True)
class Observation:
    """What one forward pass showed.

    Attributes:
        logits: [batch, labels].
        hidden: hidden states by number, 0 for the embedding output, each [batch, tokens, hidden].
        attention: attention scores before the softmax by layer, each [batch, heads, queries, keys].
    """

    logits: Tensor
    hidden: dict[int, Tensor]
    attention: dict[int, Tensor]


def observe(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    stack: str,
    hidden: Collection[int] | None,
    attention: Collection[int] | None,
) -> Observation:
    """Run a model once and look at its inside.

    Args:
        model: a transformers classifier.
        inputs: what its ``forward`` takes.
        stack: name of its stack of layers.
        hidden: numbers of the hidden states to keep; None for all. An empty collection costs nothing.
        attention: layers whose attention scores to keep; None for all. An empty collection costs nothing.
    """
    if attention is not None and not attention:
        with capture_hidden_states(model, hidden, stack=stack) as states:
            return Observation(model(**inputs).logits, states, {})
    with (
        capture_attention_scores(model, attention) as scores,
        capture_hidden_states(model, hidden, stack=stack) as states,
    ):
        return Observation(model(**inputs).logits, states, scores)


class FrozenTeacher:
    """Holds a model that is never trained, never saved and always in evaluation mode.

    It is no ``nn.Module``, so a LightningModule that keeps one has nothing of it among its parameters, in its state
    dict or in what DistributedDataParallel wraps. A deep copy of its owner (an averaged model, for instance) shares it.

    Args:
        model: the teacher. It is frozen in place.
        precision: ``"8bit"`` or ``"4bit"`` puts bitsandbytes' layers in place of the backbone's linear layers, which
            hold their weights in 8-bit integers or in 4-bit normal floats.
    """

    def __init__(self, model: PreTrainedModel, precision: TeacherPrecision = "full") -> None:
        if precision != "full":
            _quantize_linears(model, precision)
        self.model = model.eval().requires_grad_(False)
        self._stack = find_layer_stack(model)
        self._device: torch.device | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self

    @property
    def num_layers(self) -> int:
        """Number of the teacher's layers."""
        return len(self.model.get_submodule(self._stack))

    @torch.no_grad()
    def __call__(
        self, inputs: Mapping[str, Any], *, hidden: Collection[int] = (), attention: Collection[int] = ()
    ) -> Observation:
        """Run the teacher without gradients, on the device of its inputs.

        Args:
            inputs: what its ``forward`` takes.
            hidden: numbers of the hidden states that are needed, 0 for the embedding output.
            attention: layers whose attention scores are needed.
        """
        device = inputs["input_ids"].device
        if device != self._device:
            # bitsandbytes packs its weights in this call, so it is made even where the device is the same.
            self.model.to(device)
            self._device = device
        if self.model.training:
            self.model.eval()
        return observe(self.model, inputs, self._stack, hidden, attention)


def freeze(model: PreTrainedModel, precision: TeacherPrecision, *, shared: bool) -> FrozenTeacher:
    """Return ``model`` as a frozen teacher.

    Args:
        model: frozen in place.
        precision: see :class:`FrozenTeacher`.
        shared: whether someone else holds the model too, whose layers are then left alone.
    """
    return FrozenTeacher(copy.deepcopy(model) if shared and precision != "full" else model, precision)


def _quantize_linears(model: PreTrainedModel, precision: TeacherPrecision) -> None:
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        raise FiftyfoldError(
            f"teacher_precision={precision!r} needs bitsandbytes, which does not load here ({error}); use 'full'."
        ) from error
    for module in list(model.base_model.modules()):
        if type(module) is nn.Linear:
            replace_module(model, module, _packed_linear(bitsandbytes.nn, module, precision))


def _packed_linear(layers: Any, linear: nn.Linear, precision: TeacherPrecision) -> nn.Module:
    weight = linear.weight.detach()
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    packed: nn.Module
    if precision == "8bit":
        packed = layers.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
        packed.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        packed = layers.Linear4bit(*shape, quant_type="nf4", compute_dtype=weight.dtype, device="meta")
        packed.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4")
    if linear.bias is not None:
        packed.bias = linear.bias
    return packed
