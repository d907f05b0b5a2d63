"""The loader's order: complete, without overlap, deterministic, and resumed at the next batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiftyfold.datamodules.stateful_loader import StatefulLoader, plan_evaluation_batches, plan_training_batches
from fiftyfold.errors import FiftyfoldError


class Numbers:
    """A source whose rows are their own indices; at module level, so that workers can have it."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: list[int]) -> list[int]:
        return indices


def to_batch(rows):
    return {"labels": torch.tensor(rows)}


def loader(count=23, batch_size=4, seed=0, num_workers=0):
    def plan(epoch):
        return plan_training_batches(count, batch_size, seed=seed, epoch=epoch)

    return StatefulLoader(
        Numbers(count), plan, to_batch, signature={"seed": seed, "batch_size": batch_size}, num_workers=num_workers
    )


def rows(batches):
    return [batch["labels"].tolist() for batch in batches]


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 300),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    grouped=st.booleans(),
    shuffle=st.booleans(),
)
def test_processes_share_an_epoch_without_overlap(examples, batch_size, world_size, grouped, shuffle):
    lengths = [(7 * i) % 13 for i in range(examples)] if grouped else None
    plans = [
        plan_training_batches(
            examples,
            batch_size,
            seed=3,
            epoch=1,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            lengths=lengths,
        )
        for rank in range(world_size)
    ]
    seen = [index for plan in plans for batch in plan for index in batch]
    left_out = examples % (batch_size * world_size)
    assert len({len(plan) for plan in plans}) == 1
    assert len(seen) == len(set(seen))
    assert examples - len(seen) == (left_out if left_out < world_size else 0)
    assert all(1 <= len(batch) <= batch_size for plan in plans for batch in plan)


@settings(max_examples=40, deadline=None)
@given(examples=st.integers(1, 200), batch_size=st.integers(1, 9), world_size=st.integers(1, 4), grouped=st.booleans())
def test_evaluation_sees_every_example_once(examples, batch_size, world_size, grouped):
    lengths = [(7 * i) % 13 for i in range(examples)] if grouped else None
    seen = [
        index
        for rank in range(world_size)
        for batch in plan_evaluation_batches(examples, batch_size, rank=rank, world_size=world_size, lengths=lengths)
        for index in batch
    ]
    assert sorted(seen) == list(range(examples))


def test_evaluation_keeps_the_order_unless_lengths_are_given():
    assert plan_evaluation_batches(5, 2) == [[0, 1], [2, 3], [4]]
    assert plan_evaluation_batches(5, 2, lengths=[1, 5, 5, 2, 9]) == [[4, 1], [2, 3], [0]]


def test_order_is_a_function_of_seed_and_epoch():
    def plan(seed, epoch):
        return plan_training_batches(50, 4, seed=seed, epoch=epoch)

    assert plan(1, 2) == plan(1, 2)
    assert plan(1, 2) != plan(1, 3)
    assert plan(1, 2) != plan(2, 2)


def test_grouping_puts_like_lengths_together_and_shuffles_the_batches():
    lengths = [1 + (i * 37) % 60 for i in range(1000)]
    plan = plan_training_batches(1000, 8, seed=0, epoch=0, lengths=lengths)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in plan]
    assert sum(spread) / len(spread) < 3
    longest = [max(lengths[i] for i in batch) for batch in plan]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 6])
def test_resumes_at_the_next_batch(num_workers, done):
    full = loader()
    full.set_epoch(3)
    expected = rows(full)
    first = loader(num_workers=num_workers)
    first.set_epoch(3)
    batches = iter(first)
    head = rows(next(batches) for _ in range(done))
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(first.state_dict())
    resumed.set_epoch(3)
    assert head + rows(resumed) == expected
    assert rows(resumed) == expected, "only the first pass after a resume starts in the middle"


def test_state_of_a_finished_epoch_leads_to_a_full_next_one():
    first = loader()
    list(first)
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    resumed.set_epoch(1)
    full = loader()
    full.set_epoch(1)
    assert rows(resumed) == rows(full)


def test_loading_leaves_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    list(loader())
    list(loader(num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_refuses_another_order_in_mid_epoch_only():
    first = loader()
    batches = iter(first)
    next(batches)
    with pytest.raises(FiftyfoldError, match="batch_size 4 instead of 5"):
        loader(batch_size=5).load_state_dict(first.state_dict())
    list(batches)
    for batch_size in (2, 5, 8):
        resumed = loader(batch_size=batch_size)
        resumed.load_state_dict(first.state_dict())
        assert rows(resumed) == [], "what is finished stays finished"


@pytest.mark.parametrize("batch_size", [8, 23])
def test_a_place_beyond_the_end_of_shorter_epochs_is_refused(batch_size):
    first = loader(batch_size=4)
    batches = iter(first)
    for _ in range(4):
        next(batches)
    with pytest.raises(FiftyfoldError, match=f"batch_size 4 instead of {batch_size}"):
        loader(batch_size=batch_size).load_state_dict(first.state_dict())
