"""The manifest is read with suspicion."""

from __future__ import annotations

import json

import pytest

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed.manifest import FORMAT_VERSION, Manifest, PackedEntry
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings

ROWS = LayerSettings(WeightSettings(1, "per_channel"))
WHOLE = LayerSettings(WeightSettings(2), ActivationSettings())
MANIFEST = Manifest(
    structure=[{"op": "reduce_layers", "stack": "layers", "layers": [0], "of": 2, "step": 0}],
    packed={
        "embed": PackedEntry("embedding", (7, 5), ROWS),
        "layers.0": PackedEntry("conv1d", (5, 6), WHOLE),
        "head": PackedEntry("linear", (7, 5), ROWS),
    },
    tied={"head": "embed"},
    rest_dtype="float32",
)


def test_it_survives_json():
    text = json.dumps(MANIFEST.to_json())
    assert Manifest.from_json(json.loads(text)) == MANIFEST
    assert len(json.loads(text)["settings"]) == 2


def test_an_empty_one_is_a_model_with_nothing_packed():
    assert Manifest.from_json(Manifest().to_json()) == Manifest()


def test_a_newer_version_asks_for_a_newer_fiftyfold():
    content = MANIFEST.to_json() | {"format_version": FORMAT_VERSION + 1, "something": "new"}
    with pytest.raises(FiftyfoldError, match=f"format version {FORMAT_VERSION + 1}.*install a newer fiftyfold"):
        Manifest.from_json(content)


def _entry(**changes):
    return {"packed": {"embed": {"kind": "linear", "shape": [7, 5], "settings": 0} | changes}, "tied": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "1"}, "no format version '1'"),
        ({"format_version": True}, "no format version True"),
        ({"format_version": 0}, "no format version 0"),
        ({"extra": 1}, "'extra' is missing or unknown"),
        ({"rest_dtype": "int8"}, "no rest_dtype 'int8'"),
        ({"rest_dtype": ["float16"]}, "no rest_dtype"),
        ({"structure": {}}, "not a list of operations"),
        ({"structure": [{"op": "explode"}]}, "unknown operation"),
        ({"settings": {}}, "'settings' is no list"),
        ({"settings": [{"weight": {"bits": 5}, "activation": None}]}, "weight_bits must be one of"),
        ({"settings": [{"weight": {"bits": 1, "colour": 2}, "activation": None}]}, "no entry 'colour'"),
        ({"settings": [[]]}, "settings of a quantized layer"),
        ({"packed": []}, "'packed' is no mapping"),
        ({"packed": {"embed": 3}, "tied": {}}, "'embed' does not have kind"),
        (_entry(kind="lstm"), "unknown kind 'lstm'"),
        (_entry(kind=[]), "unknown kind"),
        (_entry(shape=[7]), "impossible shape"),
        (_entry(shape=[7, -5]), "impossible shape"),
        (_entry(shape=[7, True]), "impossible shape"),
        (_entry(shape="75"), "impossible shape"),
        (_entry(settings=9), "settings that are not there"),
        (_entry(settings=-1), "settings that are not there"),
        ({"tied": []}, "'tied' is no mapping"),
        ({"tied": {"head": "nothing"}}, "cannot share"),
        ({"tied": {"nothing": "embed"}}, "cannot share"),
        ({"tied": {"head": ["embed"]}}, "cannot share"),
        ({"tied": {"head": "embed", "embed": "head"}}, "cannot share"),
        ({"tied": {"layers.0": "embed"}}, "cannot share"),
    ],
)
def test_what_is_corrupt_is_refused_in_a_sentence(changes, message):
    with pytest.raises(FiftyfoldError, match=message) as caught:
        Manifest.from_json(MANIFEST.to_json() | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_anything_but_a_mapping_is_refused(content):
    with pytest.raises(FiftyfoldError, match="no mapping"):
        Manifest.from_json(content)


def test_a_missing_part_is_named():
    content = MANIFEST.to_json()
    del content["packed"]
    with pytest.raises(FiftyfoldError, match="'packed' is missing"):
        Manifest.from_json(content)
