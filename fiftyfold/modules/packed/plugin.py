"""The transformers plug-in: ``from_pretrained`` opens exported folders once this module is imported."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed.contents import collect_tensors, describe
from fiftyfold.modules.packed.layers import prepare_layers
from fiftyfold.modules.packed.manifest import Manifest
from fiftyfold.modules.packed.skeleton import (
    SHARED_BUFFERS,
    check_header,
    check_headers,
    expected_tensors,
    install_packed_layers,
    share_tied_tensors,
)
from fiftyfold.modules.packed.weights_file import DIGEST_KEY, TensorHeader, check_digest, digest, read_headers
from fiftyfold.modules.quantization.layers import quantized_layers
from fiftyfold.modules.structure import adopt_log
from fiftyfold.modules.tensor_network.layers import network_layers

METHOD = "fiftyfold"
"""Value of ``quant_method`` in the configuration of an exported folder."""


class FiftyfoldConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an exported folder: its manifest.

    Args:
        quant_method: always ``"fiftyfold"``.
        **content: what :meth:`Manifest.to_json` wrote.

    Raises:
        FiftyfoldError: if it cannot be read.
    """

    def __init__(self, quant_method: str = METHOD, **content: Any) -> None:
        self.quant_method = quant_method
        self.manifest = Manifest.from_json(content)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"quant_method": self.quant_method, **self.manifest.to_json()}


class FiftyfoldQuantizer(HfQuantizer):
    """Puts packed layers into an empty model before transformers loads its weights."""

    manifest: Manifest

    @property
    def is_trainable(self) -> bool:
        """Packed layers do not train; ``fiftyfold.load(folder, trainable=True)`` gives layers that do."""
        return False

    def is_serializable(self) -> bool:
        """Tell transformers that ``save_pretrained`` works."""
        return True

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse to quantize a model while it is loaded.

        Raises:
            FiftyfoldError: if the folder was not written by fiftyfold.
        """
        if not self.pre_quantized:
            raise FiftyfoldError("transformers cannot quantize by fiftyfold as it loads; use fiftyfold's quantize.")

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return what ``save_pretrained`` writes: the packed tensors, and their checksum.

        The manifest is made anew, since the model may be a part of the exported one, or have lost layers since.
        """
        self.manifest = self.quantization_config.manifest = describe(model, self.manifest.rest_dtype)
        model.config.quantization_config = self.quantization_config
        tensors = collect_tensors(model, self.manifest)
        return tensors, {DIGEST_KEY: digest(tensors)}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        complete = _is_exported_class(model)
        manifest = self.quantization_config.manifest
        self.manifest = manifest if complete else _for_part(manifest, model)
        install_packed_layers(model, self.manifest)
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            headers = _local_headers(model, read_headers(files))
            _declare_ties(model, self.manifest, headers)
            _check_headers(model, self.manifest, headers, files[0])
            check_digest(files)
        # Versions of transformers before 5.21 leave a tensor of a quantized file in the file's type where the model has
        # it under another name, as a part has; of any other file, each tensor takes the type of what it fills.
        self.pre_quantized = complete

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self.pre_quantized = True
        share_tied_tensors(model, self.manifest)
        for tensor in [*model.parameters(), *model.buffers()]:
            # The file is mapped into memory, where a tensor may begin at any address; sums over numbers that are not
            # aligned may be rounded in another order, and equal weights then give unequal outputs.
            tensor.data = tensor.data.clone()
        prepare_layers(model)
        if _is_exported_class(model):
            model.requires_grad_(False)
            adopt_log(model, self.manifest.structure)
        else:
            model.base_model.requires_grad_(False)


def register_plugin() -> None:
    """Make the plug-in known to transformers, and its ``save_pretrained`` careful. Doing it again changes nothing."""
    if PreTrainedModel.save_pretrained.__module__ != __name__:
        PreTrainedModel.save_pretrained = _careful(PreTrainedModel.save_pretrained)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(FiftyfoldConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(FiftyfoldQuantizer)


def _careful(save: Callable[..., None]) -> Callable[..., None]:
    """Return a ``save_pretrained`` that refuses what would come back as another model, without a word.

    Latent weights are all that transformers sees of a quantized layer, and it knows no tensor networks.
    """

    @functools.wraps(save, assigned=("__doc__", "__name__", "__qualname__", "__annotations__"))
    def save_pretrained(self: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        changed = [name for name, _ in itertools.chain(quantized_layers(self), network_layers(self))]
        if changed and not isinstance(getattr(self, "hf_quantizer", None), FiftyfoldQuantizer):
            raise FiftyfoldError(
                f"save_pretrained would write {changed[0]!r} and others without their quantizers or networks, and "
                f"{type(self).__name__} would come back as another model; use fiftyfold.export(model, folder), "
                "and with transformers' Trainer save_strategy='no'."
            )
        save(self, *arguments, **options)

    return save_pretrained


def _is_exported_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or ())


def _for_part(manifest: Manifest, model: PreTrainedModel) -> Manifest:
    """Return the manifest with the names, and only the modules, of a model of another class than the exported one."""
    modules = {name for name, _ in model.named_modules()}
    local = {name: _local_name(name, model.base_model_prefix, modules) for name in manifest.packed}
    packed = {local[name]: entry for name, entry in manifest.packed.items() if local[name] in modules}
    tied = {local[name]: local[source] for name, source in manifest.tied.items() if local[name] in modules}
    return replace(manifest, packed=packed, tied=tied)


def _local_headers(model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    names = set(model.state_dict())
    return {_local_name(name, model.base_model_prefix, names): header for name, header in headers.items()}


def _local_name(name: str, prefix: str, names: set[str]) -> str:
    """Return the name that a part has in a model with or without a head, as transformers' own loading does."""
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((candidate for candidate in candidates if candidate in names), name)


def _declare_ties(model: PreTrainedModel, manifest: Manifest, headers: Mapping[str, TensorHeader]) -> None:
    """Let transformers tie packed weights to each other, and no dense weight to a packed one.

    Raises:
        FiftyfoldError: if the model has an output layer that the folder was exported without.
    """
    packed = {f"{name}.weight" for name in manifest.packed}
    ties = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        if packed.isdisjoint((target, source)):
            continue
        del ties[target]
        if missing := [name for name in (target, source) if name not in packed and name not in headers]:
            raise FiftyfoldError(
                f"{type(model).__name__} ties {missing[0]!r} to a packed weight, and the folder was exported without "
                "it; export the model together with its output layer."
            )
    for name, owner in manifest.tied.items():
        ties[f"{name}.weight"] = f"{owner}.weight"
        # They come back with the weight, after loading: transformers ties parameters only.
        for buffer in SHARED_BUFFERS:
            model.get_submodule(name)._buffers.pop(buffer, None)
    # Tying would cut or lengthen the output layer's bias to the packed weight's number of bytes.
    model._adjust_bias = _leave_bias


def _leave_bias(output_layer: nn.Module, embedding: nn.Module) -> None:
    """Do nothing, in the place of a method of transformers' models."""


def _check_headers(model: PreTrainedModel, manifest: Manifest, headers: Mapping[str, TensorHeader], file: Path) -> None:
    expected = expected_tensors(model)
    for pair in model.all_tied_weights_keys.items():
        for name, partner in (pair, pair[::-1]):
            if name not in headers and partner in headers:
                expected.pop(name, None)
    if _is_exported_class(model):
        check_headers(expected, headers, file)
        return
    backbone = "" if model.base_model is model else f"{model.base_model_prefix}."
    for name, tensor in expected.items():
        if name.rpartition(".")[0] in manifest.packed or (name.startswith(backbone) and name in headers):
            check_header(name, tensor, headers.get(name), file)
