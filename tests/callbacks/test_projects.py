"""Other people's projects take our callbacks, and stand beside other people's callbacks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn

import fiftyfold
from fiftyfold.callbacks import LayerPruning, LayerReduction, QuantizationAwareTraining, RandomStates
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import load_from_checkpoint, reduce_layers
from fiftyfold.modules.quantization.layers import quantized_layers
from fiftyfold.modules.structure import compression_root, structure_log
from tests.projects import GPT2, INPUTS, PROJECTS, Regression, Vision
from tests.strangers import STEPS, OddUser, assert_same_tensors, assert_same_training, make_trainer

QUIET = {"num_sanity_val_steps": 0, "limit_val_batches": 1}


def compressing(module_class: type) -> list[Callback]:
    """Everything that the module's structure allows."""
    callbacks: list[Callback] = [QuantizationAwareTraining({2: 4, 5: 1})]
    if module_class is Vision:
        callbacks += [LayerReduction(keep=3, start=3), LayerPruning({4: 1}, measure_steps=1)]
    if module_class is GPT2:
        callbacks += [LayerReduction(keep=2, start=3)]
    return callbacks


def whole(module: Any) -> Any:
    """The module as its project hands it to the Trainer."""
    return torch.compile(module, backend="eager") if isinstance(module, Regression) else module


@pytest.mark.parametrize("module_class", PROJECTS)
def test_the_whole_way(module_class, tmp_path):
    trainer = make_trainer(compressing(module_class), tmp_path)
    trainer.fit(whole(module_class(seed=0)))
    module = trainer.lightning_module
    scores = trainer.test(module, verbose=False)
    steps = sorted(int(path.stem.split("=")[1]) for path in tmp_path.glob("step=*.ckpt"))
    # Compiling takes seconds a time.
    for step in steps[3:4] if module_class is Regression else steps[:-1]:
        resumed = make_trainer(compressing(module_class))
        resumed.fit(whole(module_class(seed=1)), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_training(trainer, resumed, f"{module_class.__name__}, resumed from step {step}")
    last = tmp_path / f"step={steps[-1]}.ckpt"
    for tester in (make_trainer(compressing(module_class)), make_trainer([QuantizationAwareTraining()])):
        assert tester.test(module_class(seed=1), ckpt_path=last, verbose=False) == scores
    loaded = load_from_checkpoint(module_class, last, seed=1)
    assert_same_tensors(module.state_dict(), loaded.state_dict(), "loaded")
    with pytest.raises(RuntimeError, match="fiftyfold_structure"):
        module_class.load_from_checkpoint(last, seed=1)
    _export_and_reload(loaded, tmp_path / "small")


def _export_and_reload(module: Any, folder: Any) -> None:
    name = type(module).__name__
    if name == "GPT2":
        fiftyfold.export(module.lm, folder, rest_dtype="float32")
        reloaded: nn.Module = fiftyfold.load(folder)
        inputs: tuple[Any, ...] = (torch.randint(3, 40, (2, 8)),)
        expected, found = module.lm.eval()(*inputs).logits, reloaded(*inputs).logits
    else:
        inputs = INPUTS[name]()
        fiftyfold.export(module, folder, rest_dtype="float32", example=inputs)
        reloaded = fiftyfold.load(folder, into=type(module)(seed=2))
        expected, found = module.eval()(*inputs), reloaded(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_convolutions_are_left_alone_and_it_is_said(caplog):
    module = Vision()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer([QuantizationAwareTraining(activation_bits=None)]).fit(module)
    assert "left alone: 5 Conv2d." in caplog.text
    assert {name for name, _ in quantized_layers(module)} == {*(f"blocks.{i}.gate" for i in range(4)), "head"}
    assert all(type(child) is nn.Conv2d for child in module.modules() if isinstance(child, nn.Conv2d))


def test_tied_weights_stay_tied_and_are_quantized_together():
    module = PROJECTS[1]()
    make_trainer([QuantizationAwareTraining(targets="items")]).fit(module)
    assert module.scores.weight is module.items.weight
    assert {name for name, _ in quantized_layers(module)} == {"items", "scores"}


PAIRS: dict[str, Callable[[], list[Callback]]] = {
    "early stopping": lambda: [EarlyStopping("loss", patience=9)],
    "average, every second step": lambda: [EMAWeightAveraging(decay=0.9, update_every_n_steps=2)],
    "random states": lambda: [RandomStates()],
}


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("module_class", [Vision, GPT2])
def test_other_callbacks_alongside(pair, first, module_class, tmp_path):
    def callbacks():
        return [*PAIRS[pair](), *compressing(module_class)] if first else [*compressing(module_class), *PAIRS[pair]()]

    options = {**QUIET, "gradient_clip_val": 0.5}
    trainer = make_trainer(callbacks(), tmp_path, **options)
    trainer.fit(module_class(seed=0))
    for step in (2, 4, 6):
        resumed = make_trainer(callbacks(), **options)
        resumed.fit(module_class(seed=1), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_training(trainer, resumed, f"{pair}, resumed from step {step}")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("module_class", [Vision, GPT2])
def test_stochastic_averages_follow(first, module_class, tmp_path):
    """Lightning's own resume of this callback is not exact, with or without ours; the model that it ends with is."""
    average, ours = StochasticWeightAveraging(1e-2, swa_epoch_start=1), compressing(module_class)
    trainer = make_trainer([average, *ours] if first else [*ours, average], tmp_path, **QUIET)
    trainer.fit(module_class(seed=0))
    module, copied = trainer.lightning_module, average._average_model
    assert structure_log(compression_root(copied)) == structure_log(compression_root(module))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, copied.get_parameter(name)), "training ends with the averaged weights"
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    scores = trainer.test(module, verbose=False)
    again = make_trainer(ours).test(module_class(seed=1), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert again == scores


def test_the_best_checkpoints_are_kept_across_operations(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", filename="{step}", monitor="loss", save_top_k=2, save_last=True)
    callbacks = [LayerReduction(start=2), QuantizationAwareTraining(start=5), best]
    trainer = make_trainer(callbacks, tmp_path, val_check_interval=2, **QUIET)
    trainer.fit(OddUser())
    assert len(best.best_k_models) == 2
    for path in (*best.best_k_models, best.last_model_path):
        loaded = load_from_checkpoint(OddUser, path, seed=1)
        assert_same_tensors(dict(torch.load(path)["state_dict"]), loaded.state_dict(), path)


@pytest.mark.parametrize("activation_range", ["dynamic", "static"])
def test_an_earlier_checkpoint_can_be_tested_where_only_quantizers_came_since(activation_range, tmp_path):
    def callbacks():
        return [QuantizationAwareTraining({2: 4, 5: 1}, activation_range=activation_range)]

    trainer = make_trainer(callbacks(), tmp_path)
    module = OddUser()
    trainer.fit(module)
    for step in (STEPS, 6, 4, 1):
        path = tmp_path / f"step={step}.ckpt"
        fresh = make_trainer(callbacks()).test(OddUser(seed=1), ckpt_path=path, verbose=False)
        assert trainer.test(module, ckpt_path=path, verbose=False) == fresh, step
    assert structure_log(module) == []
    make_trainer(callbacks()).fit(module)
    earlier = torch.load(tmp_path / "step=4.ckpt")["state_dict"]
    with pytest.raises(FiftyfoldError, match="changed in another way"):
        # Only a Trainer's evaluation looks back.
        module.load_state_dict(earlier)


def test_an_earlier_checkpoint_with_other_layers_wants_a_fresh_module(tmp_path):
    trainer = make_trainer([LayerReduction(start=4)], tmp_path)
    trainer.fit(OddUser())
    with pytest.raises(FiftyfoldError, match="into a fresh model"):
        trainer.test(ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    trainer.test(OddUser(seed=1), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)


def test_masks_of_pruning_are_refused():
    with pytest.raises(FiftyfoldError, match="in a run of its own"):
        make_trainer([ModelPruning("l1_unstructured", amount=0.5), QuantizationAwareTraining()]).fit(OddUser())


def test_attention_scaled_by_the_number_of_its_layer():
    module = GPT2()
    for layer in module.lm.transformer.h:
        layer.attn.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(FiftyfoldError, match="scale_attn_by_inverse_layer_idx"):
        reduce_layers(module.lm, [0, 2])
    assert len(module.lm.transformer.h) == 4
    reduce_layers(module.lm, [0, 1])
    assert structure_log(compression_root(module))[0]["layers"] == [0, 1]


def test_monitors_see_the_rates(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    trainer = make_trainer([LearningRateMonitor(), *compressing(Vision)])
    trainer.loggers = [CSVLogger(tmp_path)]
    trainer.fit(Vision())
