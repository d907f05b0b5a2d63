"""``fiftyfold tensorize``: a language model as tensor networks, healed, quantized and exported, in one line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from transformers import PreTrainedModel

from fiftyfold.app.decomposition import DECOMPOSED, MATRICES, decompose
from fiftyfold.app.delivered import complete_delivery, read_rows
from fiftyfold.app.kept_scores import kept_score
from fiftyfold.app.road import put_in_place, show, weights_bytes
from fiftyfold.app.summary import Row
from fiftyfold.app.tensorize_recipe import Method, TensorizeRecipe, build_text, check_steps
from fiftyfold.app.training import CONTENT, claim_output, quiet_lightning, score, train, work_folder
from fiftyfold.callbacks import QuantizationAwareTraining
from fiftyfold.datamodules import LanguageModelingDataModule
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import (
    HealingModule,
    LanguageModelingModule,
    export,
    load,
    quantize_bitsandbytes,
)
from fiftyfold.modules.digest import digest_of, identity_of
from fiftyfold.modules.evaluation_task import fit_vocabulary
from fiftyfold.modules.packed.contents import round_rest
from fiftyfold.modules.packed.export import REPORT_FILE
from fiftyfold.modules.packed.report import ExportReport
from fiftyfold.modules.pretrained import Objective, load_language_model
from fiftyfold.modules.sizes import model_size
from fiftyfold.modules.tensor_network.budget import Allocation
from fiftyfold.modules.tensor_network.layers import network_layers
from fiftyfold.modules.tensor_network.tensorize import Split


def tensorize_command(
    model: str,
    *,
    data: str,
    keep: float = 0.3,
    output: str | None = None,
    method: Method = "activations",
    allocation: Allocation = "model",
    cores: int = 3,
    split: Split = "even",
    exclude: list[str] | str | None = None,
    objective: Objective = "causal",
    epochs: int = 1,
    block_share: float = 0.3,
    hidden_weight: float = 0.0,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    sequence_length: int | None = None,
    limit_train: int | None = None,
    core_bits: Literal[8] | None = None,
    rest_bits: Literal[4, 8] | None = None,
    document_separator: str = "<|endoftext|>",
    text_column: str = "text",
    seed: int = 42,
) -> None:
    """Turn a language model's matrices into tensor networks, heal it on text, quantize, export, and print one table.

    Ctrl-C or a crash loses little: the same command goes on where the run stopped.

    Args:
        model: a folder or a hub id.
        data: text to heal on: a file, a folder with train and valid files, or a hub id.
        keep: share of the matrices' bytes in 16 bits that may be left, for activations; share of each matrix's numbers,
            for weights.
        output: folder for the compressed model; by default the model's name with the share appended.
        method: activations spreads one budget over all matrices and solves for their outputs on the text; weights cuts
            each matrix alone by singular values, as CompactifAI does.
        allocation: for activations, what the budget follows: what each matrix does to the whole model (model), the
            errors of the layers' outputs (outputs, for a model of less than a million parameters), or uniform.
        cores: cores of each network, for weights.
        split: for weights, even (matrix product operators, as CompactifAI) or low_rank (two thin matrices; 2 cores).
        exclude: patterns of names that stay dense, such as down_proj.
        objective: causal, or masked for models that fill in hidden tokens.
        epochs: passes over the text; 0 does not heal.
        block_share: share of the healing that goes block by block.
        hidden_weight: weight of the hidden states beside the teacher's predictions.
        learning_rate: the highest.
        batch_size: sequences a step.
        sequence_length: tokens a sequence; by default what the model reads, at most 512.
        limit_train: heal on so many sequences only.
        core_bits: 8 quantizes the cores to 8 bits and packs them; training sees the quantizers. For activations, the
            share counts these bytes, and a matrix stays whole in 3, 4 or 8 bits where that is nearer: the best way to a
            small file.
        rest_bits: hold dense linear layers that are left in 4 or 8 bits, by bitsandbytes, after healing.
        document_separator: what stands between two documents of a .txt file.
        text_column: where JSON objects, parquet files and the hub's sets have their text.
        seed: seed of the data's order.
    """
    recipe = TensorizeRecipe(
        model=model,
        data=data,
        keep=keep,
        method=method,
        allocation=allocation,
        cores=cores,
        split=split,
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude or ()),
        objective=objective,
        epochs=epochs,
        block_share=block_share,
        hidden_weight=hidden_weight,
        learning_rate=learning_rate,
        batch_size=batch_size,
        sequence_length=sequence_length,
        limit_train=limit_train,
        core_bits=core_bits,
        rest_bits=rest_bits,
        document_separator=document_separator,
        text_column=text_column,
        seed=seed,
    )
    name = f"{Path(model).resolve().name}-{round(100 * keep)}percent"
    place = Path(output or name).expanduser()
    if place.resolve() == Path.cwd() or not place.name:
        raise FiftyfoldError("the output replaces its folder, which cannot be the current directory; name one inside.")
    compress_language_model(recipe, place)


def compress_language_model(recipe: TensorizeRecipe, folder: Path) -> list[Row]:
    """Decompose, heal, quantize, export, reload, score and print.

    Args:
        recipe: what to do.
        folder: where the compressed model goes; must not hold anything.

    Returns:
        The rows of the table.

    Raises:
        FiftyfoldError: if something does not fit; nothing is overwritten.
    """
    work = folder.with_name(folder.name + ".work")
    options = json.loads(json.dumps(asdict(recipe)))
    if complete_delivery(folder, work, options):
        return _show_delivered(folder)
    claim_output(folder)
    quiet_lightning()
    lightning.seed_everything(recipe.seed, verbose=False)
    teacher = load_language_model(recipe.model, "model", recipe.objective)
    text = build_text(recipe)
    fit_vocabulary(teacher.config, text.tokenizer, "model")
    text.setup("fit")
    content = {"models": digest_of(identity_of(teacher)), "data": text.source_digests()}
    with work_folder(work, options | {CONTENT: content}, binding=(DECOMPOSED,), kept=(MATRICES,)) as resume_from:
        before = _score(teacher, text, work)
        check_steps(recipe, text)
        decompose(recipe, teacher, text, work)
        decomposed = _score(load(work / DECOMPOSED), text, work)
        student, healed = _heal(recipe, text, work, resume_from), recipe.epochs > 0
        scores = {"original": before, "decomposed": decomposed}
        report, aside = {"recipe": options, "scores": scores}, work / "packed"
        written, after = _pack(recipe, student, text, aside, report)
        if healed and not recipe.quantizes_in_training and not _is_better(after, decomposed):
            unhealed, other = load(work / DECOMPOSED, trainable=True), work / "unhealed"
            written_unhealed, without = _pack(recipe, unhealed, text, other, report)
            if not _is_better(after, without):
                shown = f"{without['val/perplexity']:.2f} → {after['val/perplexity']:.2f}"
                print(
                    f"Healing did not help (perplexity {shown}): what was decomposed is kept. A lower learning_rate "
                    "or more text may."
                )
                student, healed, aside, written, after = unhealed, False, other, written_unhealed, without
        rows = [
            Row("original", before["val/accuracy"], weights_bytes(recipe.model), count_numbers(teacher)),
            Row("decomposed", decomposed["val/accuracy"]),
            Row(
                "healed, exported" if healed else "exported",
                after["val/accuracy"],
                written.file_bytes,
                count_numbers(student),
            ),
        ]
        put_in_place(aside, folder, rows, metric="accuracy", scores=scores | {"exported": after})
    return _show_delivered(folder)


def count_numbers(model: torch.nn.Module) -> int:
    """Return how many numbers a model has, those of its networks' cores counted as a file keeps them."""
    return model_size(model).parameters


def _show_delivered(folder: Path) -> list[Row]:
    rows, metric = read_rows(folder)
    show(rows, metric, folder)
    scores = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))["scores"]
    perplexities = [scores[name]["val/perplexity"] for name in ("original", "decomposed", "exported")]
    print("perplexity: " + " → ".join(f"{perplexity:.2f}" for perplexity in perplexities))
    return rows


def _pack(
    recipe: TensorizeRecipe,
    student: PreTrainedModel,
    text: LanguageModelingDataModule,
    folder: Path,
    report: dict[str, Any],
) -> tuple[ExportReport, dict[str, float]]:
    """Export a student, and score what was written."""
    if recipe.rest_bits is not None:
        quantize_bitsandbytes(student, recipe.rest_bits)
    # What goes to disk is what is scored.
    round_rest(student)
    written = export(student, folder, tokenizer=text.tokenizer, report=report, overwrite=True)
    return written, _score(load(folder), text, folder.parent)


def _is_better(scores: dict[str, float], others: dict[str, float]) -> bool:
    return scores["val/perplexity"] < others["val/perplexity"]


def _heal(
    recipe: TensorizeRecipe, text: LanguageModelingDataModule, work: Path, resume_from: Path | None
) -> PreTrainedModel:
    module = HealingModule(
        recipe.model,
        str(work / DECOMPOSED),
        objective=recipe.objective,
        hidden_weight=recipe.hidden_weight,
        block_share=recipe.block_share,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=recipe.learning_rate, fused=True),
    )
    callbacks: tuple[QuantizationAwareTraining, ...] = ()
    if recipe.core_bits is not None and recipe.quantizes_in_training:
        names = [rf"^{name}$".replace(".", r"\.") for name, _ in network_layers(module.student)]
        callbacks = (
            QuantizationAwareTraining(
                weight_bits=recipe.core_bits, activation_bits=None, granularity="per_channel", targets=names
            ),
        )
    if recipe.epochs:
        train(module, text, epochs=recipe.epochs, work=work, callbacks=callbacks, resume_from=resume_from)
    return module.student.eval()


def _score(model: PreTrainedModel, text: LanguageModelingDataModule, work: Path) -> dict[str, float]:
    def find() -> dict[str, float]:
        return score(LanguageModelingModule(model, objective=text.objective), text)

    return kept_score(work / "scores.json", [identity_of(model), list(text.val_dataloader())], find)
