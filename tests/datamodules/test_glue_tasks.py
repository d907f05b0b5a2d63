"""Tasks by name, and their official metrics."""

import pytest
import torch

from fiftyfold.datamodules.glue_tasks import TASKS, get_task
from fiftyfold.errors import FiftyfoldError


@pytest.mark.parametrize(
    ("given", "expected"),
    [("sst2", "sst2"), ("SST-2", "sst2"), ("STS-B", "stsb"), ("diagnostic", "ax"), ("MNLI", "mnli")],
)
def test_finds_a_task_by_name_or_folder(given, expected):
    assert get_task(given).name == expected


def test_names_the_tasks_when_one_is_unknown():
    with pytest.raises(FiftyfoldError, match=r"'imdb'; choose one of cola, sst2.* wnli, or ax, which has no train"):
        get_task("imdb")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_tasks_are_whole(task):
    assert task.selection_metric in task.metrics
    assert set(task.build_metrics()) == set(task.metrics)
    assert len(task.validation_splits) == len(task.validation_names)
    assert task.num_labels == (1 if task.name == "stsb" else len(task.label_names))
    assert task.max_length == (128 if task.is_pair else 64)


def test_metrics_are_the_official_ones():
    predictions, labels = torch.tensor([1, 1, 0, 0, 1, 0]), torch.tensor([1, 0, 0, 1, 1, 0])
    metrics = get_task("mrpc").build_metrics()
    for metric in metrics.values():
        metric.update(predictions, labels)
    assert metrics["accuracy"].compute() == pytest.approx(4 / 6)
    assert metrics["f1"].compute() == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    matthews = get_task("cola").build_metrics()["matthews"]
    matthews.update(predictions, labels)
    assert matthews.compute() == pytest.approx((2 * 2 - 1 * 1) / (3 * 3 * 3 * 3) ** 0.5)


def test_sts_b_correlates_scores():
    metrics = get_task("stsb").build_metrics()
    for metric in metrics.values():
        metric.update(torch.tensor([0.1, 0.9, 2.5, 10.0]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert metrics["spearman"].compute() == pytest.approx(1.0)
    assert 0.8 < metrics["pearson"].compute() < 0.95


def test_metrics_are_fresh_each_time():
    task = get_task("sst2")
    task.build_metrics()["accuracy"].update(torch.tensor([1]), torch.tensor([0]))
    again = task.build_metrics()["accuracy"]
    again.update(torch.tensor([1]), torch.tensor([1]))
    assert again.compute() == 1.0
