"""Trains a small LLaMA-like decoder on WikiText-2, for the studies of language models.

5.5 million parameters and a byte-pair vocabulary of 4,096 of its own. The learning rate rises, stays, and falls over
the last quarter, so that a run which has not begun to fall may be given another number of steps. An interrupted run
goes on where it stopped. For example:

    python benchmarks/train_decoder.py --data WIKITEXT_FOLDER --output decoder --steps 2000
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fiftyfold.app.benchmark import processor_name

VOCABULARY = 4096
CONTEXT = 256
SEED = 42
SAVE_EVERY = 50


def main() -> None:
    """Train, score on the validation text, and save a transformers folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt, valid.txt and test.txt")
    parser.add_argument("--output", type=Path, required=True, help="the model's folder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scored-tokens", type=int, default=10**9, help="score so many tokens of each split only")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("medium")
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(arguments.data / "train.txt", arguments.output)
    tokens = {split: encode(tokenizer, arguments.data / f"{split}.txt") for split in ("train", "valid", "test")}
    model, seconds = train(tokens["train"], tokens["valid"], arguments)
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_tokens_in_text": len(tokens["train"]),
        "steps": arguments.steps,
        "tokens_a_step": arguments.batch_size * CONTEXT,
        "tokens_seen": arguments.steps * arguments.batch_size * CONTEXT,
        "learning_rate": arguments.learning_rate,
        "context": CONTEXT,
        "seed": SEED,
        "wall_seconds": round(seconds),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else processor_name(),
    }
    for split in ("valid", "test"):
        nats = mean_loss(model, tokens[split][: arguments.scored_tokens])
        words = len((arguments.data / f"{split}.txt").read_text(encoding="utf-8").replace("\n", " <eos> ").split())
        report[split] = {
            "scored_tokens": min(arguments.scored_tokens, len(tokens[split])),
            "nats_a_token": round(nats, 4),
            "perplexity_a_token": round(math.exp(nats), 2),
            "perplexity_a_word": round(math.exp(nats * len(tokens[split]) / words), 2),
            "windows": f"disjoint, {CONTEXT} tokens",
        }
    model.save_pretrained(arguments.output)
    (arguments.output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def build_tokenizer(text: Path, folder: Path) -> PreTrainedTokenizerFast:
    """Train the byte-pair tokenizer on the training text, or read the one of a former run."""
    if not (folder / "tokenizer.json").is_file():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        # WikiText's own <unk> stands for rare words: one token of the text, like any other.
        special = ["<pad>", "<s>", "</s>", "<unk>"]
        backend.train(
            [str(text)],
            trainers.BpeTrainer(
                vocab_size=VOCABULARY,
                special_tokens=special,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            model_max_length=CONTEXT,
        ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, text: Path) -> torch.Tensor:
    """Return the tokens of a whole file, one after another."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    pieces = tokenizer.backend_tokenizer.encode_batch_fast(lines, add_special_tokens=False)
    return torch.tensor([token for piece in pieces for token in piece.ids], dtype=torch.int64)


def build_model() -> LlamaForCausalLM:
    """Return the untrained decoder."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def train(
    tokens: torch.Tensor, validation: torch.Tensor, arguments: argparse.Namespace
) -> tuple[LlamaForCausalLM, float]:
    """Train, from the last checkpoint if there is one.

    Returns:
        The model, and the seconds that all parts of the run took together.
    """
    model = build_model().to(arguments.device)
    optimizer = torch.optim.AdamW(groups(model), lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)
    checkpoint = arguments.output / "last.ckpt"
    first, before = 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True, map_location=arguments.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before = state["step"], state["seconds"]
    model.train()
    begin = time.monotonic()
    for step in range(first, arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate(step, arguments.steps)
        batch = windows(tokens, step, arguments.batch_size).to(arguments.device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % SAVE_EVERY == 0 or done == arguments.steps:
            seconds = before + time.monotonic() - begin
            save(checkpoint, model, optimizer, done, seconds)
            scored = f"  valid {mean_loss(model, validation[:20_000]):.4f}" if done % (4 * SAVE_EVERY) == 0 else ""
            print(f"step {done}  loss {float(loss.detach()):.4f}{scored}  {seconds:.0f} s", flush=True)
    return model.eval(), before + time.monotonic() - begin


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    """Write a checkpoint; one that is interrupted leaves the former one whole."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    aside = path.with_suffix(".part")
    torch.save(state, aside)
    os.replace(aside, path)


def windows(tokens: torch.Tensor, step: int, batch_size: int) -> torch.Tensor:
    """Return the batch of one step: every pass over the text is cut anew and shuffled, by seed and pass alone."""
    batches = (len(tokens) - CONTEXT) // (CONTEXT * batch_size)
    generator = np.random.default_rng((SEED, step // batches))
    start = int(generator.integers(CONTEXT))
    order = generator.permutation(batches * batch_size)
    place = step % batches
    chosen = order[place * batch_size : (place + 1) * batch_size]
    return torch.stack([tokens[start + i * CONTEXT : start + (i + 1) * CONTEXT] for i in chosen])


def rate(step: int, steps: int) -> float:
    """Return the factor on the learning rate: up over 50 steps, level, down to zero over the last quarter."""
    return min(1.0, (step + 1) / 50, (steps - step) / (steps / 4))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups: matrices decay, normalisation weights do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return the mean nats a token over disjoint windows."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT).to(model.device).split(16):
        predicted = batch.numel() - len(batch)
        total += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * predicted
        count += predicted
    model.train(training)
    return total / count


if __name__ == "__main__":
    main()
