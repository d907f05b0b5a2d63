from __future__ import annotations

import importlib.util

import pytest

from fiftyfold.app.harness import harness_model
from fiftyfold.errors import FiftyfoldError
from tests.text import tiny_language_model, write_word_tokenizer


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed")
def test_without_the_harness_the_way_out_is_named():
    with pytest.raises(FiftyfoldError, match=r"pip install fiftyfold\[harness\]"):
        harness_model("anywhere")


def test_the_harness_scores_an_exported_folder(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance

    import fiftyfold
    from fiftyfold.modules import tensorize

    model = tiny_language_model(hidden=64)
    tensorize(model, keep=0.3)
    fiftyfold.export(model, tmp_path / "out")
    write_word_tokenizer(tmp_path / "out")
    opened = harness_model(str(tmp_path / "out"))
    (found,) = opened.loglikelihood([Instance("loglikelihood", {}, ("w1 w2", " w3"), 0)])
    assert found[0] < 0
