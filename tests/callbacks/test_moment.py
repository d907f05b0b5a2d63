"""Moments of training."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from fiftyfold.callbacks import LayerPruning, QuantizationAwareTraining, TensorNetworkDecomposition
from fiftyfold.callbacks.moment import Moment
from fiftyfold.errors import FiftyfoldError

TRAINER = SimpleNamespace(num_training_batches=25, accumulate_grad_batches=2, estimated_stepping_batches=39)
ENDLESS = SimpleNamespace(num_training_batches=math.inf, accumulate_grad_batches=1, estimated_stepping_batches=-1)


@pytest.mark.parametrize(
    ("when", "step"),
    [
        (0, 0),
        (7, 7),
        ("7", 7),
        ("step:7", 7),
        (0.0, 0),
        (0.5, 20),
        ("0.5", 20),
        ("fraction:0.25", 10),
        ("fraction:0", 0),
        ("epoch:0", 0),
        ("epoch:2", 26),
        ("epoch:0.5", 6),
    ],
)
def test_a_moment_comes_where_it_is_expected(when, step):
    """With one optimizer that steps alike in all epochs, whole steps are what they have always been."""
    moment = Moment.parse(when)
    assert round(moment.estimate(TRAINER)) == step
    for at in range(39):
        epoch, within = divmod(at, 13)
        now = SimpleNamespace(**vars(TRAINER), global_step=at, current_epoch=epoch, max_epochs=3, max_steps=-1)
        assert moment.steps_left(now, 2 * within) == step - at


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "epoch", "global_step", "left"),
    [
        (4, -1, 1, 999, 13),  # how often something stepped says nothing
        (4, 40, 0, 15, 5),  # what ends training first counts
        (-1, 100, 9, 20, 30),
    ],
)
def test_a_share_is_one_of_what_ends_training(max_epochs, max_steps, epoch, global_step, left):
    now = SimpleNamespace(
        **vars(TRAINER), global_step=global_step, current_epoch=epoch, max_epochs=max_epochs, max_steps=max_steps
    )
    assert Moment.parse(0.5).steps_left(now, 0) == left


def test_no_share_of_the_epochs_is_taken_where_an_epoch_has_no_length():
    now = SimpleNamespace(**vars(ENDLESS), global_step=20, current_epoch=0, max_epochs=4, max_steps=100)
    assert Moment.parse(0.5).steps_left(now, 20) == 30
    assert Moment.parse(50).steps_left(now, 20) == 30


@pytest.mark.parametrize("when", [-1, 1.0, 1.5, "fraction:1", "step:1.5", "week:2", "soon", "", True, None, "epoch:-1"])
def test_what_is_no_moment(when):
    with pytest.raises(FiftyfoldError, match=r"moment|outside|whole"):
        Moment.parse(when)


@pytest.mark.parametrize("when", [0.5, "epoch:1"])
def test_unknown_length(when):
    with pytest.raises(FiftyfoldError, match="no known length"):
        Moment.parse(when).estimate(ENDLESS)
    assert Moment.parse(5).estimate(ENDLESS) == 5


@pytest.mark.parametrize(
    "make",
    [
        QuantizationAwareTraining,
        lambda schedule: TensorNetworkDecomposition(bond_dimension=schedule),
        LayerPruning,
    ],
    ids=["bits", "bonds", "layers"],
)
def test_a_schedule_that_would_lose_a_moment_is_refused(make):
    for schedule in ({0: 8, "step:0": 4}, {"epoch:1": 2, "epoch:1.0": 1}):
        with pytest.raises(FiftyfoldError, match=r"the moment (step:0|epoch:1) twice"):
            make(schedule)
    with pytest.raises(FiftyfoldError, match=r"no moment at all|leave start and keep out|how many layers go"):
        make({})
