"""One of two processes of test_fp16_ddp.py: RANK RENDEZVOUS_FILE DTYPE. Prints a JSON report of its steps."""

import json
import sys

import torch
from torch import distributed

from fp16_cases import loss_of, mlp, problem, wrap


def report(rank, dtype):
    """Train 6 steps, of which each rank spoils one; return [overflow, loss scale, weights] of each."""
    network = mlp(dtype)
    model = torch.nn.parallel.DistributedDataParallel(network)
    optimizer = wrap(
        torch.optim.SGD(network.parameters(), lr=0.1),
        dynamic_loss_scale=True,
        dynamic_loss_args={"init_scale": 64.0, "scale_window": 2},
    )
    steps = []
    for i in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, *problem(2 * i + rank))
        optimizer.backward(loss * (float("inf") if i == 1 + 2 * rank else 1.0))
        optimizer.step()
        weights = [w.item().hex() for p in network.parameters() for w in p.float().flatten()]
        steps.append([optimizer.overflow, optimizer.loss_scale, weights])
    return steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, rendezvous, dtype = int(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    print(json.dumps(report(rank, dtype)))
    distributed.destroy_process_group()
