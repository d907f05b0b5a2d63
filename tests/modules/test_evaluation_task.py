from __future__ import annotations

import pytest
from transformers import BertConfig, PreTrainedTokenizerFast

from fiftyfold.datamodules.glue_tasks import TASKS
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.evaluation_task import EvaluationTask, UnnamedTask, fit_labels, fit_vocabulary


@pytest.mark.parametrize("name", TASKS)
def test_every_glue_task_is_one(name):
    assert isinstance(TASKS[name], EvaluationTask)


def test_without_a_description_the_number_of_labels_decides():
    assert list(UnnamedTask(3).build_metrics()) == [UnnamedTask(3).selection_metric] == ["accuracy"]
    assert list(UnnamedTask(1).build_metrics()) == [UnnamedTask(1).selection_metric] == ["pearson"]


def test_a_model_without_names_takes_the_tasks():
    config = BertConfig(num_labels=3)
    fit_labels(config, UnnamedTask(3, label_names=("no", "yes", "perhaps")), "model")
    assert config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert config.label2id == {"no": 0, "yes": 1, "perhaps": 2}


def test_names_of_the_models_own_stay():
    config = BertConfig(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    fit_labels(config, UnnamedTask(2, label_names=("negative", "positive")), "model")
    assert config.id2label == {0: "bad", 1: "good"}


def test_labels_in_another_order_are_refused():
    config = BertConfig(id2label={0: "Entailment", 1: "Not Entailment"}, label2id={})
    fit_labels(config, UnnamedTask(2, label_names=("entailment", "not_entailment")), "teacher")
    with pytest.raises(FiftyfoldError, match="teacher's labels stand in the order"):
        fit_labels(config, UnnamedTask(2, label_names=("not_entailment", "entailment")), "teacher")


def test_another_number_of_labels_is_refused():
    with pytest.raises(FiftyfoldError, match=r"has 2 label.*'data' 3"):
        fit_labels(BertConfig(), UnnamedTask(3), "model")


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {f"w{number}": number for number in range(words - 1)} | {"[PAD]": words - 1}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)), pad_token="[PAD]")


def test_tokens_without_an_embedding_are_refused():
    fit_vocabulary(BertConfig(vocab_size=20), tokenizer(20), "model")
    with pytest.raises(FiftyfoldError, match="21 tokens"):
        fit_vocabulary(BertConfig(vocab_size=20), tokenizer(21), "model")


def test_a_model_learns_its_padding_token():
    config = BertConfig(vocab_size=20, pad_token_id=None)
    fit_vocabulary(config, tokenizer(20), "model")
    assert config.pad_token_id == 19
    fit_vocabulary(config, tokenizer(10), "model")
    assert config.pad_token_id == 19
