import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.packing import largest_code, pack_codes, packed_bytes, unpack_codes, unpack_rows

BITS = (1, 2, 3, 4, 8)


def random_codes(bits, shape, seed=0):
    largest = largest_code(bits)
    codes = torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed))
    return (codes + (codes == 0) * (bits == 1)).to(torch.int8)


def pack_by_hand(codes, bits):
    """The layout of the module's table, with Python's big integers."""
    base, per_unit, size = {1: (2, 8, 1), 2: (3, 5, 1), 3: (8, 8, 3), 4: (16, 2, 1), 8: (256, 1, 1)}[bits]
    shift = {1: 0, 2: 1}.get(bits, 2 ** (bits - 1))
    digits = [(code + 1) // 2 if bits == 1 else code + shift for code in codes]
    packed = b""
    for start in range(0, len(digits), per_unit):
        unit = digits[start : start + per_unit]
        packed += sum(digit * base**place for place, digit in enumerate(unit)).to_bytes(size, "little")
    return list(packed)


@settings(max_examples=100, deadline=None)
@given(bits=st.sampled_from(BITS), numel=st.integers(0, 70), seed=st.integers(0, 1000))
def test_packing_follows_the_layout_and_is_undone_exactly(bits, numel, seed):
    codes = random_codes(bits, (numel,), seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == pack_by_hand(codes.tolist(), bits)
    assert packed.numel() == packed_bytes(numel, bits)
    assert torch.equal(unpack_codes(packed, bits, numel), codes)


@settings(max_examples=100, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    height=st.integers(1, 12),
    width=st.integers(1, 23),
    rows=st.lists(st.integers(0, 11), max_size=6),
)
def test_rows_are_unpacked_alone(bits, height, width, rows):
    codes = random_codes(bits, (height, width))
    wanted = torch.tensor([row % height for row in rows], dtype=torch.int64)
    assert torch.equal(unpack_rows(pack_codes(codes, bits), bits, wanted, width), codes[wanted])


def test_row_numbers_keep_their_shape():
    codes = random_codes(2, (7, 13))
    wanted = torch.tensor([[0, 6, 3], [3, 3, 1]], dtype=torch.int32)
    assert torch.equal(unpack_rows(pack_codes(codes, 2), 2, wanted, 13), codes[wanted])
    assert unpack_rows(pack_codes(codes, 2), 2, torch.tensor(4), 13).shape == (13,)


@pytest.mark.parametrize("row", [-1, 7, 100])
def test_rows_outside_are_refused(row):
    packed = pack_codes(random_codes(2, (7, 15)), 2)
    with pytest.raises(IndexError, match="between 0 and 6"):
        unpack_rows(packed, 2, torch.tensor([row]), 15)


def test_a_non_contiguous_matrix_is_packed_by_its_rows():
    codes = random_codes(3, (6, 4))
    assert torch.equal(pack_codes(codes.t(), 3), pack_codes(codes.t().contiguous(), 3))


def test_ternary_weights_take_at_most_161_hundredths_of_a_bit():
    assert all(packed_bytes(numel, 2) * 8 / numel <= 1.61 for numel in range(1000, 2000))


@pytest.mark.parametrize(("bits", "code"), [(1, 0), (1, 3), (2, 2), (2, -2), (3, 4), (3, -4), (4, 8), (8, -128)])
def test_codes_that_do_not_fit_are_refused(bits, code):
    with pytest.raises(FiftyfoldError, match=f"codes of {bits} bit must be"):
        pack_codes(torch.tensor([1, code], dtype=torch.int8), bits)


def test_other_types_and_bits_are_refused():
    with pytest.raises(FiftyfoldError, match="must be int8"):
        pack_codes(torch.ones(3), 1)
    with pytest.raises(FiftyfoldError, match="5 bits cannot be packed"):
        packed_bytes(3, 5)
    with pytest.raises(FiftyfoldError, match="one-dimensional uint8"):
        unpack_codes(torch.zeros(2, 2, dtype=torch.uint8), 1, 32)
    with pytest.raises(FiftyfoldError, match="one-dimensional uint8"):
        unpack_codes(torch.zeros(4, dtype=torch.int8), 1, 32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_lengths_are_refused(bits, change):
    packed = pack_codes(random_codes(bits, (24,)), bits)
    packed = packed[:-1] if change < 0 else torch.cat([packed, packed[:1]])
    with pytest.raises(FiftyfoldError, match="truncated"):
        unpack_codes(packed, bits, 24)


@pytest.mark.parametrize(("bits", "byte"), [(2, 243), (2, 255), (3, 0), (4, 0), (8, 0)])
def test_bytes_that_packing_never_writes_are_refused(bits, byte):
    packed = pack_codes(random_codes(bits, (40,)), bits)
    packed[:3] = byte
    with pytest.raises(FiftyfoldError, match=r"altered|must be"):
        unpack_codes(packed, bits, 40)
