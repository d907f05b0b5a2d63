"""LightningModules that build, optimize and hold their models in ways of their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader

from fiftyfold.callbacks import LayerPruning, LayerReduction, QuantizationAwareTraining
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import load_from_checkpoint
from fiftyfold.modules.structure import STATE_KEY, compression_root, replaying, structure_log
from tests.cases import CASES
from tests.strangers import STEPS, BertUser, OddUser, _Net, assert_same_tensors, assert_same_training, make_trainer
from tests.tiny import tiny_batch, tiny_bert

ALL_TOGETHER = CASES[-1]


class LateBuilder(OddUser):
    """Its layers do not exist when callbacks are set up."""

    def __init__(self, seed=0):
        super().__init__(seed)
        del self.net, self.blocks

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = _Net(8)


class EarlyOptimizer(OddUser):
    """Its optimizer holds the parameters of the untouched model, as the one that LightningCLI builds does."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.early = [super().configure_optimizers()]

    def configure_optimizers(self):
        return self.early[0]


class Manual(OddUser):
    """Two optimizers, stepped by hand; one trains a tensor that belongs to no module."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.automatic_optimization = False
        self.outside = [nn.Parameter(torch.ones(()))]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * self.outside[0]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        layers = torch.optim.SGD([*self.outside, *self.net.layers.parameters()], lr=1e-2, momentum=0.9)
        return [layers, torch.optim.Adam([*self.net.embed.parameters(), *self.net.head.parameters()], lr=1e-2)]


class WhollySaved(Manual):
    """Its state dict has the foreign tensor too."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.scale = self.outside[0]


class Seldom(Manual):
    """Steps by hand after every second batch."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(OddUser.training_step(self, batch, batch_idx))
        if batch_idx % 2:
            self.optimizers()[1].step()
            self.optimizers()[1].zero_grad()


class Growing(OddUser):
    """Has more batches in each epoch."""

    def train_dataloader(self):
        return DataLoader(range(2 * (1 + self.trainer.current_epoch)), batch_size=1)


class _Places(Callback):
    """Notes before which batch of which epoch the number of layers changed."""

    def __init__(self):
        self.layers, self.places = 6, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(pl_module.net.layers) < self.layers:
            self.layers = len(pl_module.net.layers)
            self.places.append((trainer.current_epoch, batch_idx))


class WithTeacher(BertUser):
    """Holds a frozen transformers model, larger than the one that it trains."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.teacher = tiny_bert(layers=6, hidden=32, vocab=50, seed=seed).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        inputs = tiny_batch(self.seed_of(batch_idx), vocab=50)
        return nn.functional.mse_loss(self.model(**inputs).logits, self.teacher(**inputs).logits)


@pytest.mark.parametrize("module_class", [LateBuilder, EarlyOptimizer, WithTeacher])
def test_resume(module_class, tmp_path):
    whole = make_trainer(ALL_TOGETHER.callbacks(), tmp_path)
    whole.fit(module_class(seed=0))
    for step in (2, 4, 6, 7):
        resumed = make_trainer(ALL_TOGETHER.callbacks())
        resumed.fit(module_class(seed=1), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_training(whole, resumed, f"resumed from step {step}")


def test_optimizers_stepped_by_hand():
    """Each of the two counts in ``global_step``; what was dropped leaves the one, what is foreign stays."""
    trainer = make_trainer([LayerReduction(start=4)])
    module = Manual()
    trainer.fit(module)
    held = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert held[0] is module.outside[0]
    assert {id(parameter) for parameter in held[1:]} == {id(parameter) for parameter in module.net.layers.parameters()}


UNEVEN = {
    "two optimizers": (Manual, {}),
    "a step by hand every second batch": (Seldom, {}),
    "accumulation that changes": (OddUser, {"callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 4})]}),
    "epochs that grow": (Growing, {"limit_train_batches": 1.0, "reload_dataloaders_every_n_epochs": 1}),
}


@pytest.mark.parametrize("how", UNEVEN)
def test_epochs_and_shares_do_not_hang_on_the_number_of_steps(how):
    """What the Trainer expects is wrong here, and nothing is measured if the measuring waits for it."""
    module_class, options = UNEVEN[how]
    others = options.get("callbacks", list)()
    places = _Places()
    options = {name: value for name, value in options.items() if name != "callbacks"}
    pruning = LayerPruning({"epoch:1": 1, "fraction:0.75": 1}, measure_steps=1)
    make_trainer([pruning, places, *others], max_epochs=4, **options).fit(module_class())
    assert places.places == [(1, 0), (3, 0)]


@pytest.mark.parametrize("module_class", [WhollySaved, Seldom])
def test_resume_with_steps_by_hand(module_class, tmp_path):
    def callbacks():
        return [LayerPruning({"epoch:1": 1, "fraction:0.75": 1}, measure_steps=1), QuantizationAwareTraining(start=0.5)]

    whole = make_trainer(callbacks(), tmp_path)
    whole.fit(module_class(seed=0))
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) > 2
    for path in saved[:-1]:
        resumed = make_trainer(callbacks())
        resumed.fit(module_class(seed=1), ckpt_path=path)
        assert_same_training(whole, resumed, f"resumed from {path.stem}")


def test_bits_that_were_overtaken_are_left_out():
    """Steps by hand do not tell beforehand whether an epoch or a step comes first."""
    module = Seldom()
    with pytest.warns(UserWarning, match=r"QuantizationAwareTraining\(4\), due at step:3, was not carried out"):
        make_trainer([QuantizationAwareTraining({0: 8, 3: 4, "epoch:1": 1})]).fit(module)
    assert [entry["settings"][0]["weight"]["bits"] for entry in structure_log(module)] == [8, 1]


def test_a_frozen_teacher_is_left_alone():
    module = WithTeacher()
    before = copy.deepcopy(module.teacher.state_dict())
    make_trainer(ALL_TOGETHER.callbacks()).fit(module)
    assert compression_root(module) is module.model
    assert_same_tensors(before, module.teacher.state_dict(), "the teacher")


def test_load_without_a_trainer(tmp_path):
    trainer = make_trainer(ALL_TOGETHER.callbacks(), tmp_path)
    trainer.fit(OddUser(seed=0))
    path = tmp_path / f"step={STEPS}.ckpt"
    loaded = load_from_checkpoint(OddUser, path, seed=1)
    assert_same_tensors(trainer.lightning_module.state_dict(), loaded.state_dict(), "loaded")
    assert structure_log(loaded) == structure_log(trainer.lightning_module)
    with pytest.raises(RuntimeError, match=STATE_KEY):
        OddUser.load_from_checkpoint(path, seed=1)


def test_copies_carry_their_own_log():
    module = BertUser()
    make_trainer([LayerReduction(start=1)]).fit(module)
    for twin in (copy.deepcopy(module.model), pickle.loads(pickle.dumps(module.model))):
        assert structure_log(twin) == structure_log(module.model)
        fresh = BertUser(seed=1).model
        with replaying():
            fresh.load_state_dict(twin.state_dict())
        assert_same_tensors(twin.state_dict(), fresh.state_dict(), "copy")


def test_another_model_is_refused(tmp_path):
    make_trainer([QuantizationAwareTraining()], tmp_path).fit(BertUser())
    with pytest.raises(FiftyfoldError, match="'model'"):
        make_trainer([QuantizationAwareTraining()]).fit(OddUser(), ckpt_path=tmp_path / "step=1.ckpt")
