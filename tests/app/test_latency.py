from __future__ import annotations

import time

import torch
from torch import nn

from fiftyfold.app import latency


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.rows: list[int] = []

    def forward(self, input_ids: torch.Tensor) -> None:
        self.rows.append(len(input_ids))
        time.sleep(self.seconds)


def test_the_slower_model_shows_and_labels_are_left_out(monkeypatch) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 3)
    models = {"slow": Sleeper(0.02), "quick": Sleeper(0.0)}
    batch = {"input_ids": torch.zeros(128, 4, dtype=torch.long), "labels": torch.zeros(128)}
    result = latency.measure_latency(models, batch)
    assert result["slow"] >= 20 > result["quick"]
    assert set(models["quick"].rows) == {32}
    assert not models["slow"].training


def test_slow_models_get_fewer_rounds(monkeypatch) -> None:
    monkeypatch.setattr(latency, "LONGEST_SECONDS", 0.0)
    model = Sleeper(0.001)
    latency.measure_latency({"model": model}, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    assert len(model.rows) == latency.WARM_UP_ROUNDS + 2


def test_what_the_model_before_has_left_behind_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 3)
    last: list[nn.Module] = []

    class Cold(Sleeper):
        def forward(self, input_ids: torch.Tensor) -> None:
            if last != [self]:
                super().forward(input_ids)
            last[:] = [self]

    models = {"first": Cold(0.02), "second": Cold(0.02)}
    result = latency.measure_latency(models, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    assert max(result.values()) < 10
