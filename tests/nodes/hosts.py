"""Two hosts on one machine: network namespaces with a cable between them, or two groups of processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.ranks import free_port

ROOT = Path(__file__).parents[2]


class Host:
    """Starts torchrun's agent as a machine of its own would, and can be lost at once with all that it runs."""

    def __init__(self, address: str, namespace: str | None, cable: str) -> None:
        self.address, self.namespace, self.cable = address, namespace, cable
        self.agent: subprocess.Popen[bytes] | None = None

    def start(self, rank: int, endpoint: str, log: Path, *words: str) -> None:
        """Start ``torchrun … words`` here, as node ``rank`` of two."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        command = [
            *inside,
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=fiftyfold", f"--node-rank={rank}"),
            *(
                "--rdzv-conf",
                f"is_host={int(rank == 0)},keep_alive_interval=1,keep_alive_max_attempt=3",
                f"--local-addr={self.address}",
            ),
            *words,
        ]
        environment = {
            **os.environ,
            # docs/many_nodes.md says why.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": self.cable,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with log.open("ab") as output:
            self.agent = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
            )

    def lose(self) -> None:
        """Kill everything that this host runs; nothing of it can say goodbye."""
        if self.agent is None:
            return
        # Workers are in sessions of their own, which have no other members.
        for process in sorted(_descendants(self.agent.pid), reverse=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.agent.wait()
        self.agent = None


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, str]]:
    """Yield two hosts and the address at which the first one waits for the other.

    Without the right to make namespaces, the hosts are groups of processes on this one.
    """
    names = [f"fiftyfold{os.getpid()}{letter}" for letter in "ab"]
    try:
        made = _cable(names)
        if made:
            hosts = [Host(f"10.213.7.{number}", name, "cable") for number, name in enumerate(names, start=1)]
        else:
            hosts = [Host("127.0.0.1", None, "lo") for _ in names]
        try:
            yield hosts[0], hosts[1], f"{hosts[0].address}:{free_port()}"
        finally:
            for host in hosts:
                host.lose()
    finally:
        for name in names:
            _ip("netns", "del", name)


def _cable(names: list[str]) -> bool:
    """Make two namespaces with one cable between them; tell whether that was possible."""
    steps = [("netns", "add", name) for name in names]
    steps += [("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])]
    for number, name in enumerate(names, start=1):
        steps += [
            ("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", "cable"),
            ("-n", name, "link", "set", "cable", "up"),
            ("-n", name, "link", "set", "lo", "up"),
        ]
    return all(_ip(*step) for step in steps)


def _ip(*words: str) -> bool:
    try:
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _descendants(process: int) -> list[int]:
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += _descendants(int(child))
    return found
