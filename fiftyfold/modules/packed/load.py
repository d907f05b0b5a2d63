"""Opening an exported folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.folder_replacement import interrupted_replacement
from fiftyfold.modules.config_size import refuse_too_many_layers
from fiftyfold.modules.packed.layers import prepare_layers
from fiftyfold.modules.packed.manifest import Manifest
from fiftyfold.modules.packed.plugin import METHOD
from fiftyfold.modules.packed.skeleton import (
    check_headers,
    expected_tensors,
    install_packed_layers,
    share_tied_tensors,
)
from fiftyfold.modules.packed.trainable import make_trainable
from fiftyfold.modules.packed.weights_file import check_digest, read_headers, read_tensors
from fiftyfold.modules.structure import compression_root, loading_values, replay

WEIGHTS_FILE = "model.safetensors"
"""Where the tensors are."""

CONFIG_FILE = "config.json"
"""Where transformers' configuration is, and in it the manifest."""

STRUCTURE_FILE = "structure.json"
"""Where the manifest of a model is that is not transformers'."""


def load(folder: str | os.PathLike[str], *, into: nn.Module | None = None, trainable: bool = False) -> nn.Module:
    """Open a folder that :func:`.export` wrote.

    ``AutoModel….from_pretrained(folder)`` gives the same for the models of transformers.

    Args:
        folder: the exported folder.
        into: for models that are not transformers': a model built as it was before anything compressed it. It is
            changed in place. Leave it out otherwise.
        trainable: give back floating-point weights that quantize as before, so that training can go on; otherwise the
            weights stay packed, for inference, and no parameter asks for gradients.

    Returns:
        The model, in evaluation mode; with ``into``, that one.

    Raises:
        FiftyfoldError: if the folder is absent, incomplete, corrupt, altered or too new, or does not fit ``into``.
    """
    path = Path(folder).expanduser()
    manifest, architecture = read_manifest(path)
    if into is not None:
        fill(into, path, manifest)
        model: nn.Module = into.eval()
    else:
        model = _from_pretrained(path, architecture)
    if trainable:
        make_trainable(model)
    return model


def fill(model: nn.Module, folder: Path, manifest: Manifest) -> None:
    """Replay the manifest's structure log on ``model``, put packed layers in, and load the weights of ``folder``.

    Raises:
        FiftyfoldError: if the file is corrupt or does not fit; the model may then be changed already.
    """
    files = [folder / WEIGHTS_FILE]
    headers = read_headers(files)
    check_digest(files)
    root = compression_root(model)
    with loading_values():
        replay(root, manifest.structure)
    install_packed_layers(root, manifest)
    expected = expected_tensors(root)
    check_headers(expected, headers, files[0])
    tensors = read_tensors(files)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
    share_tied_tensors(root, manifest)
    root.requires_grad_(False)
    prepare_layers(root)


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Return the manifest of a folder, and the name of its class for the models of transformers, otherwise nothing."""
    if (found := interrupted_replacement(folder)) is not None:
        raise FiftyfoldError(
            f"a kill stopped the export to {folder} as it was put in place: the new model is whole in {found[0]}, the "
            f"one before it in {found[1]}; rename one of them to {folder.name}."
        )
    if not folder.is_dir():
        raise FiftyfoldError(f"there is no folder {folder}.")
    if (folder / STRUCTURE_FILE).exists():
        return Manifest.from_json(_read_json(folder / STRUCTURE_FILE)), ""
    config = _read_json(folder / CONFIG_FILE)
    content, architectures = config.get("quantization_config"), config.get("architectures")
    if not isinstance(content, dict) or content.get("quant_method") != METHOD:
        raise FiftyfoldError(f"{folder} is not a folder that fiftyfold exported; open it with from_pretrained.")
    manifest = Manifest.from_json({key: value for key, value in content.items() if key != "quant_method"})
    if not isinstance(architectures, list) or not architectures:
        raise FiftyfoldError(f"{folder / CONFIG_FILE} does not name the model's class; export the model again.")
    refuse_too_many_layers(folder, config)
    return manifest, str(architectures[0])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FiftyfoldError(f"{file} cannot be read ({error.strerror}); is this an exported folder?") from error
    except (ValueError, RecursionError) as error:
        raise FiftyfoldError(f"{file} is no JSON ({error}); copy or export the folder again.") from error
    if not isinstance(content, dict):
        raise FiftyfoldError(f"{file} is no JSON object; copy or export the folder again.")
    return content


def _is_model_class(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, PreTrainedModel)


def _from_pretrained(folder: Path, architecture: str) -> PreTrainedModel:
    if not architecture:
        raise FiftyfoldError(f"{folder} holds a model that is not transformers'; pass one to fill as into=….")
    cls: Any = getattr(transformers, architecture, None)
    if not _is_model_class(cls):
        raise FiftyfoldError(f"transformers has no class {architecture}; pass a model to fill as into=….")
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except FiftyfoldError:
        raise
    except Exception as error:  # a configuration can make any part of transformers stumble
        raise FiftyfoldError(f"{folder} cannot be opened: {first_line(error)}") from error
