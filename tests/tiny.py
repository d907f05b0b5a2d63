"""Models of every family that fiftyfold knows, small enough to build in milliseconds."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

FAMILIES = ("bert", "roberta", "distilbert", "electra", "gpt2", "llama")
CAUSAL_FAMILIES = ("gpt2", "llama")
POSITIONS = 40


def tiny_config(kind: str, *, layers: int = 4, labels: int = 2, hidden: int = 32, vocab: int = 100) -> PretrainedConfig:
    bert_like = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": POSITIONS,
        "num_labels": labels,
    }
    builders = {
        "bert": lambda: BertConfig(**bert_like),
        "roberta": lambda: RobertaConfig(**bert_like, pad_token_id=1),
        "electra": lambda: ElectraConfig(**bert_like, embedding_size=hidden // 2),
        "distilbert": lambda: DistilBertConfig(
            vocab_size=vocab,
            dim=hidden,
            n_layers=layers,
            n_heads=4,
            hidden_dim=2 * hidden,
            max_position_embeddings=POSITIONS,
            num_labels=labels,
        ),
        "gpt2": lambda: GPT2Config(
            vocab_size=vocab,
            n_embd=hidden,
            n_layer=layers,
            n_head=4,
            n_positions=POSITIONS,
            num_labels=labels,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "llama": lambda: LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=POSITIONS,
            num_labels=labels,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    }
    return builders[kind]()


def tiny_model(
    kind: str, *, layers: int = 4, labels: int = 2, hidden: int = 32, vocab: int = 100, seed: int = 0
) -> PreTrainedModel:
    """A sequence classifier in eval mode; equal seeds give equal weights."""
    config = tiny_config(kind, layers=layers, labels=labels, hidden=hidden, vocab=vocab)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config).eval()


def tiny_bert(layers: int = 4, labels: int = 2, hidden: int = 32, vocab: int = 100, seed: int = 0) -> PreTrainedModel:
    return tiny_model("bert", layers=layers, labels=labels, hidden=hidden, vocab=vocab, seed=seed)


def tiny_causal(kind: str, *, layers: int = 4, hidden: int = 32, vocab: int = 100, seed: int = 0) -> PreTrainedModel:
    """A language model with its head, tied to the embedding for GPT-2; in eval mode."""
    config = tiny_config(kind, layers=layers, hidden=hidden, vocab=vocab)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def tiny_batch(
    seed: int = 0, *, rows: int = 4, length: int = 12, vocab: int = 100, labels: int = 2
) -> dict[str, torch.Tensor]:
    """Random tokens with right padding of random length, and labels; a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    tokens = torch.randint(3, vocab, (rows, length), generator=generator)
    batch = {"input_ids": torch.where(mask.bool(), tokens, 0), "attention_mask": mask}
    if labels == 1:
        batch["labels"] = torch.rand(rows, generator=generator)
    else:
        batch["labels"] = torch.randint(0, labels, (rows,), generator=generator)
    return batch
