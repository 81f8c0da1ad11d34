"""Two gloo processes: where one overflows, all skip together."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[4])
from fp16_cases import loss_of, mlp, problem, wrap
torch.set_num_threads(1)
rank, port, dtype = int(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
network = mlp(dtype)
model = torch.nn.parallel.DistributedDataParallel(network)
args = {"init_scale": 64.0, "scale_window": 2}
optimizer = wrap(torch.optim.SGD(network.parameters(), lr=0.1), dynamic_loss_scale=True,
dynamic_loss_args=args) report = []
for i in range(6):
    optimizer.zero_grad()
    x, y = problem(2 * i + rank)
    loss = loss_of(model, x, y)
    # Each rank overflows once, alone.
    optimizer.backward(loss * (float("inf") if i == 1 + 2 * rank else 1.0))
    optimizer.step()
    weights = [w.item().hex() for p in network.parameters() for w in p.float().flatten()]
    report.append([optimizer.overflow, optimizer.loss_scale, weights])
print(json.dumps(report))
dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_all_ranks_skip_together(dtype):
    port, here = str(free_port()), str(Path(__file__).parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port, dtype, here],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    reports = []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=120)
            assert worker.returncode == 0, err
            reports.append(json.loads(out.splitlines()[-1]))
    finally:
        for worker in workers:
            worker.kill()
    assert reports[0] == reports[1]
    assert [step[0] for step in reports[0]] == [False, True, False, True, False, False]
    assert [step[1] for step in reports[0]] == [64.0, 32.0, 32.0, 16.0, 16.0, 32.0]
    weights = [step[2] for step in reports[0]]
    assert weights[1] == weights[0]
    assert weights[3] == weights[2]
    assert len({tuple(w) for w in weights}) == 4
