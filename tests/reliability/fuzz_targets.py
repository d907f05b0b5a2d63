"""Everything that fiftyfold reads from a folder or a checkpoint, each as one function of bytes."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from fiftyfold.app.delivered import complete_delivery, read_rows
from fiftyfold.app.kept_scores import kept_score
from fiftyfold.app.remembered import read_checkpoint, remembered_model
from fiftyfold.app.trainer_cli import parse_trainer_command
from fiftyfold.callbacks.random_states import CHECKPOINT_KEY, capture_random_states, restore_random_states
from fiftyfold.datamodules.augmentation import _take_finished, _take_part
from fiftyfold.datamodules.glue import load_tokenizer
from fiftyfold.datamodules.glue_files import read_file
from fiftyfold.datamodules.glue_tasks import get_task
from fiftyfold.datamodules.stateful_loader import StatefulLoader
from fiftyfold.datamodules.text_files import read_documents
from fiftyfold.datamodules.token_cache import open_cache_entry, token_lengths
from fiftyfold.datamodules.word_candidates import read_synonyms
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import FineTuningModule, compress_matrices, export, load, quantize, reduce_layers, tensorize
from fiftyfold.modules.fine_tuning import load_classifier
from fiftyfold.modules.journal import LINES_FILE
from fiftyfold.modules.packed.load import fill, read_manifest
from fiftyfold.modules.packed.program_facts import ProgramFacts, read_facts
from fiftyfold.modules.packed.weights_file import check_digest, read_headers, read_tensors
from fiftyfold.modules.structure import STATE_KEY, decode_log, encode_log, replay, structure_log
from tests.modules.packed.examples import Encoder, quantized, tiny_tokenizer
from tests.reliability.mutations import mutate_bytes, mutate_json, mutate_safetensors, mutate_zip
from tests.tiny import tiny_bert

Mutate = Callable[[bytes, random.Random, int], bytes]


@dataclass(frozen=True)
class Target:
    """One reader under fuzzing.

    Attributes:
        name: what is read.
        prepare: writes into an empty folder what the reader needs; returns well-formed inputs.
        read: reads an input; what it may raise is FiftyfoldError or one of ``documented``.
        mutate: changes an input and keeps its form as far as that helps.
        weight: its share of the inputs; slow readers get fewer.
        documented: further exceptions that its documentation names.
        longest: most bytes of an input.
    """

    name: str
    prepare: Callable[[Path], list[bytes]]
    read: Callable[[bytes, Path], object]
    mutate: Mutate = mutate_bytes
    weight: int = 10
    documented: tuple[type[BaseException], ...] = field(default=())
    longest: int = 20_000


def _written(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """Read an input as the file ``name`` of the target's folder."""

    def run(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder)

    return run


# --- exported folders


def _export_bert(folder: Path) -> Path:
    model = tiny_bert(layers=3, hidden=16, vocab=30)
    reduce_layers(model, [0, 2])
    tensorize(model, cores=2, bond_dimension=3, targets="layer.0.output")
    export(quantized(model), folder / "out", tokenizer=tiny_tokenizer())
    return folder / "out"


def _folder_file(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(_export_bert(folder) / name).read_bytes()]


def _export_stranger(folder: Path) -> Path:
    model = Encoder()
    quantize(model)
    export(model, folder / "out")
    return folder / "out"


def _stranger_file(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(_export_stranger(folder) / name).read_bytes()]


def _read_weights(folder: Path) -> object:
    files = [folder / "out" / "model.safetensors"]
    read_headers(files)
    check_digest(files)
    return read_tensors(files)


def _fill_stranger(folder: Path) -> object:
    return fill(Encoder(), folder / "out", read_manifest(folder / "out")[0])


def _report_rows(folder: Path) -> list[bytes]:
    row = {"model": "teacher", "score": 0.5, "bytes_on_disk": 3000, "parameters": 700, "latency_ms": 1.5}
    return [json.dumps({"metric": "accuracy", "rows": [row, row]}).encode()]


# --- work folders


def _compress(folder: Path) -> object:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8))
    return compress_matrices(model, [torch.randn(16, 8)], 0.6, families=("svd", "sum50"), work_folder=folder)


def _journal(folder: Path) -> list[bytes]:
    _compress(folder / "whole")
    return [(folder / "whole" / LINES_FILE).read_bytes()]


def _compress_on(data: bytes, folder: Path) -> object:
    shutil.rmtree(folder / "work", ignore_errors=True)
    shutil.copytree(folder / "whole", folder / "work")
    (folder / "work" / LINES_FILE).write_bytes(data)
    return _compress(folder / "work")


def _scores(folder: Path) -> list[bytes]:
    kept_score(folder / "scores.json", [1], lambda: {"val/loss": 0.5, "val/accuracy": 0.25})
    return [(folder / "scores.json").read_bytes()]


def _delivery(folder: Path) -> list[bytes]:
    (folder / "out").mkdir()
    report = {"run": {"recipe": {"keep": 0.3}}, "rows": [], "metric": "accuracy", "scores": {}}
    return [json.dumps(report).encode()]


def _complete(folder: Path) -> object:
    (folder / "out.work").mkdir(exist_ok=True)
    (folder / "out.work" / "options.json").write_text('{"keep": 0.3, "content": {}}')
    return complete_delivery(folder / "out", folder / "out.work", {"keep": 0.3})


# --- structure logs


def _logs(_folder: Path) -> list[bytes]:
    model = tiny_bert(layers=3, hidden=16, vocab=30)
    reduce_layers(model, [0, 2])
    tensorize(model, cores=2, bond_dimension=3)
    quantize(model, weight_bits=2, granularity="per_channel", clip=2.5)
    return [encode_log(structure_log(model)).numpy().tobytes(), encode_log([]).numpy().tobytes()]


def _replay_log(data: bytes, _folder: Path) -> object:
    log = decode_log(
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    )
    with torch.device("meta"):
        model = tiny_bert_on_meta()
    return replay(model, log)


def tiny_bert_on_meta() -> Any:
    from transformers import AutoModelForSequenceClassification

    from tests.tiny import tiny_config

    return AutoModelForSequenceClassification.from_config(tiny_config("bert", layers=3, hidden=16, vocab=30))


# --- checkpoints


def _checkpoints(folder: Path) -> list[bytes]:
    tiny_bert(layers=1, hidden=16, vocab=30).save_pretrained(folder / "teacher")
    module = FineTuningModule(str(folder / "teacher"))
    checkpoint: dict[str, Any] = {
        "state_dict": {"weight": torch.zeros(3), STATE_KEY: encode_log([])},
        "hyper_parameters": {**module.hparams, "_class_path": "fiftyfold.modules.FineTuningModule"},
        "optimizer_states": [],
        CHECKPOINT_KEY: [],
        "pytorch-lightning_version": "2.6.6",
    }
    module.on_save_checkpoint(checkpoint)
    buffer, old = io.BytesIO(), io.BytesIO()
    torch.save(checkpoint, buffer)
    torch.save(checkpoint, old, _use_new_zipfile_serialization=False)
    return [buffer.getvalue(), old.getvalue()]


def _read_checkpoint(folder: Path) -> object:
    return remembered_model(read_checkpoint(folder / "input.ckpt"), "input.ckpt", None)


def _entries(folder: Path) -> list[bytes]:
    tiny_bert(layers=1, hidden=16, vocab=30).save_pretrained(folder / "teacher")
    module = FineTuningModule(str(folder / "teacher"))
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    loader = {"epoch": 1, "batches": 2, "signature": {"seed": 1}}
    states = capture_random_states()
    states["torch"] = states["torch"].tolist()
    states["numpy"]["words"] = states["numpy"]["words"].tolist()
    states["python"]["words"] = states["python"]["words"].tolist()
    hyper = {"_class_path": "fiftyfold.modules.FineTuningModule", **module.hparams}
    return [json.dumps({**checkpoint, "loader": loader, "states": states, "hyper_parameters": hyper}).encode()]


_MODULES: dict[Path, FineTuningModule] = {}


def _read_entries(data: bytes, folder: Path) -> object:
    """The entries of a checkpoint that passed ``torch.load``, one reader after the other."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    module = _MODULES.setdefault(folder, FineTuningModule(str(folder / "teacher")))
    loader = StatefulLoader(
        np.arange(9), lambda _: [[0, 1], [2, 3], [4]], lambda rows: {"rows": rows}, signature={"seed": 1}
    )
    states = content.get("states")
    readers = (
        lambda: module.on_load_checkpoint(content),
        lambda: loader.load_state_dict(content.get("loader")),
        lambda: restore_random_states(_tensors(states)),
        lambda: remembered_model(content, "input.ckpt", None),
    )
    for read in readers:
        with contextlib.suppress(FiftyfoldError):
            read()
    return list(loader)


def _tensors(states: Any) -> Any:
    """Lists of whole numbers become the tensors that they were."""
    if isinstance(states, dict):
        return {key: _tensors(value) for key, value in states.items()}
    if isinstance(states, list) and states and all(type(each) is int and abs(each) < 2**62 for each in states):
        kind = torch.uint8 if max(states) < 256 and min(states) >= 0 else torch.int64
        return torch.tensor(states, dtype=kind)
    return states


# --- data


def _rows(form: str) -> Callable[[Path], list[bytes]]:
    lines = [("a good film", 1), ('the "plot" was bad', 0), ("é, very fine", 1)]
    texts = {
        "tsv": "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in lines),
        "csv": 'sentence,label\n"a good film",1\n"the ""plot"" was bad",0\n"é, very fine",1\n',
        "jsonl": "".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in lines),
        "json": json.dumps([{"sentence": text, "label": label} for text, label in lines], indent=1),
    }
    return lambda _folder: [texts[form].encode()]


def _parquet(_folder: Path) -> list[bytes]:
    table = pyarrow.table({"sentence": ["a good film", "bad", "é"], "label": [1, 0, 1]})
    contents = []
    for compression in ("NONE", "SNAPPY"):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer, compression=compression)
        contents.append(buffer.getvalue())
    return contents


def _read_data(form: str, task: str = "sst2") -> Callable[[bytes, Path], object]:
    return _written(f"input.{form}", lambda folder: read_file(folder / f"input.{form}", get_task(task)))


def _documents(form: str) -> Callable[[Path], list[bytes]]:
    def prepare(_folder: Path) -> list[bytes]:
        table = pyarrow.table({"text": ["once upon", "a time", "é"]})
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
        contents = {"txt": b"once upon\n<|endoftext|>\na time", "jsonl": b'{"text": "once"}\n{"text": "upon"}\n'}
        return [contents.get(form, buffer.getvalue())]

    return prepare


def _read_documents(form: str) -> Callable[[bytes, Path], object]:
    def read(folder: Path) -> object:
        return list(read_documents(folder / f"train.{form}", separator="<|endoftext|>", column="text"))

    return _written(f"train.{form}", read)


def _pairs(_folder: Path) -> list[bytes]:
    return [b"sentence1\tsentence2\tscore\na b\tc d\t4.5\ne\tf\t0\n"]


def _token_entry(name: str) -> Callable[[Path], list[bytes]]:
    def prepare(folder: Path) -> list[bytes]:
        columns = {"input_ids": [[1, 2, 3], [4, 5]], "token_type_ids": [[0, 0, 0], [0, 0]], "labels": [0, 1]}
        datasets.Dataset.from_dict(columns).save_to_disk(folder / "entry")
        return [(folder / "entry" / name).read_bytes()]

    return prepare


def _read_tokens(folder: Path) -> object:
    # Arrow maps the file into memory, so each input needs a file of its own.
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "entry", copy)
    tokens = open_cache_entry(copy)
    return token_lengths(tokens), tokens[list(range(len(tokens)))]


_SETTINGS: dict[str, Any] = {"format": 1, "task": "sst2", "seed": 1}


def _augmented_part(folder: Path) -> list[bytes]:
    (folder / "out.jsonl.manifest.json").write_text(json.dumps({"settings": _SETTINGS}))
    lines = [json.dumps({"row": row, "sentence": f"film {row}", "label": 1}) for row in (0, 0, 1, 2, 2)]
    return ["\n".join(lines).encode()]


def _read_part(folder: Path) -> object:
    return _take_part(folder / "out.jsonl.part", folder / "out.jsonl.manifest.json", _SETTINGS)


def _augmented_manifest(folder: Path) -> list[bytes]:
    (folder / "out.jsonl").write_text('{"row": 0, "sentence": "film", "label": 1}\n')
    from fiftyfold.datamodules.token_cache import file_digest

    content = {"settings": _SETTINGS, "rows": 1, "digest": file_digest(folder / "out.jsonl")}
    return [json.dumps(content).encode()]


def _read_augmented_manifest(folder: Path) -> object:
    return _take_finished(folder / "out.jsonl", folder / "out.jsonl.manifest.json", _SETTINGS, 1)


# --- models and recipes


def _tokenizer_file(folder: Path) -> list[bytes]:
    tiny_tokenizer().save_pretrained(folder / "words")
    return [(folder / "words" / "tokenizer.json").read_bytes()]


def _tokenizer_config(folder: Path) -> list[bytes]:
    tiny_tokenizer().save_pretrained(folder / "words")
    return [(folder / "words" / "tokenizer_config.json").read_bytes()]


def _tokenize(folder: Path) -> object:
    words = load_tokenizer(str(folder / "words"))
    return words.pad_token_id


def _teacher_file(name: str) -> Callable[[Path], list[bytes]]:
    def prepare(folder: Path) -> list[bytes]:
        tiny_bert(layers=1, hidden=16, vocab=30).save_pretrained(folder / "teacher")
        return [(folder / "teacher" / name).read_bytes()]

    return prepare


def _load_teacher(folder: Path) -> object:
    return load_classifier(str(folder / "teacher"), "teacher")


def _recipes(_folder: Path) -> list[bytes]:
    from fiftyfold.app.trainer_cli import RECIPES

    return [(RECIPES / "xtc" / f"{name}.yaml").read_bytes() for name in ("w1a8", "stepped_bits")]


def _read_recipe(folder: Path) -> object:
    with contextlib.redirect_stderr(io.StringIO()):
        words = ["--model.teacher", "teacher", "--data.task", "sst2", "--data.tokenizer", "teacher"]
        return parse_trainer_command(["fit", "--config", str(folder / "recipe.yaml"), *words])


# --- compiled programs

_FACTS = "small/data/aotinductor/model/x.wrapper_metadata.json"


def _program_archive(metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("small/data/aotinductor/model/x.wrapper.so", b"machine code")
        archive.writestr(_FACTS, json.dumps(metadata))
    return buffer.getvalue()


def _programs(_: Path) -> list[bytes]:
    facts = ProgramFacts(
        model="BertModel",
        device="cpu",
        inputs=["input_ids", "attention_mask"],
        longest=40,
        words=100,
        types=0,
        output_module="transformers.modeling_outputs",
        torch="2.13.0",
        library=True,
        instructions=["avx2"],
        sample=[[1, 2], [3, 4]],
        outputs=[0.5, -1.5],
    )
    return [_program_archive(facts.to_metadata()), _program_archive({"AOTI_DEVICE_KEY": "cpu"})]


def _mutate_program(data: bytes, source: random.Random, limit: int) -> bytes:
    """Change a fact within its string within the file, or the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            metadata = json.loads(archive.read(_FACTS))
        changed = metadata | {"fiftyfold": mutate_json(metadata["fiftyfold"].encode(), source, limit).decode("latin1")}
    except Exception:  # noqa: BLE001 - what earlier mutations left is no program any more
        return mutate_zip(data, source, limit)
    return mutate_zip(data, source, limit) if source.random() < 0.3 else _program_archive(changed)[:limit]


TARGETS: tuple[Target, ...] = (
    Target("data, TSV", _rows("tsv"), _read_data("tsv"), weight=30),
    Target("data, TSV of pairs with scores", _pairs, _read_data("tsv", "stsb"), weight=20),
    Target("data, CSV", _rows("csv"), _read_data("csv"), weight=30),
    Target("data, JSON lines", _rows("jsonl"), _read_data("jsonl"), weight=30),
    Target("data, JSON", _rows("json"), _read_data("json"), mutate_json, weight=20),
    Target("data, parquet", _parquet, _read_data("parquet"), weight=20),
    Target("text, plain", _documents("txt"), _read_documents("txt"), weight=10),
    Target("text, JSON lines", _documents("jsonl"), _read_documents("jsonl"), weight=20),
    Target("text, parquet", _documents("parquet"), _read_documents("parquet"), weight=20),
    Target(
        "list of synonyms",
        lambda _: [b"good fine\nbad poor\n"],
        _written("words.txt", lambda f: read_synonyms(f / "words.txt")),
        weight=20,
    ),
    Target("journal of a compression", _journal, _compress_on, weight=10),
    Target(
        "scores of a run",
        _scores,
        _written("scores.json", lambda f: kept_score(f / "scores.json", [1], lambda: {"val/loss": 1.0})),
        mutate_json,
        weight=10,
    ),
    Target(
        "report of a run that was killed",
        _delivery,
        _written("out/fiftyfold_report.json", _complete),
        mutate_json,
        weight=10,
    ),
    Target("augmented file, unfinished", _augmented_part, _written("out.jsonl.part", _read_part), weight=20),
    Target(
        "augmented file's manifest",
        _augmented_manifest,
        _written("out.jsonl.manifest.json", _read_augmented_manifest),
        mutate_json,
        weight=20,
    ),
    Target(
        "token cache, arrow",
        _token_entry("data-00000-of-00001.arrow"),
        _written("entry/data-00000-of-00001.arrow", _read_tokens),
        weight=8,
    ),
    Target(
        "token cache, state",
        _token_entry("state.json"),
        _written("entry/state.json", _read_tokens),
        mutate_json,
        weight=8,
    ),
    Target(
        "token cache, features",
        _token_entry("dataset_info.json"),
        _written("entry/dataset_info.json", _read_tokens),
        mutate_json,
        weight=8,
    ),
    Target("tokenizer.json", _tokenizer_file, _written("words/tokenizer.json", _tokenize), mutate_json, weight=4),
    Target(
        "tokenizer_config.json",
        _tokenizer_config,
        _written("words/tokenizer_config.json", _tokenize),
        mutate_json,
        weight=4,
    ),
    Target(
        "exported config.json, its manifest",
        _folder_file("config.json"),
        _written("out/config.json", lambda f: read_manifest(f / "out")),
        mutate_json,
        weight=40,
    ),
    Target(
        "exported config.json, opened",
        _folder_file("config.json"),
        _written("out/config.json", lambda f: load(f / "out")),
        mutate_json,
        weight=3,
    ),
    Target(
        "exported weights, read",
        _folder_file("model.safetensors"),
        _written("out/model.safetensors", _read_weights),
        mutate_safetensors,
        weight=40,
    ),
    Target(
        "exported weights, opened",
        _folder_file("model.safetensors"),
        _written("out/model.safetensors", lambda f: load(f / "out")),
        mutate_safetensors,
        weight=3,
    ),
    Target(
        "a stranger's structure.json",
        _stranger_file("structure.json"),
        _written("out/structure.json", _fill_stranger),
        mutate_json,
        weight=20,
    ),
    Target(
        "a stranger's weights",
        _stranger_file("model.safetensors"),
        _written("out/model.safetensors", _fill_stranger),
        mutate_safetensors,
        weight=20,
    ),
    Target("report", _report_rows, _written("fiftyfold_report.json", read_rows), mutate_json, weight=20),
    Target(
        "compiled program",
        _programs,
        _written("small.pt2", lambda f: read_facts(f / "small.pt2")),
        _mutate_program,
        weight=20,
    ),
    Target("structure log in a checkpoint", _logs, _replay_log, mutate_json, weight=8),
    Target("checkpoint file", _checkpoints, _written("input.ckpt", _read_checkpoint), mutate_zip, weight=20),
    Target("entries of a checkpoint", _entries, _read_entries, mutate_json, weight=10, longest=60_000),
    Target(
        "teacher's config.json",
        _teacher_file("config.json"),
        _written("teacher/config.json", _load_teacher),
        mutate_json,
        weight=3,
    ),
    Target(
        "teacher's weights",
        _teacher_file("model.safetensors"),
        _written("teacher/model.safetensors", _load_teacher),
        mutate_safetensors,
        weight=3,
    ),
    Target("YAML recipe", _recipes, _written("recipe.yaml", _read_recipe), weight=1, documented=(SystemExit,)),
)
"""Every reader; a new one adds its row."""
