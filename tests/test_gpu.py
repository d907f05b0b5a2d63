"""The product on a GPU, where there is one; all other tests leave GPUs alone.

FIFTYFOLD_TESTS_ON_GPU=1 python -m pytest tests/test_gpu.py tests/kernels/test_triton.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForSequenceClassification

from fiftyfold.modules import export, quantize
from fiftyfold.modules.packed.contents import round_rest
from fiftyfold.modules.structure import compression_root, structure_log
from tests.cases import CASES
from tests.strangers import STEPS, BertUser, assert_same_training, make_trainer
from tests.tiny import tiny_batch, tiny_bert

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and FIFTYFOLD_TESTS_ON_GPU=1")


def inputs(device: str) -> dict[str, torch.Tensor]:
    batch = tiny_batch(77, vocab=50)
    del batch["labels"]
    return {name: value.to(device) for name, value in batch.items()}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Where a float sum differs in its last bit, an input may take the neighbouring code: so within some codes."""
    assert float((found.float().cpu() - expected.cpu()).abs().max()) < 0.02 * float(expected.abs().max())


class _OnGpu(Callback):
    """Afterwards Lightning moves a module back to the CPU."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        assert all(parameter.is_cuda for parameter in pl_module.parameters())


@pytest.fixture(autouse=True)
def _determinism_as_before():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_train_resume_and_export(case, tmp_path):
    options = {"accelerator": "gpu", "devices": 1, "deterministic": "warn"}
    whole = make_trainer([*case.callbacks(), _OnGpu()], tmp_path / "checkpoints", **options)
    module = BertUser()
    whole.fit(module)
    log = structure_log(compression_root(module))
    assert tuple((entry["op"], entry["step"]) for entry in log) == case.operations
    resumed = make_trainer(case.callbacks(), **options)
    resumed.fit(BertUser(seed=1), ckpt_path=tmp_path / "checkpoints" / f"step={STEPS - 3}.ckpt")
    assert_same_training(whole, resumed, f"{case}, resumed")
    round_rest(module)
    export(module, tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    module.eval()
    with torch.no_grad():
        expected = module.model.cpu()(**inputs("cpu")).logits
        assert_close(loaded(**inputs("cpu")).logits, expected)
        assert_close(loaded.cuda()(**inputs("cuda")).logits, expected)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_moves_to_a_gpu_and_back(bits, dtype, tmp_path):
    model = tiny_bert().eval()
    quantize(model, weight_bits=bits)
    export(model, tmp_path / "out")
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        expected = small(**inputs("cpu")).logits
        on_gpu = copy.deepcopy(small).to("cuda", dtype)
        assert_close(on_gpu(**inputs("cuda")).logits, expected)
        if dtype == torch.float32:
            assert torch.equal(on_gpu.cpu()(**inputs("cpu")).logits, expected)


def test_a_compiler_sees_one_graph(tmp_path):
    model = tiny_bert().eval()
    quantize(model, weight_bits=2)
    export(model, tmp_path / "out")
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval().cuda()
    with torch.inference_mode():
        expected = small(**inputs("cuda")).logits
        assert_close(torch.compile(small, fullgraph=True)(**inputs("cuda")).logits, expected.cpu())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains(precision):
    module = BertUser()
    make_trainer([*CASES[0].callbacks(), _OnGpu()], accelerator="gpu", devices=1, precision=precision).fit(module)
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    assert [entry["op"] for entry in structure_log(compression_root(module))] == ["quantize"]
