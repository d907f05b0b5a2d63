"""Folders that are broken or hostile: one sentence each, and no memory for what they only claim to hold."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import export, load, quantize
from tests.modules.packed.examples import (
    Encoder,
    drop_checksum,
    edit_config,
    edit_header,
    edit_tensors,
    quantized,
    tiny_tokenizer,
)
from tests.tiny import tiny_bert, tiny_causal

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported")
    export(quantized(tiny_bert(layers=2)), path / "out", tokenizer=tiny_tokenizer())
    return path / "out"


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "out")


def refuses(folder, message):
    """Both ways to open the folder give one and the same sentence."""
    for opener in (load, AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(FiftyfoldError, match=message) as caught:
            opener(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file(folder, share):
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    refuses(folder, r"model\.safetensors is truncated or altered")


def test_a_longer_file(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refuses(folder, "truncated or altered")


def test_one_flipped_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    refuses(folder, "was altered: its checksum does not fit")


def test_a_header_length_beyond_all_measure(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    refuses(folder, "truncated or altered")


def test_a_header_that_is_no_json(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:20] = b"not json at a"[:12]
    path.write_bytes(content)
    refuses(folder, "truncated or altered")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**40]}, "truncated or altered"),
        ({"shape": [2**62, 2**62]}, "truncated or altered"),
        ({"shape": [16, 8]}, r"with shape \(16, 8\), but the model wants \(128,\)"),
        ({"dtype": "I8"}, r"as I8, but the model wants torch\.uint8"),
        ({"dtype": "F99"}, "truncated or altered"),
        ({"data_offsets": [0, 1]}, "truncated or altered"),
        ({"data_offsets": [2**40, 2**40 + 128]}, "truncated or altered"),
    ],
)
def test_an_altered_header(folder, change, message):
    edit_header(folder, lambda header: header[f"{QUERY}.weight"].update(change))
    refuses(folder, message)


def test_a_type_of_the_same_width_is_noticed_too(folder):
    edit_header(folder, lambda header: header["classifier.weight"].update(dtype="BF16"))
    refuses(folder, "checksum does not fit")
    edit_header(folder, lambda header: header[f"{QUERY}.weight_scale"].update(dtype="BF16"))
    refuses(folder, r"weight_scale' as BF16, but the model wants torch\.float16")


def test_a_whole_number_is_no_float(folder):
    edit_header(folder, lambda header: header["classifier.weight"].update(dtype="I16"))
    refuses(folder, r"'classifier\.weight' as I16")


def test_no_checksum(folder):
    drop_checksum(folder)
    refuses(folder, "checksum does not fit")


def test_a_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("bert.encoder.layer.1.output.LayerNorm.bias"))
    refuses(folder, r"lacks the tensor 'bert\.encoder\.layer\.1\.output\.LayerNorm\.bias'")


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_a_missing_packed_tensor_is_noticed_by_the_backbone_alone_too(folder, part):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{QUERY}.{part}"))
    refuses(folder, rf"lacks the tensor '{QUERY}\.{part}'")
    with pytest.raises(FiftyfoldError, match="lacks the tensor"):
        AutoModel.from_pretrained(folder)


def test_an_extra_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update(trojan=torch.zeros(3)))
    refuses(folder, "holds 'trojan', which the model does not have")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{QUERY}.weight", torch.zeros(127, dtype=torch.uint8)),
        (f"{QUERY}.weight", torch.zeros(32, 32)),
        (f"{QUERY}.weight_scale", torch.zeros(32, 1, dtype=torch.float16)),
        ("classifier.weight", torch.zeros(3, 32)),
        ("bert.embeddings.LayerNorm.weight", torch.zeros(())),
    ],
)
def test_a_tensor_of_another_shape(folder, name, tensor):
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    refuses(folder, f"{name}' with shape .* do not belong together")


def test_bytes_that_packing_never_writes(tmp_path):
    export(quantized(tiny_bert(layers=1), weight_bits=2), tmp_path / "out")
    edit_tensors(tmp_path / "out", lambda tensors: tensors[f"{QUERY}.weight"].fill_(255))
    with pytest.raises(FiftyfoldError, match="the file was altered"):
        load(tmp_path / "out")


def test_two_tensors_for_one_name(folder):
    shards = folder.with_name("shards")
    load(folder).save_pretrained(shards, max_shard_size=2000)
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    shutil.copy(second, first)
    with pytest.raises(FiftyfoldError, match="two weight files"):
        AutoModelForSequenceClassification.from_pretrained(shards)


def test_an_absent_weight_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FiftyfoldError, match=r"model\.safetensors"):
        load(folder)


# --- the configuration ----------------------------------------------------------------------------------------------


def manifest(folder, **changes):
    edit_config(folder, lambda config: config["quantization_config"].update(changes))


def test_a_newer_format(folder):
    manifest(folder, format_version=99)
    refuses(folder, "has format version 99, .*install a newer fiftyfold")


def test_bits_that_nobody_knows(folder):
    def edit(config):
        config["quantization_config"]["settings"][0]["weight"]["bits"] = 7

    edit_config(folder, edit)
    refuses(folder, "weight_bits must be one of 1, 2, 3, 4, 8, not 7")


def test_bits_that_do_not_fit_the_tensors(folder):
    def edit(config):
        for settings in config["quantization_config"]["settings"]:
            settings["weight"]["bits"] = 4

    edit_config(folder, edit)
    refuses(folder, "weights and configuration do not belong together")


def test_an_operation_that_nobody_knows(folder):
    manifest(folder, structure=[{"op": "explode"}])
    refuses(folder, "unknown operation")


@pytest.mark.parametrize("shape", [[2**31, 2**31], [32, 33]])
def test_a_shape_that_commands_memory(folder, shape):
    def edit(config):
        config["quantization_config"]["packed"][QUERY]["shape"] = shape

    edit_config(folder, edit)
    refuses(folder, r"query' is packed with shape .*, but the model wants \(32, 32\)")


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "max_position_embeddings"])
def test_a_model_that_commands_memory(folder, key):
    edit_config(folder, lambda config: config.update({key: 2**40}))
    refuses(folder, "but the model wants")


def test_a_model_and_manifest_that_command_memory_together(folder):
    def edit(config):
        config["vocab_size"] = 2**40
        config["quantization_config"]["packed"]["bert.embeddings.word_embeddings"]["shape"] = [2**40, 32]

    edit_config(folder, edit)
    refuses(folder, "weights and configuration do not belong together")


def test_a_module_that_is_not_there(folder):
    def edit(config):
        packed = config["quantization_config"]["packed"]
        packed["bert.encoder.layer.7.output.dense"] = packed.pop("bert.encoder.layer.1.output.dense")

    edit_config(folder, edit)
    refuses(folder, "the model has no such module")


def test_a_module_of_another_kind(folder):
    def edit(config):
        config["quantization_config"]["packed"][QUERY]["kind"] = "embedding"

    edit_config(folder, edit)
    refuses(folder, "is packed as embedding, but the model has Linear there")


def test_a_module_without_a_weight(folder):
    def edit(config):
        packed = config["quantization_config"]["packed"]
        packed["bert.encoder"] = packed.pop(QUERY)

    edit_config(folder, edit)
    refuses(folder, "the model has BertEncoder there")


def test_groups_that_do_not_fit(folder):
    def edit(config):
        for settings in config["quantization_config"]["settings"]:
            settings["weight"].update(granularity="per_group", group_size=7)

    edit_config(folder, edit)
    refuses(folder, "does not divide")


def test_an_embedding_cannot_claim_another_layers_tensors(folder):
    manifest(folder, tied={QUERY: "bert.embeddings.word_embeddings"})
    refuses(folder, "cannot share the tensors")


def test_a_tie_that_the_file_does_not_have(tmp_path):
    export(quantized(tiny_causal("gpt2"), targets=""), tmp_path / "out")
    manifest(tmp_path / "out", tied={})
    with pytest.raises(FiftyfoldError, match=r"lacks the tensor 'lm_head\.weight"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ("\udcff", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "not a folder that fiftyfold exported"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "not a folder that fiftyfold exported"),
        ('{"quantization_config": []}', "not a folder that fiftyfold exported"),
    ],
)
def test_a_configuration_that_is_none(folder, content, message):
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(FiftyfoldError, match=message):
        load(folder)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["os"], [3], ["AutoModel"]])
def test_a_class_that_is_none(folder, architectures):
    edit_config(folder, lambda config: config.update(architectures=architectures))
    with pytest.raises(FiftyfoldError, match="class"):
        load(folder)


def test_a_value_that_transformers_refuses(folder):
    edit_config(folder, lambda config: config.update(hidden_act="magic"))
    with pytest.raises(FiftyfoldError, match="cannot be opened"):
        load(folder)


def test_a_dense_folder_is_not_ours(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "dense")
    with pytest.raises(FiftyfoldError, match="not a folder that fiftyfold exported; open it with from_pretrained"):
        load(tmp_path / "dense")


def test_no_folder(tmp_path):
    with pytest.raises(FiftyfoldError, match="there is no folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FiftyfoldError, match=r"config\.json cannot be read"):
        load(tmp_path / "empty")


# --- a stranger's model ---------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path):
    model = Encoder()
    quantize(model)
    export(model, tmp_path / "out")
    return tmp_path / "out"


def test_a_strangers_folder_needs_a_model(stranger):
    with pytest.raises(FiftyfoldError, match="pass one to fill as into"):
        load(stranger)


@pytest.mark.parametrize("model", [Encoder(width=14), Encoder(layers=2), tiny_bert()], ids=["width", "depth", "other"])
def test_a_model_that_does_not_fit(stranger, model):
    with pytest.raises(FiftyfoldError):
        load(stranger, into=model)


def test_a_model_that_was_changed_in_another_way(stranger):
    model = Encoder()
    quantize(model, weight_bits=4)
    with pytest.raises(FiftyfoldError, match="changed in another way"):
        load(stranger, into=model)
