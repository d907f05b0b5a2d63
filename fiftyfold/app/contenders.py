"""The models that an exported one is measured beside."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.kernels.prepacked import prepacked_bytes
from fiftyfold.modules import compile_model, load
from fiftyfold.modules.packed.load import read_manifest
from fiftyfold.modules.quantization.layers import remove_quantization

INPUTS = ("input_ids", "attention_mask")
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Contender:
    """A model to measure.

    Attributes:
        name: what it is called in the table.
        model: takes ``input_ids`` and ``attention_mask``.
        weight_bytes: what its weights take in memory as it computes with them; asked after a forward pass.
    """

    name: str
    model: nn.Module
    weight_bytes: Callable[[], int]


@dataclass(frozen=True)
class LeftOut:
    """A model that is not measured, and why."""

    name: str
    reason: str


def check_lengths(folder: str, teacher: str | None, longest: int) -> None:
    """Refuse sentences that a model does not read, before it is built.

    Args:
        folder: as for :func:`build_contenders`.
        teacher: likewise.
        longest: tokens of the longest sentence.

    Raises:
        FiftyfoldError: if a folder cannot be opened, or its model reads less.
    """
    _, architecture = read_manifest(place := Path(folder).expanduser())
    sources = ([str(place)] if architecture else []) + ([] if teacher is None else [teacher])
    for source, config in [(source, _config(source)) for source in sources]:
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and longest > limit:
            raise FiftyfoldError(f"the model {source} takes at most {limit} tokens, not {longest}.")


def build_contenders(
    folder: str, teacher: str | None, device: str, *, compiled: bool = False
) -> Iterator[Contender | LeftOut]:
    """Build the models one by one: the one to compare with first, the exported one last, each compiled after itself.

    Args:
        folder: an exported folder of a transformers model.
        teacher: a folder or hub id to compare with; by default the exported model itself with dense float32 weights.
        device: ``"cpu"`` or ``"cuda"``. The 8-bit peers run on the CPU alone.
        compiled: whether to compile both too.

    Raises:
        FiftyfoldError: if a folder cannot be opened, the model does not read tokens, or the teacher is of another
            architecture.
    """
    packed = _exported(folder)
    dense = _dense(folder) if teacher is None else _teacher(teacher, packed)
    name = "dense float32" if teacher is None else "teacher"
    yield _torch_contender(name, dense.to(device))
    if compiled:
        yield _compiled(name, dense)
    yield _torch_contender("bfloat16", copy.deepcopy(dense).to(torch.bfloat16))
    if device == "cpu":
        yield _dynamic_int8(dense)
        yield _onnxruntime_int8(dense)
    else:
        yield LeftOut("dynamic int8", "it runs on CPUs alone")
        yield LeftOut("onnxruntime int8", "it runs on CPUs alone here")
    yield _torch_contender("fiftyfold", packed.to(device))
    if compiled:
        yield _compiled("fiftyfold", packed)


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors that a model holds, what its layers keep between calls included."""
    found: dict[int, int] = {}
    for module in model.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]:
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes() + prepacked_bytes(tensor)
    return sum(found.values())


def _torch_contender(name: str, model: nn.Module) -> Contender:
    return Contender(name, model.eval(), lambda: resident_bytes(model))


def _compiled(plain: str, model: nn.Module) -> Contender | LeftOut:
    name = f"{plain}, compiled"
    try:
        with tempfile.TemporaryDirectory() as place:
            program = Path(place) / "program.pt2"
            return Contender(name, compile_model(model, program), program.stat().st_size.__int__)
    except FiftyfoldError as error:
        return LeftOut(name, str(error).rstrip("."))


def _exported(folder: str) -> PreTrainedModel:
    model = load(folder)
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        raise FiftyfoldError(
            f"{folder} holds a {type(model).__name__}, which does not read tokens; only such are timed."
        )
    return model


def _dense(folder: str) -> nn.Module:
    model = load(folder, trainable=True)
    remove_quantization(model)
    return model.float()


def _teacher(source: str, packed: PreTrainedModel) -> nn.Module:
    kind: Any = type(packed)
    found, expected = _config(source).model_type, packed.config.model_type
    if found != expected:
        raise FiftyfoldError(
            f"the teacher {source!r} is a {found!r} model, but the exported one is {expected!r}; name the model "
            "that it replaces."
        )
    try:
        model, loading = kind.from_pretrained(source, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise FiftyfoldError(
            f"the teacher {source!r} cannot be opened as {kind.__name__}: {first_line(error)}"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise FiftyfoldError(
            f"the teacher {source!r} has no weights for {missing[0]!r}, which would be random ones; name a whole "
            f"{kind.__name__}."
        )
    return model.float()  # type: ignore[no-any-return]


def _config(source: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FiftyfoldError(f"the model {source!r} cannot be opened: {first_line(error)}") from error


def _dynamic_int8(dense: nn.Module) -> Contender | LeftOut:
    name = "dynamic int8"
    try:
        with _quiet():
            model = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as error:
        return LeftOut(name, f"this torch cannot quantize it ({first_line(error)[:120]})")
    # Its packed weights are no tensors; what it writes to a file has the same size.
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return Contender(name, model.eval(), buffer.getbuffer().nbytes.__int__)


def _onnxruntime_int8(dense: nn.Module) -> Contender | LeftOut:
    name = "onnxruntime int8"
    missing = [package for package in _ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        return LeftOut(name, f"{', '.join(missing)} not installed")
    try:
        with _quiet(), tempfile.TemporaryDirectory() as place:
            return _onnx_contender(name, dense, Path(place))
    except Exception as error:  # noqa: BLE001 - three packages with exceptions of their own
        return LeftOut(name, f"it cannot be exported ({first_line(error)[:120]})")


def _onnx_contender(name: str, dense: nn.Module, place: Path) -> Contender:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exported, quantized = place / "dense.onnx", place / "int8.onnx"
    example = {name: torch.ones(2, 8, dtype=torch.int64) for name in INPUTS}
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in INPUTS}
    torch.onnx.export(
        FirstOutput(dense), (), str(exported), kwargs=example, dynamic_shapes=axes, dynamo=True, verbose=False
    )
    quantize_dynamic(exported, quantized, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads otherwise spin on for a while after each call, and slow the model that is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(quantized.read_bytes(), options, providers=["CPUExecutionProvider"])
    return Contender(name, OnnxModel(session), quantized.stat().st_size.__int__)


class FirstOutput(nn.Module):
    """A transformers model that returns its logits or hidden states alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the first output of the model."""
        output: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return output


class OnnxModel(nn.Module):
    """A session of onnxruntime that is called as a module is."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Return the outputs as arrays."""
        return self.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters' progress and warnings off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
