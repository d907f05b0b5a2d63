"""Strategies that shard the model: the same training as on one device, and a resume that loses nothing.

Lightning lets FSDP run on GPUs only; what it does there is done here on CPUs, by the subclass below and by
``fully_shard`` in ``configure_model``. Gloo carries what NCCL would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelPruning
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fiftyfold.callbacks import LayerPruning, LayerReduction, QuantizationAwareTraining, TensorNetworkDecomposition
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import reduce_layers, tensorize
from fiftyfold.modules.checkpoint import checkpoint_structure
from fiftyfold.modules.quantization.layers import quantized_layers
from fiftyfold.modules.quantization.ranges import ranges
from fiftyfold.modules.structure import STATE_KEY, structure_log
from tests.ranks import RANKS, run_on_ranks
from tests.strangers import OddUser, SplitUser, _Net, _Residual, assert_same_tensors, make_trainer


class CPUFSDP(FSDPStrategy):
    """FSDP as Lightning sets it up, with the device named, and without the offloading that copies nothing on a CPU."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )

    def _whole(self):
        return FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=False, rank0_only=False),
            FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with self._whole():
            return {name: value.clone() for name, value in self.model.state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        with self._whole():
            inner = getattr(optimizer, "optimizer", optimizer)
            state = copy.deepcopy(FullyShardedDataParallel.optim_state_dict(self.model, inner))
        return FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model)


class Sharding(SplitUser):
    """Shards itself, its layers each by itself, as ModelParallelStrategy asks for it."""

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            # One layer's own Linear is sharded by itself, which changes the Linear's class.
            fully_shard(self.net.layers[-1].up, mesh=mesh)
            for layer in self.net.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class LateSharding(Sharding):
    """Has no layers before it shards them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = _Net(8)
        super().configure_model()


class _Weights(Callback):
    """Keeps the whole weights after the last step."""

    def on_train_end(self, trainer, pl_module):
        whole = trainer.strategy.lightning_module_state_dict()
        self.state = {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
            for name, value in whole.items()
        }


def model_parallel(**options: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1, **options)


STRATEGIES: dict[str, tuple[type[SplitUser], Callable[[], Any]]] = {
    "fsdp": (SplitUser, lambda: CPUFSDP(auto_wrap_policy={_Residual})),
    "fsdp, flat": (SplitUser, lambda: CPUFSDP(sharding_strategy="SHARD_GRAD_OP")),
    "model parallel": (Sharding, model_parallel),
    "model parallel, built late, one file": (LateSharding, lambda: model_parallel(save_distributed_checkpoint=False)),
}

QUANTIZERS: Callable[[], list[Callback]] = lambda: [  # noqa: E731
    QuantizationAwareTraining({2: 4, 5: 1}, exclude=r"\.up$"),
    QuantizationAwareTraining(2, targets=r"\.up$", activation_range="static", start=3),
]


def everything() -> list[Callback]:
    return [LayerReduction(keep=3), TensorNetworkDecomposition(2, 4, targets=r"\.down$"), *QUANTIZERS()]


def fit(
    module: SplitUser, callbacks: list[Callback], strategy: Any = "auto", folder: Path | None = None, **options: Any
):
    weights = _Weights()
    path = options.pop("ckpt_path", None)
    known = options.pop("known", None)
    devices = RANKS if strategy != "auto" else 1
    trainer = make_trainer([*callbacks, weights], folder, strategy=strategy, devices=devices, every=2, **options)
    if known is not None:
        trainer.ckpt_path = known
    trainer.fit(module, ckpt_path=path)
    return trainer, weights.state


def single_device(
    callbacks: list[Callback], *, reduced: bool, decomposed: bool = False, **options: Any
) -> dict[str, torch.Tensor]:
    """The same on one device; shapes change before the optimizer is made, as they do where the model is sharded."""
    module = SplitUser()
    if reduced:
        reduce_layers(module, keep=3)
    if decomposed:
        tensorize(module, 2, 4, targets=r"\.down$")
    return fit(module, callbacks, **options)[1]


def assert_close(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert {name for name in state if not name.endswith(STATE_KEY)} == set(expected) - {STATE_KEY}
    for name, value in expected.items():
        # Each rank uses the range that it has itself seen until the batch ends.
        if name != STATE_KEY and "activation" not in name:
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_and_resume(name, tmp_path):
    """One run of the whole and several resumed ones, in one pair of processes."""
    module_class, strategy = STRATEGIES[name]
    late = module_class is LateSharding
    callbacks = QUANTIZERS if late else everything

    def body():
        module = module_class()
        trainer, state = fit(module, callbacks(), strategy(), tmp_path)
        log = structure_log(module)
        assert len(list(quantized_layers(module))) == len(log[-1]["targets"]) + len(log[-2]["targets"])
        for step in (2, 4, 6):
            path = tmp_path / f"step={step}.ckpt"
            again, resumed = fit(module_class(seed=1), callbacks(), strategy(), ckpt_path=path)
            assert_same_tensors(state, resumed, f"{name}, resumed from step {step}")
            assert_same_optimizers(trainer, again)
        assert module.configure_model.__func__ is module_class.configure_model
        return state, log, ranges(module, "activation_high")

    results = run_on_ranks(body)
    expected = single_device(QUANTIZERS(), reduced=not late, decomposed=not late)
    for rank, (state, log, _) in enumerate(results):
        assert [entry["op"] for entry in log] == ["reduce_layers", "tensorize"] * (not late) + ["quantize"] * 3
        # One file is written by one rank, which alone puts the weights together.
        if rank == 0 or not name.startswith("model parallel,"):
            assert_close(state, expected)
    assert results[0][2] == results[1][2], "the ranks observed one range"


def assert_same_optimizers(first: Any, second: Any) -> None:
    for one, other in zip(first.optimizers, second.optimizers, strict=True):
        states = [
            [value for parameter in groups for value in optimizer.state.get(parameter, {}).values()]
            for optimizer in (one, other)
            for groups in [[p for group in optimizer.param_groups for p in group["params"]]]
        ]
        assert len(states[0]) == len(states[1]) > 0
        for value, same in zip(*states, strict=True):
            local, same_local = (getattr(v, "_local_tensor", v) for v in (value, same))
            assert torch.equal(local, same_local)


@pytest.mark.parametrize("name", ["fsdp", "model parallel"])
def test_a_checkpoint_of_another_structure(name, tmp_path):
    """Which file ``fit(ckpt_path=...)`` is given becomes known too late; ``trainer.ckpt_path`` is known in time."""
    module_class, strategy = STRATEGIES[name]

    def body():
        _, state = fit(module_class(), everything(), strategy(), tmp_path)
        path = tmp_path / "step=4.ckpt"
        assert checkpoint_structure(path)[""][0]["layers"] == [1, 3, 5]
        _, resumed = fit(module_class(seed=1), QUANTIZERS(), strategy(), known=path)
        assert_same_tensors(state, resumed, "resumed")
        with pytest.raises(FiftyfoldError, match=r"set trainer\.ckpt_path"):
            fit(module_class(seed=1), QUANTIZERS(), strategy(), ckpt_path=path)

    run_on_ranks(body)


@pytest.mark.parametrize("name", ["fsdp", "model parallel"])
def test_mixed_precision_and_accumulated_gradients(name):
    module_class, strategy = STRATEGIES[name]
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2}

    def body():
        return fit(
            module_class(), [LayerReduction(keep=3), QuantizationAwareTraining(4, start=2)], strategy(), **options
        )[1]

    expected = single_device([QuantizationAwareTraining(4, start=2)], reduced=True, **options)
    for state in run_on_ranks(body):
        for key, value in expected.items():
            if key != STATE_KEY:
                # bfloat16 keeps 8 bits; Adam's first steps are of one size, whatever the gradient.
                torch.testing.assert_close(state[key], value, rtol=0.1, atol=0.05, msg=key)


def test_what_cannot_be_done_is_refused():
    strategy = FSDPStrategy.__new__(FSDPStrategy)

    def refuse(callbacks, message):
        trainer = SimpleNamespace(strategy=strategy, callbacks=callbacks)
        with pytest.raises(FiftyfoldError, match=message):
            callbacks[0].setup(trainer, OddUser(), "fit")

    refuse([LayerReduction(start=3)], "let it happen at step 0")
    refuse([LayerPruning({2: 1})], "let it happen at step 0")
    refuse([QuantizationAwareTraining(), EMAWeightAveraging()], "EMAWeightAveraging cannot average")
    refuse([QuantizationAwareTraining(), ModelPruning("l1_unstructured")], "in a run of its own")


def test_layers_that_are_built_and_sharded_at_once_cannot_be_dropped():
    def body():
        module = LateSharding()
        with pytest.raises(FiftyfoldError, match="build them in __init__"):
            fit(module, [LayerReduction(keep=3)], model_parallel())
        # The failed run leaves nothing behind.
        fit(LateSharding(), [QuantizationAwareTraining(start=2)], model_parallel())

    run_on_ranks(body)


def test_tensor_parallelism_is_refused():
    class Split(Sharding):
        def configure_model(self):
            parallelize_module(self.net.head, self.device_mesh["tensor_parallel"], ColwiseParallel())

    def body():
        with pytest.raises(FiftyfoldError, match="tensor_parallel_size=1"):
            fit(Split(), [QuantizationAwareTraining()], ModelParallelStrategy())

    run_on_ranks(body)


def test_a_module_that_does_not_shard_itself_is_lightnings_to_refuse():
    def body():
        with pytest.raises(TypeError, match="configure_model"):
            fit(SplitUser(), [QuantizationAwareTraining()], model_parallel())

    run_on_ranks(body)
