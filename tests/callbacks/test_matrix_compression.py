"""Calibrating in the middle of a run, and what the run notices of it."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fiftyfold.callbacks import MatrixCompression, QuantizationAwareTraining
from fiftyfold.callbacks.calibration_loader import undisturbed
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import compress_matrices, export
from fiftyfold.modules.journal import Journal
from fiftyfold.modules.sizes import model_size
from fiftyfold.modules.structure import compression_root, structure_log
from fiftyfold.modules.tensor_network.layers import TensorNetworkLayer
from tests.ranks import run_on_ranks
from tests.strangers import BertUser, OddUser, assert_same_tensors, assert_same_training, make_trainer
from tests.tiny import tiny_batch


class Classifier(LightningModule):
    """Reads pairs from a loader that it is given, and sees them in an order of its own."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(x[:, 0].tolist())
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pairs():
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(32, 6, generator=generator), torch.arange(32) % 3)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pairs())


BITS = ({}, {"factor_bits": 8}, {"factor_bits": 8, "whole_bits": (4,)})

LOADERS = {
    "shuffled by the global numbers": lambda: DataLoader(pairs(), batch_size=8, shuffle=True),
    "shuffled by its own": lambda: DataLoader(
        pairs(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "a stream": lambda: DataLoader(Stream(), batch_size=8),
    "batches of its own": lambda: DataLoader([tuple(pairs()[at : at + 8]) for at in (0, 8, 16, 24)], batch_size=None),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=list(LOADERS))
def test_the_run_goes_on_as_if_nothing_had_been_read(loader):
    def fit(callbacks):
        torch.manual_seed(11)
        module = Classifier()
        make_trainer(callbacks, limit_train_batches=1.0).fit(module, loader())
        return module

    plain, compressed = fit([]), fit([MatrixCompression(0.9, batches=2, start=5)])
    assert structure_log(compressed)[0]["step"] == 5
    trained = compressed.seen[:5] + compressed.seen[7:]
    assert trained == plain.seen, "the second pass draws no number and takes no batch from the first"


@pytest.mark.parametrize("injected", [True, False])
def test_each_process_calibrates_on_batches_of_its_own_where_lightning_would_share_them_out(injected):
    class Fed(Classifier):
        def train_dataloader(self):
            return DataLoader(pairs(), batch_size=8, shuffle=True)

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            with undisturbed(trainer) as loader:
                self.seen = [value for x, _ in loader for value in x[:, 0].tolist()]

    def body():
        look = Look()
        options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": injected, "max_steps": 1}
        make_trainer([look], max_epochs=-1, **options).fit(Fed())
        return look.seen

    first, second = run_on_ranks(body)
    every = sorted(pairs().tensors[0][:, 0].tolist())
    assert sorted(first + second) == (every if injected else sorted(every * 2))


def test_the_other_ranks_wait_longer_than_their_group_would():
    def body():
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=8))
        slow = MatrixCompression(0.6, batches=2)
        compress = slow._compress
        slow._compress = lambda *found: time.sleep(12) or compress(*found)
        module = BertUser()
        make_trainer([slow], max_steps=1, max_epochs=-1, strategy=strategy, devices=2).fit(module)
        return structure_log(module.model)

    first, second = run_on_ranks(body)
    assert first == second != []


def test_a_training_step_that_does_not_count_its_batches():
    class Plain(Classifier):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    module = Plain()
    make_trainer([MatrixCompression(0.9, batches=2)]).fit(module, DataLoader(pairs(), batch_size=8))
    assert structure_log(module)[0]["op"] == "compress_matrices"


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_it_is_the_plain_function_on_the_first_batches(bits):
    module, by_hand = BertUser(), BertUser()
    make_trainer([MatrixCompression(0.6, batches=3, **bits)], max_steps=1, max_epochs=-1).fit(module)
    compress_matrices(by_hand.model, [tiny_batch(10 * at, vocab=50) for at in range(3)], 0.6, **bits)
    log = structure_log(module.model)
    assert len({entry.pop("by") for entry in log}) == 1
    assert log == structure_log(by_hand.model)


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_an_average_of_the_weights_gets_the_values_too(bits):
    module, average = OddUser(), EMAWeightAveraging(decay=0.0)
    make_trainer([MatrixCompression(0.7, batches=2, start=3, **bits), average]).fit(module)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values() if value.is_floating_point())
    assert any(isinstance(layer, TensorNetworkLayer) for layer in module.modules())
    averaged = average._average_model.module
    assert structure_log(compression_root(averaged)) == structure_log(compression_root(module))
    assert_same_tensors(averaged.state_dict(), module.state_dict(), "an average that forgets all but the last")


def test_what_cannot_follow_few_bits_is_refused_before_the_training():
    first, second = (
        MatrixCompression(0.6, batches=2, factor_bits=8, targets=t, start=s) for t, s in (("up", 0), ("down", 5))
    )
    module = OddUser()
    with pytest.raises(FiftyfoldError, match="cannot follow 'quantize'"):
        make_trainer([first, second]).fit(module)
    assert structure_log(compression_root(module)) == []


def test_the_size_that_is_foretold_is_the_files(tmp_path):
    model = BertUser().model
    batches = [tiny_batch(10 * at, vocab=50) for at in range(2)]
    compress_matrices(model, batches, 0.45, factor_bits=8, whole_bits=(4,))
    foretold = model_size(model).bytes
    export(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith("pivots") for name in tensors)
    assert foretold == sum(tensor.nbytes for tensor in tensors.values())


def test_layers_of_few_bits_get_no_others():
    few_bits = MatrixCompression(0.6, batches=2, whole_bits=(4,))
    with pytest.raises(FiftyfoldError, match="exclude it from QuantizationAwareTraining"):
        make_trainer([few_bits, QuantizationAwareTraining(8, start=2)]).fit(OddUser())
    module = OddUser()
    make_trainer([few_bits, QuantizationAwareTraining(8, start=2, exclude=r"layers\.")]).fit(module)
    assert [entry["op"] for entry in structure_log(module)] == ["compress_matrices", "quantize", "quantize"]


def test_what_has_few_bits_is_told_of(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer([MatrixCompression(0.3, batches=2, whole_bits=(3,))]).fit(OddUser())
    assert "compressed 12 layers (12 of them whole, in few bits) to 2" in caplog.text
    assert "MatrixCompression: compressed 12 of 12 matrices." in caplog.text


def test_a_run_goes_on_in_which_every_matrix_stayed_whole(tmp_path):
    def callbacks():
        return [MatrixCompression(0.3, batches=2, whole_bits=(3,), targets=r"layers\.", start=2)]

    whole = make_trainer(callbacks(), tmp_path)
    whole.fit(OddUser())
    assert not any(isinstance(layer, TensorNetworkLayer) for layer in whole.lightning_module.modules())
    for step in (1, 3, 6):
        resumed = make_trainer(callbacks())
        resumed.fit(OddUser(seed=1), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_training(whole, resumed, f"resumed from step {step}")


def test_a_run_that_was_killed_while_it_compressed_goes_on_there(tmp_path, monkeypatch):
    def fit(folder):
        module = OddUser()
        trainer = make_trainer([MatrixCompression(0.7, batches=2, start=2, work_folder=folder)])
        trainer.fit(module)
        return trainer

    whole, added, add = fit(None), [], Journal.add

    def cut(self, key, *found):
        if len(added) == 20:
            raise RuntimeError("killed")
        added.append(key)
        add(self, key, *found)

    folder = str(tmp_path / "matrices")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", cut)
        with pytest.raises(RuntimeError, match="killed"):
            fit(folder)
    monkeypatch.setattr(Journal, "add", lambda self, key, *found: add(self, key, *found) or added.append(key))
    assert_same_training(whole, fit(folder), "a run that was begun again")
    assert len(added) == len(set(added)) > 20, "nothing is found twice"
    with pytest.raises(FiftyfoldError, match="holds work on another model or text"):
        make_trainer([MatrixCompression(0.6, batches=2, start=2, work_folder=folder)]).fit(OddUser())
    both = [
        MatrixCompression(0.7, batches=2, targets=t, start=s, work_folder=folder) for t, s in (("up", 0), ("down", 3))
    ]
    with pytest.raises(FiftyfoldError, match="share the work folder"):
        make_trainer(both).fit(OddUser())


def test_what_is_compressed_already_is_not_compressed_again(tmp_path):
    first = make_trainer([MatrixCompression(0.7, batches=2)], tmp_path)
    first.fit(OddUser())
    again = make_trainer([MatrixCompression(0.7, batches=2)], max_epochs=3)
    again.fit(OddUser(seed=1), ckpt_path=tmp_path / "step=4.ckpt")
    assert len(structure_log(compression_root(again.lightning_module))) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": 1.5}, "between 0 and 1"),
        ({"batches": 0}, "at least 1"),
        ({"allocation": "fair"}, "allocation must be one of"),
        ({"families": ["tucker"]}, "families must be some of"),
        ({"factor_bits": 4}, "factor_bits must be 8 or 16"),
        ({"whole_bits": [1]}, "whole_bits must be some of 3, 4 and 8"),
    ],
    ids=str,
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(FiftyfoldError, match=words):
        MatrixCompression(**arguments)


def test_a_loader_that_may_not_be_read_twice():
    class Own:
        def __iter__(self):
            return iter([])

        def __len__(self):
            return 1

    class Fed(Own):
        def __iter__(self):
            yield from DataLoader(pairs(), batch_size=8)

    with pytest.raises(FiftyfoldError, match="may not be read twice"):
        make_trainer([MatrixCompression(0.9)], limit_train_batches=1.0).fit(Classifier(), Fed())


def test_layers_in_parts_that_are_called_apart():
    class Apart(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0]
            for layer in self.net:
                x = layer(x)
            return x.sum()

    module = Apart()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(FiftyfoldError, match="calls no module that holds all"):
        make_trainer([MatrixCompression(0.9)]).fit(module, DataLoader(pairs(), batch_size=8))
    assert_same_tensors(before, module.state_dict(), "refused")
