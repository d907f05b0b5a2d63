from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import fiftyfold
from fiftyfold.app import contenders, latency
from fiftyfold.app.benchmark import Measurement, show, smallest_vocabulary
from fiftyfold.app.contenders import INPUTS, Contender, LeftOut, build_contenders, resident_bytes
from fiftyfold.app.main import main
from fiftyfold.modules import quantize
from fiftyfold.modules.quantization.layers import quantized_layers
from tests.app.conftest import write_teacher


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_teacher(tmp_path / "teacher")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "teacher")
    quantize(model, weight_bits=1)
    fiftyfold.export(model, tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    # Exporting to ONNX takes half a minute; one test does it.
    monkeypatch.setattr(contenders, "_ONNX_PACKAGES", ("a_package_that_is_not_there",))
    return tmp_path


def test_a_table_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    words = ["small", "--teacher", "teacher", "--shapes", "1x4,2x8", "--threads", "1", "--output", "figures.json"]
    try:
        assert main(["benchmark", *words]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "a_package_that_is_not_there not installed" in printed
    figures = json.loads((folder / "figures.json").read_text())
    names = [row["model"] for row in figures["models"]]
    assert names == ["teacher", "bfloat16", "dynamic int8", "fiftyfold"]
    for row in figures["models"]:
        assert row["model"] in printed
        assert set(row["latency_ms"]) == {"1x4", "2x8"}
        assert row["tokens_per_second"]["2x8"] == pytest.approx(16000 / row["latency_ms"]["2x8"])
    bytes_of = {row["model"]: row["weight_bytes"] for row in figures["models"]}
    assert bytes_of["fiftyfold"] < bytes_of["bfloat16"] < bytes_of["teacher"]
    assert [absent["name"] for absent in figures["left_out"]] == ["onnxruntime int8"]
    assert max(len(line) for line in printed.splitlines()) <= 100


def test_figures_are_never_cut_to_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shapes = {"1x8": 123.45, "8x128": 2223.44, "32x512": 182608.9}
    rows = [Measurement(name, 2**28, shapes, dict.fromkeys(shapes, 1.0)) for name in ("dense float32", "fiftyfold")]
    show(rows, [], title="small, cpu, 1 threads")
    printed = capsys.readouterr().out
    assert "182608.90 (1.0x)" in printed
    assert "…" not in printed


def test_without_a_teacher_the_model_itself_is_dense(folder: Path) -> None:
    first, *_, last = (found for found in build_contenders("small", None, "cpu") if isinstance(found, Contender))
    assert (first.name, last.name) == ("dense float32", "fiftyfold")
    assert not any(True for _ in quantized_layers(first.model))
    tokens = torch.arange(1, 7).unsqueeze(0)
    with torch.no_grad():
        dense, packed = (found.model(input_ids=tokens).logits for found in (first, last))
    assert torch.allclose(dense, packed, atol=0.1)


@pytest.mark.slow
def test_compiled_models_compute_the_same(folder: Path) -> None:
    found = {each.name: each for each in build_contenders("small", None, "cpu", compiled=True)}
    assert list(found) == [
        *("dense float32", "dense float32, compiled", "bfloat16", "dynamic int8", "onnxruntime int8"),
        *("fiftyfold", "fiftyfold, compiled"),
    ]
    batch = {name: torch.arange(3, 15).view(3, 4) if name == "input_ids" else torch.ones(3, 4) for name in INPUTS}
    for name in ("dense float32", "fiftyfold"):
        plain, compiled = found[name], found[f"{name}, compiled"]
        assert isinstance(plain, Contender)
        assert isinstance(compiled, Contender), compiled
        with torch.inference_mode():
            assert torch.allclose(compiled.model(**batch).logits, plain.model(**batch).logits, atol=0.02)
    files = [found[f"{name}, compiled"].weight_bytes() for name in ("fiftyfold", "dense float32")]  # type: ignore[union-attr]
    assert files[0] < files[1]


def test_a_model_that_cannot_be_compiled_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch.export, "export", fail)
    reason = "torch cannot compile BertForSequenceClassification (no compiler)"
    left_out = [each for each in build_contenders("small", None, "cpu", compiled=True) if isinstance(each, LeftOut)]
    assert LeftOut("dense float32, compiled", reason) in left_out
    assert LeftOut("fiftyfold, compiled", reason) in left_out


@pytest.mark.slow
def test_a_folder_is_compiled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "small", "small.pt2"]) == 0
    size = (folder / "small.pt2").stat().st_size
    assert f"small.pt2: {size:,} bytes, compared with the model;" in capsys.readouterr().out
    tokens = torch.arange(3, 15).view(3, 4)
    with torch.inference_mode():
        found, expected = fiftyfold.load_compiled("small.pt2")(tokens), fiftyfold.load("small")(tokens)
    assert torch.allclose(found.logits, expected.logits, atol=1e-3)
    assert main(["compile", "small", "small.pt2"]) == 1
    assert "small.pt2 exists already; name another file." in capsys.readouterr().err
    assert main(["compile", "teacher", "other.pt2"]) == 1
    assert "not a folder that fiftyfold exported" in capsys.readouterr().err


@pytest.mark.slow
def test_onnxruntime_computes_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setattr(contenders, "_ONNX_PACKAGES", ())
    dense = BertForSequenceClassification.from_pretrained("teacher").eval()
    found = contenders._onnxruntime_int8(dense)
    assert isinstance(found, Contender), found
    tokens = torch.arange(3, 9).view(2, 3)
    logits = found.model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0]
    assert torch.allclose(torch.from_numpy(logits), dense(tokens).logits, atol=0.1)


def test_an_exporter_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(contenders, "_ONNX_PACKAGES", ())
    monkeypatch.setattr(contenders, "_onnx_contender", fail)
    assert contenders._onnxruntime_int8(torch.nn.Linear(1, 1)) == LeftOut(
        "onnxruntime int8", "it cannot be exported (no such operator)"
    )


def test_shared_tensors_count_once() -> None:
    one, other = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    other.weight = one.weight
    one.kept = (torch.zeros(8, dtype=torch.uint8), None)  # type: ignore[assignment]
    assert resident_bytes(torch.nn.Sequential(one, other)) == 64 + 8


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere"], "nowhere"),
        (["teacher"], "not a folder that fiftyfold exported"),
        (["small", "--teacher", "nobody"], "'nobody'"),
        (["small", "--shapes", "8by9"], "'8by9'"),
        (["small", "--shapes", "0x9"], "'0x9'"),
        (["small", "--shapes", "64x9"], "at most 32 sentences"),
        (["small", "--shapes", "1x65"], "at most 64 tokens"),
        (["small", "--threads", "0"], "at least 1"),
        (["small", "--output", "teacher"], "exists already"),
        (["small", "--output", "nowhere/figures.json"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    assert main(["benchmark", *words]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fiftyfold: error: ")
    assert named in error


def write_other_model(place: Path) -> None:
    config = DistilBertConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    DistilBertForSequenceClassification(config).save_pretrained(place)


def write_model_without_a_head(place: Path) -> None:
    BertModel.from_pretrained("teacher").save_pretrained(place)


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (write_other_model, "'other' is a 'distilbert' model, but the exported one is 'bert'"),
        (write_model_without_a_head, "'other' has no weights for 'classifier."),
    ],
)
def test_a_teacher_with_random_weights_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], None], named: str
) -> None:
    write(folder / "other")
    assert main(["benchmark", "small", "--teacher", "other", "--shapes", "1x4"]) == 1
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("words", [["small"], ["small", "--teacher", "teacher"]])
def test_what_is_too_long_is_refused_before_a_model_is_built(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(contenders, "load", None)
    assert main(["benchmark", *words, "--shapes", "1x4,1x65"]) == 1
    assert "takes at most 64 tokens, not 65" in capsys.readouterr().err


def test_tokens_are_those_that_all_models_know(folder: Path) -> None:
    models = [BertForSequenceClassification(BertConfig(vocab_size=size, num_hidden_layers=1)) for size in (90, 50)]
    assert smallest_vocabulary([*models, torch.nn.Linear(1, 1)]) == 50


def test_cuda_needs_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["benchmark", "small", "--device", "cuda"]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err
