"""The operation "tensorize": which weights become tensor networks, and which (CompactifAI, arXiv 2401.14109)."""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypedDict, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.digest import identity_of
from fiftyfold.modules.journal import Journal, open_journal
from fiftyfold.modules.quantization.targets import Targets, named_layers
from fiftyfold.modules.structure import (
    Operation,
    apply_operation,
    check_order,
    register_operation,
    structure_log,
    values_follow,
)
from fiftyfold.modules.surgery import leave_fused_paths
from fiftyfold.modules.tensor_network.form import NetworkForm, balanced_form, low_rank_form
from fiftyfold.modules.tensor_network.layers import (
    TensorNetworkLayer,
    check_weight,
    cores_of,
    flat_numbers,
    install_network,
    matrix_shape,
)
from fiftyfold.modules.tensor_network.progress import Report, silent
from fiftyfold.modules.tensor_network.targets import find_matrices

OPERATION = "tensorize"
"""Kind of a log's entry."""

Split = Literal["even", "low_rank"]
"""Where the sites lie: even factors on both sides, or (outputs, 1) and (1, inputs), a product of two thin matrices."""

_NAMED = 3

_FOUND = contextvars.ContextVar[Mapping[int, nn.Parameter] | None]("found", default=None)
"""What :func:`tensorize` found, by the identity of the weight that it replaces, for the operation to put in place."""


class TensorizeArguments(TypedDict, total=False):
    """The arguments that say what to tensorize and how; :func:`tensorize` explains them."""

    cores: int
    bond_dimension: int
    keep: float | None
    split: Split
    targets: Targets
    exclude: Targets


def tensorize(
    model: nn.Module,
    cores: int = 3,
    bond_dimension: int = 64,
    *,
    keep: float | None = None,
    split: Split = "even",
    targets: Targets = "default",
    exclude: Targets = (),
    step: int = 0,
    optimizer: Optimizer | None = None,
    report: Report = silent,
    work_folder: str | Path | None = None,
) -> list[str]:
    """Replace weight matrices by matrix product operators, in place, from sequential singular value decompositions.

    All matrices are decomposed before the first is replaced. A layer that holds a network already is decomposed anew,
    so that bonds can shrink step by step. Biases stay, and so does their absence; tied weights stay tied.

    Args:
        model: any module.
        cores: cores of each network, at least 2.
        bond_dimension: size of the bonds between them, at least 1. Where a matrix allows less, the bond is clipped,
            with a notice, and the log holds the real size.
        keep: instead of ``bond_dimension``, the share of each matrix's numbers that its network may have, between 0
            and 1; the largest bond that keeps to it is taken.
        split: ``"even"`` cuts both sides into the most even factors, as the paper does (216 = 6 · 6 · 6), padded with
            zeros where there are none; ``"low_rank"`` gives the product of two thin matrices, and takes two cores.
        targets: ``"default"`` (the linear layers of the stacked layers), or patterns, as :func:`.find_matrices` takes.
        exclude: patterns of names to leave out.
        step: the optimizer step at which this happens, for the log.
        optimizer: the optimizer that trains the model, if there is one; the new parameters enter the groups of those
            that they replace.
        report: is called as the matrices are decomposed.
        work_folder: where each network is kept as soon as it is found, so that the same call goes on where a process
            was killed; delete it once the model is saved.

    Returns:
        The names of the layers.

    Raises:
        FiftyfoldError: if an argument is impossible, nothing is found, a weight is not finite, memory runs out, or the
            work folder holds another decomposition. The model is then unchanged.
    """
    operation = tensorize_operation(
        model,
        cores=cores,
        bond_dimension=bond_dimension,
        keep=keep,
        split=split,
        targets=targets,
        exclude=exclude,
        step=step,
    )
    layers, forms = dict(named_layers(model)), read_forms(operation)
    for name in forms:
        check_weight(layers[name], name)
    with open_journal(
        work_folder,
        lambda: [OPERATION, operation["targets"], operation["forms"], [identity_of(layers[name]) for name in forms]],
    ) as journal:
        token = _FOUND.set(_decomposed(layers, forms, report=report, journal=journal))
    try:
        apply_operation(model, operation, [] if optimizer is None else [optimizer])
    finally:
        _FOUND.reset(token)
    return list(forms)


def tensorize_operation(
    model: nn.Module,
    *,
    cores: int = 3,
    bond_dimension: int = 64,
    keep: float | None = None,
    split: Split = "even",
    targets: Targets = "default",
    exclude: Targets = (),
    step: int = 0,
) -> Operation:
    """Return the log entry that :func:`tensorize` would carry out, and change nothing.

    Raises:
        FiftyfoldError: as :func:`tensorize` does, but for what the values of weights and the memory decide.
    """
    check_order(structure_log(model), [OPERATION])
    check_arguments(cores, bond_dimension, keep, split)
    layers = dict(named_layers(model))
    forms = {
        name: _form_of_bond(matrix_shape(layers[name]), cores, bond_dimension, split)
        if keep is None
        else _form_of_share(name, matrix_shape(layers[name]), cores, keep, split)
        for name in find_matrices(model, targets, exclude)
    }
    if keep is None:
        _give_notice(forms, bond_dimension)
    return network_operation(OPERATION, forms, step)


def network_operation(kind: str, forms: Mapping[str, NetworkForm], step: int) -> Operation:
    """Return a log entry that says which layers get networks of which form; equal forms are written once."""
    used = list(dict.fromkeys(forms.values()))
    return {
        "op": kind,
        "targets": {name: used.index(form) for name, form in forms.items()},
        "forms": [form.to_json() for form in used],
        "step": step,
    }


def check_arguments(cores: int, bond_dimension: int, keep: float | None, split: str) -> None:
    """Refuse arguments that no model could make good.

    Raises:
        FiftyfoldError: naming the argument.
    """
    if type(cores) is not int or cores < 2:
        raise FiftyfoldError(f"cores must be an integer of at least 2, not {cores!r}.")
    if type(bond_dimension) is not int or bond_dimension < 1:
        raise FiftyfoldError(f"bond_dimension must be an integer of at least 1, not {bond_dimension!r}.")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep < 1):
        raise FiftyfoldError(f"keep must be a share between 0 and 1, not {keep!r}.")
    if split not in get_args(Split):
        raise FiftyfoldError(f"split must be one of {', '.join(get_args(Split))}, not {split!r}.")
    if split == "low_rank" and cores != 2:
        raise FiftyfoldError(f"split 'low_rank' is a product of two matrices: it takes cores=2, not {cores}.")


def largest_form(shape: tuple[int, int], cores: int, split: Split, numbers: float) -> NetworkForm | None:
    """Return the form with the largest bond that has at most so many numbers; nothing if a bond of 1 has more."""
    lowest, beyond = 0, min(shape) ** 2 + 1
    while beyond - lowest > 1:
        middle = (lowest + beyond) // 2
        form = _form_of_bond(shape, cores, middle, split)
        if form.count <= numbers and max(form.terms[0].bonds) == middle:
            lowest = middle
        else:
            beyond = middle
    return _form_of_bond(shape, cores, lowest, split) if lowest else None


def install_networks(
    model: nn.Module,
    forms: Mapping[str, NetworkForm],
    *,
    compute: bool = True,
    found: Mapping[int, nn.Parameter] | None = None,
) -> None:
    """Put networks into layers of ``model``, those that shared a weight into one parameter again.

    Args:
        model: on any device, the meta device included.
        forms: what each layer gets, by name.
        compute: whether to decompose the weights; otherwise their numbers are to be loaded.
        found: the numbers of all networks, where they are known, by the identity of the weight that they replace.

    Raises:
        FiftyfoldError: if a layer is absent or does not fit; the model is then unchanged.
    """
    layers = dict(named_layers(model))
    for name, form in forms.items():
        _check_layer(model, layers.get(name), name, form)
    weights = found if found is not None else _decomposed(layers, forms) if compute else {}
    shared: dict[int, nn.Parameter] = {}
    for name, form in forms.items():
        old = layers[name].weight
        install_network(layers[name], form, shared.get(id(old), weights.get(id(old))))
        new = layers[name].weight
        assert isinstance(new, nn.Parameter)
        shared[id(old)] = new
    leave_fused_paths(model, TensorNetworkLayer)


def read_forms(operation: Operation) -> dict[str, NetworkForm]:
    """Return the forms by layer that :func:`network_operation` wrote.

    Raises:
        FiftyfoldError: if they cannot be read.
    """
    try:
        forms = [NetworkForm.from_json(values) for values in operation["forms"]]
        return {str(name): forms[index] for name, index in operation["targets"].items()}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FiftyfoldError(f"the log's entry {operation.get('op')!r} cannot be read; the file is corrupt.") from error


def _form_of_share(name: str, shape: tuple[int, int], cores: int, keep: float, split: Split) -> NetworkForm:
    form = largest_form(shape, cores, split, keep * shape[0] * shape[1])
    if form is None:
        smallest = _form_of_bond(shape, cores, 1, split).count / (shape[0] * shape[1])
        raise FiftyfoldError(
            f"{name}: no network of {cores} cores has so few numbers as keep={keep} asks for; the smallest has "
            f"{smallest:.3g} of the matrix. Raise keep, or leave the layer out with exclude."
        )
    return form


def _form_of_bond(shape: tuple[int, int], cores: int, bond_dimension: int, split: Split) -> NetworkForm:
    if split == "low_rank":
        return low_rank_form(shape, bond_dimension)
    return balanced_form(shape, cores, bond_dimension)


def _give_notice(forms: Mapping[str, NetworkForm], bond_dimension: int) -> None:
    clipped = [name for name, form in forms.items() if max(form.terms[0].bonds) < bond_dimension]
    if clipped:
        bonds = forms[clipped[0]].terms[0].bonds
        warnings.warn(
            f"a bond dimension of {bond_dimension} is more than {len(clipped)} of {len(forms)} matrices allow; "
            f"{clipped[0]!r}, for one, gets {bonds}.",
            stacklevel=3,
        )
    larger = [name for name, form in forms.items() if form.count >= form.shape[0] * form.shape[1]]
    if larger:
        names = ", ".join(larger[:_NAMED])
        warnings.warn(
            f"{len(larger)} networks have as many numbers as their matrices, or more ({names}); "
            "a smaller bond_dimension makes them smaller.",
            stacklevel=3,
        )


def _check_layer(model: nn.Module, layer: nn.Module | None, name: str, form: NetworkForm) -> None:
    if layer is None or not hasattr(layer, "weight"):
        raise FiftyfoldError(f"the log tensorizes {name!r}, which {type(model).__name__} does not have.")
    if matrix_shape(layer) != form.shape:
        raise FiftyfoldError(f"the log's {name!r} is a matrix {form.shape}; the model's is {matrix_shape(layer)}.")


def _decomposed(
    layers: Mapping[str, nn.Module],
    forms: Mapping[str, NetworkForm],
    *,
    report: Report = silent,
    journal: Journal | None = None,
) -> dict[int, nn.Parameter]:
    """Return the numbers of all networks by the identity of the weight that they replace."""
    weights: dict[int, nn.Parameter] = {}
    for done, (name, form) in enumerate(forms.items(), 1):
        old = layers[name].weight
        assert isinstance(old, torch.Tensor)
        if not (id(old) in weights or old.is_meta):
            numbers = _numbers(layers[name], name, form, journal or Journal())
            weights[id(old)] = nn.Parameter(numbers.to(old.device, old.dtype), requires_grad=old.requires_grad)
        report("decomposed", done, len(forms))
    return weights


def _checked(tensors: Mapping[str, torch.Tensor], form: NetworkForm) -> torch.Tensor:
    if set(tensors) != {"numbers"} or tensors["numbers"].shape != (form.count,):
        raise ValueError("its tensors are not those of the network")
    return tensors["numbers"]


def _numbers(layer: nn.Module, name: str, form: NetworkForm, journal: Journal) -> torch.Tensor:
    key = f"network {name}"
    if key in journal:
        tensors = journal.tensors(key)
        return journal.read(key, lambda _: _checked(tensors, form))
    try:
        numbers = flat_numbers(cores_of(layer, form))
    except FiftyfoldError as error:
        raise FiftyfoldError(f"{name}: {error}") from error
    journal.add(key, None, {"numbers": numbers})
    return numbers


def _replay(model: nn.Module, operation: Operation) -> None:
    install_networks(model, read_forms(operation), compute=not values_follow(), found=_FOUND.get())


register_operation(OPERATION, _replay, forbidden_after=["quantize"])
