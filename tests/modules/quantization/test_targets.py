import re

import pytest
import torch
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.targets import find_targets
from tests.tiny import FAMILIES, tiny_bert, tiny_causal, tiny_model

XTC_PATTERNS = ("attention.self", "intermediate", "word_embeddings", "output.dense")

HEADS = {
    "bert": {"classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "electra": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
    "gpt2": {"score"},
    "llama": {"score"},
}


def layer_names(model):
    return {name for name, module in model.named_modules() if hasattr(module, "weight") and module.weight.dim() == 2}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_default_is_everything_but_the_task_head(kind):
    model = tiny_model(kind)
    found = find_targets(model)
    assert set(found) == layer_names(model) - HEADS[kind]
    assert found == [name for name, _ in model.named_modules() if name in set(found)]


def test_xtc_on_bert_is_what_its_patterns_match():
    model = tiny_bert()
    expected = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and any(re.search(p, name) for p in XTC_PATTERNS)
    ]
    assert find_targets(model, "xtc") == expected
    assert len(expected) == 6 * 4 + 1
    assert find_targets(model, XTC_PATTERNS) == expected


@pytest.mark.parametrize(
    ("kind", "per_layer"), [("roberta", 6), ("electra", 6), ("distilbert", 6), ("gpt2", 4), ("llama", 7)]
)
def test_xtc_elsewhere_is_the_same_by_role(kind, per_layer):
    model = tiny_model(kind)
    found = find_targets(model, "xtc")
    assert len(found) == per_layer * 4 + 1
    modules = dict(model.named_modules())
    assert [name for name in found if isinstance(modules[name], nn.Embedding)] == [
        name for name, module in modules.items() if module is model.get_input_embeddings()
    ]


def test_a_tied_head_comes_with_its_embedding_unless_excluded():
    model = tiny_causal("gpt2")
    assert "lm_head" in find_targets(model)
    assert find_targets(model, "wte") == ["transformer.wte", "lm_head"]
    assert find_targets(model, "wte", exclude="lm_head") == ["transformer.wte"]
    assert "lm_head" not in find_targets(tiny_causal("llama"))


def test_exclude_takes_layers_out():
    model = tiny_bert()
    assert set(find_targets(model)) - set(find_targets(model, exclude=["pooler", "position"])) == {
        "bert.pooler.dense",
        "bert.embeddings.position_embeddings",
    }


def test_other_models_give_everything_and_subclasses_are_left_alone():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), Special(4, 4), nn.Conv2d(1, 1, 1), nn.LayerNorm(4))
    model.append(nn.MultiheadAttention(4, 2))
    assert find_targets(model) == ["0", "1"]


def test_a_frozen_teacher_beside_a_student_is_left_alone():
    both = nn.ModuleDict({"teacher": tiny_bert(layers=1).requires_grad_(False), "student": tiny_bert(layers=1)})
    assert all(name.startswith("student.bert.") for name in find_targets(both))
    assert all(name.startswith("student.bert.") for name in find_targets(both, "xtc"))
    assert find_targets(both["teacher"])


def test_a_frozen_part_of_any_kind_is_left_alone_beside_one_that_trains():
    """A teacher that is no transformers model, larger than the student and called what it may be."""

    def part(vocabulary):
        layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        return nn.ModuleDict({"words": nn.Embedding(vocabulary, 4), "layers": layers, "head": nn.Linear(4, 2)})

    both = nn.ModuleDict({"judge": part(50).requires_grad_(False), "net": part(20)})
    assert find_targets(both) == ["net.words", "net.layers.0", "net.layers.1", "net.head"]
    assert find_targets(both, "xtc") == ["net.words", "net.layers.0", "net.layers.1"]
    assert find_targets(both, "judge.*layers") == ["judge.layers.0", "judge.layers.1"]
    assert len(find_targets(both.requires_grad_(False))) == 8


def test_frozen_embeddings_of_a_model_that_trains_are_quantized():
    model = tiny_bert(layers=1)
    everything = find_targets(model)
    model.bert.embeddings.requires_grad_(False)
    assert find_targets(model) == everything
    model.bert.requires_grad_(False)
    assert find_targets(model) == everything


def test_compiled_parts_leave_no_trace_in_names():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager"))
    assert find_targets(model) == ["0.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"targets": "nothing_like_it"},
            r"targets: no layer's name has 'nothing_like_it'; the names are bert\.embeddings",
        ),
        ({"targets": ["query", "qeury"]}, "targets: no layer's name has 'qeury'"),
        ({"targets": "("}, r"targets: '\(' is not a regular expression"),
        ({"exclude": "qeury"}, "exclude: no layer's name has 'qeury'"),
        ({"targets": "query", "exclude": "query"}, "leave nothing to quantize"),
        ({"targets": None}, "targets must be a pattern or several"),
        ({"targets": []}, "leave nothing to quantize"),
    ],
)
def test_what_matches_nothing_is_refused(arguments, message):
    with pytest.raises(FiftyfoldError, match=message):
        find_targets(tiny_bert(), **arguments)


def test_a_model_without_layers_is_refused():
    with pytest.raises(FiftyfoldError, match="no Linear, Embedding or Conv1D"):
        find_targets(nn.Sequential(nn.ReLU()))
