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
def test_resolve(when, step):
    assert Moment.parse(when).resolve(TRAINER) == step


@pytest.mark.parametrize("when", [-1, 1.0, 1.5, "fraction:1", "step:1.5", "week:2", "soon", "", True, None, "epoch:-1"])
def test_what_is_no_moment(when):
    with pytest.raises(FiftyfoldError, match=r"moment|outside|whole"):
        Moment.parse(when)


@pytest.mark.parametrize("when", [0.5, "epoch:1"])
def test_unknown_length(when):
    with pytest.raises(FiftyfoldError, match="no known length"):
        Moment.parse(when).resolve(ENDLESS)
    assert Moment.parse(5).resolve(ENDLESS) == 5


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
