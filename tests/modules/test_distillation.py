from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import (
    DistillationModule,
    FineTuningModule,
    export,
    load_from_checkpoint,
    prune_layers,
    quantize,
    reduce_layers,
)
from fiftyfold.modules.distillation import Stage
from fiftyfold.modules.distillation_losses import attention_score_loss, hidden_state_loss, soft_cross_entropy
from fiftyfold.modules.evaluation_task import UnnamedTask
from fiftyfold.modules.structure import structure_log
from tests.modules.training import fit, loader, same_weights, trainer
from tests.tiny import FAMILIES, tiny_batch, tiny_bert, tiny_model


@pytest.fixture
def folder(tmp_path) -> str:
    tiny_bert(seed=5).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def distil(teacher=None, **options):
    return DistillationModule(tiny_bert() if teacher is None else teacher, **options)


def without_dropout(module: DistillationModule) -> DistillationModule:
    module.student.eval()
    return module


def calls_of_teacher(module: DistillationModule) -> list[int]:
    calls: list[int] = []
    module.teacher.register_forward_hook(lambda *_: calls.append(1))
    return calls


class TestLosses:
    def test_a_whole_student_without_dropout_has_nothing_to_learn_but_the_entropy(self):
        module, batch = without_dropout(distil()), tiny_batch()
        losses = module.training_losses(batch)
        assert losses["attention_loss"].item() == losses["hidden_loss"].item() == 0.0
        logits = module(batch)
        torch.testing.assert_close(losses["loss"], soft_cross_entropy(logits, logits))

    @pytest.mark.parametrize("kind", FAMILIES)
    @pytest.mark.parametrize("masked", [True, False])
    def test_they_are_the_sum_of_the_papers_three(self, kind, masked):
        teacher, batch = tiny_model(kind, layers=6), tiny_batch()
        module = without_dropout(distil(teacher, layers=[1, 3, 5], mask_padding=masked))
        with torch.no_grad():
            module.student.get_parameter(next(iter(dict(module.student.named_parameters())))).add_(0.1)
        losses = module.training_losses(batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        seen = module._teacher(inputs, hidden=range(7), attention=range(6))
        mine = type(module._teacher)(copy.deepcopy(module.student))(inputs, hidden=range(4), attention=range(3))
        mask = batch["attention_mask"] if masked else None
        causal = kind in ("gpt2", "llama")
        attention = attention_score_loss(list(mine.attention.values()), seen.attention, [1, 3, 5], mask, causal=causal)
        hidden = hidden_state_loss(list(mine.hidden.values()), seen.hidden, [0, 2, 4, 6], mask)
        torch.testing.assert_close(losses["attention_loss"], attention)
        torch.testing.assert_close(losses["hidden_loss"], hidden)
        total = attention + hidden + soft_cross_entropy(mine.logits, seen.logits)
        torch.testing.assert_close(losses["loss"], total)
        assert attention > 0
        assert hidden > 0

    def test_padding_does_not_matter_unless_it_is_asked_to(self):
        batch = tiny_batch()
        longer = {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5)),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
            "labels": batch["labels"],
        }
        for masked in (True, False):
            module = without_dropout(distil(layers=[0, 2], mask_padding=masked))
            first, second = module.training_losses(batch)["loss"], module.training_losses(longer)["loss"]
            assert torch.allclose(first, second, rtol=1e-5) == masked

    def test_weights_multiply(self):
        batch = tiny_batch()
        plain = without_dropout(distil(layers=[1, 3])).training_losses(batch)
        weighted = distil(layers=[1, 3], attention_weight=3.0, hidden_weight=0.5, logit_weight=2.0)
        losses = without_dropout(weighted).training_losses(batch)
        expected = 3 * plain["attention_loss"] + 0.5 * plain["hidden_loss"] + 2 * plain["logit_loss"]
        torch.testing.assert_close(losses["loss"], expected)

    def test_hard_labels_take_their_share(self):
        batch, options = tiny_batch(), {"attention_weight": 0.0, "hidden_weight": 0.0}
        soft = without_dropout(distil(**options)).training_losses(batch)["loss"]
        hard = without_dropout(distil(**options, hard_label_share=1.0)).training_losses(batch)["loss"]
        mixed = without_dropout(distil(**options, hard_label_share=0.25)).training_losses(batch)
        torch.testing.assert_close(mixed["loss"], 0.75 * soft + 0.25 * hard)
        assert {"logit_loss", "label_loss"} <= set(mixed)

    def test_a_batch_without_labels_serves_unless_labels_have_a_share(self):
        batch = tiny_batch()
        unlabelled = {name: value for name, value in batch.items() if name != "labels"}
        with_labels = without_dropout(distil()).training_losses(batch)["loss"]
        torch.testing.assert_close(without_dropout(distil()).training_losses(unlabelled)["loss"], with_labels)
        for module in (distil(hard_label_share=0.5), FineTuningModule(tiny_bert())):
            with pytest.raises(FiftyfoldError, match="have no labels"):
                module.training_losses(unlabelled)

    def test_regression_follows_the_score(self):
        module = without_dropout(distil(tiny_bert(labels=1), layers=[0, 1, 2, 3], hard_label_share=0.5))
        batch = tiny_batch(labels=1)
        losses = module.training_losses(batch)
        assert losses["logit_loss"].item() == 0.0
        score = module(batch).squeeze(-1)
        torch.testing.assert_close(losses["label_loss"], (score - batch["labels"]).square().mean())

    def test_what_has_no_weight_is_not_computed(self):
        module = distil(attention_weight=0.0, hidden_weight=0.0)
        calls = calls_of_teacher(module)
        assert set(module.training_losses(tiny_batch())) == {"loss", "logit_loss"}
        assert len(calls) == 1

    def test_a_teacher_whom_nobody_asks_is_not_run(self):
        module = distil(attention_weight=0.0, hidden_weight=0.0, hard_label_share=1.0)
        calls = calls_of_teacher(module)
        assert set(module.training_losses(tiny_batch())) == {"loss", "label_loss"}
        assert calls == []

    def test_every_parameter_gets_a_gradient_in_a_stage_without_logits(self):
        module = distil(stages=[Stage(logits=0.0)])
        module.training_losses(tiny_batch())["loss"].backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert module.student.classifier.weight.grad.abs().sum() == 0


class TestStages:
    @pytest.mark.parametrize(
        ("stages", "expected"),
        [
            (1, ["ahl"] * 6),
            (2, ["ah"] * 3 + ["l"] * 3),
            (3, ["ah"] * 2 + ["ahl"] * 2 + ["l"] * 2),
            ([Stage(hidden=0.0, share=2.0), Stage(attention=0.0, share=1.0)], ["al"] * 4 + ["hl"] * 2),
        ],
    )
    def test_each_has_its_losses_and_its_share(self, stages, expected):
        seen = []

        class Watched(DistillationModule):
            def training_losses(self, batch):
                losses = super().training_losses(batch)
                seen.append("".join(name[0] for name in losses if name != "loss"))
                return losses

        module = Watched(tiny_bert(layers=2), stages=stages, warmup=0.5)
        fit(module, steps=6)
        assert seen == expected

    def test_the_learning_rate_starts_again(self):
        module = distil(stages=2, warmup=0.0)
        rates = []

        class Watched(DistillationModule):
            def on_before_optimizer_step(self, optimizer):
                rates.append(optimizer.param_groups[0]["lr"])

        module = Watched(tiny_bert(layers=1), stages=2, warmup=0.0)
        fit(module, steps=4)
        assert rates == pytest.approx([5e-5, 2.5e-5] * 2)

    @pytest.mark.parametrize("stages", [0, 4, [Stage(share=0.0)], []])
    def test_impossible_stages_are_refused(self, stages):
        with pytest.raises(FiftyfoldError, match="stage"):
            fit(distil(stages=stages))

    @pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (-1.0, 1.0, 1.0)])
    def test_impossible_weights_are_refused(self, weights):
        with pytest.raises(FiftyfoldError, match="weights"):
            Stage(*weights)


class TestTeacher:
    def test_it_is_hidden_from_lightning(self):
        module = distil(layers="every-other")
        assert not any("teacher" in name for name, _ in module.named_modules())
        assert not any("teacher" in name for name in module.state_dict())
        assert len(list(module.parameters())) == len(list(module.student.parameters()))

    def test_it_survives_training_unchanged_and_in_evaluation_mode(self):
        teacher = tiny_bert()
        before = copy.deepcopy(teacher)
        module = distil(teacher, layers="every-other")
        module.train()
        run = trainer(max_epochs=1, val_check_interval=2)
        run.fit(module, loader(), loader(2))
        run.validate(module, loader(2))
        run.test(module, loader(2))
        assert same_weights(teacher, before)
        assert not any(part.training for part in teacher.modules())
        assert module.student.training

    def test_an_averaged_copy_shares_it(self):
        module = distil(layers="every-other")
        averaging = EMAWeightAveraging(decay=0.5)
        fit(module, callbacks=[averaging])
        assert averaging._average_model.module._teacher is module._teacher

    def test_it_can_be_held_in_eight_bits_without_touching_the_callers_model(self):
        teacher = tiny_bert(hidden=64)
        module = distil(teacher, teacher_precision="8bit")
        fit(module, steps=1)
        assert type(module.teacher.bert.encoder.layer[0].intermediate.dense).__name__ == "Linear8bitLt"
        assert type(teacher.bert.encoder.layer[0].intermediate.dense) is torch.nn.Linear
        assert module.student.bert.encoder.layer[0].intermediate.dense.weight.dtype == torch.float32


class TestStudent:
    def test_it_is_a_copy_of_the_chosen_layers(self):
        teacher = tiny_bert(layers=6)
        module = distil(teacher, layers="every-other")
        kept = module.student.bert.encoder.layer
        assert len(kept) == module.student.config.num_hidden_layers == 3
        assert same_weights(kept[1], teacher.bert.encoder.layer[3])
        assert module.kept_layers() == [1, 3, 5]
        assert all(part.training for part in module.student.modules())
        assert all(parameter.requires_grad for parameter in module.student.parameters())

    def test_a_teacher_in_half_precision_gives_a_student_in_full(self):
        module = distil(tiny_bert().bfloat16())
        assert {parameter.dtype for parameter in module.student.parameters()} == {torch.float32}
        module.training_losses(tiny_batch())["loss"].backward()

    def test_it_can_begin_from_another_folder(self, tmp_path):
        teacher = tiny_bert(layers=4)
        first = distil(teacher, layers=[1, 3])
        fit(first)
        first.student.save_pretrained(tmp_path / "student")
        second = distil(teacher, student=str(tmp_path / "student"), layers=[1, 3])
        assert same_weights(second.student, first.student)
        assert second.student.training
        with pytest.raises(FiftyfoldError, match="student has 2 layers"):
            distil(teacher, student=str(tmp_path / "student"))

    def test_it_can_go_on_from_an_exported_folder(self, tmp_path):
        first = distil(layers=[1, 3])
        quantize(first.student, weight_bits=1)
        fit(first)
        export(first.student, tmp_path / "out")
        second = distil(student=str(tmp_path / "out"), layers=[1, 3])
        assert second.kept_layers() == [1, 3]
        first.eval()
        second.eval()
        torch.testing.assert_close(second(tiny_batch()), first(tiny_batch()), atol=2e-3, rtol=0)
        second.train()
        fit(second).save_checkpoint(tmp_path / "a.ckpt")
        loaded = DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", teacher=tiny_bert())
        assert same_weights(loaded, second)
        with pytest.raises(FiftyfoldError, match="packed"):
            distil(str(tmp_path / "out"))

    def test_layers_that_go_later_leave_the_maps_too(self):
        module = distil(tiny_bert(layers=6), layers=[0, 1, 3, 5])
        prune_layers(module.student, drop=1, importance=[0.3, 0.1, 0.2, 0.4])
        assert module.kept_layers() == [0, 3, 5]
        reduce_layers(module.student, layers=[0, 2])
        assert module.kept_layers() == [0, 5]
        assert without_dropout(module).training_losses(tiny_batch())["hidden_loss"] > 0

    def test_it_can_be_quantized(self):
        module = distil(layers="every-other")
        quantize(module.student, weight_bits=1)
        fit(module, steps=2)
        assert [entry["op"] for entry in structure_log(module.student)] == ["quantize"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"vocab": 90}, "vocabulary size is 90"),
            ({"labels": 3}, "number of labels is 3"),
            ({"hidden": 16}, "hidden size is 16"),
        ],
    )
    def test_a_student_that_does_not_fit_is_refused(self, tmp_path, options, message):
        tiny_bert(**options).save_pretrained(tmp_path / "student")
        with pytest.raises(FiftyfoldError, match=message):
            distil(student=str(tmp_path / "student"))

    def test_a_narrower_student_may_learn_from_logits_alone(self, tmp_path):
        tiny_bert(hidden=16).save_pretrained(tmp_path / "student")
        module = distil(student=str(tmp_path / "student"), attention_weight=0.0, hidden_weight=0.0)
        fit(module, steps=1)

    def test_a_teacher_of_another_task_is_refused(self):
        class Data(LightningDataModule):
            task = UnnamedTask(3, name="mnli")

            def train_dataloader(self):
                return loader()

        with pytest.raises(FiftyfoldError, match=r"teacher has 2 label.*mnli"):
            trainer().fit(distil(), datamodule=Data())

    @pytest.mark.parametrize("layers", ["odd", [], [3, 1], [4], [-1]])
    def test_impossible_layers_are_refused(self, layers):
        with pytest.raises(FiftyfoldError):
            distil(layers=layers)

    @pytest.mark.parametrize("options", [{"hard_label_share": 1.5}, {"temperature": 0.0}, {"keep": 2}])
    def test_impossible_arguments_are_refused(self, options):
        with pytest.raises(FiftyfoldError, match=next(iter(options))):
            distil(**options)


class TestCheckpoints:
    @pytest.mark.parametrize("step", [1, 3, 4])
    def test_a_resumed_training_is_the_same(self, folder, tmp_path, step):
        def module():
            return without_dropout(DistillationModule(folder, layers="every-other", stages=2))

        # One batch an epoch: a plain DataLoader resumes exactly only there.
        whole, batches = module(), loader(1)
        trainer(max_epochs=6).fit(whole, batches)

        class Saving(DistillationModule):
            def on_train_epoch_end(self):
                if self.global_step == step:
                    self.trainer.save_checkpoint(tmp_path / "part.ckpt")

        trainer(max_epochs=6).fit(without_dropout(Saving(folder, layers="every-other", stages=2)), batches)
        resumed = module()
        trainer(max_epochs=6).fit(resumed, batches, ckpt_path=tmp_path / "part.ckpt")
        assert same_weights(resumed, whole)
        assert not same_weights(module(), whole)

    def test_it_holds_no_teacher_and_plain_hyperparameters(self, folder, tmp_path):
        module = DistillationModule(folder, layers=[1, 3], stages=[Stage(logits=0.0), Stage(share=2.0)])
        fit(module).save_checkpoint(tmp_path / "a.ckpt")
        content = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert all(name.startswith("student.") for name in content["state_dict"])
        stored = content["hyper_parameters"]
        assert json.loads(json.dumps(stored)) == stored
        assert stored["teacher"] == folder
        loaded = DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
        assert same_weights(loaded, module)
        assert loaded._stages == module._stages

    def test_a_compressed_student_loads(self, folder, tmp_path):
        module = DistillationModule(folder)
        quantize(module.student, weight_bits=2)
        reduce_layers(module.student, layers=[0, 3])
        fit(module).save_checkpoint(tmp_path / "a.ckpt")
        for load in (
            DistillationModule.load_from_checkpoint,
            lambda path: load_from_checkpoint(DistillationModule, path),
        ):
            loaded = load(tmp_path / "a.ckpt")
            assert loaded.kept_layers() == [0, 3]
            assert torch.equal(loaded.eval()(tiny_batch()), module.eval()(tiny_batch()))

    def test_a_teacher_that_is_gone_is_named_and_can_be_replaced(self, folder, tmp_path):
        module = DistillationModule(folder)
        fit(module).save_checkpoint(tmp_path / "a.ckpt")
        (tmp_path / "teacher").rename(tmp_path / "moved")
        with pytest.raises(FiftyfoldError, match=r"teacher '.*teacher' is not there.*teacher=\.\.\."):
            DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt")
        loaded = DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", teacher=str(tmp_path / "moved"))
        assert same_weights(loaded, module)

    def test_a_model_as_teacher_is_not_stored(self, tmp_path):
        module = distil()
        fit(module).save_checkpoint(tmp_path / "a.ckpt")
        assert "teacher" not in torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
        assert same_weights(DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", teacher=tiny_bert()), module)


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()


def test_it_comes_from_the_command_line(folder, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model:
  class_path: fiftyfold.modules.DistillationModule
  init_args:
    teacher: {folder}
    layers: [1, 3]
    stages:
    - {{attention: 1.0, hidden: 1.0, logits: 0.0, share: 1.0}}
    - {{attention: 0.0, hidden: 0.0, logits: 1.0, share: 2.0}}
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {{lr: 0.002}}
data:
  class_path: tests.modules.test_distillation.Data
trainer:
  max_steps: 3
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {tmp_path}
"""
    )
    cli = LightningCLI(
        args=["fit", "--config", str(config)], auto_configure_optimizers=False, save_config_callback=None
    )
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.002
    assert cli.model._stages == [Stage(logits=0.0), Stage(0.0, 0.0, 1.0, share=2.0)]
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    stored = torch.load(tmp_path / "cli.ckpt", weights_only=True)["hyper_parameters"]
    assert json.loads(json.dumps(stored)) == stored
    assert stored["optimizer"]["init_args"]["lr"] == 0.002
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "cli.ckpt")
    assert same_weights(loaded, cli.model)
    assert loaded._stages == cli.model._stages
