"""Launchers other than torchrun tell the processes of their places in ways of their own."""

from __future__ import annotations

import os

from tests.cases import CASES
from tests.ranks import RANKS, run_on_ranks
from tests.strangers import OddUser, assert_same_tensors, make_trainer


def fit():
    module = OddUser()
    trainer = make_trainer(
        CASES[-1].callbacks(), strategy="ddp", devices=1, num_nodes=RANKS, use_distributed_sampler=False
    )
    trainer.fit(module)
    return type(trainer.strategy.cluster_environment).__name__, module.state_dict()


def under_torchrun():
    """Each process on a node of its own."""
    os.environ.update(GROUP_RANK=os.environ["RANK"], LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    return fit()


def test_srun_starts_the_processes_of_two_nodes():
    def under_slurm():
        rank, port = os.environ["RANK"], os.environ["MASTER_PORT"]
        for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            del os.environ[name]
        os.environ.update(
            SLURM_JOB_ID="1", SLURM_JOB_NAME="compress", SLURM_NTASKS=str(RANKS), SLURM_NTASKS_PER_NODE="1",
            SLURM_NNODES=str(RANKS), SLURM_NODELIST="127.0.0.1", SLURM_NODEID=rank, SLURM_PROCID=rank,
            SLURM_LOCALID="0", MASTER_PORT=port,
        )  # fmt: skip
        return fit()

    by_slurm, by_torchrun = run_on_ranks(under_slurm), run_on_ranks(under_torchrun)
    assert {name for name, _ in by_slurm} == {"SLURMEnvironment"}
    assert {name for name, _ in by_torchrun} == {"TorchElasticEnvironment"}
    for _, state in by_slurm[1:] + by_torchrun:
        assert_same_tensors(by_slurm[0][1], state, "launcher")
