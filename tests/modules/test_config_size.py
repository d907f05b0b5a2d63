"""No number in a configuration commands memory that the weights beside it do not account for."""

from __future__ import annotations

import json

import pytest

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import export, load, quantize
from fiftyfold.modules.fine_tuning import load_classifier
from tests.tiny import FAMILIES, tiny_bert, tiny_model


def change(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("kind", FAMILIES)
def test_models_as_they_are_open(kind, tmp_path):
    tiny_model(kind).half().save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), "model").config.model_type == kind


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "hidden_size", "max_position_embeddings"])
def test_a_width_that_commands_memory(key, tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    change(tmp_path, **{key: 2**33})
    with pytest.raises(FiftyfoldError, match=r"cannot be loaded .*(do not belong together|overflow)"):
        load_classifier(str(tmp_path), "model")


def test_a_depth_that_commands_memory(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "dense")
    model = tiny_bert()
    quantize(model)
    export(model, tmp_path / "packed")
    for folder in (tmp_path / "dense", tmp_path / "packed"):
        change(folder, num_hidden_layers=2**40)
        with pytest.raises(FiftyfoldError, match=r"num_hidden_layers=1099511627776, but the weights .* tensors"):
            load_classifier(str(folder), "model") if folder.name == "dense" else load(folder)
