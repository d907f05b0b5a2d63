"""Layers that hold a tensor network in the place of their weight matrix.

A layer is the dense layer itself with another class and another ``weight``: one parameter, one-dimensional, of all the
numbers of all cores. So there is one parameter where there was one, under the same name; tied weights stay tied,
optimizers and transformers find what they look for, and a file opened without fiftyfold fails by the shape.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import is_tensor_like
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.path import current_path
from fiftyfold.modules.tensor_network.contraction import break_even, contract
from fiftyfold.modules.tensor_network.decomposition import Cores, check_finite, decompose, rebuild
from fiftyfold.modules.tensor_network.form import Gauge, NetworkForm
from fiftyfold.modules.tensor_network.gauge import (
    fix_gauge,
    join_fixed,
    join_free,
    row_places,
    split_fixed,
    split_free,
)
from fiftyfold.modules.tensor_network.pivots import PIVOTS, held_alike, row_numbers, row_signs, stored_rows


class TensorNetworkLayer(nn.Module):
    """What layers with a tensor network have in common.

    Attributes:
        weight: all numbers, (n,).
        form: which cores they are.
        keeps_merged: whether the matrix, once built for inference, stays in memory.
        trained_gauge: the gauge in which it trained and may train again, where it is kept in another one.
        settings: how the cores are quantized, in the subclasses that quantize them.
    """

    weight: torch.Tensor
    form: NetworkForm
    keeps_merged: bool = False
    trained_gauge: Gauge | None = None
    settings: Any = None
    _merged: torch.Tensor | None = None
    _places: list[torch.Tensor] | None = None
    _break_even: float

    def matrices(self) -> list[torch.Tensor]:
        """Return the numbers as the matrices of :attr:`.NetworkForm.matrix_shapes`, views of the weight."""
        shapes = self.form.matrix_shapes
        parts = self.weight.split([rows * columns for rows, columns in shapes])
        if current_path() == "reference":
            # Where a part begins depends on the gauge; sums over numbers that are not aligned in memory may be rounded
            # in another order, and equal cores then give unequal outputs.
            parts = tuple(part.clone() for part in parts)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def networks(self) -> list[Cores]:
        """Return the cores that the layer computes with, term after term; gradients flow through them."""
        matrices, networks, bonds = iter(self.matrices()), [], iter(self._row_places())
        for term in self.form.terms:
            own = [next(matrices) for _ in term.rows]
            if self.form.gauge == "free":
                networks.append(join_free(own, term))
            else:
                networks.append(join_fixed(own, [next(bonds) for _ in term.bonds], term))
        return networks

    def dense_weight(self) -> torch.Tensor:
        """Return the matrix that the cores stand for, (outputs, inputs); gradients flow through it."""
        rows, columns = self.form.shape
        rebuilt = [rebuild(cores)[:rows, :columns] for cores in self.networks()]
        return sum(rebuilt[1:], rebuilt[0]).contiguous()

    def merged_weight(self) -> torch.Tensor:
        """Return the matrix without gradients, kept for the next call."""
        if self._merged is None:
            with torch.no_grad():
                self._merged = self.dense_weight()
        return self._merged

    def forget_merged(self) -> None:
        """Drop what :meth:`merged_weight` kept."""
        self._merged = None

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        rows, columns = self.form.shape
        terms = ", ".join(f"{term.rows}x{term.columns} bonds {term.bonds}" for term in self.form.terms)
        return f"{columns}, {rows}, {terms}, gauge={self.form.gauge}"

    def _row_places(self) -> list[torch.Tensor]:
        if self.form.gauge == "free":
            return []
        if self._places is None:
            bonds = [bond for term in self.form.terms for bond in term.bonds]
            pivots = row_numbers(self.get_buffer(PIVOTS)).split(bonds)
            shapes = [shape for term in self.form.terms for shape in term.core_shapes[:-1]]
            self._places = [
                row_places(rows, left * outputs * inputs)
                for rows, (left, outputs, inputs, _) in zip(pivots, shapes, strict=True)
            ]
        return self._places

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TensorNetworkLayer:
        self._forget()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._forget()
        held = self._buffers.get(PIVOTS)
        given: Any = state_dict.get(prefix + PIVOTS)
        if held is not None and is_tensor_like(given):
            # Lightning's FSDP hands in tensors that are read from the file by the first function of torch on them.
            state_dict[prefix + PIVOTS] = held_alike(torch.detach(given), held, self.form)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_merged": None, "_places": None}

    def _forget(self) -> None:
        self._merged = self._places = None


class TensorNetworkLinear(TensorNetworkLayer):
    """An ``nn.Linear`` with a tensor network in the place of its weight."""

    bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output: (…, inputs) → (…, outputs).

        For few tokens the cores are multiplied one after another; for many the matrix is rebuilt, in the backward pass
        once more, so that no more than one layer's matrix is in memory at a time.
        """
        if self._uses_merged(x):
            return F.linear(x, self.merged_weight().to(x.dtype), self.bias)
        if math.prod(x.shape[:-1]) <= self._break_even:
            return self._contract(x)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            # The type of a checkpoint's result is not stated by torch.
            return checkpoint(self._rebuild_and_multiply, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return self._rebuild_and_multiply(x)

    def _uses_merged(self, x: torch.Tensor) -> bool:
        if not self.keeps_merged or math.isinf(self._break_even):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return False
        return current_path() != "reference" or math.prod(x.shape[:-1]) > self._break_even

    def _contract(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.form.shape
        flat = x.reshape(-1, columns)
        first, *others = [contract(flat, cores, rows) for cores in self.networks()]
        output = sum(others, first)
        output = output if self.bias is None else output + self.bias.to(output.dtype)  # autocast's, if that is on
        return output.view(*x.shape[:-1], rows)

    def _rebuild_and_multiply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense_weight(), self.bias)


class TensorNetworkConv1D(TensorNetworkLinear):
    """GPT-2's ``Conv1D`` with a tensor network; the network's matrix is (outputs, inputs), as for a linear layer."""


class TensorNetworkEmbedding(TensorNetworkLayer):
    """An ``nn.Embedding`` with a tensor network; rows are looked up without building the table."""

    padding_idx: int | None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows: (…) integers → (…, features)."""
        columns = self.form.shape[1]
        flat = tokens.reshape(-1)
        first, *others = [look_up(flat, cores)[:, :columns] for cores in self.networks()]
        found = sum(others, first)
        if self.padding_idx is not None and torch.is_grad_enabled():
            # As in a dense embedding, padding teaches nothing.
            found = torch.where((flat == self.padding_idx).unsqueeze(1), found.detach(), found)
        return found.view(*tokens.shape, columns)


def look_up(tokens: torch.Tensor, cores: Cores) -> torch.Tensor:
    """Return rows of the matrix that cores stand for.

    Args:
        tokens: (n,) row numbers.
        cores: of one term.

    Returns:
        (n, product of the cores' inputs).

    Raises:
        IndexError: on a CPU, if a number is not that of a row.
    """
    state = cores[0].new_ones(1, 1, 1)
    below, width, first = math.prod([core.shape[1] for core in cores]), 1, True
    for core in cores:
        left, rows, columns, right = core.shape
        below //= rows
        if rows == 1:
            chosen = core.reshape(1, left, columns * right)
        else:
            # index_select rather than indexing: its gradient adds up in a fixed order on CPUs.
            # The first digit is not wrapped around: a number beyond the last row is an error, as in a dense embedding.
            digits = tokens // below if first else tokens // below % rows
            first = False
            chosen = core.transpose(0, 1).index_select(0, digits).reshape(-1, left, columns * right)
        state = state @ chosen
        width *= columns
        state = state.reshape(state.shape[0], width, right)
    return state.squeeze(2).expand(tokens.shape[0], width)


_NETWORKS: dict[type[nn.Module], type[TensorNetworkLayer]] = {
    nn.Linear: TensorNetworkLinear,
    nn.Embedding: TensorNetworkEmbedding,
    Conv1D: TensorNetworkConv1D,
}
_DENSE = {network: dense for dense, network in _NETWORKS.items()}


def is_tensorizable(module: nn.Module) -> bool:
    """Tell whether the weight of ``module`` can become a tensor network, or is one already.

    Subclasses of the dense layers compute in ways of their own and are left alone. So are embeddings that
    renormalize their rows or have sparse gradients.
    """
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return False
    return type(module) in _NETWORKS or isinstance(module, TensorNetworkLayer)


def matrix_of(module: nn.Module) -> torch.Tensor:
    """Return the weight of a dense layer or a tensor network as (outputs, inputs), without gradients."""
    if isinstance(module, TensorNetworkLayer):
        with torch.no_grad():
            return module.dense_weight()
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().t() if isinstance(module, Conv1D) else weight.detach()


def check_weight(module: nn.Module, name: str) -> None:
    """Refuse a layer whose weight is not finite.

    Args:
        module: a dense layer or a tensor network; nothing is known of one on the meta device.
        name: how the message calls it.

    Raises:
        FiftyfoldError: if any entry is not.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if weight.is_meta:
        return
    try:
        check_finite(matrix_of(module))
    except FiftyfoldError as error:
        raise FiftyfoldError(f"{name}: {error}") from error


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a dense layer or a tensor network."""
    if isinstance(module, TensorNetworkLayer):
        return module.form.shape
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def flat_numbers(networks: Sequence[Cores]) -> torch.Tensor:
    """Return the numbers of free cores as the layers keep them, (n,)."""
    return torch.cat([matrix.reshape(-1) for cores in networks for matrix in split_free(cores)])


def fixed_numbers(networks: Sequence[Cores]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of cores once their gauge is fixed, (n,), and the rows of all identity blocks."""
    fixed = [fix_gauge(cores) for cores in networks]
    numbers = [matrix.reshape(-1) for cores, pivots in fixed for matrix in split_fixed(cores, pivots)]
    rows = list(itertools.chain.from_iterable(pivots for _, pivots in fixed))
    return torch.cat(numbers), torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)


def install_network(
    module: nn.Module, form: NetworkForm, weight: nn.Parameter | None = None, pivots: torch.Tensor | None = None
) -> None:
    """Give ``module`` a tensor network in the place of its weight; its bias and its hooks stay.

    Args:
        module: a dense layer, or one with a network already.
        form: of the network.
        weight: the numbers, perhaps those of a layer that it is tied to; by default numbers that are to be loaded,
            of the type and on the device of the old ones, and not a number until then.
        pivots: rows of all identity blocks, if the gauge is fixed; by default they are to be loaded.

    Raises:
        FiftyfoldError: if the layer cannot hold such a network.
    """
    if not is_tensorizable(module):
        raise FiftyfoldError(f"a {type(module).__name__} has no weight that a tensor network can stand for.")
    if matrix_shape(module) != form.shape:
        raise FiftyfoldError(f"the layer's weight is {matrix_shape(module)}, and the network's matrix {form.shape}.")
    old = module.weight
    assert isinstance(old, torch.Tensor)
    if weight is None:
        weight = nn.Parameter(old.new_full((form.count,), math.nan), requires_grad=old.requires_grad)
    if type(module) in _NETWORKS:
        module.__class__ = _NETWORKS[type(module)]
    assert isinstance(module, TensorNetworkLayer)
    module._forget()
    module.register_parameter("weight", weight)
    module._buffers.pop(PIVOTS, None)
    if form.gauge == "fixed":
        rows = torch.zeros(form.pivots, dtype=torch.long, device=weight.device) if pivots is None else pivots
        module.register_buffer(PIVOTS, row_signs(rows.to(weight.device), form, weight.dtype))
    module.form = form
    module._break_even = break_even(form)


def narrow_pivots(module: TensorNetworkLayer) -> None:
    """Hold the numbers of the identity's rows as a file does, in place."""
    if PIVOTS in module._buffers:
        module._buffers[PIVOTS] = stored_rows(module.get_buffer(PIVOTS), module.form)


def widen_pivots(module: TensorNetworkLayer) -> None:
    """Hold the numbers of the identity's rows as training does, in place."""
    if PIVOTS in module._buffers:
        rows = row_numbers(module.get_buffer(PIVOTS))
        module._buffers[PIVOTS] = row_signs(rows, module.form, module.weight.dtype)


@torch.no_grad()
def change_gauge(module: TensorNetworkLayer, gauge: Gauge) -> None:
    """Keep the same operator with another number of numbers, in place; the parameter becomes another one."""
    if module.form.gauge == gauge:
        return
    networks, old = module.networks(), module.weight
    form = module.form.with_gauge(gauge)
    numbers, pivots = fixed_numbers(networks) if gauge == "fixed" else (flat_numbers(networks), None)
    install_network(module, form, nn.Parameter(numbers.to(old.dtype), requires_grad=old.requires_grad), pivots)


@torch.no_grad()
def normalize_gauge(module: TensorNetworkLayer) -> None:
    """Give the cores of a free network identity blocks, in place, so that fixing its gauge changes nothing more."""
    if module.form.gauge == "free":
        networks = [fix_gauge(cores)[0] for cores in module.networks()]
        module.weight.copy_(flat_numbers(networks))
        module.forget_merged()


def to_dense(module: TensorNetworkLayer) -> None:
    """Turn a layer back into a dense one, in place, with the matrix that its network stands for."""
    matrix = matrix_of(module)
    weight = matrix.t().contiguous() if isinstance(module, TensorNetworkConv1D) else matrix.contiguous()
    requires_grad = module.weight.requires_grad
    for name in ("form", "keeps_merged", "trained_gauge", "_merged", "_places", "_break_even"):
        module.__dict__.pop(name, None)
    module._buffers.pop(PIVOTS, None)
    module.__class__ = next(_DENSE[each] for each in type(module).__mro__ if each in _DENSE)  # type: ignore[assignment]
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=requires_grad))


def network_layers(model: nn.Module) -> Iterator[tuple[str, TensorNetworkLayer]]:
    """Yield the layers of ``model`` that hold a tensor network, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, TensorNetworkLayer):
            yield name, module


def cores_of(module: nn.Module, form: NetworkForm) -> list[Cores]:
    """Return the cores of ``form`` that stand nearest to the weight of a dense layer or a tensor network."""
    return decompose(matrix_of(module), form)
