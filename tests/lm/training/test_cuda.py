"""The README's commands on a GPU, where there is one."""

import json

import pytest

import jobs

pytestmark = pytest.mark.cuda

COMMANDS = [
    ["main"],
    ["main", "--fp16"],
    ["main_fp16_optimizer", "--fp16"],
    ["main_fp16_optimizer", "--fp16", "--dynamic-loss-scale"],
    ["main_amp"],
    ["main_amp", "--dtype", "bfloat16"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_readme_commands(monkeypatch, tmp_path, command) -> None:
    script, *flags = command
    size = ["--emsize", "200", "--nhid", "200", "--batch_size", "20", "--bptt", "35", "--lr", "20"]
    flags += [*size, "--cuda", "--max-steps", "60"]
    assert jobs.run(monkeypatch, "python-docs", tmp_path / "run", script, *flags) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["device"] == "cuda"
    assert config["precision"]["dtypes"]["hidden"] == config["precision"]["dtype"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["test_ppl"] < 1000  # of 2,200 words
    assert result["peak_memory_bytes"] > 1_000_000
