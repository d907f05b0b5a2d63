"""Trimming a vocabulary: the texts' tokens and outputs stay, everything named by number follows, and refusals undo."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import DistillationModule, export, load, quantize, reduce_layers, trim_vocabulary
from tests.tiny import tiny_config

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
CORPUS = [
    f"the {adjective} {noun} was {verb}ed and nobody {verb}s a naïve {noun} in café {number}"
    for number, adjective in enumerate("good bad boring lovely terrible fine great awful".split())
    for noun in "film movie story actor scene ending music camera".split()
    for verb in "play watch shoot cut".split()
]
TEXTS = ["the good film was watched", "", "nobody plays in café 3 ❤"]
LONG_WORD = "camera"


def byte_level(**options: Any) -> Tokenizer:
    backend = Tokenizer(kinds.BPE(**options))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return backend


def byte_fallback() -> Tokenizer:
    backend = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + in_bytes))
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = definition["added_tokens"][: len(SPECIAL)]
    return Tokenizer.from_str(json.dumps(definition))


def ends_of_words() -> Tokenizer:
    backend = Tokenizer(kinds.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_pieces() -> Tokenizer:
    backend = Tokenizer(kinds.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=SPECIAL))
    template = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B <mask>"}
    backend.post_processor = processors.TemplateProcessing(
        **template, special_tokens=[("<s>", 0), ("</s>", 2), ("<mask>", 4)]
    )
    return backend


def unigram() -> Tokenizer:
    backend = Tokenizer(kinds.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>")
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def whole_words() -> Tokenizer:
    backend = Tokenizer(kinds.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(CORPUS, trainers.WordLevelTrainer(vocab_size=200, special_tokens=SPECIAL))
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "BPE that takes known words whole": lambda: byte_level(ignore_merges=True),
    "BPE with byte fallback": byte_fallback,
    "BPE with ends of words": ends_of_words,
    "WordPiece": word_pieces,
    "Unigram": unigram,
    "WordLevel": whole_words,
}


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
    )


def build(name: str, rows: int, **options: Any) -> PreTrainedModel:
    """A model of a transformers class, its biases not zero."""
    family = next(family for family in ("DistilBert", "Electra", "Roberta", "Bert", "GPT2", "Llama") if family in name)
    config = tiny_config(family.lower(), layers=2, vocab=rows)
    numbers = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    for option, value in (numbers | options).items():
        setattr(config, option, value)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    return model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])[0].float()


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return wrap(byte_level())


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_as_before_and_other_words_into_smaller_pieces(kind: str, tmp_path: Path) -> None:
    tokenizer = wrap(KINDS[kind]())
    model = build("BertForSequenceClassification", len(tokenizer))
    before = [outputs(model, tokenizer, text) for text in TEXTS if tokenizer(text)["input_ids"]]
    trimmed = trim_vocabulary(model, tokenizer, lambda: TEXTS)

    assert len(trimmed) == model.get_input_embeddings().weight.shape[0] < len(tokenizer)
    assert [pieces(trimmed, text) for text in TEXTS] == [pieces(tokenizer, text) for text in TEXTS]
    assert pieces(trimmed, TEXTS[0]) != pieces(trimmed, LONG_WORD)
    if kind != "WordLevel":
        assert len(pieces(trimmed, LONG_WORD)) > len(pieces(tokenizer, LONG_WORD))
        assert "<unk>" not in pieces(trimmed, LONG_WORD)
    if "byte" in kind.lower():
        assert pieces(trimmed, "漢字 ☃") == pieces(tokenizer, "漢字 ☃")
    model.save_pretrained(tmp_path)
    trimmed.save_pretrained(tmp_path)
    model, reloaded = type(model).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == trimmed.get_vocab()
    assert "/tmp" not in (tmp_path / "tokenizer_config.json").read_text()
    after = [outputs(model, reloaded, text) for text in TEXTS if tokenizer(text)["input_ids"]]
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BertForMaskedLM", {}),
        ("RobertaForMaskedLM", {}),
        ("DistilBertForMaskedLM", {}),
        ("ElectraForMaskedLM", {}),
        ("GPT2LMHeadModel", {}),
        ("GPT2ForSequenceClassification", {"pad_token_id": None}),
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"dtype": torch.bfloat16}),
    ],
)
def test_models_compute_the_same(
    name: str, options: dict[str, Any], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # More rows than tokens, as models have whose rows were filled up to a multiple.
    model = build(name, len(byte_tokenizer) + 3, **options).to(options.get("dtype", torch.float32))
    before = outputs(model, byte_tokenizer, TEXTS[0])
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is (
        model.get_input_embeddings().weight
    )
    trimmed = trim_vocabulary(model, byte_tokenizer, lambda: TEXTS)
    for module in model.modules():
        assert getattr(module, "vocab_size", len(trimmed)) == len(trimmed)
        if isinstance(module, torch.nn.Embedding | torch.nn.Linear):
            told = module.num_embeddings if isinstance(module, torch.nn.Embedding) else module.out_features
            assert module.weight.shape[0] == told
    numbers = byte_tokenizer.get_vocab()
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=model.dtype)
    for one in (model, reloaded):
        after = outputs(one, trimmed, TEXTS[0])
        if one.get_output_embeddings() is not None:
            assert after.shape[-1] == len(trimmed) == one.config.vocab_size
            kept = sorted(numbers[token] for token in trimmed.get_vocab())
            after = torch.full_like(before, torch.nan).index_copy(-1, torch.tensor(kept), after)
            after = torch.where(after.isnan(), before, after)
            assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) == tied
        assert torch.allclose(before, after, atol=0.02 if model.dtype == torch.bfloat16 else 1e-5)
    if model.can_generate():
        prompt = trimmed(TEXTS[0], return_tensors="pt")["input_ids"]
        assert reloaded.generate(prompt, max_new_tokens=3, min_new_tokens=3).max() < len(trimmed)


def test_numbers_in_configurations_follow_their_tokens(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = len(byte_tokenizer)
    model = build("GPT2LMHeadModel", rows + 2, pad_token_id=rows + 1)
    word = byte_tokenizer.convert_tokens_to_ids("Ġ" + LONG_WORD)
    model.generation_config.eos_token_id = [2, word]
    model.generation_config.suppress_tokens = [word]
    model.generation_config.begin_suppress_tokens = [rows + 1]
    model.generation_config.forced_eos_token_id = None
    trimmed = trim_vocabulary(model, byte_tokenizer, lambda: TEXTS)
    moved = trimmed.convert_tokens_to_ids("Ġ" + LONG_WORD)
    assert moved < word
    assert model.generation_config.eos_token_id == [2, moved]
    assert model.generation_config.suppress_tokens == [moved]
    assert model.generation_config.begin_suppress_tokens is None
    assert model.config.pad_token_id is None, "no token of the tokenizer"
    assert trimmed(" " + LONG_WORD)["input_ids"] == [0, moved, 2]


def test_what_a_tokenizer_was_given_later_stays(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(["film", "<new>"])  # "film" cuts words where the vocabulary did not
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.padding_side = "left"
    tokenizer("the", max_length=2, truncation=True)
    texts = [*TEXTS, "a filmed <new> <|turn|>"]
    trimmed = trim_vocabulary(build("GPT2LMHeadModel", len(tokenizer)), tokenizer, lambda: texts)
    assert [pieces(trimmed, text) for text in texts] == [pieces(tokenizer, text) for text in texts]
    assert trimmed.get_added_vocab().keys() == tokenizer.get_added_vocab().keys()
    assert trimmed.chat_template == tokenizer.chat_template
    assert trimmed.padding_side == "left"
    assert trimmed.pad_token_id == tokenizer.pad_token_id


def test_tokens_that_only_a_definition_names_stay() -> None:
    definition = json.loads(word_pieces().to_str())
    unused = [number for name, number in definition["model"]["vocab"].items() if name in (LONG_WORD, "movie")]
    definition["post_processor"]["special_tokens"]["<mask>"]["ids"] = unused[:1]
    definition["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    definition["padding"] |= {"pad_id": unused[1], "pad_type_id": 0, "pad_token": "movie"}
    tokenizer = wrap(Tokenizer.from_str(json.dumps(definition)))
    trimmed = trim_vocabulary(build("BertModel", len(tokenizer)), tokenizer, lambda: TEXTS)
    pair = [tokenizer(TEXTS[0], TEXTS[2])["input_ids"], trimmed(TEXTS[0], TEXTS[2])["input_ids"]]
    assert tokenizer.convert_ids_to_tokens(pair[0]) == trimmed.convert_ids_to_tokens(pair[1])


def test_every_part_keeps_its_mode(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("BertForSequenceClassification", len(byte_tokenizer)).train()
    model.bert.embeddings.eval()
    trim_vocabulary(model, byte_tokenizer, lambda: TEXTS)
    assert model.training
    assert model.classifier.training
    assert not model.bert.embeddings.training


class ByNumber(transformers.BertForSequenceClassification):
    """Computes with the tokens' numbers themselves."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (super().forward(input_ids=input_ids).logits + input_ids.sum(),)


def t5(rows: int) -> PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=rows, **sizes))


def quantized(rows: int) -> PreTrainedModel:
    model = build("BertForSequenceClassification", rows)
    quantize(model, targets="encoder")
    return model


def reduced(rows: int) -> PreTrainedModel:
    model = build("BertForSequenceClassification", rows)
    reduce_layers(model, "first", keep=1)
    return model


def with_bad_words(rows: int) -> PreTrainedModel:
    model = build("GPT2LMHeadModel", rows)
    model.generation_config.bad_words_ids = [[5, 6]]
    return model


def far_padding(rows: int) -> PreTrainedModel:
    # A token that stays, for it is configured, under another number.
    return build("RobertaForSequenceClassification", rows, pad_token_id=rows - 1, max_position_embeddings=2 * rows)


def by_number(rows: int) -> PreTrainedModel:
    return ByNumber(tiny_config("bert", layers=1, vocab=rows))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (t5, "no plain encoder or decoder"),
        (quantized, "compressed already"),
        (reduced, "compressed already"),
        (with_bad_words, "bad_words_ids"),
        (far_padding, "position_embeddings counts from the padding's number"),
        (by_number, "ByNumber computes something else with fewer tokens"),
        (lambda rows: build("BertModel", rows - 1), "use the model's own"),
    ],
)
def test_a_refused_model_is_as_before(
    make: Callable[[int], PreTrainedModel], named: str, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make(len(byte_tokenizer))
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(FiftyfoldError, match=named):
        trim_vocabulary(model, byte_tokenizer, lambda: TEXTS)
    assert model.config.to_dict() == config
    assert model.get_input_embeddings().num_embeddings == config["vocab_size"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


ONCE = iter(CORPUS)


class NoFastOne:
    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("tokenizer", "texts", "named"),
    [
        (NoFastOne(), lambda: TEXTS, "NoFastOne has no tokenizer.json"),
        (None, lambda: [], "no text"),
        (None, lambda: iter(()), "no text"),
        (None, ONCE.__iter__, "called again"),
    ],
)
def test_tokenizers_and_texts_that_are_refused(
    tokenizer: Any, texts: Any, named: str, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build("BertModel", len(byte_tokenizer))
    with pytest.raises(FiftyfoldError, match=named):
        trim_vocabulary(model, tokenizer or byte_tokenizer, texts)
    assert model.config.vocab_size == len(byte_tokenizer)


def test_a_tokenizer_that_would_cut_otherwise_is_refused() -> None:
    backend = Tokenizer(kinds.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, continuing_subword_prefix="##")
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = wrap(backend)
    with pytest.raises(FiftyfoldError, match="would cut 'the good film"):
        trim_vocabulary(build("BertModel", len(tokenizer)), tokenizer, lambda: TEXTS)


def test_a_trimmed_model_is_a_teacher_and_is_compressed(
    byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    teacher = build("BertForSequenceClassification", len(byte_tokenizer))
    trimmed = trim_vocabulary(teacher, byte_tokenizer, lambda: TEXTS)
    student = DistillationModule(teacher).student
    assert student.config.vocab_size == len(trimmed)
    quantize(student)
    export(student, tmp_path / "small", tokenizer=trimmed, rest_dtype="float32")
    small, tokenizer = load(tmp_path / "small"), AutoTokenizer.from_pretrained(tmp_path / "small")
    expected = outputs(student.eval(), trimmed, TEXTS[0])
    assert torch.allclose(outputs(small, tokenizer, TEXTS[0]), expected, atol=1e-4)
