"""A kill at any rename of a replacement leaves the old folder or the new one, and both can be found."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from fiftyfold.errors import FiftyfoldError
from fiftyfold.folder_replacement import complete_replacement, interrupted_replacement, replaced_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork")


def replace(target: Path, content: str) -> None:
    with replaced_folder(target) as aside:
        (aside / "content").write_text(content)


def killed_at_rename(target: Path, number: int) -> None:
    """Replace ``target`` in a process that dies before its ``number``-th rename."""
    process = os.fork()
    if process == 0:
        rename, left = Path.rename, [number]

        def dying(self: Path, place: Path) -> Path:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, place)

        Path.rename = dying  # type: ignore[method-assign]
        replace(target, "new")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == (-signal.SIGKILL if number < 2 else 0)


@pytest.mark.parametrize("name", ["out", "a [b]*?"])
def test_between_the_renames_both_are_whole_and_the_new_one_wins(tmp_path, name):
    target = tmp_path / name
    replace(target, "old")
    killed_at_rename(target, 1)
    assert not target.exists()
    new, old = interrupted_replacement(target)
    assert ((new / "content").read_text(), (old / "content").read_text()) == ("new", "old")
    assert complete_replacement(target)
    assert (target / "content").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
    assert not complete_replacement(target)


def test_before_the_renames_the_old_one_is_in_place(tmp_path):
    target = tmp_path / "out"
    replace(target, "old")
    killed_at_rename(target, 0)
    assert (target / "content").read_text() == "old"
    assert interrupted_replacement(target) is None
    replace(target, "next")
    assert (target / "content").read_text() == "next"


def test_a_first_writing_that_is_killed_is_no_replacement(tmp_path):
    target = tmp_path / "out"
    killed_at_rename(target, 0)
    assert not target.exists()
    assert interrupted_replacement(target) is None
    assert not complete_replacement(target)


def test_what_cannot_be_completed_names_both(tmp_path, monkeypatch):
    target = tmp_path / "out"
    replace(target, "old")
    killed_at_rename(target, 1)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(FiftyfoldError, match=r"rename .*/\.out\.\w+ or .*/\.out\.\w+\.old to it"):
        complete_replacement(target)
    assert interrupted_replacement(target) is not None
