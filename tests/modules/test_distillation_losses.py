"""The losses against a second formulation in float64 numpy, written from the paper's equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.distillation_losses import (
    attention_score_loss,
    hard_cross_entropy,
    hidden_state_loss,
    layer_maps,
    mean_squared_error,
    soft_cross_entropy,
)

NUMBERS = st.floats(-60, 60, allow_nan=False, width=32)
FAST = settings(max_examples=40, deadline=None)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def soft_cross_entropy_64(student, teacher, temperature):
    """-1/(B·C) Σ_b Σ_c p_T(c) log p_S(c) · T², and its derivative (p_S - p_T)·T/(B·C)."""
    student, teacher = student / temperature, teacher / temperature
    shifted = student - student.max(-1, keepdims=True)
    log_student = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    value = -(softmax(teacher) * log_student).sum() / student.size * temperature**2
    return value, (softmax(student) - softmax(teacher)) * temperature / student.size


def squared_differences_64(student, teacher, layer_map, keep):
    """Σ_i mean over kept entries of (S_i - T_m(i))², and its derivatives."""
    value, gradients = 0.0, []
    for mine, index in zip(student, layer_map, strict=True):
        weight = np.broadcast_to(keep, mine.shape).astype(np.float64)
        difference = np.where(weight > 0, mine - teacher[index], 0.0)
        count = max(weight.sum(), 1.0)
        value += (difference**2).sum() / count
        gradients.append(2 * difference / count)
    return value, gradients


def pair_mask_64(mask, causal):
    batch, tokens = mask.shape
    pairs = np.zeros((batch, 1, tokens, tokens))
    for row in range(batch):
        for query in range(tokens):
            for key in range(tokens):
                pairs[row, 0, query, key] = mask[row, query] and mask[row, key] and (key <= query or not causal)
    return pairs


@FAST
@given(
    logits=hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(1, 5), st.integers(2, 6)), elements=NUMBERS),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_soft_cross_entropy_and_its_gradient(logits, temperature):
    student = torch.tensor(logits[0], requires_grad=True)
    loss = soft_cross_entropy(student, torch.tensor(logits[1]), temperature)
    loss.backward()
    value, gradient = soft_cross_entropy_64(logits[0], logits[1], temperature)
    np.testing.assert_allclose(loss.item(), value, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-9, atol=1e-12)


def test_soft_cross_entropy_is_the_usual_one_over_the_number_of_classes():
    student, teacher = torch.randn(7, 3), torch.randn(7, 3)
    usual = torch.nn.functional.cross_entropy(student, teacher.softmax(-1))
    torch.testing.assert_close(soft_cross_entropy(student, teacher), usual / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(dtype):
    student, teacher = torch.tensor([[80.0, -80.0]], dtype=dtype), torch.tensor([[-80.0, 80.0]], dtype=dtype)
    loss = soft_cross_entropy(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(80.0)


def test_hard_labels_are_a_teacher_that_is_certain():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    certain = torch.nn.functional.one_hot(labels, 4) * 1e4
    torch.testing.assert_close(hard_cross_entropy(logits, labels), soft_cross_entropy(logits, certain.float()))


def test_regression_compares_scores():
    student, teacher = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    assert mean_squared_error(student, teacher).item() == pytest.approx((1 + 4) / 2)


@st.composite
def layered(draw, dimensions):
    student_layers, teacher_layers = draw(st.integers(1, 3)), draw(st.integers(3, 4))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = (batch, tokens, 3) if dimensions == 3 else (batch, 2, tokens, tokens)
    values = draw(hnp.arrays(np.float64, (student_layers + teacher_layers, *shape), elements=NUMBERS))
    layer_map = draw(st.lists(st.integers(0, teacher_layers - 1), min_size=student_layers, max_size=student_layers))
    mask = draw(hnp.arrays(np.int64, (batch, tokens), elements=st.integers(0, 1)))
    return values[:student_layers], values[student_layers:], layer_map, mask


def check(loss, students, value, gradients):
    loss.backward()
    np.testing.assert_allclose(loss.item(), value, rtol=1e-10, atol=1e-12)
    for student, gradient in zip(students, gradients, strict=True):
        np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-9, atol=1e-12)


@FAST
@given(case=layered(3), masked=st.booleans())
def test_hidden_state_loss_and_its_gradient(case, masked):
    mine, theirs, layer_map, mask = case
    students = [torch.tensor(layer, requires_grad=True) for layer in mine]
    loss = hidden_state_loss(
        students, [torch.tensor(layer) for layer in theirs], layer_map, torch.tensor(mask) if masked else None
    )
    check(loss, students, *squared_differences_64(mine, theirs, layer_map, mask[..., None] if masked else 1.0))


@FAST
@given(case=layered(4), masked=st.booleans(), causal=st.booleans())
def test_attention_score_loss_and_its_gradient(case, masked, causal):
    mine, theirs, layer_map, mask = case
    students = [torch.tensor(layer, requires_grad=True) for layer in mine]
    loss = attention_score_loss(
        students,
        [torch.tensor(layer) for layer in theirs],
        layer_map,
        torch.tensor(mask) if masked else None,
        causal=causal,
    )
    check(
        loss, students, *squared_differences_64(mine, theirs, layer_map, pair_mask_64(mask, causal) if masked else 1.0)
    )


@pytest.mark.parametrize("rubbish", [float("inf"), float("-inf"), float("nan")])
def test_padding_reaches_neither_the_loss_nor_its_gradient(rubbish):
    mask = torch.tensor([[1, 1, 0]])
    student, teacher = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    student[:, 2] = rubbish
    student.requires_grad_()
    loss = hidden_state_loss([student], [teacher], [0], mask)
    loss.backward()
    torch.testing.assert_close(loss, (student[:, :2] - teacher[:, :2]).square().mean())
    assert torch.equal(student.grad[:, 2], torch.zeros(1, 4))
    scores = torch.randn(1, 2, 3, 3)
    scores[..., 2] = rubbish
    scores[:, :, 2] = rubbish
    assert attention_score_loss([scores], [torch.zeros(1, 2, 3, 3)], [0], mask).isfinite()


def test_padding_counts_without_a_mask():
    student, teacher = torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]])
    assert hidden_state_loss([student], [teacher], [0]).item() == pytest.approx(5.0)
    assert hidden_state_loss([student], [teacher], [0], torch.tensor([[1, 0]])).item() == pytest.approx(1.0)


def test_no_gradient_flows_into_the_teacher():
    student, teacher = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    (hidden_state_loss([student], [teacher], [0]) + soft_cross_entropy(student, teacher)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_mapping_serves_as_teacher():
    student, teacher = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    assert torch.equal(hidden_state_loss([student], {5: teacher}, [5]), hidden_state_loss([student], [teacher], [0]))
    with pytest.raises(FiftyfoldError, match="number 4"):
        hidden_state_loss([student], {5: teacher}, [4])


def test_shapes_and_lengths_that_do_not_fit_are_refused():
    with pytest.raises(FiftyfoldError, match="width"):
        hidden_state_loss([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 4)], [0])
    with pytest.raises(FiftyfoldError, match="layer map"):
        hidden_state_loss([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 3)], [0, 0])


@pytest.mark.parametrize(
    ("layers", "total", "hidden_map"),
    [
        (range(12), 12, list(range(13))),
        ([1, 3, 5, 7, 9, 11], 12, [0, 2, 4, 6, 8, 10, 12]),
        ([2, 4, 6, 8, 10], 12, [1, 3, 5, 7, 9, 11]),
        ([0, 2, 4], 6, [0, 1, 3, 5]),
        ([0], 1, [0, 1]),
        ([5], 6, [4, 6]),
    ],
)
def test_layer_maps_are_the_papers(layers, total, hidden_map):
    assert layer_maps(layers, total) == (list(layers), hidden_map)


@pytest.mark.parametrize("layers", [[], [3, 1], [1, 1], [-1, 2], [12]])
def test_impossible_layers_are_refused(layers):
    with pytest.raises(FiftyfoldError, match="rising"):
        layer_maps(layers, 12)
