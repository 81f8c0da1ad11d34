"""Two gloo processes: where one overflows, all skip together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1] / "helpers"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_all_ranks_skip_together(tmp_path, dtype):
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    workers = [
        subprocess.Popen(
            [sys.executable, HERE / "fp16_ddp_worker.py", str(rank), tmp_path / "rendezvous", dtype],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
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
            worker.communicate()
    assert reports[0] == reports[1]
    assert [step[0] for step in reports[0]] == [False, True, False, True, False, False]
    assert [step[1] for step in reports[0]] == [64.0, 32.0, 32.0, 16.0, 16.0, 32.0]
    weights = [step[2] for step in reports[0]]
    assert weights[1] == weights[0]
    assert weights[3] == weights[2]
    assert len({tuple(w) for w in weights}) == 4
