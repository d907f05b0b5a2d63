"""Attention scores before the softmax, taken while a transformers model runs.

XTC compares the scores themselves, not the probabilities. transformers returns only probabilities, and only from its
eager attention; but it lets anyone register an attention function of one's own. Ours computes what eager attention
computes and puts the scores aside on the way, so that nothing is computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from fiftyfold.errors import FiftyfoldError

IMPLEMENTATION = "fiftyfold_scores"
"""Name of the attention function in transformers' registry."""

_CHANGING = ("softcap", "s_aux", "position_bias", "head_mask")
"""Arguments by which some models change what comes of the scores."""


@dataclass
class _Recorder:
    scores: dict[int, Tensor] = field(default_factory=dict)
    wanted: Collection[int] | None = None
    seen: int = 0

    def take(self, scores: Tensor) -> None:
        if self.wanted is None or self.seen in self.wanted:
            self.scores[self.seen] = scores
        self.seen += 1


_recorder: ContextVar[_Recorder | None] = ContextVar("fiftyfold_attention_scores", default=None)


@contextlib.contextmanager
def capture_attention_scores(
    model: PreTrainedModel, layers: Collection[int] | None = None
) -> Iterator[dict[int, Tensor]]:
    """Collect the attention scores of one forward pass of ``model`` inside the block.

    The scores are Q·Kᵀ times the model's scaling, before the mask is added and before the softmax, one tensor
    [batch, heads, queries, keys] per layer; keys shared by several heads count once for
    each. They take part in gradients. The model's output is that of its eager attention.

    Args:
        model: any transformers model whose attention goes through transformers' attention interface.
        layers: keep only the scores of these layers, counted from 0; by default of all.

    Yields:
        The scores by layer, in rising order; filled by the forward pass.

    Raises:
        FiftyfoldError: if the model checkpoints its activations, or if its attention went another way.
    """
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise FiftyfoldError(
            "attention scores cannot be taken under gradient checkpointing; switch one of the two off "
            "(attention_weight=0 leaves the scores out of the loss)."
        )
    recorder = _Recorder(wanted=layers)
    token = _recorder.set(recorder)
    try:
        with _attention_implementation(model):
            yield recorder.scores
    finally:
        _recorder.reset(token)
    if not recorder.seen:
        raise FiftyfoldError(
            f"no attention scores came out of {type(model).__name__}: its attention does not go through transformers' "
            "attention interface; set attention_weight=0."
        )


def has_causal_attention(model: PreTrainedModel) -> bool:
    """Tell whether a token sees only those before it."""
    return any(bool(getattr(module, "is_causal", False)) for module in model.modules())


def attention_with_scores(  # noqa: PLR0917 (transformers calls it so)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: object,
) -> tuple[Tensor, Tensor]:
    """Attend as transformers' eager attention does, and hand the scores to the block that asked for them.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key: [batch, heads or fewer, keys, width].
        value: as ``key``.
        attention_mask: added to the scores, [batch, 1, queries, keys].
        scaling: factor on Q·Kᵀ; by default one over the root of the width.
        dropout: probability with which an attention weight is dropped in training.
        **others: what else transformers hands over; most of it does not touch the result.

    Returns:
        The output [batch, queries, heads, width] and the attention probabilities.

    Raises:
        FiftyfoldError: if the model's own attention does more to the scores than scale and mask them.
    """
    if odd := [name for name in _CHANGING if others.get(name) is not None]:
        raise FiftyfoldError(
            f"{type(module).__name__} attends with {odd[0]!r}, which taking scores leaves out; set attention_weight=0."
        )
    sharing = query.shape[1] // key.shape[1]
    if sharing > 1:
        key, value = key.repeat_interleave(sharing, dim=1), value.repeat_interleave(sharing, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    recorder = _recorder.get()
    if recorder is not None:
        recorder.take(scores)
    masked = scores if attention_mask is None else scores + attention_mask[..., : key.shape[-2]]
    # Half-precision models take the softmax in float32, as LLaMA's eager attention does.
    probabilities = F.softmax(masked, dim=-1, dtype=torch.promote_types(masked.dtype, torch.float32)).to(value.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


@contextlib.contextmanager
def _attention_implementation(model: PreTrainedModel) -> Iterator[None]:
    configs = {id(config): config for config in _configs(model)}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _configs(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            yield config


AttentionInterface.register(IMPLEMENTATION, attention_with_scores)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
