"""Runs of the pipeline, ranks among them, in processes forked from one that has imported everything once.

python tests/forked_runs.py '[{"runs": "/tmp/a", "ranks": 2, "overrides": ["pipeline=dense", "name=two"]}]'
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightning.pytorch.callbacks  # noqa: E402, F401
import lightning.pytorch.strategies  # noqa: E402, F401
import peft.tuners.lora  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import fastvlm.callbacks.cost  # noqa: E402, F401
import fastvlm.callbacks.features  # noqa: E402, F401
import fastvlm.callbacks.metrics  # noqa: E402, F401
import fastvlm.callbacks.progress  # noqa: E402, F401
import fastvlm.callbacks.provenance  # noqa: E402, F401
import fastvlm.callbacks.rehearsal  # noqa: E402, F401
import fastvlm.callbacks.samples  # noqa: E402, F401
import fastvlm.data.datamodule  # noqa: E402, F401
import fastvlm.models.llms  # noqa: E402, F401
import fastvlm.models.memory  # noqa: E402, F401
import fastvlm.models.vlm  # noqa: E402, F401
import fastvlm.report  # noqa: E402, F401
import fastvlm.stages  # noqa: E402, F401
from fastvlm.config import check, compose  # noqa: E402
from fastvlm.pipeline import Pipeline  # noqa: E402


def train(run: dict, rank: int, port: int) -> None:
    os.environ["FASTVLM_RUNS"] = run["runs"]
    if run["ranks"] > 1:  # as Lightning's launcher tells its processes
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = compose("train", run["overrides"])
    check(config)
    Pipeline(config).run()


def fork(run: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        train(run, rank, port)
        code = 0
    except BaseException:  # noqa: BLE001  whatever it is must not reach the parent's code below the fork
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    for run in json.loads(sys.argv[1]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        waiting = {fork(run, rank, port) for rank in range(run["ranks"])}
        while waiting:
            pid, status = os.wait()
            waiting.discard(pid)
            if status:  # the other ranks would wait for it forever
                for other in waiting:
                    os.kill(other, signal.SIGKILL)
                sys.exit(1)


if __name__ == "__main__":
    main()
