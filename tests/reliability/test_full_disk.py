"""A disk that is full, a real one: what was good stays, one sentence says so, and with room the work goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fiftyfold.datamodules import GLUEDataModule
from fiftyfold.datamodules.augmentation import augment_file
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import export, load
from tests.modules.packed.examples import logits, quantized
from tests.reliability.commands import Run, compress_words, export_hash, fit_words, said, training_hash
from tests.tiny import tiny_bert

PAGE = 4096
"""A file takes whole pages of a file system in memory."""

pytestmark = pytest.mark.slow


class Disk:
    """A file system in memory, of a size that can change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        if not self._mount("size=64m"):
            pytest.skip("needs to mount a file system")

    def resize(self, size: int) -> None:
        assert self._mount(f"remount,size={size}")

    def leave(self, size: int) -> None:
        """Let only so many bytes be free, in whole pages."""
        used = subprocess.run(["df", "-B1", "--output=used", self.folder], check=True, capture_output=True, text=True)
        self.resize(int(used.stdout.split()[-1]) + size)

    def _mount(self, options: str) -> bool:
        if sys.platform != "linux":
            return False
        command = ["mount", "-t", "tmpfs", "-o", options, "fiftyfold-test", str(self.folder)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture
def disk(place, tmp_path) -> Iterator[Disk]:
    """Lies in the place, so that commands reach it by a relative path."""
    folder = place / f"disk-{tmp_path.name}"
    disk = Disk(folder)
    yield disk
    subprocess.run(["umount", "-l", folder], check=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("free", [0, PAGE, 10 * PAGE])
def test_export(disk, free):
    """Neither the folder, nor the first file, nor the weights find room; the folder before stays."""
    before = quantized(tiny_bert())
    export(before, disk.folder / "out", rest_dtype="float32")
    disk.leave(free)
    with pytest.raises(FiftyfoldError, match=r"cannot be written .*[Nn]o space left.*nothing was exported"):
        export(quantized(tiny_bert(seed=1, hidden=64)), disk.folder / "out", rest_dtype="float32", overwrite=True)
    assert names(disk.folder) == ["out"]
    assert torch.equal(logits(load(disk.folder / "out")), logits(before))


def test_fit(disk, place, fitted):
    size = (place / "whole" / "step=2.ckpt").stat().st_size
    disk.resize(size * 7 // 2)
    folder = disk.folder.name
    assert Run(fit_words(folder), place).wait() == 1
    assert said(place).startswith(
        f"fiftyfold: error: the checkpoint {disk.folder}/step=4.ckpt cannot be written (No space"
    )
    assert [name for name in names(disk.folder) if name != "config.yaml"] == [f"step={step}.ckpt" for step in (1, 2, 3)]
    disk.resize(64 * 2**20)
    assert Run(fit_words(folder, resume=Path(folder) / "step=3.ckpt"), place).wait() == 0
    assert training_hash(disk.folder / "step=8.ckpt") == fitted


def test_compress(disk, place):
    folder = disk.folder.name
    assert Run(compress_words("undisturbed"), place).wait() == 0
    disk.resize(600_000)
    assert Run(compress_words(f"{folder}/small"), place).wait() == 1
    assert "fiftyfold: error: " in said(place)
    assert "No space left on device" in said(place)
    assert not (disk.folder / "small").exists()
    disk.resize(64 * 2**20)
    assert Run(compress_words(f"{folder}/small"), place).wait() == 0
    assert export_hash(disk.folder / "small") == export_hash(place / "undisturbed")
    assert names(disk.folder) == ["small"]


def test_augmentation(disk, place):
    """Neither the manifest, nor the first rows, nor later ones, nor the manifest of the whole find room."""
    (data,) = (place / "data").rglob("train*")
    words = place / "synonyms.txt"
    words.write_text("".join(f"{word} {word}ly\n" for word in data.read_text().split() if word.isalpha()))
    options = {"synonyms": words, "variants": 4, "probability": 0.9}
    whole = augment_file(data, place / "whole.jsonl", "sst2", **options)
    pages = -(-whole.path.stat().st_size // PAGE)
    output = disk.folder / "more.jsonl"
    (disk.folder / "other").write_bytes(bytes(PAGE))
    for number, free in enumerate((0, 1, 3, 1 + pages)):
        disk.resize((1 + free) * PAGE)
        with pytest.raises(FiftyfoldError, match=r"more\.jsonl\.part cannot be written \(No space left on device\)"):
            augment_file(data, output, "sst2", **options)
        assert names(disk.folder) == ["more.jsonl.manifest.json", "more.jsonl.part", "other"][number == 0 :]
    disk.resize(2**20)
    after = augment_file(data, output, "sst2", **options)
    assert (after.rows, after.resumed_at) == (whole.rows, whole.source_rows - 1)
    assert output.read_bytes() == whole.path.read_bytes()
    assert names(disk.folder) == ["more.jsonl", "more.jsonl.manifest.json", "other"]


@pytest.mark.parametrize("size", [PAGE, 2 * PAGE])
def test_tokens(disk, place, size):
    def data() -> GLUEDataModule:
        module = GLUEDataModule("sst2", str(place / "teacher"), str(place / "data"), cache_dir=str(disk.folder))
        module.setup("fit")
        return module

    disk.resize(size)
    with pytest.raises(FiftyfoldError, match="No space left on device"):
        data()
    assert names(disk.folder) == []
    disk.resize(2**20)
    assert next(iter(data().train_dataloader()))["input_ids"].ndim == 2
