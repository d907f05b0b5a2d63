"""What a long search keeps, whatever stops it."""

from __future__ import annotations

import json

import pytest
import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.journal import LINES_FILE, Journal, digest_of, number, open_journal


def test_what_was_found_is_there_again_with_its_tensors(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor([1, 2], dtype=torch.bfloat16)}
    with open_journal(tmp_path / "new", [1], "a search") as journal:
        assert journal.remember("one", lambda: 1, number) == 1.0
        journal.add("two", {"x": [0.1]}, tensors)
    with open_journal(tmp_path / "new", [1], "a search") as journal:
        assert "one" in journal
        assert "three" not in journal
        assert journal.remember("one", lambda: pytest.fail("known"), number) == 1.0
        assert journal.read("two", lambda value: value["x"]) == [0.1]
        found = journal.tensors("two")
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in "ab")


def test_without_a_folder_nothing_is_known():
    with open_journal(None, torch.ones(1), "a search") as journal:
        journal.add("one", 1)
        assert "one" not in journal


def test_a_search_that_finds_nothing_leaves_nothing(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(RuntimeError), open_journal(folder, 1, "a search"):
        raise RuntimeError
    assert not folder.exists()
    folder.mkdir()
    (folder / "own").touch()
    with open_journal(folder, 1, "a search"):
        pass
    assert [path.name for path in folder.iterdir()] == ["own"]


@pytest.mark.parametrize("kept", range(1, 60))
def test_a_line_that_a_kill_cut_short_is_found_again(kept, tmp_path):
    with open_journal(tmp_path, 1, "a search") as journal:
        journal.add("one", 1)
        whole = (tmp_path / LINES_FILE).read_bytes()
        journal.add("two", 2)
    after = (tmp_path / LINES_FILE).read_bytes()
    (tmp_path / LINES_FILE).write_bytes(after[: min(len(whole) + kept % 24, kept * 3)])
    with open_journal(tmp_path, 1, "a search") as journal:
        journal.remember("one", lambda: 1, number)
        journal.remember("two", lambda: 2, number)
    assert (tmp_path / LINES_FILE).read_bytes() == after


def test_two_searches_do_not_share_a_folder(tmp_path):
    with open_journal(tmp_path, 1, "a search") as journal:
        journal.add("one", 1)
        with pytest.raises(FiftyfoldError, match="another run is writing"), open_journal(tmp_path, 1, "a search"):
            pass
    with pytest.raises(FiftyfoldError, match="holds a search of another"), open_journal(tmp_path, 2, "a search"):
        pass
    with open_journal(tmp_path, 1, "a search") as journal:
        assert "one" in journal


@pytest.mark.parametrize(
    "content", [b"{}\n", b"\xff\n", b"[]\n", b'{"stamp": 1}\n[1]\n', b"[" * 100_000 + b"\n", b"\n"]
)
def test_a_file_that_is_no_journal_is_refused(content, tmp_path):
    (tmp_path / LINES_FILE).write_bytes(content)
    with pytest.raises(FiftyfoldError), open_journal(tmp_path, 1, "a search"):
        pass
    assert (tmp_path / LINES_FILE).read_bytes() == content


@pytest.mark.parametrize("damage", ["missing", "short", "bits"])
def test_damaged_tensors_are_named(damage, tmp_path):
    with open_journal(tmp_path, 1, "a search") as journal:
        journal.add("one", 1, {"x": torch.ones(100)})
    path = next(tmp_path.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(content[:-1] if damage == "short" else content)
    with (
        open_journal(tmp_path, 1, "a search") as journal,
        pytest.raises(FiftyfoldError, match=r"damaged \(at one.*delete"),
    ):
        journal.tensors("one")


def test_a_value_that_cannot_be_read_is_named(tmp_path):
    with open_journal(tmp_path, 1, "a search") as journal:
        for key, value in {"text": "1", "truth": True, "list": [1.0]}.items():
            journal.add(key, value)
            with pytest.raises(FiftyfoldError, match=f"damaged .at {key}"):
                journal.read(key, number)


def test_digests_tell_apart_what_differs_and_nothing_else():
    x = torch.arange(6)
    different = [x, x.float(), x.view(2, 3), x.flip(0), [x], {"a": x}, {"b": x}, [x, 1], "1", 1, [1, [2]], [[1], 2]]
    assert len({digest_of(value) for value in different}) == len(different)
    assert digest_of({"a": x, "b": 1}) == digest_of({"b": 1, "a": x.view(2, 3).t().t().reshape(6)})
    assert digest_of((1, 2)) == digest_of([1, 2])


def test_the_disk_holds_only_whole_lines(tmp_path):
    journal = Journal()
    assert not journal._lines
    with open_journal(tmp_path, 1, "a search") as journal:
        journal.add("one", [None])
    first, second = (json.loads(line) for line in (tmp_path / LINES_FILE).read_text().splitlines())
    assert set(first) == {"stamp"}
    assert second == {"key": "one", "value": [None]}
