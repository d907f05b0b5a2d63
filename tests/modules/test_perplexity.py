from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.perplexity import _windows, score_documents, score_masked, score_row
from tests.text import SIZE, tiny_language_model, tokens

STORIES = Path(__file__).resolve().parents[3] / "shared"


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 20, 33])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 1), (2, 2), (40, 20)])
def test_every_token_but_the_first_is_predicted_once(length, window, stride):
    row = torch.arange(length)
    predicted = []
    for position, (seen, labels) in enumerate(_windows(row, window, stride)):
        assert 2 <= len(seen) <= window
        new = labels[labels != -100].tolist()
        first = int((labels != -100).nonzero()[0])
        assert first >= 1, "something stands before what is predicted"
        assert position == 0 or first >= window - min(stride, window - 1)
        predicted += new
    assert predicted == list(range(1, length))


def test_one_window_is_transformers_own_loss():
    model, row = tiny_language_model(), tokens(1, 12)[0]
    score = score_row(model, row, window=40)
    expected = model(input_ids=row[None], labels=row[None]).loss
    assert math.isclose(score.nats, float(expected), rel_tol=1e-5)
    assert score.tokens == 11
    assert math.isclose(score.perplexity, math.exp(score.nats))


def test_documents_are_scored_each_on_its_own_whatever_the_batch():
    model = tiny_language_model()
    documents = [tokens(1, length, seed=length)[0] for length in (3, 30, 11, 60)]
    one = score_documents(model, documents, first_token=1, window=40, batch_size=1)
    many = score_documents(model, documents, first_token=1, window=40, batch_size=3)
    assert math.isclose(one.nats, many.nats, rel_tol=1e-5)
    assert one.tokens == many.tokens == 104
    parts = [score_documents(model, [document], first_token=1, window=40) for document in documents]
    assert math.isclose(one.nats, sum(p.nats * p.tokens for p in parts) / 104, rel_tol=1e-5)
    assert score_documents(model, documents, first_token=None, window=40).tokens == 100


def test_the_mode_of_the_model_stays():
    model = tiny_language_model().train()
    score_row(model, tokens(1, 12)[0], window=8)
    assert model.training


def test_masked_models():
    from transformers import AutoModelForMaskedLM

    from tests.tiny import tiny_config

    model = AutoModelForMaskedLM.from_config(tiny_config("bert", vocab=SIZE)).eval()
    inputs = tokens(4, 12)
    labels = torch.where(torch.arange(12) % 5 == 0, inputs, -100)
    batch = {"input_ids": inputs, "labels": labels}
    score = score_masked(model, [batch])
    assert score.tokens == 12
    assert math.isclose(score.nats, float(model(**batch).loss), rel_tol=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 9)])
def test_senseless_windows_are_refused(window, stride):
    with pytest.raises(FiftyfoldError, match="windows"):
        score_row(tiny_language_model(), tokens(1, 12)[0], window=window, stride=stride)


def test_nothing_to_score_is_refused():
    with pytest.raises(FiftyfoldError, match="fewer than two"):
        score_row(tiny_language_model(), tokens(1, 1)[0], window=8)
    with pytest.raises(FiftyfoldError, match="no document"):
        score_documents(tiny_language_model(), [torch.tensor([4])], first_token=None, window=8)
    broken = tiny_language_model()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(FiftyfoldError, match="not finite"):
        score_row(broken, tokens(1, 12)[0], window=8)


@pytest.mark.real_data
@pytest.mark.skipif(
    not (STORIES / "models" / "stories260K").is_dir(), reason="the real model is not beside the project"
)
def test_a_real_model_on_real_stories():
    """The first 60 stories of the sample; measured with transformers' own loss, a story at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(STORIES / "models" / "stories260K")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = (STORIES / "data" / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")[:60]]
    documents = [torch.tensor(tokenizer(story, add_special_tokens=False)["input_ids"])[:511] for story in stories]
    score = score_documents(model, documents, first_token=tokenizer.bos_token_id, window=512)
    assert abs(score.nats - 1.2958) < 1e-3
