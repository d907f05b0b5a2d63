"""Programs that are compiled ahead of time: what they compute, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartModel, ElectraForPreTraining

import fiftyfold
from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.build import compiler
from fiftyfold.kernels.cpu import Status
from fiftyfold.modules import quantize
from fiftyfold.modules.packed import ahead_of_time, compiled_program, program_facts
from fiftyfold.modules.packed.ahead_of_time import compile_model
from fiftyfold.modules.packed.compiled_program import load_compiled
from tests.modules.packed.examples import inputs, quantized
from tests.tiny import POSITIONS, tiny_bert, tiny_causal, tiny_config, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="programs are compiled by a C++ compiler"),
    pytest.mark.skipif(torch.__version__ < "2.13", reason="programs of torch 2.10 misread operators' types"),
]

EXPORTED, PROGRAM = "small", "small.pt2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported model and the program that was made of it."""
    folder = tmp_path_factory.mktemp("compiled")
    fiftyfold.export(quantized(tiny_bert(layers=2)), folder / EXPORTED)
    compile_model(fiftyfold.load(folder / EXPORTED), folder / PROGRAM)
    return folder


@pytest.fixture
def program(place: Path, tmp_path: Path) -> Path:
    """A copy of the program, for tests that break it."""
    return shutil.copy(place / PROGRAM, tmp_path / PROGRAM)


@torch.inference_mode()
def test_batches_of_any_size_and_padding_give_what_the_model_gives(place: Path) -> None:
    model, compiled = fiftyfold.load(place / EXPORTED), load_compiled(place / PROGRAM)
    generator = torch.Generator().manual_seed(1)
    for size in ((1, 1), (1, POSITIONS), (7, 3), (33, 1)):
        tokens = torch.randint(100, size, generator=generator)
        found, expected = compiled(tokens), model(tokens)
        assert type(found) is type(expected)
        assert torch.allclose(found.logits, expected.logits, atol=1e-3)
    padded = inputs()
    assert torch.allclose(compiled(**padded).logits, model(**padded).logits, atol=1e-3)
    assert not torch.allclose(compiled(padded["input_ids"]).logits, compiled(**padded).logits, atol=1e-5)
    types = torch.ones_like(padded["input_ids"])
    typed = [computed(**padded, token_type_ids=types).logits for computed in (compiled, model)]
    assert torch.allclose(typed[0], typed[1], atol=1e-3)
    assert not torch.allclose(typed[0], compiled(**padded).logits, atol=1e-5)


def test_layers_that_read_the_same_tensor_are_one_call(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []

    def note(program: Any, **_: object) -> None:
        targets = [node.target for node in program.graph.nodes]
        products.append(targets.count(torch.ops.fiftyfold.packed_linear.default))
        raise RuntimeError("this is far enough")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", note)
    with pytest.raises(FiftyfoldError, match="far enough"):
        compile_model(fiftyfold.load(place / EXPORTED), place / "traced.pt2")
    # In each of two blocks one for query, key and value, and three others; then the pooler.
    assert products == [2 * 4 + 1]


@torch.inference_mode()
def test_tokens_may_be_of_any_integer_type_and_lie_anywhere(place: Path) -> None:
    compiled = load_compiled(place / PROGRAM)
    tokens = inputs()["input_ids"]
    expected = compiled(tokens).logits
    assert torch.equal(compiled(tokens.to(torch.int32)).logits, expected)
    wide = torch.stack([tokens, tokens.flip(1)], 2)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(compiled(wide).logits, expected)


@torch.inference_mode()
def test_its_sample_is_what_the_model_computes_without_padding(place: Path) -> None:
    facts = load_compiled(place / PROGRAM).facts
    expected = fiftyfold.load(place / EXPORTED)(torch.tensor(facts.sample)).logits.flatten()
    assert torch.allclose(torch.tensor(facts.outputs), expected, rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that calls an operator in Python, and whose output has a class of the model's own module."""
    model = ElectraForPreTraining(tiny_config("electra", layers=1)).eval()
    quantize(model, weight_bits=8)
    folder = tmp_path_factory.mktemp("eight")
    fiftyfold.export(model, folder / EXPORTED)
    compile_model(fiftyfold.load(folder / EXPORTED), folder / PROGRAM)
    return folder


def test_another_process_needs_the_file_alone(eight_bits: Path, tmp_path: Path) -> None:
    tokens = inputs()["input_ids"]
    script = (
        "import sys, torch, fiftyfold\n"
        f"print(fiftyfold.load_compiled(sys.argv[1])(torch.tensor({tokens.tolist()})).logits.tolist())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(eight_bits / PROGRAM)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = load_compiled(eight_bits / PROGRAM)(tokens).logits
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)


def test_threads_take_turns(eight_bits: Path) -> None:
    """In a process of its own, for a program and a thread that wait for each other never end."""
    script = (
        "import sys, torch, fiftyfold\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "model = fiftyfold.load_compiled(sys.argv[1])\n"
        "batches = [torch.full((3, 7), token) for token in range(40)]\n"
        "expected = [model(batch).logits for batch in batches]\n"
        "with ThreadPoolExecutor(4) as threads:\n"
        "    found = list(threads.map(lambda batch: model(batch).logits, batches))\n"
        "print(all(map(torch.equal, found, expected)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(eight_bits / PROGRAM)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "True\n", done.stderr


def test_a_language_model_is_compiled_without_its_cache(tmp_path: Path) -> None:
    """Its output layer is tied and takes its input as it is, which torch.export could not trace."""
    fiftyfold.export(quantized(tiny_causal("gpt2", layers=1), targets="", activation_bits=None), tmp_path / EXPORTED)
    model = fiftyfold.load(tmp_path / EXPORTED)
    compiled = compile_model(model, tmp_path / PROGRAM)
    with torch.inference_mode():
        found, expected = compiled(**inputs()), model(**inputs())
    assert found.get("past_key_values") is None
    assert torch.allclose(found.logits, expected.logits, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"\(sentences, tokens\), not of shape \(3,\)"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, r"not of shape \(2, 0\)"),
        ({"input_ids": torch.ones(2, POSITIONS + 1, dtype=torch.int64)}, f"at most {POSITIONS} tokens"),
        ({"input_ids": torch.tensor([[3, 100]])}, "0 to 99, but there are some from 3 to 100"),
        ({"input_ids": torch.tensor([[3, -1]])}, "some from -1 to 3"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4).long()}, r"shape \(2, 4\) does not"),
        ({"input_ids": torch.tensor([[3.5, 1.0]])}, "input_ids must be integers, not torch.float32"),
        ({"input_ids": torch.tensor([[3, 4]]), "token_type_ids": torch.tensor([[0, 2]])}, "0 to 1, but there are some"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(place: Path, call: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(FiftyfoldError, match=named):
        load_compiled(place / PROGRAM)(**call)


def rewrite(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change what a program's file says about it."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in content if name.endswith("wrapper_metadata.json"))
    metadata = json.loads(content[name])
    facts = json.loads(metadata["fiftyfold"])
    edit(facts)
    content[name] = json.dumps(metadata | {"fiftyfold": json.dumps(facts)}).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for entry, data in content.items():
            archive.writestr(entry, data)


def test_another_processors_program_is_refused_before_it_runs(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(program, lambda facts: facts["instructions"].append("of_another_processor"))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_: pytest.fail("it ran"))
    with pytest.raises(FiftyfoldError, match="has of_another_processor, which this one has not"):
        load_compiled(program)


def test_a_program_that_computes_something_else_here_is_refused(program: Path) -> None:
    rewrite(program, lambda facts: facts.update(outputs=[-number for number in facts["outputs"]]))
    with pytest.raises(FiftyfoldError, match="does not compute here what its model did"):
        load_compiled(program)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (flip, "corrupt"),
        (lambda data: data[: len(data) // 2], "corrupt"),
        (lambda data: b"", "corrupt"),
        (lambda data: b"what anyone wrote", "corrupt"),
    ],
)
def test_a_corrupt_file_is_refused(program: Path, edit: Callable[[bytes], bytes], named: str) -> None:
    program.write_bytes(edit(program.read_bytes()))
    with pytest.raises(FiftyfoldError, match=named):
        load_compiled(program)


@pytest.mark.parametrize(
    "change",
    [
        {"instructions": None},
        {"instructions": ["avx2", 3]},
        {"device": "foo"},
        {"outputs": "many"},
        {"sample": [[]]},
        {"sample": [[3, 4], [5]]},
        {"longest": "long"},
        {"another": 1},
    ],
)
def test_facts_of_another_kind_are_refused(program: Path, change: dict[str, Any]) -> None:
    rewrite(program, lambda facts: facts.update(change))
    with pytest.raises(FiftyfoldError, match="is not a program that fiftyfold compiled"):
        load_compiled(program)


@pytest.mark.parametrize("outputs", [[], [1.0], [1.0] * 65])
def test_outputs_of_another_number_are_refused(program: Path, outputs: list[float]) -> None:
    rewrite(program, lambda facts: facts.update(outputs=outputs))
    with pytest.raises(FiftyfoldError, match="does not compute here what its model did"):
        load_compiled(program)


def test_another_version_of_the_facts_is_refused(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_facts, "FORMAT", 2)
    with pytest.raises(FiftyfoldError, match="by another version of fiftyfold"):
        load_compiled(program)


def test_a_program_that_calls_kernels_which_are_missing_is_refused(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_program, "cpu_status", lambda: Status(None, "no C++ compiler was found"))
    rewrite(program, lambda facts: facts.update(library=True))
    with pytest.raises(FiftyfoldError, match=r"missing here \(no C\+\+ compiler was found\): install g\+\+"):
        load_compiled(program)


@pytest.mark.parametrize("content", ["{}", "[" * 100_000, '{"fiftyfold_format": "1", "fiftyfold": "3"}'])
def test_a_strangers_archive_is_refused(tmp_path: Path, content: str) -> None:
    with zipfile.ZipFile(tmp_path / PROGRAM, "w") as archive:
        archive.writestr("small/data/aotinductor/model/x.wrapper_metadata.json", content)
    with pytest.raises(FiftyfoldError, match="is not a program that fiftyfold compiled"):
        load_compiled(tmp_path / PROGRAM)


def test_what_is_compressed_is_refused_unread(tmp_path: Path) -> None:
    """A small file may unfold to gigabytes."""
    with zipfile.ZipFile(tmp_path / PROGRAM, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small/data/aotinductor/model/x.wrapper_metadata.json", "[" * 100_000)
    with pytest.raises(FiftyfoldError, match="is not a program that fiftyfold compiled"):
        load_compiled(tmp_path / PROGRAM)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FiftyfoldError, match="there is no file"):
        load_compiled(tmp_path / "nothing.pt2")


def test_a_folder_is_no_program(place: Path, tmp_path: Path) -> None:
    with pytest.raises(FiftyfoldError, match=r"small is a folder of a model; open an exported one by fiftyfold\.load"):
        load_compiled(place / EXPORTED)
    with pytest.raises(FiftyfoldError, match="is a folder and no compiled program"):
        load_compiled(tmp_path)


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of_time, "_compile", lambda *_: pytest.fail("it compiled"))
    (tmp_path / PROGRAM).write_text("of the user's")
    for file, named in (
        (PROGRAM, "exists already"),
        ("small.so", "end in .pt2"),
        ("nowhere/small.pt2", "there is no folder"),
    ):
        with pytest.raises(FiftyfoldError, match=named):
            compile_model(tiny_bert(), tmp_path / file)
    assert (tmp_path / PROGRAM).read_text() == "of the user's"


def test_a_file_that_appears_meanwhile_stays(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_slowly(_: object, package: Path) -> None:
        shutil.copy(place / PROGRAM, package)
        (tmp_path / PROGRAM).write_text("of another process")

    monkeypatch.setattr(ahead_of_time, "_compile", compile_slowly)
    with pytest.raises(FiftyfoldError, match="exists by now"):
        compile_model(fiftyfold.load(place / EXPORTED), tmp_path / PROGRAM)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of another process"]


@pytest.mark.parametrize(("kind", "longest"), [("bert", POSITIONS), ("roberta", POSITIONS - 2), ("llama", POSITIONS)])
def test_tokens_beyond_the_positions_are_known(kind: str, longest: int) -> None:
    model = tiny_model(kind, layers=1)
    assert ahead_of_time._longest(model, SimpleNamespace(range_constraints={})) == longest
    model(torch.ones(1, longest, dtype=torch.int64) * 5)
    model.config.max_position_embeddings = -1  # as XLNet's
    rest = longest if kind == "roberta" else None
    assert ahead_of_time._longest(model, SimpleNamespace(range_constraints={})) == rest


def test_a_model_that_cannot_compute_is_named(tmp_path: Path) -> None:
    model = tiny_model("gpt2", layers=1)
    model.config.pad_token_id = None
    with pytest.raises(FiftyfoldError, match=r"GPT2ForSequenceClassification itself cannot compute 2 x 8 tokens"):
        compile_model(model, tmp_path / PROGRAM)
    assert not list(tmp_path.iterdir())


def test_what_reads_no_tokens_is_refused(tmp_path: Path) -> None:
    bart = BartModel(BartConfig(vocab_size=10, d_model=16, encoder_layers=1, decoder_layers=1))
    for model in (nn.Linear(2, 2), bart):
        with pytest.raises(FiftyfoldError, match=f"not {type(model).__name__}"):
            compile_model(model, tmp_path / PROGRAM)


def test_a_compiler_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(FiftyfoldError, match=r"torch cannot compile BertForSequenceClassification \(no compiler\)"):
        compile_model(tiny_bert(layers=1), tmp_path / PROGRAM)
    assert not list(tmp_path.iterdir())


def fails(*_: object, **__: object) -> Any:
    raise RuntimeError("The expanded size must match\nand more")


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (None, "for 2 x 8 tokens its program computes something else than the model"),
        (fails, r"for 2 x 8 tokens its program fails \(The expanded size must match\)"),
    ],
)
def test_a_program_is_kept_only_if_it_computes_what_the_model_does(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any, named: str
) -> None:
    monkeypatch.setattr(ahead_of_time, "_compile", lambda _, package: shutil.copy(place / PROGRAM, package))
    if broken is not None:
        monkeypatch.setattr(compiled_program.CompiledModel, "forward", broken)
    other = tiny_bert(layers=2, seed=1)
    quantize(other)
    with pytest.raises(FiftyfoldError, match=named):
        compile_model(other, tmp_path / PROGRAM)
    assert not list(tmp_path.iterdir())
