"""What each method does to a model in training."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from fiftyfold.callbacks import LayerPruning, LayerReduction, QuantizationAwareTraining
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.layers import quantized_layers
from fiftyfold.modules.structure import compression_root, structure_log
from tests.cases import CASES
from tests.strangers import BATCHES, MODULES, STEPS, BertUser, OddUser, make_trainer


class _Watch(Callback):
    """Keeps the weights of each step, and checks what must hold after all of them."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in pl_module.parameters()), (
            "the optimizer trains the model's parameters"
        )
        known = {id(p) for p in pl_module.parameters()}
        assert all(id(p) in known for p in trainer.optimizers[0].state), "no moments of parameters that are gone"
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("module_class", MODULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_train(case, module_class):
    watch = _Watch()
    module = module_class()
    make_trainer([*case.callbacks(), watch]).fit(module)
    log = structure_log(compression_root(module))
    assert tuple((entry["op"], entry["step"]) for entry in log) == case.operations
    last, before = watch.weights[-1], watch.weights[-2]
    assert all(torch.isfinite(value).all() for value in last.values())
    names = [
        name for name, _ in compression_root(module).named_parameters() if "up.weight" in name or "query.weight" in name
    ]
    prefix = "model." if module_class is BertUser else ""
    assert names
    assert all(not torch.equal(last[prefix + name], before[prefix + name]) for name in names), "training goes on"


def test_nothing_happens_before_its_time():
    """Up to the operation, the run is the same as one without it, bit by bit."""
    plain, watched = _Watch(), _Watch()
    make_trainer([plain]).fit(OddUser())
    make_trainer([QuantizationAwareTraining(start=3), watched]).fit(OddUser())
    same = [
        all(torch.equal(value, other[name]) for name, value in one.items())
        for one, other in zip(plain.weights, watched.weights, strict=True)
    ]
    assert same == [True] * 3 + [False] * (STEPS - 3)


def test_learning_rates_go_on():
    """An operation restarts no schedule."""

    class Rates(Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_end(self, trainer, *_):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    plain, changed = Rates(), Rates()
    make_trainer([plain]).fit(BertUser())
    make_trainer([LayerReduction(start=3), changed]).fit(BertUser())
    assert plain.rates == changed.rates


def test_a_run_that_starts_reduced_is_a_run_of_the_reduced_model():
    from fiftyfold.modules import reduce_layers

    by_callback, by_hand = BertUser(), BertUser()
    make_trainer([LayerReduction([0, 3])]).fit(by_callback)
    reduce_layers(by_hand.model, [0, 3])
    make_trainer().fit(by_hand)
    for name, parameter in by_hand.model.named_parameters():
        assert torch.equal(parameter, by_callback.model.get_parameter(name)), name


def test_averaged_copy_follows():
    average = EMAWeightAveraging(decay=0.5)
    module = BertUser()
    make_trainer([average, LayerReduction(start=2), QuantizationAwareTraining(start=4)]).fit(module)
    copied = average._average_model.module.model
    assert structure_log(copied) == structure_log(module.model)
    assert len(copied.bert.encoder.layer) == 2
    assert dict(quantized_layers(copied)).keys() == dict(quantized_layers(module.model)).keys()


@pytest.mark.parametrize("first", [True, False])
def test_averaged_copy_uses_the_ranges_that_the_model_observed(first):
    """Averaged like weights, a range would creep up from nothing and clip all inputs meanwhile."""

    def callback():
        return QuantizationAwareTraining(activation_range="static", start=2)

    average, plain = EMAWeightAveraging(decay=0.999), OddUser()
    make_trainer([average, callback()] if first else [callback(), average]).fit(OddUser())
    make_trainer([callback()]).fit(plain)
    copied = dict(average._average_model.module.named_buffers())
    observed = {name: value for name, value in plain.named_buffers() if "activation" in name}
    assert observed
    for name, value in observed.items():
        torch.testing.assert_close(copied[name], value, msg=name)


def test_averaged_copy_has_the_same_integers():
    """At this decay, the average of an integer with itself is cut off below it."""
    module, average = BertUser(), EMAWeightAveraging(decay=0.9)
    module.register_buffer("numbers", torch.arange(200))
    make_trainer([average, QuantizationAwareTraining(start=2)]).fit(module)
    assert torch.equal(average._average_model.module.numbers, torch.arange(200))


def test_pruning_drops_what_does_nothing():
    module = BertUser()
    for name, parameter in module.model.bert.encoder.layer[1].named_parameters():
        if "output" in name and "LayerNorm" not in name:
            parameter.data.zero_()
    layers = list(module.model.bert.encoder.layer)
    make_trainer([LayerPruning({1: 1})]).fit(module)
    (entry,) = structure_log(module.model)
    assert entry["layers"] == [0, 2, 3]
    assert entry["importance"][1] == min(entry["importance"])
    assert list(module.model.bert.encoder.layer) == [layers[0], layers[2], layers[3]]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [LayerPruning({0: 1})], "step 0"),
        (lambda: [LayerPruning({1: 2, 2: 2})], "leave at least one"),
        (lambda: [LayerPruning({})], "schedule"),
        (lambda: [LayerPruning({4: 1, "epoch:1": 1})], "same optimizer step"),
        (lambda: [LayerPruning({2: 1}, measure_steps=0)], "measure_steps"),
        (lambda: [LayerReduction(keep=9)], "keep 1 to 4"),
        (lambda: [LayerReduction([4])], "no layer 4"),
        (lambda: [LayerReduction(keep=9, start=5)], "keep 1 to 4"),
        (lambda: [LayerReduction([0, 3], start=5), LayerPruning({3: 1})], "no layer 3"),
        (lambda: [LayerPruning({4: 2}), LayerReduction(start=2)], "leave at least one"),
        (lambda: [LayerReduction(start=2), LayerReduction(start=4)], "scheduled twice"),
        (lambda: [QuantizationAwareTraining({0: 2, 3: 8})], "step down"),
        (lambda: [QuantizationAwareTraining({0: 8}, start=3)], "leave start out"),
        (lambda: [QuantizationAwareTraining(targets="no such layer", start=5)], "no such layer"),
        (lambda: [QuantizationAwareTraining(5)], "5"),
        (lambda: [QuantizationAwareTraining(2), QuantizationAwareTraining(1, targets="query")], "exclude"),
    ],
)
def test_impossible_plans_are_refused_at_the_start(callbacks, message):
    watch = _Watch()
    with pytest.raises(FiftyfoldError, match=message):
        make_trainer([*callbacks(), watch]).fit(BertUser())
    assert not watch.weights


def test_what_never_comes_is_announced():
    with pytest.warns(UserWarning, match="never comes"):
        make_trainer([LayerReduction(start=STEPS)]).fit(BertUser())


class _Stop(Callback):
    def on_train_epoch_end(self, trainer, *_):
        trainer.should_stop = True


def test_what_an_early_stop_left_undone_is_told():
    told = rf"QuantizationAwareTraining\(1\), due at fraction:0.9, was not carried out: .* at step {BATCHES};"
    with pytest.warns(UserWarning, match=told):
        make_trainer([QuantizationAwareTraining({0: 8, "fraction:0.9": 1}), _Stop()]).fit(OddUser())


def test_what_was_done_is_not_told(recwarn):
    make_trainer([QuantizationAwareTraining({0: 8, "fraction:0.9": 1})]).fit(OddUser())
    assert not [each for each in recwarn if "was not carried out" in str(each.message)]


@pytest.mark.parametrize(
    ("callbacks", "bits"),
    [
        (lambda: [QuantizationAwareTraining({0: 8, "fraction:0.3": 4, "fraction:0.6": 1})], [4]),
        (lambda: [QuantizationAwareTraining({"fraction:0.3": 4, 0: 8})], [4]),
        (lambda: [LayerPruning({"fraction:0.3": 1}), QuantizationAwareTraining(2)], [2]),
    ],
)
def test_a_trial_run_is_too_short_for_a_schedule(callbacks, bits):
    module = OddUser()
    with pytest.warns(UserWarning, match=r"fast_dev_run.* left out|fast_dev_run leaves it out"):
        make_trainer(callbacks(), fast_dev_run=True).fit(module)
    assert [entry["settings"][0]["weight"]["bits"] for entry in structure_log(module)] == bits
