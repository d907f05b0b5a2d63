"""Strategies that shard the model (FSDP, ModelParallel, DeepSpeed): what changes it must happen before that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.checkpoint import checkpoint_structure
from fiftyfold.modules.structure import (
    attach_structure,
    keeps_parameters,
    loading_values,
    logs_by_part,
    replay,
)

_MARK = "_fiftyfold_original"


def shards(strategy: Strategy) -> bool:
    """Tell whether a strategy distributes the parameters over the ranks."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)


def holds_shards(module: nn.Module) -> bool:
    """Tell whether some parameter of ``module`` is distributed over the ranks already."""
    wrapped = any(isinstance(part, FullyShardedDataParallel) for part in module.modules())
    return wrapped or any(isinstance(parameter, DTensor) for parameter in module.parameters())


def before_sharding(trainer: Trainer, module: LightningModule, prepare: Callable[[], None]) -> None:
    """Call ``prepare`` in ``configure_model``, the last moment before a strategy shards ``module``.

    A module that shards itself there (ModelParallel) is prepared before its own ``configure_model`` if it has its
    layers by then, and afterwards what is missing.
    """
    itself = isinstance(trainer.strategy, ModelParallelStrategy)
    # Lightning refuses a module that does not shard itself; a wrapper would hide that from it.
    if itself and not is_overridden("configure_model", module):
        return
    original = module.configure_model

    def configure_model() -> None:
        if itself and any(True for _ in module.parameters()) and not holds_shards(module):
            prepare()
        original()
        _refuse_tensor_parallel(module)
        prepare()

    setattr(configure_model, _MARK, original)
    module.configure_model = configure_model


def check_before_loading(trainer: Trainer, module: LightningModule) -> None:
    """Let the strategy load a checkpoint only into the structure that it was saved with.

    Which file ``fit(ckpt_path=...)`` was given is known only when the strategy loads it. What a log says of quantizers
    can still be done then, and no more.
    """
    strategy = trainer.strategy
    original = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        path = strategy.broadcast(checkpoint_path)
        saved, have = checkpoint_structure(path), logs_by_part(module)
        missing = [entry for part, log in saved.items() for entry in log[len(have.get(part, [])) :]]
        if any(not keeps_parameters(entry["op"]) for entry in missing):
            raise FiftyfoldError(
                f"the checkpoint {path} has another structure than the model, which {type(strategy).__name__} has "
                "sharded already; set trainer.ckpt_path to it and call fit, validate or test without ckpt_path."
            )
        replay_checkpoint(path, module)
        return original(checkpoint_path, *args, **kwargs)

    setattr(load_checkpoint, _MARK, original)
    strategy.load_checkpoint = load_checkpoint


def after_sharding(trainer: Trainer, module: LightningModule) -> None:
    """Give ``module`` and the strategy their own methods back."""
    for holder, name in ((module, "configure_model"), (trainer.strategy, "load_checkpoint")):
        if hasattr(getattr(holder, name), _MARK):
            vars(holder).pop(name)


def replay_checkpoint(path: str | Path, module: LightningModule) -> None:
    """Bring ``module`` into the structure that a checkpoint was saved with.

    Raises:
        FiftyfoldError: if the structure cannot be read, or does not fit the module.
    """
    for part, log in checkpoint_structure(path).items():
        root = module.get_submodule(part)
        attach_structure(root)
        with loading_values():
            replay(root, log)


def share_new_parameters(root: nn.Module, known: set[int], trainer: Trainer) -> None:
    """Give every rank the first rank's values of the parameters that an operation made.

    Ranks on unlike hardware may compute other values, and a sharded model is put together from all ranks' parts.

    Args:
        root: what was changed, not yet sharded.
        known: ids of the parameters that it had before.
        trainer: its strategy joins the ranks.
    """
    for parameter in root.parameters():
        if id(parameter) not in known and not parameter.is_meta and trainer.world_size > 1:
            parameter.data.copy_(trainer.strategy.broadcast(parameter.detach()))


def _refuse_tensor_parallel(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor) and "tensor_parallel" in (parameter.device_mesh.mesh_dim_names or ()):
            raise FiftyfoldError(
                f"{name!r} is split by tensor parallelism, under which no rank sees a whole weight to quantize; use "
                "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) and shard over "
                'device_mesh["data_parallel"].'
            )
