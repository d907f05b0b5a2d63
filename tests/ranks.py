"""Running a function in several processes that form one process group, as a launcher such as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import pytest
import torch

RANKS = 2
_PRELOADED = ["tests.cases", "tests.strangers"]
_SECONDS = 240


def run_on_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = RANKS) -> list[Any]:
    """Call ``function(*arguments)`` in ``ranks`` new processes and return what each returned, by rank.

    They find each other through the variables that torchrun sets, and a Trainer inside takes them for its own. They are
    forked from a process that has imported everything and done nothing: torch refuses gradients in one that is forked
    after threads of its own, as builds for GPUs may start them.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    port, call = free_port(), cloudpickle.dumps((function, arguments))
    processes, ends = [], []
    for rank in range(ranks):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(call, rank, ranks, port, there))
        process.start()
        there.close()
        processes.append(process)
        ends.append(here)
    try:
        results = _receive(ends)
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [f"rank {rank}:\n{result}" for rank, (good, result) in results.items() if not good]
    assert not failures, "\n".join(failures)
    return [results[rank][1] for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _receive(ends: list[Connection]) -> dict[int, tuple[bool, Any]]:
    """Wait for every rank, or for the first one that fails: the others may then wait for it for ever."""
    results: dict[int, tuple[bool, Any]] = {}
    while len(results) < len(ends):
        ready = wait([end for rank, end in enumerate(ends) if rank not in results], timeout=_SECONDS)
        if not ready:
            return {**results, -1: (False, f"the ranks beside {sorted(results)} are silent for {_SECONDS} s")}
        for rank, end in enumerate(ends):
            if end in ready:
                try:
                    # By value: tensors sent in torch's own way live in a file that ends with the process.
                    results[rank] = pickle.loads(end.recv_bytes())
                except EOFError:
                    results[rank] = (False, "it died")
        if not all(good for good, _ in results.values()):
            break
    return results


def _run(call: bytes, rank: int, ranks: int, port: int, end: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        function, arguments = cloudpickle.loads(call)
        end.send_bytes(pickle.dumps((True, function(*arguments))))
    except BaseException:  # noqa: BLE001
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))
        # The other rank may wait for this one for ever.
        os._exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
