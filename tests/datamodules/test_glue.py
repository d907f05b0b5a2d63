"""GLUEDataModule: batches, splits by stage, the cache, the hub."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from functools import partial
from types import SimpleNamespace

import datasets
import jsonargparse
import lightning.pytorch as pl
import pyarrow
import pyarrow.parquet
import pytest
import torch

from fiftyfold.datamodules import GLUEDataModule, token_cache
from fiftyfold.datamodules.glue_files import Rows
from fiftyfold.errors import FiftyfoldError
from tests.datamodules.conftest import sentences, write_sst2


def module(folder, tokenizer, tmp_path, task="sst2", **options):
    return GLUEDataModule(task, tokenizer, str(folder), cache_dir=str(tmp_path / "cache"), **options)


def count_rows(loader):
    return sum(len(batch["input_ids"]) for batch in loader)


def test_batches_are_padded_to_their_longest_row(tmp_path, sst2_folder, tokenizer_folder):
    data = module(sst2_folder, tokenizer_folder, tmp_path, batch_size=4)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(len(batch["labels"]) for batch in batches) == 27
    assert len({batch["input_ids"].shape[1] for batch in batches}) > 1
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == lengths.max() > 5, "the tokenizer's own truncation to 5 must not show"
        assert torch.equal(batch["input_ids"] != 0, batch["attention_mask"].bool())
        assert batch["labels"].dtype == torch.int64


def test_long_rows_are_cut(tmp_path, sst2_folder, tokenizer_folder):
    data = module(sst2_folder, tokenizer_folder, tmp_path, max_length=6)
    data.setup("fit")
    assert max(batch["input_ids"].shape[1] for batch in data.train_dataloader()) == 6


def test_pairs_and_scores(tmp_path, tokenizer_folder):
    folder = tmp_path / "STS-B"
    folder.mkdir()
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("sentence1\tsentence2\tscore\ngood film\tfine film\t4.2\n")
    data = module(tmp_path, tokenizer_folder, tmp_path, task="stsb")
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == pytest.approx([4.2])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert data.num_labels == 1


def test_tokenizer_without_padding_token_pads_with_its_end(tmp_path, sst2_folder, tokenizer_folder):
    data = module(sst2_folder, tokenizer_folder, tmp_path)
    tokenizer = data.tokenizer
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path / "no_padding")
    again = module(sst2_folder, str(tmp_path / "no_padding"), tmp_path)
    again.setup("fit")
    batch = next(iter(again.train_dataloader()))
    assert batch["input_ids"][batch["attention_mask"] == 0].unique().tolist() == [tokenizer.eos_token_id]


def test_padding_side_is_the_tokenizers():
    collate = token_cache.PaddingCollator(0, regression=False, pad_left=True)
    assert collate({"input_ids": [[5], [6, 7]]})["input_ids"].tolist() == [[0, 5], [6, 7]]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_refuses_a_development_set_that_leaves_one_without_a_batch(tmp_path, tokenizer_folder, rank):
    data = module(write_sst2(tmp_path / "SST-2", dev=1).parent, tokenizer_folder, tmp_path)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    data.setup("fit")
    with pytest.raises(FiftyfoldError, match="validation set of sst2 has 1 rows for 2 processes; use fewer devices"):
        data.val_dataloader()


def test_a_changed_shard_is_noticed(tmp_path, sst2_folder, tokenizer_folder):
    folder = sst2_folder / "SST-2"
    (folder / "train.tsv").unlink()
    for second in ("fine film", "good plot and story"):
        for number, text in enumerate(["good film", second]):
            table = pyarrow.table({"sentence": [text], "label": [number]})
            pyarrow.parquet.write_table(table, folder / f"train-{number:05d}-of-00002.parquet")
        data = module(sst2_folder, tokenizer_folder, tmp_path, batch_size=2)
        data.setup("fit")
        (batch,) = data.train_dataloader()
        assert batch["input_ids"].shape == (2, 2 + len(second.split()))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_stages_without_a_test_file_take_the_development_set(tmp_path, sst2_folder, tokenizer_folder, stage):
    data = module(sst2_folder, tokenizer_folder, tmp_path)
    data.setup(stage)
    loader = {"validate": data.val_dataloader, "test": data.test_dataloader, "predict": data.predict_dataloader}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert count_rows(loader[stage]()) == 9
    assert ["sst2 has no test set" in str(each.message) for each in said] == [True] * (stage != "validate")


def test_unlabelled_test_file_is_predicted_and_not_tested(tmp_path, sst2_folder, tokenizer_folder):
    (sst2_folder / "SST-2" / "test.tsv").write_text("index\tsentence\n0\tvery good\n1\tgood\n2\tbad very bad film\n")
    data = module(sst2_folder, tokenizer_folder, tmp_path)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert "labels" not in batches[0]
    assert batches[0]["attention_mask"].sum(1).tolist() == [4, 3, 6], "predictions keep the order of the file"
    data.setup("test")
    assert count_rows(data.test_dataloader()) == 9


def test_labelled_test_file_is_tested(tmp_path, sst2_folder, tokenizer_folder):
    (sst2_folder / "SST-2" / "test.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    data = module(sst2_folder, tokenizer_folder, tmp_path)
    data.setup("test")
    assert count_rows(data.test_dataloader()) == 2


@pytest.mark.parametrize("mismatched", [False, True])
def test_mnli_has_one_or_two_development_sets(tmp_path, tokenizer_folder, mismatched):
    folder = tmp_path / "MNLI"
    folder.mkdir()
    for name in ["train", "dev_matched", *(["dev_mismatched"] if mismatched else [])]:
        (folder / f"{name}.tsv").write_text("sentence1\tsentence2\tgold_label\ngood\tbad\tcontradiction\n")
    data = module(tmp_path, tokenizer_folder, tmp_path, task="mnli")
    data.setup("fit")
    loaders = data.val_dataloader()
    assert isinstance(loaders, list) == mismatched
    assert data.task.validation_names == (("matched", "mismatched") if mismatched else ("matched",))


def test_diagnostic_set_is_for_prediction(tmp_path, tokenizer_folder):
    (tmp_path / "diagnostic").mkdir()
    (tmp_path / "diagnostic" / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\tgood\tbad\n")
    data = module(tmp_path, tokenizer_folder, tmp_path, task="ax")
    data.setup("predict")
    assert count_rows(data.predict_dataloader()) == 1
    with pytest.raises(FiftyfoldError, match="no development set for ax"):
        data.setup("fit")
    data.setup("test")
    with pytest.raises(FiftyfoldError, match="has no labels to test with"):
        data.test_dataloader()


def test_limit_is_a_choice_by_the_seed(tmp_path, sst2_folder, tokenizer_folder):
    def rows(seed):
        data = module(sst2_folder, tokenizer_folder, tmp_path, limit_train=10, batch_size=10, seed=seed)
        data.setup("fit")
        (batch,) = data.train_dataloader()
        return sorted(map(str, batch["input_ids"].tolist()))

    assert len(rows(1)) == 10
    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_augmented_file_takes_the_training_sets_place(tmp_path, sst2_folder, tokenizer_folder):
    path = tmp_path / "more.jsonl"
    path.write_text('{"row": 0, "sentence": "good", "label": 1}\n' * 40)
    data = module(sst2_folder, tokenizer_folder, tmp_path, augmented=str(path))
    data.setup("fit")
    assert count_rows(data.train_dataloader()) == 40
    assert count_rows(data.val_dataloader()) == 9
    with pytest.raises(FiftyfoldError, match=r"none.jsonl does not exist"):
        module(sst2_folder, tokenizer_folder, tmp_path, augmented=str(tmp_path / "none.jsonl")).setup("fit")


def test_unlabelled_texts_join_the_training_set_and_nobody_reads_their_labels(tmp_path, sst2_folder, tokenizer_folder):
    path = tmp_path / "more.jsonl"
    path.write_text('{"sentence": "good", "label": "of another task"}\n' * 40)
    data = module(sst2_folder, tokenizer_folder, tmp_path, unlabelled=str(path), limit_train=10)
    data.setup("fit")
    assert count_rows(data.train_dataloader()) == 50
    assert all("labels" not in batch for batch in data.train_dataloader())
    assert all("labels" in batch for batch in data.val_dataloader())
    path.write_text('{"text": "good"}\n')
    with pytest.raises(FiftyfoldError, match="no column 'sentence'"):
        module(sst2_folder, tokenizer_folder, tmp_path, unlabelled=str(path)).setup("fit")
    with pytest.raises(FiftyfoldError, match=r"none.jsonl does not exist"):
        module(sst2_folder, tokenizer_folder, tmp_path, unlabelled=str(tmp_path / "none.jsonl")).setup("fit")


def test_training_texts_are_those_of_the_training_and_the_unlabelled_set(tmp_path, sst2_folder, tokenizer_folder):
    (tmp_path / "more.jsonl").write_text('{"sentence": "poor plot"}\n')
    data = module(sst2_folder, tokenizer_folder, tmp_path, unlabelled=str(tmp_path / "more.jsonl"), limit_train=5)
    for _ in range(2):
        assert list(data.training_texts()) == [*sentences(27, seed=1), "poor plot"]
    (sst2_folder / "SST-2" / "train.tsv").unlink()
    with pytest.raises(FiftyfoldError, match="has no train set for sst2"):
        list(module(sst2_folder, tokenizer_folder, tmp_path).training_texts())


def test_wrong_values_and_missing_sets(tmp_path, sst2_folder, tokenizer_folder):
    for option in ("batch_size", "eval_batch_size", "limit_train", "max_length"):
        with pytest.raises(FiftyfoldError, match=f"{option} is 0"):
            module(sst2_folder, tokenizer_folder, tmp_path, **{option: 0})
    with pytest.raises(FiftyfoldError, match="No tokenizer could be loaded"):
        module(sst2_folder, str(tmp_path), tmp_path).setup("fit")
    (sst2_folder / "SST-2" / "dev.tsv").unlink()
    with pytest.raises(FiftyfoldError, match="no development set for sst2"):
        module(sst2_folder, tokenizer_folder, tmp_path).setup("fit")


class TestCache:
    @pytest.fixture
    def tokenizings(self, monkeypatch):
        done = []
        original = token_cache.tokenize

        def counted(rows, tokenizer, **options):
            done.append(len(rows))
            return original(rows, tokenizer, **options)

        monkeypatch.setattr(token_cache, "tokenize", counted)
        return done

    def test_tokenises_once(self, tmp_path, sst2_folder, tokenizer_folder, tokenizings):
        for _ in range(2):
            data = module(sst2_folder, tokenizer_folder, tmp_path)
            data.setup("fit")
            list(data.train_dataloader())
        assert tokenizings == [9, 27]

    def test_notices_a_changed_source(self, tmp_path, sst2_folder, tokenizer_folder, tokenizings):
        module(sst2_folder, tokenizer_folder, tmp_path).setup("fit")
        path = sst2_folder / "SST-2" / "train.tsv"
        status = path.stat()
        path.write_text(path.read_text().replace("good", "fine"))
        # neither size nor time gives it away
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
        data = module(sst2_folder, tokenizer_folder, tmp_path)
        data.setup("fit")
        assert tokenizings == [9, 27, 27]
        good = data.tokenizer.convert_tokens_to_ids("good")
        assert not any((batch["input_ids"] == good).any() for batch in data.train_dataloader())

    def test_notices_another_length_and_tokenizer(self, tmp_path, sst2_folder, tokenizer_folder, tokenizings):
        data = module(sst2_folder, tokenizer_folder, tmp_path)
        data.setup("validate")
        module(sst2_folder, tokenizer_folder, tmp_path, max_length=5).setup("validate")
        tokenizer = data.tokenizer
        tokenizer.add_tokens(["story plot"])
        tokenizer.save_pretrained(tmp_path / "other")
        module(sst2_folder, str(tmp_path / "other"), tmp_path).setup("validate")
        assert tokenizings == [9, 9, 9]

    def test_a_used_tokenizer_keeps_its_digest(self, tokenizer_folder, sst2_folder, tmp_path):
        tokenizer = module(sst2_folder, tokenizer_folder, tmp_path).tokenizer
        before = token_cache.tokenizer_digest(tokenizer)
        tokenizer(["good"], truncation=True, max_length=3, padding="max_length")
        assert token_cache.tokenizer_digest(tokenizer) == before

    def test_two_processes_may_build_it_at_once(self, tmp_path, sst2_folder, tokenizer_folder):
        context = multiprocessing.get_context("fork")
        build = partial(_build, str(sst2_folder), tokenizer_folder, str(tmp_path / "cache"))
        workers = [context.Process(target=build) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert len(list((tmp_path / "cache").iterdir())) == 2

    def test_the_later_of_two_builders_gives_way(self, tmp_path, tokenizer_folder, sst2_folder, monkeypatch):
        tokenizer = module(sst2_folder, tokenizer_folder, tmp_path).tokenizer
        options = {
            "source_digest": "x",
            "task": "sst2",
            "split": "train",
            "max_length": 9,
            "cache_folder": tmp_path / "c",
        }
        rows = Rows((["good"],), [1])

        def read_while_another_builds():
            token_cache.cached_tokens(lambda: rows, tokenizer, **options)
            return rows

        tokens = token_cache.cached_tokens(read_while_another_builds, tokenizer, **options)
        assert len(tokens) == 1
        assert len(list((tmp_path / "c").iterdir())) == 1, "nothing half-written stays behind"

    def test_unwritable_folder(self, tmp_path, sst2_folder, tokenizer_folder):
        (tmp_path / "cache").write_text("a file where the folder should be")
        with pytest.raises(FiftyfoldError, match=r"cannot be written .* cache_dir"):
            module(sst2_folder, tokenizer_folder, tmp_path).setup("fit")

    def test_damaged_entry(self, tmp_path, sst2_folder, tokenizer_folder):
        module(sst2_folder, tokenizer_folder, tmp_path).setup("validate")
        (data_file,) = (tmp_path / "cache").glob("*/*.arrow")
        data_file.write_bytes(data_file.read_bytes()[:100])
        with pytest.raises(FiftyfoldError, match="is damaged; remove it"):
            module(sst2_folder, tokenizer_folder, tmp_path).setup("validate")


def _build(folder: str, tokenizer: str, cache: str) -> None:
    GLUEDataModule("sst2", tokenizer, folder, cache_dir=cache).setup("fit")


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        asked = []

        def load_dataset(name, config):
            asked.append((name, config))
            rows = {"sentence": ["good film", "bad film"], "label": [1, 0], "idx": [0, 1]}
            hidden = {**rows, "label": [-1, -1]}
            return datasets.DatasetDict(
                {
                    "train": datasets.Dataset.from_dict(rows),
                    "validation": datasets.Dataset.from_dict(rows),
                    "test": datasets.Dataset.from_dict(hidden),
                }
            )

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    def test_reads_the_tasks_configuration(self, hub, tmp_path, tokenizer_folder):
        data = GLUEDataModule("SST-2", tokenizer_folder, cache_dir=str(tmp_path))
        data.setup("fit")
        data.setup("predict")
        assert hub == [("nyu-mll/glue", "sst2")]
        assert next(iter(data.train_dataloader()))["labels"].sort().values.tolist() == [0, 1]
        assert "labels" not in next(iter(data.predict_dataloader()))

    def test_offline_gets_one_sentence(self, monkeypatch, tmp_path, tokenizer_folder):
        def load_dataset(name, config):
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(
            FiftyfoldError, match=r"could not be fetched .*\(no route\); go online, or give data"
        ) as error:
            GLUEDataModule("sst2", tokenizer_folder, cache_dir=str(tmp_path)).setup("fit")
        assert "\n" not in str(error.value)


class Counter(pl.LightningModule):
    """Counts what each stage hands it, and can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.first_batches: list[list[list[int]]] = []

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.first_batches.append(batch["input_ids"].tolist())
        return self.weight * batch["labels"].float().mean()

    def validation_step(self, batch, batch_idx):
        self.log("rows", float(len(batch["labels"])), reduce_fx="sum", batch_size=1)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch["attention_mask"].sum(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_stage_of_a_trainer(tmp_path, sst2_folder, tokenizer_folder, num_workers):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = module(sst2_folder, tokenizer_folder, tmp_path, batch_size=4, eval_batch_size=4, num_workers=num_workers)
    counter = Counter()
    trainer.fit(counter, datamodule=data)
    assert counter.first_batches[0] != counter.first_batches[1], "each epoch has an order of its own"
    assert trainer.validate(counter, datamodule=data, verbose=False) == [{"rows": 9.0}]
    assert trainer.test(counter, datamodule=data, verbose=False) == [{"rows": 9.0}]
    assert sum(len(lengths) for lengths in trainer.predict(counter, datamodule=data)) == 9


def test_overfitting_sees_the_same_batches_in_each_epoch(tmp_path, sst2_folder, tokenizer_folder):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        overfit_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    counter = Counter()
    trainer.fit(counter, datamodule=module(sst2_folder, tokenizer_folder, tmp_path, batch_size=4))
    assert len(counter.first_batches) == 3
    assert all(batch == counter.first_batches[0] for batch in counter.first_batches)


def test_command_line_takes_the_tokenizer_as_a_name(sst2_folder, tokenizer_folder):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GLUEDataModule, "data")
    arguments = ["--data.task=sst2", f"--data.tokenizer={tokenizer_folder}", f"--data.data={sst2_folder}"]
    made = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert made.tokenizer.pad_token == "[PAD]"
    assert made.task.name == "sst2"
