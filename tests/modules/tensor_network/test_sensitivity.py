"""How far a model's outputs moved, of as many tokens as memory allows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fiftyfold.modules.tensor_network import sensitivity
from fiftyfold.modules.tensor_network.sensitivity import Outputs, deviation, some_outputs
from tests.tiny import tiny_causal


class _Echo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight.detach()


@pytest.mark.parametrize(("most", "rows"), [(2**26, 24), (24 * 5, 24), (24 * 5 - 1, 12), (10, 2), (1, 1)])
def test_many_tokens_are_taken_at_even_distances(most, rows, monkeypatch):
    monkeypatch.setattr(sensitivity, "_MOST_LOGITS", most)
    batch = torch.arange(24.0).view(4, 6, 1).expand(4, 6, 5)
    values = some_outputs(_Echo(), batch).values
    assert len(values) <= max(1, rows)
    assert torch.equal(values[:, 0], torch.arange(24.0)[:: -(-24 // len(values))][: len(values)])


def test_tokens_that_fill_up_a_batch_do_not_count():
    tokens = torch.randint(3, 40, (2, 6))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    found = some_outputs(tiny_causal("llama"), {"input_ids": tokens, "attention_mask": mask})
    assert found.are_logits
    assert len(found.values) == 10


def test_a_single_number_is_an_output():
    assert deviation(Outputs(torch.ones(1, 1), False), some_outputs(_Echo(), torch.tensor(3.0))) == 4.0
