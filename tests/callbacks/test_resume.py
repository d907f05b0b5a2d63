"""A run that stops at any optimizer step goes on as if it had never stopped, bit by bit."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from fiftyfold.callbacks import LayerPruning, LayerReduction, QuantizationAwareTraining
from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.path import use_path
from fiftyfold.modules.structure import compression_root, structure_log
from tests.cases import CASES
from tests.strangers import (
    MODULES,
    STEPS,
    BertUser,
    OddUser,
    assert_same_tensors,
    assert_same_training,
    make_trainer,
)

ALL_TOGETHER = CASES[-1]


@pytest.mark.parametrize("module_class", MODULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_resume_from_every_step(case, module_class, tmp_path):
    whole = make_trainer(case.callbacks(), tmp_path)
    whole.fit(module_class(seed=0))
    for step in range(1, STEPS):
        resumed = make_trainer(case.callbacks())
        # Another seed: nothing of the result may come from the fresh module's own weights.
        resumed.fit(module_class(seed=1), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_training(whole, resumed, f"{case}, resumed from step {step}")


@pytest.mark.parametrize("module_class", MODULES)
def test_accumulated_gradients_survive_an_operation(module_class, tmp_path):
    """Operations fall between optimizer steps; one in the middle would drop half of a step's gradient."""

    def callbacks():
        return [LayerReduction(keep=3, start=1), LayerPruning({3: 1}), QuantizationAwareTraining(start=2)]

    whole = make_trainer(callbacks(), tmp_path, accumulate_grad_batches=2)
    whole.fit(module_class(seed=0))
    assert [entry["step"] for entry in structure_log(compression_root(whole.lightning_module))] == [1, 2, 3]
    for step in range(1, STEPS // 2):
        resumed = make_trainer(callbacks(), accumulate_grad_batches=2)
        resumed.fit(module_class(seed=1), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_training(whole, resumed, f"resumed from step {step}")


@pytest.mark.parametrize("module_class", MODULES)
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights(module_class, first, tmp_path):
    """The averaging callback copies the model, saves the copy in its place, and swaps the two to validate."""

    def callbacks():
        average, ours = EMAWeightAveraging(decay=0.5), ALL_TOGETHER.callbacks()
        return [average, *ours] if first else [*ours, average]

    whole = make_trainer(callbacks(), tmp_path, limit_val_batches=1, num_sanity_val_steps=0)
    whole.fit(module_class(seed=0))
    for step in range(1, STEPS):
        resumed = make_trainer(callbacks(), limit_val_batches=1, num_sanity_val_steps=0)
        resumed.fit(module_class(seed=1), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_training(whole, resumed, f"resumed from step {step}")


@pytest.mark.parametrize("module_class", MODULES)
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_can_be_tested(module_class, weights_only, tmp_path):
    """Weights-only files hold no state of any callback; the log travels with the weights."""
    trainer = make_trainer(ALL_TOGETHER.callbacks(), tmp_path, weights_only=weights_only)
    trainer.fit(module_class(seed=0))
    trained = trainer.test(trainer.lightning_module, verbose=False)
    again = make_trainer(ALL_TOGETHER.callbacks())
    fresh = module_class(seed=1)
    assert again.test(fresh, ckpt_path=tmp_path / f"step={STEPS}.ckpt", verbose=False) == trained
    assert_same_tensors(trainer.lightning_module.state_dict(), fresh.state_dict(), "tested")


@pytest.mark.slow
def test_compiled(tmp_path):
    """The compiled graph must notice the quantizers, the dropped layers and the meter."""

    def callbacks():
        return [QuantizationAwareTraining(start=2), LayerPruning({4: 3}, measure_steps=1)]

    whole = make_trainer(callbacks(), tmp_path)
    whole.fit(torch.compile(OddUser(seed=0), backend="aot_eager"))
    resumed = make_trainer(callbacks())
    resumed.fit(torch.compile(OddUser(seed=1), backend="aot_eager"), ckpt_path=tmp_path / "step=3.ckpt")
    assert_same_training(whole, resumed, "compiled, resumed from step 3")
    plain = make_trainer(callbacks())
    with use_path("reference"):  # what a compiler sees through
        plain.fit(OddUser(seed=0))
    # The log holds what pruning measured, to the last digit.
    assert _choices(whole.lightning_module) == _choices(plain.lightning_module)
    for name, value in plain.lightning_module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(whole.lightning_module.state_dict()[name], value, msg=name)


def _choices(module):
    return [{**entry, "importance": None} for entry in structure_log(compression_root(module))]


def test_compiled_part(tmp_path):
    """Compiling a part of the model puts ``_orig_mod`` into the names of the state dict, not into those of the log."""

    def module(seed):
        user = OddUser(seed)
        user.net = torch.compile(user.net, backend="eager")
        return user

    whole = make_trainer(ALL_TOGETHER.callbacks(), tmp_path)
    whole.fit(module(0))
    assert "_orig_mod" not in str(structure_log(whole.lightning_module))
    resumed = make_trainer(ALL_TOGETHER.callbacks())
    resumed.fit(module(1), ckpt_path=tmp_path / "step=4.ckpt")
    assert_same_training(whole, resumed, "compiled part")


def test_a_callback_may_be_added_or_left_out_at_a_resume(tmp_path):
    make_trainer([LayerReduction(start=2)], tmp_path).fit(BertUser(seed=0))
    added = make_trainer([QuantizationAwareTraining(start=3)], tmp_path / "added")
    added.fit(BertUser(seed=1), ckpt_path=tmp_path / "step=5.ckpt")
    log = structure_log(compression_root(added.lightning_module))
    assert [(entry["op"], entry["step"]) for entry in log] == [("reduce_layers", 2), ("quantize", 5)]
    resumed = make_trainer([LayerReduction(start=2), QuantizationAwareTraining(start=3)])
    resumed.fit(BertUser(seed=2), ckpt_path=tmp_path / "added" / "step=6.ckpt")
    assert_same_training(added, resumed, "resumed with both")


def test_a_second_fit_repeats_nothing_and_says_so(tmp_path, recwarn):
    def told():
        return [str(each.message) for each in recwarn if "earlier run, and is skipped" in str(each.message)]

    module = BertUser()
    callbacks = [LayerReduction(start=2), QuantizationAwareTraining({0: 8, 3: 1})]
    first = make_trainer(callbacks, tmp_path)
    first.fit(module)
    first.fit_loop.max_epochs += 1
    first.fit(module)
    make_trainer(callbacks).fit(BertUser(), ckpt_path=tmp_path / "step=4.ckpt")
    assert not told(), "a run that goes on repeats nothing either, as is expected"
    make_trainer(callbacks).fit(module)
    assert len(module.model.bert.encoder.layer) == 2
    names = ("LayerReduction('every-other')", "QuantizationAwareTraining(8)", "QuantizationAwareTraining(1)")
    assert [message.partition(" was done")[0] for message in told()] == list(names)


def test_a_checkpoint_that_was_tested_leaves_no_trace_in_the_next_fit(tmp_path):
    def callbacks():
        return [LayerReduction(start=4), LayerPruning({6: 1})]

    first = make_trainer(callbacks(), tmp_path)
    first.fit(OddUser(seed=0))
    used = callbacks()
    make_trainer(used).test(OddUser(seed=1), ckpt_path=tmp_path / f"step={STEPS}.ckpt", verbose=False)
    second = make_trainer(used)
    second.fit(OddUser(seed=0))
    assert_same_training(first, second, "after a test")


def test_a_checkpoint_changed_otherwise_is_refused(tmp_path):
    make_trainer([LayerReduction(start=1)], tmp_path).fit(BertUser(seed=0))
    changed = BertUser(seed=1)
    make_trainer([LayerReduction("first", start=1)]).fit(changed)
    with pytest.raises(FiftyfoldError, match="changed in another way"):
        make_trainer([LayerReduction(start=1)]).fit(changed, ckpt_path=tmp_path / "step=3.ckpt")
