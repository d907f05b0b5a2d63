"""The order of hidden channels, which costs no byte.

Between the two matrices of an MLP, and within a head between the value and the output projection, channels may change
places: the rows of what writes them and the columns of what reads them move together, and no output changes. A product
of two thin matrices does not care for their order. A chain of cores cuts them into runs, and comes nearer to a matrix
whose strong channels stand together.

Which layers belong together is not read off their names. Layers that are called one after another and whose shapes fit
are tried: their channels change places in a forward pass, and the model must not notice.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from fiftyfold.modules.quantization.targets import named_layers
from fiftyfold.modules.tensor_network.budget import memory_groups
from fiftyfold.modules.tensor_network.layers import matrix_shape
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.moments import Batch, Moments, call, call_stages, collect_moments, listening
from fiftyfold.modules.tensor_network.objective import least_squares
from fiftyfold.modules.tensor_network.progress import Report, silent
from fiftyfold.modules.tensor_network.sensitivity import outputs_of

_PLAIN = (nn.Linear, Conv1D)
_SMALLEST_HEAD = 4
_ROWS = 4
_SMALLEST_GAIN = 1e-3
_TOLERANCE = 1e-5
_PARTS = ("rows", "columns")


@dataclass(frozen=True)
class ChannelGroup:
    """Layers between which channels may change places.

    Attributes:
        writers: whose outputs the channels are; all move alike, as in a gated MLP.
        reader: whose inputs they are.
        head: size of the runs within which they may change places; all channels for an MLP.
        repeats: how many runs of the reader's inputs, one after another, come from one run of the writers' outputs: the
            query heads to a key-value head.
    """

    writers: tuple[str, ...]
    reader: str
    head: int
    repeats: int

    def at_reader(self, order: torch.Tensor) -> torch.Tensor:
        """Return the order of the reader's inputs, (inputs,), for one of the writers' outputs, (outputs,)."""
        inner = (order.view(-1, self.head) % self.head).repeat_interleave(self.repeats, dim=0)
        starts = torch.arange(len(inner), device=order.device) * self.head
        return (inner + starts.unsqueeze(1)).flatten()


@dataclass(frozen=True)
class ChannelOrders:
    """Which old channel stands at each place.

    Attributes:
        rows: of outputs, by the layer's name.
        columns: of inputs, likewise.
    """

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def inverse(self) -> ChannelOrders:
        """Return the orders that undo these."""
        return ChannelOrders(*({name: each.argsort() for name, each in part.items()} for part in self._parts()))

    def to_json(self) -> dict[str, dict[str, list[int]]]:
        """Return JSON values."""
        rows, columns = ({name: each.tolist() for name, each in part.items()} for part in self._parts())
        return {"rows": rows, "columns": columns}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, list[int]]], model: nn.Module) -> ChannelOrders:
        """Read what :meth:`to_json` wrote, perhaps altered since.

        Args:
            values: that were read.
            model: whose channels they are.

        Raises:
            KeyError: if the model has no such layer.
            ValueError: if the numbers of a layer are not those of its channels in some order.
        """
        layers, parts = dict(named_layers(model)), list[dict[str, torch.Tensor]]()
        for side, key in enumerate(_PARTS):
            for name, order in values[key].items():
                if sorted(order) != list(range(matrix_shape(layers[name])[side])):
                    raise ValueError(f"{name} has no order of its channels")
            device = next(model.parameters()).device
            parts.append({name: torch.tensor(order, device=device) for name, order in values[key].items()})
        return cls(*parts)

    def cpu(self) -> ChannelOrders:
        """Return the same on the CPU."""
        return ChannelOrders(*({name: each.cpu() for name, each in part.items()} for part in self._parts()))

    def _parts(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return self.rows, self.columns


Judge = Callable[[str, torch.Tensor, Metric], float]
"""Tells how far from a layer's matrix, in a metric of its inputs, what is to stand for it would be; a squared share."""


@torch.no_grad()
def sort_channels(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    judge: Judge,
    *,
    report: Report = silent,
) -> ChannelOrders:
    """Sort hidden channels by the strength with which they reach the next layer's outputs, where it pays, in place.

    Args:
        model: in evaluation mode; it computes what it did before.
        names: of the layers that may be touched; a group of which one is missing stays as it is.
        batches: calibration text.
        judge: a group is sorted if that brings its matrices nearer, taken together.
        report: is told of each matrix that was judged in both orders.

    Returns:
        What was moved; nothing where no group is found, or if the outputs changed and all was put back.
    """
    probe = _probe(batches)
    groups = [] if probe is None else find_channel_groups(model, names, probe)
    if probe is None or not groups:
        return ChannelOrders()
    orders = ChannelOrders()
    for group, order in _paying_orders(model, groups, batches, judge, report):
        orders.rows.update(dict.fromkeys(group.writers, order))
        orders.columns[group.reader] = group.at_reader(order)
    before = outputs_of(model, probe).values
    permute_channels(model, orders)
    if not near(outputs_of(model, probe).values, before, 16):
        permute_channels(model, orders.inverse())
        return ChannelOrders()
    return orders


def _paying_orders(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Batch], judge: Judge, report: Report
) -> Iterator[tuple[ChannelGroup, torch.Tensor]]:
    layers = dict(named_layers(model))
    by_reader = {group.reader: group for group in groups}
    by_writer = {name: group for group in groups for name in group.writers}
    orders: dict[str, torch.Tensor] = {}
    number, total = itertools.count(1), len(by_reader) + len(by_writer)
    natural, moved = dict.fromkeys(by_reader, 0.0), dict.fromkeys(by_reader, 0.0)
    for name, moments in _moments(model, list(by_reader), batches):
        matrix, metric = least_squares(layers[name], moments)
        strengths = matrix.square().sum(0) * moments.inputs.diagonal()
        orders[name] = _falling(strengths, by_reader[name])
        columns = by_reader[name].at_reader(orders[name])
        natural[name] += judge(name, matrix, metric)
        moved_metric = Metric(moments.reordered(columns, both=True).inputs.to(matrix.dtype))
        moved[name] += judge(name, matrix[:, columns], moved_metric)
        report("ordered", next(number), total)
    for name, moments in _moments(model, list(by_writer), batches):
        matrix, metric = least_squares(layers[name], moments)
        reader = by_writer[name].reader
        natural[reader] += judge(name, matrix, metric)
        moved[reader] += judge(name, matrix[orders[reader]], metric)
        report("ordered", next(number), total)
    for group in groups:
        if moved[group.reader] < natural[group.reader] * (1 - _SMALLEST_GAIN):
            yield group, orders[group.reader]


def _moments(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> Iterator[tuple[str, Moments]]:
    for part in memory_groups(dict(named_layers(model)), names):
        yield from collect_moments(model, part, batches).items()


@torch.no_grad()
def permute_channels(model: nn.Module, orders: ChannelOrders) -> None:
    """Move rows with their biases, and columns, in place."""
    layers = dict(named_layers(model))
    for parts, rows in ((orders.rows, True), (orders.columns, False)):
        for name, order in parts.items():
            layer = layers[name]
            assert isinstance(layer.weight, torch.Tensor)
            moved = layer.weight.index_select(int(rows == isinstance(layer, Conv1D)), order)
            layer.weight.copy_(moved)
            if rows and isinstance(layer.bias, torch.Tensor):
                layer.bias.copy_(layer.bias[order])


@torch.no_grad()
def permute_bias_state(model: nn.Module, orders: ChannelOrders, optimizers: Sequence[Optimizer]) -> None:
    """Let what optimizers keep of biases follow them: momenta that belong to single numbers."""
    layers = dict(named_layers(model))
    for name, order in orders.rows.items():
        bias = getattr(layers[name], "bias", None)
        if not isinstance(bias, torch.Tensor):
            continue
        for optimizer in optimizers:
            for value in optimizer.state.get(bias, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == bias.shape:
                    value.copy_(value[order.to(value.device)])


@torch.no_grad()
def find_channel_groups(model: nn.Module, names: Sequence[str], batch: Batch) -> list[ChannelGroup]:
    """Find the layers between which channels may change places, by trying.

    Tried are plain linear layers that nothing else shares: each that reads a tensor alone, with those that were called
    just before it. What is found at one place is tried once at the same place of other blocks, and nothing else there.

    Args:
        model: in evaluation mode; unchanged afterwards.
        names: of the layers to choose among.
        batch: what the model is called with.
    """
    layers = dict(named_layers(model))
    stages = call_stages(model, _eligible(model, names), batch)
    calls = Counter(itertools.chain.from_iterable(stages))
    trial, known, found = _Trial(model, batch), dict[Any, _Pattern | None](), list[ChannelGroup]()
    for stage, following in itertools.pairwise(stages):
        reader, writers = following[0], stage[::-1]
        if len(following) > 1 or any(calls[name] > 1 for name in (reader, *writers)):
            continue
        place = tuple((re.sub(r"\d+", "#", name), matrix_shape(layers[name])) for name in (*writers, reader))
        holds = functools.partial(trial.holds, writers, reader)
        pattern = known.get(place)
        if place not in known:
            rows = [matrix_shape(layers[name])[0] for name in writers]
            pattern = _search(rows, matrix_shape(layers[reader])[1], holds)
        elif pattern is not None and not holds(pattern):
            pattern = None
        known[place] = pattern
        if pattern is not None:
            found.append(pattern.group(writers, reader))
    return found


@dataclass(frozen=True)
class _Pattern:
    """What groups at the same place of different blocks have in common."""

    chosen: tuple[int, ...]
    head: int
    repeats: int

    def group(self, writers: Sequence[str], reader: str) -> ChannelGroup:
        return ChannelGroup(tuple(writers[index] for index in self.chosen), reader, self.head, self.repeats)


class _NoticedError(Exception):
    """Ends a forward pass that has told what was asked."""


class _Trial:
    """Forward passes in which channels change places between layers, by hooks alone."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self._model, self._batch = model, batch
        self._layers = dict(named_layers(model))
        self._before = outputs_of(model, batch).values
        self._known: tuple[str, torch.Tensor] | None = None

    def holds(self, writers: Sequence[str], reader: str, pattern: _Pattern) -> bool:
        """Tell whether the reader gets what it did, in another order, and the model's outputs stay the same."""
        group, inputs = pattern.group(writers, reader), self._inputs(reader)
        order = _shuffled(inputs.shape[-1] // pattern.repeats, pattern.head).to(inputs.device)
        places = group.at_reader(order)

        def put_back(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            if not near(arguments[0], inputs[..., places]):
                raise _NoticedError
            return (arguments[0][..., places.argsort()], *arguments[1:])

        with contextlib.ExitStack() as hooks, contextlib.suppress(_NoticedError):
            for name in group.writers:
                handle = self._layers[name].register_forward_hook(lambda _, __, output: output[..., order])
                hooks.callback(handle.remove)
            hooks.callback(self._layers[reader].register_forward_pre_hook(put_back).remove)
            return near(outputs_of(self._model, self._batch).values, self._before)
        return False

    def _inputs(self, reader: str) -> torch.Tensor:
        if self._known is None or self._known[0] != reader:

            def keep(name: str, x: torch.Tensor) -> None:
                self._known = name, x
                raise _NoticedError

            with listening(self._model, [reader], keep), contextlib.suppress(_NoticedError):
                call(self._model, self._batch)
        assert self._known is not None
        return self._known[1]


def near(found: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> bool:
    """Tell whether two tensors differ by rounding alone; one of nothing but zeros is near to none."""
    tolerance = factor * max(_TOLERANCE, 4 * torch.finfo(expected.dtype).eps)
    size = float(expected.float().norm())
    return size > 0 and float((found.float() - expected.float()).norm()) <= tolerance * size


def _shuffled(channels: int, head: int) -> torch.Tensor:
    """Return a random order within each head, another one in each; always the same one, and never the one there is."""
    places = torch.arange(channels).view(-1, head)
    keys = torch.rand(places.shape, generator=torch.Generator().manual_seed(0))
    order = places.gather(1, keys.argsort(1))
    return (places.flip(1) if torch.equal(order, places) else order).flatten()


def _search(rows: Sequence[int], inputs: int, holds: Callable[[_Pattern], bool]) -> _Pattern | None:
    """Return the smallest choice of writers, in the largest heads, whose channels may change places."""
    for size in range(1, len(rows) + 1):
        for chosen in itertools.combinations(range(len(rows)), size):
            channels = rows[chosen[0]]
            if inputs % channels or any(rows[index] != channels for index in chosen):
                continue
            patterns = {
                head: _Pattern(chosen, head, inputs // channels)
                for head in range(channels, 1, -1)
                if channels % head == 0
            }
            # What holds within a head holds within every part of it: primes first, for most choices fail there.
            primes = [head for head in patterns if all(head % factor for factor in range(2, head))]
            wrong = [prime for prime in primes if not holds(patterns[prime])]
            for head, pattern in patterns.items():
                allowed = head >= _SMALLEST_HEAD and all(head % prime for prime in wrong)
                if allowed and (head in primes or holds(pattern)):
                    return pattern
    return None


def _eligible(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the plain linear layers whose parameters are theirs alone, and which nothing listens to or replaces."""
    layers = dict(named_layers(model))
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))

    def is_plain(layer: nn.Module) -> bool:
        watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        return type(layer) in _PLAIN and not watched and all(owners[id(each)] == 1 for each in layer.parameters())

    return [name for name in names if is_plain(layers[name])]


def _probe(batches: Sequence[Batch]) -> Batch | None:
    """Return a few rows with several tokens each; nothing if there are none, for a lone token tells no heads apart."""
    longest = max(batches, key=_width)
    if isinstance(longest, torch.Tensor):
        return longest[:_ROWS] if longest.is_floating_point() or _width(longest) > 1 else None
    mask, rows = longest.get("attention_mask"), len(next(iter(longest.values())))
    if _width(longest) < 2:
        return None
    if not all(isinstance(value, torch.Tensor) and value.dim() and len(value) == rows for value in longest.values()):
        return longest
    real = mask.sum(1) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else torch.ones(rows)
    fullest = real.argsort(descending=True, stable=True)[:_ROWS]
    return {name: value[fullest.to(value.device)] for name, value in longest.items()}


def _width(batch: Batch) -> int:
    """Return how many tokens the fullest row of a batch has."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and len(mask):
        return int(mask.sum(1).max())
    tensor = batch if isinstance(batch, torch.Tensor) else next(iter(batch.values()), None)
    return tensor.shape[1] if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and len(tensor) else 0


def _falling(strengths: torch.Tensor, group: ChannelGroup) -> torch.Tensor:
    """Return the order of the writers' outputs, the strongest of each head first."""
    heads = strengths.view(-1, group.repeats, group.head).sum(1)
    starts = torch.arange(len(heads), device=heads.device).unsqueeze(1) * group.head
    return (heads.argsort(dim=1, descending=True, stable=True) + starts).flatten()
