"""The pure maths: factors, forms, sequential decompositions, gauge, contraction."""

from __future__ import annotations

import math

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.tt_matrix import tt_matrix_to_matrix

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.tensor_network import contraction
from fiftyfold.modules.tensor_network.decomposition import decompose, rebuild, tensor_train
from fiftyfold.modules.tensor_network.factors import even_factors, even_sites, site_factors, skewed_sites
from fiftyfold.modules.tensor_network.form import NetworkForm, Term, balanced_form, low_rank_form, low_rank_term
from fiftyfold.modules.tensor_network.gauge import LARGEST_ENTRY, fix_gauge, join_fixed, row_places, split_fixed
from fiftyfold.modules.tensor_network.layers import look_up


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "count", "factors"),
    [
        (216, 3, (6, 6, 6)),
        (768, 2, (24, 32)),
        (768, 3, (8, 8, 12)),
        (11008, 3, (16, 16, 43)),
        (14336, 3, (16, 28, 32)),
        (50257, 2, (29, 1733)),
    ],
)
def test_even_factors(size, count, factors):
    assert even_factors(size, count) == factors


@pytest.mark.parametrize("size", [7, 11008, 14336, 18944, 2880, 50257, 30522, 32000])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_site_factors_are_even_and_hardly_larger(size, count):
    factors = site_factors(size, count)
    assert size <= math.prod(factors) <= max(size + 1, size * 1.05)
    assert max(factors) <= 4 * min(factors) or math.prod(factors) == size
    assert max(factors) <= size // 2 + 1


@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (11008, 4096), (50257, 768)])
@pytest.mark.parametrize("count", [2, 3])
def test_skewed_cuts_lie_between_even_and_low_rank(shape, count):
    even = even_sites(shape, count)
    cuts = skewed_sites(shape, count)
    assert 1 <= len(cuts) == len(set(cuts)) <= 2
    assert even not in cuts
    for rows, columns in cuts:
        assert [math.prod(rows), math.prod(columns)] == [math.prod(side) for side in even]
        assert min(*rows, *columns) > 1


def test_the_cuts_of_a_square():
    assert skewed_sites((384, 384), 2) == [((8, 48), (48, 8)), ((48, 8), (8, 48))]


def test_the_papers_worked_example():
    """CompactifAI: 216 × 216 as three cores has 2·36χ + 36χ² parameters."""
    for bond in (1, 10, 36):
        form = balanced_form((216, 216), 3, bond)
        assert form.count == 2 * 36 * bond + 36 * bond**2
        assert sum(core.numel() for core in decompose(matrix(216, 216), form)[0]) == form.count


@pytest.mark.parametrize(("rows", "columns"), [(216, 216), (50, 36), (7, 96), (96, 7), (1, 5)])
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_full_bonds_give_the_matrix_back(rows, columns, cores):
    given_matrix = matrix(rows, columns)
    form = balanced_form((rows, columns), cores, 10**6)
    (found,) = decompose(given_matrix, form)
    torch.testing.assert_close(rebuild(found)[:rows, :columns], given_matrix, atol=2e-5, rtol=0)


@pytest.mark.parametrize("cores", [2, 3, 4])
def test_rebuilding_is_tensorlys(cores):
    (found,) = decompose(matrix(48, 36), balanced_form((48, 36), cores, 5))
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        torch.testing.assert_close(rebuild(found), tt_matrix_to_matrix(found).reshape(48, 36), atol=1e-5, rtol=0)


def test_the_error_is_bounded_by_what_was_cut():
    given_matrix = matrix(48, 36).double()
    term = balanced_form((48, 36), 3, 6).terms[0]
    error = float((rebuild(tensor_train(given_matrix, term)) - given_matrix).square().sum())
    rows, columns = term.rows, term.columns
    tensor = given_matrix.view(*rows, *columns).permute(0, 3, 1, 4, 2, 5)
    cut = 0.0
    for sites, bond in ((1, term.bonds[0]), (2, term.bonds[1])):
        left = math.prod(rows[:sites]) * math.prod(columns[:sites])
        cut += float(torch.linalg.svdvals(tensor.reshape(left, -1))[bond:].square().sum())
    assert error <= cut + 1e-9


def test_the_low_rank_split_is_a_truncated_svd():
    given_matrix = matrix(30, 20)
    (found,) = decompose(given_matrix, low_rank_form((30, 20), 4))
    left, values, right = torch.linalg.svd(given_matrix)
    best = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close(rebuild(found), best, atol=1e-5, rtol=0)


def test_a_sum_takes_what_the_first_term_left():
    given_matrix = matrix(24, 24)
    first, second = low_rank_term((24, 24), 3), balanced_form((24, 24), 2, 4).terms[0]
    both = decompose(given_matrix, NetworkForm((24, 24), (first, second)))
    alone = decompose(given_matrix, NetworkForm((24, 24), (first,)))
    assert (given_matrix - rebuild(both[0]) - rebuild(both[1])).norm() < (given_matrix - rebuild(alone[0])).norm()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    cores=st.integers(2, 4),
    bond=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_all_ways_to_multiply_agree(rows, columns, cores, bond, seed):
    form = balanced_form((rows, columns), cores, bond)
    (found,) = decompose(matrix(rows, columns, seed), form)
    dense, x = rebuild(found)[:rows, :columns], matrix(6, columns, seed + 1)
    expected = x @ dense.T
    torch.testing.assert_close(contraction.contract(x, found, rows), expected, atol=1e-4, rtol=1e-4)
    padded = torch.nn.functional.pad(x, (0, math.prod(form.terms[0].columns) - columns))
    for direction in (contraction._right_to_left, contraction._left_to_right):
        torch.testing.assert_close(direction(padded, found)[:, :rows], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(look_up(torch.arange(rows), found)[:, :columns], dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "form", [balanced_form((48, 36), 3, 5), balanced_form((50, 36), 2, 7), low_rank_form((48, 9), 9)]
)
def test_a_fixed_gauge_holds_the_same_operator_in_fewer_numbers(form):
    (found,) = decompose(matrix(*form.shape), form)
    fixed, pivots = fix_gauge(found)
    torch.testing.assert_close(rebuild(fixed), rebuild(found), atol=1e-5, rtol=0)
    kept = split_fixed(fixed, pivots)
    assert sum(each.numel() for each in kept) == form.with_gauge("fixed").count < form.count
    assert all(float(each.abs().max()) <= LARGEST_ENTRY for each in kept[:-1] if each.numel())
    places = [row_places(rows, core.flatten(0, 2).shape[0]) for rows, core in zip(pivots, fixed[:-1], strict=True)]
    for one, other in zip(join_fixed(kept, places, form.terms[0]), fixed, strict=True):
        assert torch.equal(one, other)
    again, same = fix_gauge(fixed)
    assert all(torch.equal(one, other) for one, other in zip([*again, *same], [*fixed, *pivots], strict=True))


def test_a_fixed_gauge_survives_a_deficient_rank():
    (found,) = decompose(matrix(30, 2) @ matrix(2, 20), low_rank_form((30, 20), 5))
    fixed, _ = fix_gauge(found)
    torch.testing.assert_close(rebuild(fixed), rebuild(found), atol=1e-5, rtol=0)


def test_forms_travel_as_json():
    form = NetworkForm((24, 24), (low_rank_term((24, 24), 3), balanced_form((24, 24), 2, 4).terms[0]), "fixed")
    assert NetworkForm.from_json(form.to_json()) == form


@pytest.mark.parametrize(
    "change",
    [
        {"terms": []},
        {"gauge": "loose"},
        {"shape": [24]},
        {"shape": [25, 24]},
        {"terms": [{"rows": [24, 1], "columns": [1, 24], "bonds": [0]}]},
        {"terms": [{"rows": [24, 1], "columns": [1, 24], "bonds": [25]}]},
        {"terms": [{"rows": [24, 1], "columns": [1, 24], "bonds": [3.0]}]},
        {"terms": [{"rows": [24, 1], "columns": [24], "bonds": [3]}]},
        {"terms": 3},
        {"other": 1},
    ],
)
def test_altered_forms_are_refused(change):
    values = {**low_rank_form((24, 24), 3).to_json(), **change}
    with pytest.raises(FiftyfoldError):
        NetworkForm.from_json(values)


def test_weights_that_are_no_numbers_are_refused():
    broken = matrix(8, 8)
    broken[0, 0] = math.nan
    with pytest.raises(FiftyfoldError, match="not finite"):
        decompose(broken, low_rank_form((8, 8), 2))


def test_a_bond_of_zero_is_refused():
    with pytest.raises(FiftyfoldError, match="at least 1"):
        Term((8, 1), (1, 8), (0,))
