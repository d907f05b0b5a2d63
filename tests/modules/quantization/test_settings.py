import json

import pytest

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings


@pytest.mark.parametrize(
    "how",
    [
        LayerSettings(WeightSettings()),
        LayerSettings(WeightSettings(3, "per_group", 16, 2.5), ActivationSettings(4, False, "static", True, 2.5)),
    ],
)
def test_settings_survive_json(how):
    assert LayerSettings.from_json(json.loads(json.dumps(how.to_json()))) == how


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightSettings(5), "weight_bits must be one of 1, 2, 3, 4, 8, not 5"),
        (lambda: WeightSettings(True), "weight_bits must be one of"),
        (lambda: WeightSettings(1.0), "weight_bits must be one of"),
        (lambda: WeightSettings(1, "per_row"), "granularity must be one of per_tensor"),
        (lambda: WeightSettings(1, "per_group"), "needs group_size"),
        (lambda: WeightSettings(1, "per_group", 0), "needs group_size"),
        (lambda: WeightSettings(1, "per_tensor", 8), "group_size belongs to"),
        (lambda: WeightSettings(1, clip=0.0), "clip must be a positive number"),
        (lambda: WeightSettings(1, clip=float("nan")), "clip must be a positive number"),
        (lambda: ActivationSettings(2), "activation_bits must be one of 4, 8"),
        (lambda: ActivationSettings(range="fixed"), "activation_range must be one of dynamic, static"),
        (lambda: ActivationSettings(symmetric="no"), "symmetric must be true or false"),
        (lambda: WeightSettings.from_json({"bits": 1, "bit": 2}), "has no entry 'bit'"),
        (lambda: LayerSettings.from_json({"weight": {}}), "exactly the entries"),
        (lambda: LayerSettings.from_json({"weight": [1], "activation": None}), "must be an object"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(FiftyfoldError, match=message):
        make()
