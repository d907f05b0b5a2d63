from __future__ import annotations

import warnings

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


def test_names_of_the_models_own_stay_and_are_said():
    config = BertConfig(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    with pytest.warns(UserWarning, match=r"'bad', 'good'.*'negative', 'positive'.*made for this task"):
        fit_labels(config, UnnamedTask(2, label_names=("negative", "positive")), "model")
    assert config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize("names", [("NEGATIVE", "Positive"), ("LABEL_0", "LABEL_1"), ("0", "1")])
def test_names_that_say_nothing_else_are_no_cause_for_a_warning(names):
    config = BertConfig(id2label=dict(enumerate(names)), label2id={})
    with warnings.catch_warnings(action="error"):
        fit_labels(config, UnnamedTask(2, label_names=("negative", "positive")), "model")


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


def test_a_tokenizer_of_far_fewer_tokens_is_doubted():
    with warnings.catch_warnings(action="error"):
        fit_vocabulary(BertConfig(vocab_size=20), tokenizer(15), "model")
    with pytest.warns(UserWarning, match=r"has 14 tokens, the model's vocabulary 20: is it the model's own"):
        fit_vocabulary(BertConfig(vocab_size=20), tokenizer(14), "model")


def test_a_model_learns_its_padding_token():
    config = BertConfig(vocab_size=20, pad_token_id=None)
    fit_vocabulary(config, tokenizer(20), "model")
    assert config.pad_token_id == 19
    fit_vocabulary(config, tokenizer(15), "model")
    assert config.pad_token_id == 19
