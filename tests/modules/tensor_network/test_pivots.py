"""The rows of a fixed gauge's identity blocks, whatever a training loop does to buffers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from lightning.fabric.utilities.load import _lazy_load
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from fiftyfold.modules import compress_matrices, tensorize
from fiftyfold.modules.tensor_network.form import balanced_form, low_rank_form
from fiftyfold.modules.tensor_network.layers import change_gauge, narrow_pivots, network_layers, widen_pivots
from fiftyfold.modules.tensor_network.pivots import PIVOTS, row_numbers, row_signs, stored_rows
from tests.strangers import BertUser, make_trainer
from tests.tiny import tiny_batch

AVERAGES = {
    "exponential": {"avg_fn": get_ema_avg_fn(0.9)},
    "exponential, slow": {"avg_fn": get_ema_avg_fn(0.9999)},
    "exponential, of lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "mean": {},
    "mean, of one": {"avg_fn": get_swa_avg_fn()},
    "mean, of lists": {"multi_avg_fn": get_swa_multi_avg_fn()},
}
CASTS = {
    "none": (),
    "float16": (torch.float16,),
    "bfloat16": (torch.bfloat16,),
    "there and back": (torch.bfloat16, torch.float16, torch.float32),
}


def fixed_model():
    """Its rows are many enough for a type of 16 bits not to hold them exactly in floating point."""
    model = nn.Sequential(nn.Linear(12, 5000))
    tensorize(model, 2, bond_dimension=11, split="low_rank")
    change_gauge(model[0], "fixed")
    return model


def rows_of(model):
    return [row_numbers(layer.get_buffer(PIVOTS)).tolist() for _, layer in network_layers(model)]


def state_in_integers(model, dtype):
    """Return what a file (int16) or an earlier version's training (int32) holds."""
    state = dict(model.state_dict())
    state[f"0.{PIVOTS}"] = row_numbers(state[f"0.{PIVOTS}"]).to(dtype)
    return state


@pytest.mark.parametrize("casts", CASTS.values(), ids=list(CASTS))
@pytest.mark.parametrize("options", AVERAGES.values(), ids=list(AVERAGES))
def test_averages_of_buffers_leave_them(options, casts):
    model = fixed_model()
    rows = rows_of(model)
    assert max(rows[0]) > 2048
    for dtype in casts:
        model.to(dtype)
    averaged = AveragedModel(model, use_buffers=True, **options)
    for _ in range(300):
        averaged.update_parameters(model)
    assert rows_of(averaged.module) == rows
    matrix, expected = averaged.module[0].dense_weight(), model[0].dense_weight()
    assert (matrix - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(decay=0.9), WeightAveraging()], ids=["exponential", "mean"])
def test_lightnings_averages_leave_them_without_a_callback_of_ours(averaging, tmp_path):
    module = BertUser()
    compress_matrices(module.model, [tiny_batch(1, vocab=50)], 0.45, factor_bits=8, allocation="uniform", sweeps=1)
    rows = rows_of(module)
    make_trainer([averaging], tmp_path).fit(module)
    assert rows_of(module) == rows
    assert rows_of(averaging._average_model.module) == rows


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_integers_are_loaded_into_training(dtype, assign):
    model, fresh = fixed_model(), fixed_model()
    state = state_in_integers(model, dtype)
    fresh.load_state_dict(state, assign=assign)
    assert state[f"0.{PIVOTS}"].dtype == dtype, "the caller's state stays his"
    assert fresh[0].get_buffer(PIVOTS).dtype == torch.float32
    assert torch.equal(fresh[0].dense_weight(), model[0].dense_weight())
    averaged = AveragedModel(fresh, use_buffers=True, avg_fn=get_ema_avg_fn(0.9))
    for _ in range(50):
        averaged.update_parameters(fresh)
    assert rows_of(averaged.module) == rows_of(model)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_training_state_is_loaded_into_what_a_file_holds(assign):
    model, stored = fixed_model(), fixed_model()
    narrow_pivots(stored[0])
    for state in (model.state_dict(), state_in_integers(model, torch.int32)):
        stored.load_state_dict(state, assign=assign)
        assert stored[0].get_buffer(PIVOTS).dtype == torch.int16
        assert torch.equal(stored[0].dense_weight(), model[0].dense_weight())


def test_integers_are_loaded_from_a_file_that_is_read_late(tmp_path):
    model, fresh = fixed_model(), fixed_model()
    torch.save(state_in_integers(model, torch.int32), tmp_path / "state.pt")
    fresh.load_state_dict(_lazy_load(tmp_path / "state.pt"))
    assert torch.equal(fresh[0].dense_weight(), model[0].dense_weight())


def test_integers_are_assigned_to_a_model_without_values():
    model, fresh = fixed_model(), fixed_model().to("meta")
    fresh.load_state_dict(state_in_integers(model, torch.int16), assign=True)
    assert torch.equal(fresh[0].dense_weight(), model[0].dense_weight())


def test_a_state_of_another_size_is_refused():
    model = fixed_model()
    state = state_in_integers(model, torch.int32)
    state[f"0.{PIVOTS}"] = state[f"0.{PIVOTS}"][1:]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)


def test_a_layer_that_was_pickled_whole_with_integers_goes_on():
    model, file = fixed_model(), io.BytesIO()
    model[0]._buffers[PIVOTS] = row_numbers(model[0].get_buffer(PIVOTS)).int()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again[0].dense_weight(), model[0].dense_weight())


def test_what_a_file_holds_and_back():
    model = fixed_model()
    before = copy.deepcopy(model)
    narrow_pivots(model[0])
    held = model[0].get_buffer(PIVOTS)
    assert held.dtype == torch.int16
    assert held.numel() * held.element_size() == model[0].form.pivots * model[0].form.pivot_bytes
    narrow_pivots(model[0])
    assert model[0].get_buffer(PIVOTS) is held
    widen_pivots(model[0])
    assert torch.equal(model[0].get_buffer(PIVOTS), before[0].get_buffer(PIVOTS))
    widen_pivots(model[0])
    assert torch.equal(model[0].get_buffer(PIVOTS), before[0].get_buffer(PIVOTS))


@pytest.mark.parametrize(
    ("form", "bits", "dtype"),
    [
        (balanced_form((4, 4), 1, 1), 0, torch.int16),
        (balanced_form((1, 1), 2, 1), 0, torch.int16),
        (low_rank_form((2, 2), 2), 1, torch.int16),
        (low_rank_form((2**15, 4), 3), 15, torch.int16),
        (low_rank_form((2**15 + 1, 4), 3), 16, torch.int32),
    ],
    ids=["no bond", "one row", "two rows", "the most in 16 bits", "one more"],
)
def test_the_digits_are_as_many_as_the_rows_need(form, bits, dtype):
    rows = torch.tensor([0, 2**bits - 1 if bits < 16 else 2**15])
    signs = row_signs(rows, form, torch.float32)
    assert signs.shape == (2, bits)
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    stored = stored_rows(signs, form)
    assert stored.dtype == dtype
    assert torch.equal(stored.long(), rows)


@pytest.mark.parametrize("given", [torch.tensor(1), torch.zeros(2, 2, 2), torch.zeros(99)], ids=["0", "3", "1, floats"])
@pytest.mark.parametrize("stored", [True, False])
def test_what_is_no_row_numbers_is_for_loading_to_refuse(given, stored):
    model = nn.Sequential(nn.Linear(6, 6))
    compress_matrices(model, [torch.randn(40, 6)], 0.9, allocation="uniform", families=("svd",))
    change_gauge(model[0], "fixed")
    if stored:
        narrow_pivots(model[0])
    with pytest.raises(RuntimeError, match=PIVOTS):
        model.load_state_dict(model.state_dict() | {f"0.{PIVOTS}": given})
