"""Healing follows the teacher, in a plain loop and under a Trainer."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fiftyfold.callbacks import LayerReduction, RandomStates
from fiftyfold.datamodules import LanguageModelingDataModule
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import HealingModule, LanguageModelingModule, heal, reduce_layers
from fiftyfold.modules.healing import Healer, HealingLoss, relative_difference, token_divergence
from fiftyfold.modules.surgery import parameter_checksum
from fiftyfold.modules.teacher import FrozenTeacher
from tests.modules.training import same_weights, trainer
from tests.text import SIZE, roughened, tiny_language_model, tokens, write_text, write_word_tokenizer


def divergence(student, teacher):
    text = tokens(4, 12, seed=5)
    with torch.no_grad():
        return float(token_divergence(student(input_ids=text).logits, teacher(input_ids=text).logits))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("phases", [{"steps": 12}, {"steps": 6, "block_steps": 6}, {"steps": 0, "block_steps": 12}])
def test_healing_comes_nearer_to_the_teacher(kind, phases):
    teacher = tiny_language_model(kind)
    student = roughened(teacher)
    before = divergence(student, teacher)
    frozen = copy.deepcopy(teacher.state_dict())
    losses = heal(student, teacher, tokens(16, 12), batch_size=4, learning_rate=1e-2, **phases)
    assert len(losses) == 12
    # Blocks alone cannot mend the embedding.
    assert divergence(student, teacher) < (0.8 if phases["steps"] else 1.0) * before
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())


def test_equal_seeds_heal_alike():
    teacher = tiny_language_model()
    runs = [roughened(teacher) for _ in range(3)]
    for student, seed in zip(runs, (0, 0, 1), strict=True):
        heal(student, teacher, tokens(16, 12), steps=3, block_steps=2, seed=seed)
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_an_unchanged_student_has_nothing_to_heal():
    teacher = tiny_language_model()
    healer = Healer(copy.deepcopy(teacher), FrozenTeacher(teacher))
    batch = {"input_ids": tokens(), "labels": tokens()}
    assert float(healer.block_wise(batch)["loss"]) < 1e-10
    losses = healer.end_to_end(batch, HealingLoss(logits=1.0, hidden=1.0, labels=0.5))
    assert abs(float(losses["logit_loss"])) < 1e-6
    assert float(losses["hidden_loss"]) < 1e-10
    assert torch.isclose(losses["loss"], 0.5 * losses["label_loss"], atol=1e-6)


def test_lookahead_teaches_a_block_for_the_next():
    """Without it a block's gradient comes from its own output alone."""
    teacher = tiny_language_model()
    batch = {"input_ids": tokens(), "labels": tokens()}
    gradients = []
    for lookahead in (True, False):
        student = roughened(teacher)
        Healer(student, FrozenTeacher(teacher)).block_wise(batch, lookahead=lookahead)["loss"].backward()
        gradients.append(student.model.layers[0].mlp.down_proj.weight.grad)
        assert student.get_input_embeddings().weight.grad is None or not student.model.embed_tokens.weight.grad.any()
    assert not torch.allclose(*gradients)


def test_a_student_with_fewer_layers_follows_the_layers_it_came_from():
    teacher = tiny_language_model(layers=4)
    student = copy.deepcopy(teacher).requires_grad_(True)
    healer = Healer(student, FrozenTeacher(teacher))
    reduce_layers(student, [1, 3])
    assert healer.kept_layers() == [1, 3]
    assert float(healer.block_wise({"input_ids": tokens(), "labels": tokens()})["loss"]) > 0
    heal(student, teacher, tokens(), steps=1, block_steps=1, layers=[1, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sequences": tokens(0)}, "needs text"),
        ({"sequences": torch.full((4, 8), 500)}, "tokens from 500 to 500, the model knows 0 to"),
        ({"sequences": torch.full((4, 8), -1)}, "tokens from -1"),
        ({"sequences": torch.zeros(4, 8)}, "tokens are integers"),
        ({"sequences": tokens(2, 41)}, "reads at most 40"),
        ({"layers": [0]}, "name the teacher's layers"),
        ({"teacher": tiny_language_model(vocab=60)}, "vocabulary size is 50, the teacher's 60"),
        ({"teacher": tiny_language_model(hidden=32)}, "hidden size"),
    ],
)
def test_what_cannot_be_healed_is_refused(arguments, message):
    given = {"teacher": tiny_language_model(), "sequences": tokens(), "steps": 1} | arguments
    with pytest.raises(FiftyfoldError, match=message):
        heal(tiny_language_model(), **given)


def test_a_frozen_student_is_refused():
    with pytest.raises(FiftyfoldError, match="nothing of the student trains"):
        heal(tiny_language_model().requires_grad_(False), tiny_language_model(), tokens(), steps=1)


def test_text_of_another_vocabulary_is_refused():
    teacher = tiny_language_model()
    teacher.lm_head.weight.data.mul_(100)
    with pytest.raises(FiftyfoldError, match="worse than an even guess"):
        heal(roughened(teacher), teacher, tokens(), steps=1)


@pytest.mark.parametrize("wrong", [{"logits": 0.0}, {"hidden": -1.0}, {"temperature": 0.0}])
def test_losses_that_make_no_sense_are_refused(wrong):
    with pytest.raises(FiftyfoldError):
        HealingLoss(**wrong)


def test_padding_does_not_count():
    one, other = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    spoilt = torch.where(mask[..., None].bool(), one, 1e3)
    for measure in (relative_difference, lambda a, b, m: token_divergence(a, b, 1.0, m)):
        assert torch.equal(measure(one, other, mask), measure(spoilt, other, mask))


def test_divergence_is_zero_for_equal_predictions_and_scales_with_temperature():
    logits = torch.randn(2, 3, 9)
    assert abs(float(token_divergence(logits, logits))) < 1e-6
    assert float(token_divergence(logits, -logits, 2.0)) > 0


# ---- under a Trainer


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "data")
    for kind in ("causal", "masked"):
        write_word_tokenizer(tmp_path / f"words-{kind}", kind=kind)
    tiny_language_model().save_pretrained(tmp_path / "teacher")
    return tmp_path


def data(**options):
    options = {"sequence_length": 12, "batch_size": 4, "cache_dir": "cache", **options}
    return LanguageModelingDataModule(options.pop("tokenizer", "words-causal"), "data", **options)


def fit(module, *, steps=8, callbacks=(), ckpt_path=None, datamodule=None, **options):
    run = trainer(max_steps=steps, max_epochs=-1, callbacks=[RandomStates(), *callbacks], **options)
    run.fit(module, datamodule=datamodule or data(), ckpt_path=ckpt_path)
    return run


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def test_the_module_heals_a_reduced_student_in_both_phases(place):
    module = HealingModule("teacher", block_share=0.5, hidden_weight=0.1, optimizer=adam)
    run = fit(module, callbacks=[LayerReduction([1])], limit_val_batches=1)
    assert len(module.student.model.layers) == 1
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    assert {"val/loss", "val/perplexity", "val/accuracy", "val/score"} <= metrics.keys()
    assert metrics["val/score"] == metrics["val/accuracy"]
    assert abs(metrics["val/perplexity"] - torch.tensor(metrics["val/loss"]).exp()) < 1e-2


def test_a_resumed_healing_is_the_one_that_was_never_interrupted(place):
    def make():
        return HealingModule("teacher", block_share=0.5, optimizer=adam)

    saver = ModelCheckpoint(place / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = make()
    fit(whole, callbacks=[LayerReduction([0], start=3), saver], enable_checkpointing=True)
    for step in (2, 3, 4, 6):
        torch.manual_seed(99)
        again = make()
        fit(again, callbacks=[LayerReduction([0], start=3)], ckpt_path=place / "saved" / f"step={step}.ckpt")
        assert same_weights(whole, again), f"resumed from step {step}"
    state = torch.load(place / "saved" / "step=6.ckpt", weights_only=True)
    assert state["state_dict"]
    assert not any("teacher" in name for name in state["state_dict"])


def test_masked_models_are_healed_too(place):
    from transformers import AutoModelForMaskedLM

    from tests.tiny import tiny_config

    AutoModelForMaskedLM.from_config(tiny_config("bert", layers=2, vocab=SIZE)).save_pretrained("masked")
    module = HealingModule("masked", objective="masked", block_share=0.5, optimizer=adam)
    text = data(tokenizer="words-masked", objective="masked")
    run = fit(module, steps=4, datamodule=text)
    (result,) = run.validate(module, datamodule=text, verbose=False)
    assert result["val/loss"] > 0


def test_a_language_model_learns_from_text_alone(place):
    module = LanguageModelingModule("teacher", optimizer=adam)
    run = fit(module, steps=60)
    assert float(run.callback_metrics["val/accuracy"]) > 0.3


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: HealingModule("absent"), {}, "cannot be loaded"),
        (lambda: HealingModule("teacher", block_share=1.0), {}, "block_share"),
        (lambda: HealingModule("teacher", objective="prefix"), {}, "objective"),
        (lambda: HealingModule("teacher"), {"objective": "masked", "tokenizer": "words-masked"}, "for a masked model"),
        (lambda: HealingModule("teacher"), {"sequence_length": 41}, "reads at most 40"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(place, make, options, message):
    with pytest.raises(FiftyfoldError, match=message):
        fit(make(), datamodule=data(**options))


def test_a_larger_vocabulary_is_refused(place):
    write_word_tokenizer(place / "large", size=SIZE + 1)
    with pytest.raises(FiftyfoldError, match="51 tokens"):
        fit(HealingModule("teacher"), datamodule=data(tokenizer="large"))


class _EqualRanks(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        sums = trainer.strategy.all_gather(parameter_checksum(pl_module))
        assert trainer.world_size == len(sums) == 2
        assert torch.equal(sums[0], sums[1]), f"the ranks differ at step {trainer.global_step}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_heal_one_model(place):
    """In both phases, though the block-wise one leaves the embedding without a gradient."""
    module = HealingModule("teacher", block_share=0.5, optimizer=adam)
    fit(module, steps=4, callbacks=[_EqualRanks()], strategy="ddp_fork", devices=2, use_distributed_sampler=False)
