"""Fine-tuning, and with it what every task module has: groups, schedule, scores, checkpoints, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import DistillationModule, FineTuningModule, export
from fiftyfold.modules.evaluation_task import UnnamedTask
from fiftyfold.modules.fine_tuning import load_teacher
from fiftyfold.modules.finite_loss import FiniteLossGuard
from fiftyfold.modules.task_module import decay_groups, label_loss, model_inputs
from tests.modules.training import fit, loader, same_weights, trainer
from tests.tiny import FAMILIES, tiny_batch, tiny_bert, tiny_model


class PairTask(UnnamedTask):
    @property
    def selection_metric(self) -> str:
        return "f1"

    def build_metrics(self):
        return {"accuracy": MulticlassAccuracy(2, average="micro"), "f1": BinaryF1Score()}


class Data(LightningDataModule):
    def __init__(self, labels: int = 2) -> None:
        super().__init__()
        names = ("no", "yes") if labels == 2 else ()
        self.task = PairTask(labels, name="pairs", label_names=names, validation_names=("matched", "mismatched"))

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return [loader(3), loader(2)]


@pytest.fixture
def folder(tmp_path) -> str:
    tiny_bert().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_it_learns(folder):
    module = FineTuningModule(folder, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    run = trainer(max_epochs=30)
    run.fit(module, loader(2), loader(2))
    assert run.callback_metrics["val/accuracy"] == 1.0


def test_the_model_trains_with_dropout(folder):
    assert all(module.training for module in FineTuningModule(folder).modules())


@pytest.mark.parametrize("kind", FAMILIES)
def test_biases_and_norms_do_not_decay(kind):
    model = tiny_model(kind)
    decayed, spared = decay_groups(model, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free = {names[id(parameter)] for parameter in spared["params"]}
    assert decayed["weight_decay"] == 0.01
    assert spared["weight_decay"] == 0.0
    assert free == {name for name in names.values() if "bias" in name or "norm" in name.lower() or ".ln_" in name}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_frozen_parameters_stay_out_of_the_optimizer():
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    count = sum(len(group["params"]) for group in decay_groups(model, 0.01))
    assert count == sum(parameter.requires_grad for parameter in model.parameters())


def test_the_learning_rate_reaches_zero_at_the_end(folder):
    module = FineTuningModule(folder, optimizer=sgd, warmup=0.25)
    run = fit(module, steps=8)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.0
    assert run.lr_scheduler_configs[0].interval == "step"


def test_a_training_without_an_end_is_refused(folder):
    with pytest.raises(FiftyfoldError, match="max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(FineTuningModule(folder), loader())


def test_scores_of_every_validation_set(folder):
    module, data = FineTuningModule(folder), Data()
    run = trainer()
    run.fit(module, datamodule=data)
    metrics = run.callback_metrics
    assert {"val/accuracy", "val/f1", "val/loss", "val/score", "val_mismatched/accuracy"} <= set(metrics)
    assert metrics["val/score"] == metrics["val/f1"]
    assert "val_mismatched/score" not in metrics
    module.eval()
    batches = list(loader(3))
    with torch.no_grad():
        logits = torch.cat([module(batch) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert metrics["val/accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert metrics["val/loss"].item() == pytest.approx(label_loss(logits, labels).item(), rel=1e-5)


def test_a_rank_without_batches_joins_the_others_in_computing(folder, monkeypatch):
    module, logged = FineTuningModule(folder), {}
    monkeypatch.setattr(module, "all_gather", lambda own: torch.stack([own, torch.ones_like(own)]))
    monkeypatch.setattr(module, "log_dict", logged.update)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module._start_scores()
    with pytest.warns(UserWarning, match="before the ``update``"):
        module._log_scores("val")
    assert set(logged) == {"val/accuracy", "val/loss"}


def test_names_come_from_the_task_and_are_saved(folder, tmp_path):
    module = FineTuningModule(folder)
    trainer(max_steps=1).fit(module, datamodule=Data())
    module.model.save_pretrained(tmp_path / "out")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "no", 1: "yes"}


def test_another_number_of_labels_than_the_tasks_is_refused(folder):
    with pytest.raises(FiftyfoldError, match="label"):
        trainer().fit(FineTuningModule(folder, num_labels=3), datamodule=Data())


def test_a_head_of_another_size_is_made_anew_and_the_rest_is_kept(folder):
    module = FineTuningModule(folder, num_labels=1)
    assert module.model.classifier.weight.shape == (1, 32)
    assert module.model.config.problem_type == "regression"
    assert same_weights(module.model.bert, tiny_bert().bert)


def test_regression(folder):
    module = FineTuningModule(folder, num_labels=1)
    run = trainer()
    run.fit(module, loader(labels=1), loader(2, labels=1))
    assert "val/pearson" in run.callback_metrics
    assert trainer().predict(module, loader(1))[0].shape == (4,)
    logits, labels = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 4])
    assert label_loss(logits, labels).item() == pytest.approx((1 + 4) / 2)


def test_predictions_are_classes(folder):
    module = FineTuningModule(folder)
    (predicted,) = trainer().predict(module, loader(1))
    assert torch.equal(predicted, module.eval()(tiny_batch()).argmax(-1))


def test_a_split_without_labels_is_refused(folder):
    batch = tiny_batch()
    del batch["labels"]
    with pytest.raises(FiftyfoldError, match="predict"):
        trainer().test(FineTuningModule(folder), DataLoader([batch], batch_size=None))


def test_a_loss_that_is_no_number_stops_the_training(folder):
    module = FineTuningModule(folder, warmup=0.0, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e30))
    with pytest.raises(FiftyfoldError, match="at step 1"):
        trainer().fit(module, loader())


def test_an_accelerator_run_does_not_end_well_after_its_last_losses(folder, monkeypatch):
    class OnAccelerator(torch.Tensor):
        device = torch.device("cuda")

    note = FiniteLossGuard.note
    monkeypatch.setattr(
        FiniteLossGuard, "note", lambda guard, loss, step: note(guard, loss.detach().as_subclass(OnAccelerator), step)
    )
    module = FineTuningModule(folder, warmup=0.0, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e30))
    with pytest.raises(FiftyfoldError, match="at step 1"):
        trainer().fit(module, loader())


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FiftyfoldError, match="nowhere"):
        FineTuningModule(str(tmp_path / "nowhere"))
    with pytest.raises(FiftyfoldError, match="cannot be loaded"):
        FineTuningModule(str(tmp_path))


@pytest.mark.parametrize("length", [1000, -1000])
def test_a_truncated_file_is_one_sentence(folder, length):
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(FiftyfoldError, match="cannot be loaded"):
        FineTuningModule(folder)


def test_a_teacher_without_a_classifier_of_its_own_is_refused(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "headless")
    FineTuningModule(str(tmp_path / "headless"))
    with pytest.raises(FiftyfoldError, match="classifier"):
        load_teacher(str(tmp_path / "headless"))
    assert same_weights(load_teacher(folder), tiny_bert())


def test_a_backbone_with_missing_weights_is_refused(folder):
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "pooler" in name or name.startswith("classifier")]:
        del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    FineTuningModule(folder)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FiftyfoldError, match=r"lacks 1 weights of its backbone, such as 'bert.encoder.layer.1.output"):
        FineTuningModule(folder)


def test_an_exported_folder_with_nothing_packed_trains_in_float32(tmp_path):
    export(tiny_bert(), tmp_path / "plain")
    module = FineTuningModule(str(tmp_path / "plain"))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())
    before = module.model.classifier.weight.clone()
    fit(module, steps=1)
    assert not torch.equal(module.model.classifier.weight, before)
    module.model.save_pretrained(tmp_path / "again")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "again"), "quantization_config")
    assert DistillationModule(str(tmp_path / "plain")).student.dtype == torch.float32


@pytest.mark.parametrize("arguments", [{"warmup": 1.0}, {"warmup": -0.1}, {"weight_decay": -1.0}])
def test_impossible_arguments_are_refused(folder, arguments):
    with pytest.raises(FiftyfoldError, match=next(iter(arguments))):
        FineTuningModule(folder, **arguments)


def test_distilbert_is_spared_token_types():
    batch = tiny_batch()
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    assert "token_type_ids" not in model_inputs(tiny_model("distilbert"), batch)
    assert "token_type_ids" in model_inputs(tiny_bert(), batch)


def test_a_checkpoint_loads_with_plain_hyperparameters(folder, tmp_path):
    module = FineTuningModule(folder, optimizer=sgd, warmup=0.3)
    fit(module).save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert json.loads(json.dumps(content["hyper_parameters"])) == {
        "model": folder,
        "num_labels": None,
        "weight_decay": 0.01,
        "warmup": 0.3,
    }
    assert same_weights(FineTuningModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True), module)


def test_the_best_checkpoint_is_chosen_by_the_score(folder, tmp_path):
    keeper = ModelCheckpoint(tmp_path, monitor="val/score", mode="max")
    run = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keeper])
    run.fit(FineTuningModule(folder), datamodule=Data())
    assert keeper.best_model_score is not None


def test_the_optimizer_comes_from_the_command_line(folder, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model:
  class_path: fiftyfold.modules.FineTuningModule
  init_args:
    model: {folder}
    weight_decay: 0.05
    optimizer:
      class_path: bitsandbytes.optim.AdamW8bit
      init_args: {{lr: 0.001, min_8bit_size: 16}}
data:
  class_path: tests.modules.test_fine_tuning.Data
trainer:
  max_steps: 2
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
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer).__name__ == "AdamW8bit"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert optimizer.param_groups[0]["initial_lr"] == 0.001
    assert any(
        value.dtype == torch.uint8
        for value in optimizer.state[optimizer.param_groups[0]["params"][0]].values()
        if isinstance(value, torch.Tensor)
    )
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    stored = torch.load(tmp_path / "cli.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["optimizer"]["class_path"] == "bitsandbytes.optim.AdamW8bit"
    json.dumps(stored)
    loaded = FineTuningModule.load_from_checkpoint(tmp_path / "cli.ckpt")
    assert same_weights(loaded, cli.model)


def test_a_model_is_scored_as_it_is_and_not_stored(bert):
    module = FineTuningModule(bert)
    assert module.trained_model is bert
    assert "model" not in module.hparams
