"""A host that is lost in the middle of a run costs the steps since the last checkpoint, and nothing else."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from tests.nodes.hosts import two_hosts
from tests.nodes.run import STALLS_AT, train
from tests.ranks import run_on_ranks
from tests.strangers import STEPS, assert_same_tensors

_SECONDS = 180


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills what /proc says a host runs")
def test_the_run_ends_as_an_undisturbed_one(tmp_path):
    with two_hosts() as (first, second, endpoint):
        for rank, host in enumerate((first, second)):
            host.start(rank, endpoint, tmp_path / f"{rank}.log", "-m", "tests.nodes.run", str(tmp_path))
        _wait((tmp_path / "reached").exists, tmp_path, "the middle is not reached")
        assert (tmp_path / f"step={STALLS_AT}.ckpt").exists()
        second.lose()
        second.start(1, endpoint, tmp_path / "1.log", "-m", "tests.nodes.run", str(tmp_path))
        agents = [first.agent, second.agent]
        _wait(lambda: all(agent.poll() is not None for agent in agents), tmp_path, "the run does not end")
        assert [agent.returncode for agent in agents] == [0, 0], _logs(tmp_path)
    end = torch.load(tmp_path / "end.pt")
    assert end["from"] == f"step={STALLS_AT}.ckpt"

    def undisturbed(start):
        return train(tmp_path / f"whole, from {start}", start, [], devices=2)

    for start in (tmp_path / end["from"], None):
        for state in run_on_ranks(undisturbed, start):
            assert_same_tensors(end["state"], state, f"undisturbed, from {start}")
    assert (tmp_path / f"step={STEPS}.ckpt").exists()


def _wait(done, folder, complaint):
    deadline = time.monotonic() + _SECONDS
    while not done():
        assert time.monotonic() < deadline, f"{complaint}\n{_logs(folder)}"
        time.sleep(0.1)


def _logs(folder):
    return "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))
