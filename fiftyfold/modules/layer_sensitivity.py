"""How much a model suffers when one matrix at a time becomes a tensor network (CompactifAI's sensitivity profile).

Its Supplementary measures a metric of the whole model (MMLU accuracy there; any metric will do) for one layer at a time
and a sweep of bond dimensions. The cheap profile needs one pass over text instead: it tells the relative error of each
layer's output, which says nothing of how much the model minds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.tensor_network.decomposition import rebuild
from fiftyfold.modules.tensor_network.form import NetworkForm
from fiftyfold.modules.tensor_network.layers import cores_of, matrix_of, matrix_shape
from fiftyfold.modules.tensor_network.targets import find_matrices


@contextmanager
def approximated(layer: nn.Module, form: NetworkForm) -> Iterator[None]:
    """Let a dense layer compute, inside the block, with the matrix that a tensor network of its weight stands for.

    Args:
        layer: dense; its weight is the old one again afterwards, also if the block fails.
        form: of the network.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    kept = weight.detach().clone()
    with torch.no_grad():
        matrix = _approximation(layer, form)
        weight.copy_(matrix.t() if isinstance(layer, Conv1D) else matrix)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@torch.no_grad()
def output_error(layer: nn.Module, form: NetworkForm, moments: Tensor) -> float:
    """Return the relative error of a layer's output, ‖(W − Ŵ)X‖ / ‖WX‖.

    Args:
        layer: dense.
        form: of the network Ŵ.
        moments: the mean of x·xᵀ over the inputs X, (inputs, inputs).
    """
    matrix = matrix_of(layer).to(moments.dtype)
    difference = matrix - _approximation(layer, form).to(moments.dtype)
    wrong, whole = (((part @ moments) * part).sum() for part in (difference, matrix))
    return float((wrong / whole.clamp(min=torch.finfo(moments.dtype).tiny)).clamp(min=0).sqrt())


@torch.no_grad()
def input_moments(model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of x·xᵀ over the inputs x of each named layer, in one pass, in float64.

    Args:
        model: called with each batch.
        names: of linear layers.
        batches: arguments of the model's ``forward`` by name; no padding.

    Raises:
        FiftyfoldError: if there is no batch, or a layer was never called.
    """
    layers = {name: model.get_submodule(name) for name in names}
    sums = {name: torch.zeros(2 * matrix_shape(layer)[1:], dtype=torch.float64) for name, layer in layers.items()}
    counts = dict.fromkeys(names, 0)

    def add(name: str, given: Tensor) -> None:
        rows = given.reshape(-1, given.shape[-1]).double().cpu()
        sums[name] += rows.T @ rows
        counts[name] += len(rows)

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if idle := [name for name, count in counts.items() if count == 0]:
        raise FiftyfoldError(f"no text reached {idle[0]!r}; give some text, or leave the layer out.")
    return {name: total / counts[name] for name, total in sums.items()}


def profiled_matrices(model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the names of the dense linear layers to profile, a tied weight once.

    Raises:
        FiftyfoldError: if there are none.
    """
    seen: set[int] = set()
    names = []
    for name in find_matrices(model, targets, exclude):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear | Conv1D) and id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            names.append(name)
    if not names:
        raise FiftyfoldError("there is no dense linear layer to profile.")
    return names


def _approximation(layer: nn.Module, form: NetworkForm) -> Tensor:
    rows, columns = form.shape
    parts = [rebuild(cores)[:rows, :columns] for cores in cores_of(layer, form)]
    return sum(parts[1:], parts[0])
