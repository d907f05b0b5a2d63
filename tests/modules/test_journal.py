"""What a long search keeps, whatever stops it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.journal import LINES_FILE, number, open_journal


def test_what_was_found_is_there_again_with_its_tensors(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor([1, 2], dtype=torch.bfloat16)}
    with open_journal(tmp_path / "new", lambda: [1]) as journal:
        assert journal.remember("one", lambda: 1, number) == 1.0
        journal.add("two", {"x": [0.1]}, tensors)
    with open_journal(tmp_path / "new", lambda: [1]) as journal:
        assert "one" in journal
        assert "three" not in journal
        assert journal.remember("one", lambda: pytest.fail("known"), number) == 1.0
        assert journal.read("two", lambda value: value["x"]) == [0.1]
        found = journal.tensors("two")
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in "ab")


def test_without_a_folder_nothing_is_known():
    with open_journal(None, lambda: torch.ones(1)) as journal:
        journal.add("one", 1)
        assert "one" not in journal


def test_a_search_that_finds_nothing_leaves_nothing(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(RuntimeError), open_journal(folder, lambda: 1):
        raise RuntimeError
    assert not folder.exists()
    folder.mkdir()
    with open_journal(folder, lambda: 1):
        pass
    assert folder.is_dir(), "it was there before"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kept", range(0, 60, 3))
def test_a_line_that_a_kill_cut_short_is_found_again(kept, tmp_path):
    with open_journal(tmp_path, lambda: 1) as journal:
        journal.add("one", 1)
        whole = (tmp_path / LINES_FILE).read_bytes()
        journal.add("two", 2)
    after = (tmp_path / LINES_FILE).read_bytes()
    stamp = len(whole.splitlines(keepends=True)[0])
    (tmp_path / LINES_FILE).write_bytes(after[: stamp + kept])
    with open_journal(tmp_path, lambda: 1) as journal:
        journal.remember("one", lambda: 1, number)
        journal.remember("two", lambda: 2, number)
    assert (tmp_path / LINES_FILE).read_bytes() == after


def test_two_searches_do_not_share_a_folder(tmp_path):
    with open_journal(tmp_path, lambda: 1) as journal:
        journal.add("one", 1)
        with (
            pytest.raises(FiftyfoldError, match="another run is writing"),
            open_journal(tmp_path, lambda: 1),
        ):
            pass
    with (
        pytest.raises(FiftyfoldError, match="holds work on another"),
        open_journal(tmp_path, lambda: 2),
    ):
        pass
    with open_journal(tmp_path, lambda: 1) as journal:
        assert "one" in journal


@pytest.mark.parametrize(
    "content", [b"{}\n", b'["stamp"]\n', b"\xff\n", b"[]\n", b'{"stamp": 1}\n[1]\n', b"[" * 100_000 + b"\n", b"\n"]
)
def test_a_file_that_is_no_journal_is_refused(content, tmp_path):
    (tmp_path / LINES_FILE).write_bytes(content)
    with pytest.raises(FiftyfoldError), open_journal(tmp_path, lambda: 1):
        pass
    assert (tmp_path / LINES_FILE).read_bytes() == content


@pytest.mark.parametrize("damage", ["missing", "short", "bits"])
def test_damaged_tensors_are_named(damage, tmp_path):
    with open_journal(tmp_path, lambda: 1) as journal:
        journal.add("one", 1, {"x": torch.ones(100)})
    path = next(tmp_path.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(content[:-1] if damage == "short" else content)
    with (
        open_journal(tmp_path, lambda: 1) as journal,
        pytest.raises(FiftyfoldError, match=r"damaged \(at one.*delete"),
    ):
        journal.tensors("one")


def test_a_value_that_cannot_be_read_is_named(tmp_path):
    with open_journal(tmp_path, lambda: 1) as journal:
        for key, value in {"text": "1", "truth": True, "list": [1.0], "large": 10**400}.items():
            journal.add(key, value)
            with pytest.raises(FiftyfoldError, match=f"damaged .at {key}"):
                journal.read(key, number)


def test_the_disk_holds_only_whole_lines(tmp_path):
    with open_journal(tmp_path, lambda: 1) as journal:
        journal.add("one", [None])
    first, second = (json.loads(line) for line in (tmp_path / LINES_FILE).read_text().splitlines())
    assert set(first) == {"stamp"}
    assert second == {"key": "one", "value": [None]}
    assert [path.name for path in tmp_path.iterdir()] == [LINES_FILE]


@pytest.mark.parametrize(
    "name",
    ["profile.csv", "00000.safetensors", LINES_FILE, "journal.lock", f"{LINES_FILE}.bak", f".{LINES_FILE}.mine.tmp"],
)
@pytest.mark.parametrize("content", [b"mine", b"mine\n"])
def test_what_is_not_ours_is_left_alone(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FiftyfoldError, match="name another"), open_journal(tmp_path, lambda: 1):
        pass
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, content)]


def test_a_place_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place, message in (
        (tmp_path / "file", "cannot be a work folder"),
        ("a\0b", "cannot be a work folder"),
        ("~no_such_user/x", "cannot be a work folder"),
        ("x" * 300, "cannot be a work folder"),
        (3, "a path, not 3"),
        (True, "a path"),
    ):
        with pytest.raises(FiftyfoldError, match=message), open_journal(place, lambda: 1):
            pass


def test_a_disk_that_refuses_is_told_of_and_what_is_there_stays(tmp_path, monkeypatch):
    with open_journal(tmp_path, lambda: 1) as journal:
        journal.add("one", 1)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(FiftyfoldError, match=r"cannot be written .*No space left"):
                journal.add("two", 2, {"x": torch.ones(1)})
        assert "two" not in journal
        journal.add("two", 2, {"x": torch.ones(1)})
    with open_journal(tmp_path, lambda: 1) as journal:
        assert torch.equal(journal.tensors("two")["x"], torch.ones(1))


def test_what_is_no_value_is_not_kept(tmp_path):
    with open_journal(tmp_path, lambda: 1) as journal:
        with pytest.raises(FiftyfoldError, match="weight of x: nan is no number"):
            journal.remember("weight of x", lambda: math.nan, number)
        assert journal.remember("weight of x", lambda: 1, number) == 1
