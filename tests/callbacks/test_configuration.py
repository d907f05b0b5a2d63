"""The callbacks as a YAML file writes them."""

from __future__ import annotations

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

from fiftyfold.callbacks.moment import Moment

CONFIGURATION = """
callbacks:
- class_path: fiftyfold.callbacks.QuantizationAwareTraining
  init_args:
    weight_bits: {0: 8, "epoch:1": 4, "0.5": 2}
    targets: [query, key]
    start: 0
- class_path: fiftyfold.callbacks.QuantizationAwareTraining
  init_args: {weight_bits: 1, targets: xtc, full_range: true, start: "fraction:0.1"}
- class_path: fiftyfold.callbacks.LayerReduction
  init_args: {layers: [1, 3], start: 5}
- class_path: fiftyfold.callbacks.LayerPruning
  init_args:
    schedule: {"fraction:0.2": 1, 40: 2}
"""


@pytest.fixture(scope="module")
def callbacks():
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    return parser.instantiate_classes(parser.parse_object(yaml.safe_load(CONFIGURATION))).callbacks


def test_moments_and_bits(callbacks):
    stepping, fixed, reduction, pruning = callbacks
    assert stepping.weight_bits == {Moment(0, "step"): 8, Moment(1, "epoch"): 4, Moment(0.5, "fraction"): 2}
    assert fixed.weight_bits == {Moment(0.1, "fraction"): 1}
    assert (reduction.layers, reduction.start) == ([1, 3], Moment(5, "step"))
    assert pruning.schedule == {Moment(0.2, "fraction"): 1, Moment(40, "step"): 2}


def test_events_are_named_apart(callbacks):
    names = [event.name for callback in callbacks for event in callback.events]
    assert len(set(names)) == len(names) == 7
    assert names[0] == "QuantizationAwareTraining(8, targets=('query', 'key'))"
