"""The operation "compress_matrices": weights become tensor networks that the data choose, under one budget of bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, Unpack, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.digest import identity_of
from fiftyfold.modules.journal import number, open_journal
from fiftyfold.modules.quantization.quantize import quantize_operation
from fiftyfold.modules.quantization.targets import Targets, named_layers
from fiftyfold.modules.structure import Operation, apply_operation, check_order, register_operation, structure_log
from fiftyfold.modules.tensor_network.budget import Allocation, spread_bytes
from fiftyfold.modules.tensor_network.channel_order import ChannelOrders, permute_bias_state
from fiftyfold.modules.tensor_network.compressed_copy import compressed_copy
from fiftyfold.modules.tensor_network.compressed_matrix import (
    FAMILIES_BY_DEFAULT,
    WHOLE_BITS,
    CompressedMatrix,
    Plan,
)
from fiftyfold.modules.tensor_network.decomposition import as_memory_error
from fiftyfold.modules.tensor_network.families import FAMILIES, Family
from fiftyfold.modules.tensor_network.layers import TensorNetworkEmbedding, check_weight, matrix_shape
from fiftyfold.modules.tensor_network.moments import Batch, check_batches
from fiftyfold.modules.tensor_network.progress import Report, silent
from fiftyfold.modules.tensor_network.solvers import SWEEPS
from fiftyfold.modules.tensor_network.targets import find_matrices
from fiftyfold.modules.tensor_network.tensorize import install_networks, network_operation, read_forms

OPERATION = "compress_matrices"
"""Kind of a log's entry."""

_FACTOR_BITS = (8, 16)


def compress_matrices(
    model: nn.Module,
    batches: Iterable[Batch],
    keep: float = 0.3,
    *,
    families: Sequence[Family] = FAMILIES_BY_DEFAULT,
    allocation: Allocation = "model",
    factor_bits: int = 16,
    whole_bits: Sequence[int] = (),
    compressed_prefix: bool = True,
    sweeps: int = SWEEPS,
    targets: Targets = "default",
    exclude: Targets = (),
    step: int = 0,
    optimizer: Optimizer | None = None,
    report: Report = silent,
    work_folder: str | Path | None = None,
) -> dict[str, CompressedMatrix]:
    """Replace weight matrices by the tensor networks that change the layers' outputs least on calibration text.

    Each matrix takes the best of several families at its number of bytes, solved for in the metric of its inputs: the
    ones that the model gives it whose earlier layers are compressed already. The target is the output of the original
    model, so that a layer also makes up for those before it; what the mean of its inputs contributes goes into its
    bias, where it has one. All is computed on a copy before the first weight is replaced.

    Args:
        model: any module; it is called with each batch.
        batches: calibration text: tensors, or arguments by name. Padding that an ``attention_mask`` marks is left out.
        keep: share of the bytes that the chosen matrices take in 16 bits; between 0 and 1.
        families: which forms are tried; see :data:`.Family`. Low rank alone, ``("svd",)``, needs no iteration.
        allocation: how the bytes are spread; see :data:`Allocation`.
        factor_bits: 16, or 8 for factors that are quantized by row. They then stand under the quantizer, ready for
            quantization-aware training, and the log gets an entry for that as well.
        whole_bits: of 3, 4 and 8, in which bits a matrix may stay whole, rounded by row in the same metric, where that
            is nearer than a network of its number of bytes. Such layers, too, stand under their quantizers then.
        compressed_prefix: whether each layer sees the inputs of the compressed model; otherwise the original's, which
            takes one pass over the text in place of two for each layer.
        sweeps: of the alternating least squares.
        targets: ``"default"`` (the linear layers of the stacked layers), or patterns, as :func:`.find_matrices` takes.
        exclude: patterns of names to leave out.
        step: the optimizer step at which this happens, for the log.
        optimizer: the optimizer that trains the model, if there is one; the new parameters enter the groups of those
            that they replace.
        report: is called as the matrices are weighed, ordered and compressed, which takes hours for a large model.
        work_folder: where each matrix is kept as soon as it is done, so that the same call goes on where a process was
            killed, to the same numbers; delete it once the model is saved.

    Returns:
        What became of each matrix, by name.

    Raises:
        FiftyfoldError: if an argument is impossible, the text is empty or does not suit the model, the budget cannot be
            met, a weight is not finite, memory runs out, or the work folder holds another compression. The model is
            then unchanged.
    """
    compression = plan_compression(
        model,
        batches,
        keep,
        families=families,
        allocation=allocation,
        factor_bits=factor_bits,
        whole_bits=whole_bits,
        compressed_prefix=compressed_prefix,
        sweeps=sweeps,
        targets=targets,
        exclude=exclude,
        report=report,
        work_folder=work_folder,
    )
    optimizers = [] if optimizer is None else [optimizer]
    apply_operation(model, compression.operation(step), optimizers)
    compression.give_values(model, optimizers)
    for operation in compression.quantizing(model, step):
        apply_operation(model, operation, optimizers)
    return compression.results


class CompressionArguments(TypedDict, total=False):
    """Arguments that :func:`compress_matrices` and what plans for it have in common."""

    factor_bits: int
    whole_bits: Sequence[int]
    families: Sequence[Family]
    allocation: Allocation
    compressed_prefix: bool
    sweeps: int
    targets: Targets
    exclude: Targets


@dataclass(frozen=True)
class Compression:
    """What :func:`compress_matrices` does to a model, found and not yet carried out.

    Attributes:
        results: what becomes of each matrix, by the layer's name.
        values: the state dict of each layer that gets a network, or is rounded, by its name.
        orders: of the channels that were sorted between these layers; their networks and biases have it already.
        factor_bits: of a factor's number.
    """

    results: dict[str, CompressedMatrix]
    values: dict[str, dict[str, torch.Tensor]]
    orders: ChannelOrders
    factor_bits: int

    def operation(self, step: int, part: str = "") -> Operation:
        """Return the log's entry.

        Args:
            step: the optimizer step at which this happens.
            part: name of the part that was planned for, within the model that carries the log.
        """
        prefix = f"{part}." if part else ""
        found = {f"{prefix}{name}": result for name, result in self.results.items()}
        forms = {name: result.form for name, result in found.items() if result.form is not None}
        errors = {name: round(found[name].error, 6) for name in found}
        return network_operation(OPERATION, forms, step) | {"errors": errors}

    def quantizing(self, model: nn.Module, step: int, part: str = "") -> list[Operation]:
        """Return the log's entries that put the layers of few bits under their quantizers, by row.

        Args:
            model: what carries the log; it has had the operation.
            step: as for :meth:`operation`.
            part: as for :meth:`operation`.
        """
        prefix = f"{part}." if part else ""
        bits = {name: self.results[name].whole_bits or self.factor_bits for name in self.values}
        return [
            quantize_operation(
                model,
                weight_bits=width,
                activation_bits=None,
                granularity="per_channel",
                targets=[f"^{re.escape(prefix + name)}$" for name, own in bits.items() if own == width],
                step=step,
            )
            for width in sorted(set(bits.values()) - {16}, reverse=True)
        ]

    @torch.no_grad()
    def give_values(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Fill the changed layers of ``model``, which has had the operation; its training goes on from there.

        Args:
            model: changed in place.
            optimizers: that train it; what they keep of a bias follows its channels.
        """
        layers = dict(named_layers(model))
        for name, values in self.values.items():
            for key, tensor in layers[name].state_dict().items():
                tensor.copy_(values[key])
        permute_bias_state(model, self.orders, optimizers)


def check_arguments(keep: float, **arguments: Unpack[CompressionArguments]) -> None:
    """Refuse arguments that no model could make good.

    Raises:
        FiftyfoldError: naming the argument.
    """
    plan = Plan(**arguments)
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep < 1:
        raise FiftyfoldError(f"keep must be a share between 0 and 1, not {keep!r}.")
    families = plan.families if isinstance(plan.families, Sequence) else ()
    if not families or any(family not in FAMILIES for family in families):
        raise FiftyfoldError(f"families must be some of {', '.join(FAMILIES)}, not {plan.families!r}.")
    if plan.factor_bits not in _FACTOR_BITS:
        raise FiftyfoldError(f"factor_bits must be 8 or 16, not {plan.factor_bits!r}.")
    if not isinstance(plan.whole_bits, Sequence):
        raise FiftyfoldError(f"whole_bits must be a sequence, such as (4,), not {plan.whole_bits!r}.")
    if any(bits not in WHOLE_BITS for bits in plan.whole_bits):
        raise FiftyfoldError(f"whole_bits must be some of 3, 4 and 8, not {list(plan.whole_bits)}.")
    if type(plan.sweeps) is not int or plan.sweeps < 1:
        raise FiftyfoldError(f"sweeps must be an integer of at least 1, not {plan.sweeps!r}.")
    if plan.allocation not in get_args(Allocation):
        allowed = ", ".join(map(repr, get_args(Allocation)))
        raise FiftyfoldError(f"allocation must be one of {allowed}, not {plan.allocation!r}.")


def plan_compression(
    model: nn.Module,
    batches: Iterable[Batch],
    keep: float = 0.3,
    *,
    report: Report = silent,
    work_folder: str | Path | None = None,
    **arguments: Unpack[CompressionArguments],
) -> Compression:
    """Find what :func:`compress_matrices` would carry out, and change nothing.

    Raises:
        FiftyfoldError: as :func:`compress_matrices` does.
    """
    check_order(structure_log(model), [OPERATION])
    check_arguments(keep, **arguments)
    plan = Plan(**arguments)
    found = check_batches(batches)
    names = _matrices(model, plan.targets, plan.exclude)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with open_journal(
            work_folder, lambda: [OPERATION, names, keep, asdict(plan), identity_of(model), found]
        ) as journal:
            sizes = journal.remember(
                "bytes",
                lambda: spread_bytes(
                    model,
                    names,
                    found,
                    keep=keep,
                    allocation=plan.allocation,
                    bits=plan.factor_bits,
                    whole_bits=plan.whole_bits,
                    report=report,
                    journal=journal,
                ),
                lambda values: {name: number(values[name]) for name in names},
            )
            student, results, orders = compressed_copy(model, names, found, sizes, plan, report=report, journal=journal)
    except (MemoryError, RuntimeError) as error:
        raise as_memory_error(error, max(matrix_shape(dict(named_layers(model))[name]) for name in names)) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    layers = dict(named_layers(student))
    # Not on a GPU: another rank may have another one.
    values = {
        name: {key: tensor.cpu() for key, tensor in layers[name].state_dict().items()}
        for name, result in results.items()
        if result.is_changed
    }
    if not values:
        raise FiftyfoldError(f"every matrix stays dense at keep={keep}; lower it.")
    return Compression(results, values, orders.cpu(), plan.factor_bits)


def _matrices(model: nn.Module, targets: Targets, exclude: Targets) -> list[str]:
    names, layers = find_matrices(model, targets, exclude), dict(named_layers(model))
    owners: dict[int, str] = {}
    for name in names:
        if isinstance(layers[name], nn.Embedding | TensorNetworkEmbedding):
            raise FiftyfoldError(f"{name!r} is an embedding, whose inputs have no metric; exclude it, or tensorize it.")
        first = owners.setdefault(id(layers[name].weight), name)
        if first != name:
            raise FiftyfoldError(f"{name!r} and {first!r} share a weight but not their inputs; exclude both.")
        check_weight(layers[name], name)
    return names


def _replay(model: nn.Module, operation: Operation) -> None:
    install_networks(model, read_forms(operation), compute=False)


register_operation(OPERATION, _replay, forbidden_after=["quantize"])
