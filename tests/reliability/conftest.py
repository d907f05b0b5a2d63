"""A teacher and data, and the training on them that nothing disturbs."""

from __future__ import annotations

import pytest

from tests.reliability.commands import Run, fit_words, make_place, training_hash


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def fitted(place):
    """The undisturbed training's last checkpoint."""
    assert Run(fit_words("whole"), place).wait() == 0
    return training_hash(place / "whole" / "step=8.ckpt")
