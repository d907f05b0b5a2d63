"""Compiled modules on several ranks: a graph made before an operation, or after it, trains as the plain module does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch._dynamo.utils import counters

from fiftyfold.callbacks import LayerReduction, QuantizationAwareTraining
from fiftyfold.kernels.path import use_path
from fiftyfold.modules.structure import structure_log
from tests.callbacks.test_sharding import Sharding, _Weights, model_parallel
from tests.cases import CASES
from tests.ranks import RANKS, run_on_ranks
from tests.strangers import SplitUser, make_trainer

pytestmark = pytest.mark.slow

FORWARD, BOTH = "eager", "aot_eager"
"""Backends that trace the forward pass, or the backward pass too, as the default one does, and generate no code."""


class CompiledInPlace(SplitUser):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        for layer in self.net.layers:
            layer.compile(backend=BOTH)


class ShardedAndCompiled(Sharding):
    def configure_model(self) -> None:
        super().configure_model()
        for layer in self.net.layers:
            layer.compile(backend=FORWARD)


class CompileAt(Callback):
    """Compiles the network in mid-training, after what is due at that step has happened."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            pl_module.net.compile(backend=FORWARD)


def whole() -> Any:
    return torch.compile(SplitUser(), backend=FORWARD)


def fit(
    module: Any, callbacks: list[Callback], folder: Path | None = None, path: Path | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    """Return the weights after training, under the names of the module that is not compiled."""
    torch._dynamo.reset()
    counters.clear()
    weights = _Weights()
    with use_path("reference"):  # what a compiler sees through
        make_trainer([*callbacks, weights], folder, devices=RANKS, **options).fit(module, ckpt_path=path)
    return weights.state


def compiled(module: Any, callbacks: list[Callback], *places: Path | None, **options: Any) -> dict[str, torch.Tensor]:
    state = fit(module, callbacks, *places, **options)
    assert counters["stats"]["unique_graphs"] > 0
    return state


def assert_close(states: list[dict[str, torch.Tensor]]) -> None:
    plain, *others = states
    for state in others:
        assert list(state) == list(plain)
        for name, value in plain.items():
            if value.is_floating_point():
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)


def two_operations() -> list[Callback]:
    return [LayerReduction(keep=2), QuantizationAwareTraining(weight_bits=2, start=3)]


# A network is traced anew after each operation, a layer for itself in a fraction of that time.
WAYS: dict[str, tuple[Callable[[], Any], Callable[[], list[Callback]]]] = {
    "the module as a whole": (whole, two_operations),
    "its layers in place": (CompiledInPlace, CASES[-1].callbacks),
    "its network, after the operations": (SplitUser, lambda: [*two_operations(), CompileAt(5)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_ddp(way, tmp_path):
    """Layers are dropped, decomposed and quantized, which wraps the module anew; a resume begins in the middle."""
    make, callbacks = WAYS[way]

    def body():
        plain = fit(SplitUser(), callbacks()[:2] if "after" in way else callbacks(), strategy="ddp")
        module = make()
        states = [plain, compiled(module, callbacks(), tmp_path, strategy="ddp")]
        log = [entry["op"] for entry in structure_log(getattr(module, "_orig_mod", module))]
        assert log == [name for name, _ in CASES[-1].operations] if make is CompiledInPlace else len(log) == 2
        if make is CompiledInPlace:
            states.append(compiled(make(), callbacks(), None, tmp_path / "step=4.ckpt", strategy="ddp"))
        return states

    first, second = run_on_ranks(body)
    assert_close(first)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items()), "the ranks differ"


def test_fully_sharded_layers():
    """Lightning refuses to compile the whole of a module that shards itself; its parts can be."""

    def callbacks() -> list[Callback]:
        return [LayerReduction(keep=2), QuantizationAwareTraining(1, start=3, targets=r"\.(up|down)$")]

    def body():
        plain = fit(Sharding(), callbacks(), strategy=model_parallel())
        state = compiled(ShardedAndCompiled(), callbacks(), strategy=model_parallel())
        return [plain, state]

    for states in run_on_ranks(body):
        assert_close(states)


def test_a_whole_module_that_shards_itself_is_refused():
    def body():
        module = torch.compile(Sharding(), backend=FORWARD)
        with pytest.raises(RuntimeError, match="compiled model is incompatible"):
            fit(module, [QuantizationAwareTraining(start=2)], strategy=model_parallel())

    run_on_ranks(body)
