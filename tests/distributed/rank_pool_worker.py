"""One of the processes of `rank_pool.py`: waits for checks and runs them.

python rank_pool_worker.py ADDRESS RANK PROCESSES STORE SECONDS
"""

import os
import pickle
import sys
import traceback
import types
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepare_imports() -> None:
    """`tests` is this folder, even where some installed package brings one of that name."""
    sys.path[0] = str(ROOT)
    tests = types.ModuleType("tests")
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests


def main(address: str, rank: int, processes: int, store: str, seconds: float) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    connection = Client(address)
    prepare_imports()
    import torch
    import torch.distributed as dist

    from fisher_lab.curvature.collectives import TorchCommunicator

    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, processes), rank=rank, world_size=processes,
        timeout=timeout,
    )  # fmt: skip
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, processes + 1)}
    connection.send(rank)
    while True:
        message = connection.recv_bytes()
        if not message:
            break
        try:
            function, size, arguments = pickle.loads(message)
            answer = (True, function(TorchCommunicator(groups[size]), **arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
