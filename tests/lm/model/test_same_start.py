"""Every mode starts from the same weights, reads the same batches and drops the same units."""

from typing import Any

import pytest
import torch

import jobs
from lm.data.corpus import get_batch
from lm.training.loop import Training


def make(monkeypatch, tmp_path, corpus, mode: str, *flags: str) -> Training:
    where = ("--run-dir", str(tmp_path / f"run-{mode}"), "--save", str(tmp_path / "model.safetensors"))
    return jobs.build(monkeypatch, corpus, *jobs.MODES[mode], *where, *flags)


@pytest.mark.parametrize("flags", [[], ["--tied", "--model", "GRU"], ["--tied", "--model", "Transformer"]])
@pytest.mark.parametrize("mode", jobs.MODES)
def test_same_initial_weights_rounded_where_the_mode_rounds(monkeypatch, tmp_path, corpus, mode, flags) -> None:
    if mode == "fp32":
        flags = ["--log-interval", "7", *flags]  # what is not precision does not matter either
    job = make(monkeypatch, tmp_path, corpus, mode, *flags)
    (tmp_path / "reference").mkdir()
    reference = make(monkeypatch, tmp_path / "reference", corpus, "fp32", *flags)
    expected = list(reference.model.parameters())
    assert jobs.bits(list(job.model.parameters())) == jobs.bits(
        [p.to(next(job.model.parameters()).dtype) for p in expected]
    )
    assert (job.model.decoder.weight is job.model.encoder.weight) == ("--tied" in flags)
    masters = [p for group in job.precision.param_groups for p in group["params"]]
    assert len(masters) == len(expected)
    assert jobs.bits(masters) == jobs.bits([p.to(next(job.model.parameters()).dtype).float() for p in expected])


def record_masks(job: Training, steps: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Which units each dropout kept (-1 where the unit was 0 anyway), and the random generator's state afterwards."""
    masks: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        masks.append(torch.where(args[0] == 0, -1, (output != 0).int()))

    job.model.drop.register_forward_hook(hook)
    job.model.train()
    for i in range(steps):
        job.train_step(i * job.args.bptt)
    return masks, torch.get_rng_state()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH", "Transformer"])
def test_same_dropout_masks(monkeypatch, tmp_path, corpus, kind) -> None:
    expected = None
    for mode in jobs.MODES:
        job = make(monkeypatch, tmp_path, corpus, mode, "--model", kind, "--dropout", "0.4")
        masks, state = record_masks(job, 3)
        assert len(masks) == (3 if kind == "Transformer" else 6)
        assert 0.5 < float((masks[0] == 1).float().mean()) < 0.7
        if expected is None:
            expected = masks, state
        for found, wanted in zip(masks, expected[0], strict=True):
            assert bool(((found == wanted) | (found < 0) | (wanted < 0)).all()), mode
        # The masks between the layers are out of a hook's reach; the generator says that as many were drawn.
        assert torch.equal(state, expected[1]), mode


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_draws_the_same_mask_in_every_dtype(dtype) -> None:
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(torch.ones(35, 20, 200), 0.2) != 0
    torch.manual_seed(3)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(35, 20, 200, dtype=dtype), 0.2) != 0, expected)


def test_same_batches(monkeypatch, tmp_path, corpus) -> None:
    jobs_of_modes = [make(monkeypatch, tmp_path, corpus, mode) for mode in jobs.MODES]
    for i in range(0, 20, 5):
        batches = [get_batch(job.train_data, i, 5) for job in jobs_of_modes]
        assert all(torch.equal(b[0], batches[0][0]) and torch.equal(b[1], batches[0][1]) for b in batches)


def test_trying_the_model_once_changes_nothing(monkeypatch, tmp_path, corpus) -> None:
    """`config.json` knows the dtypes that ran because they ran; the run does not notice."""
    job = make(monkeypatch, tmp_path, corpus, "fp32")
    torch.manual_seed(job.args.seed)
    drawn = [p.clone() for p in type(job.model)(**job.model.options).parameters()]
    expected = torch.get_rng_state()
    again = make(monkeypatch, tmp_path, corpus, "amp-fp32")
    assert torch.equal(torch.get_rng_state(), expected)
    assert jobs.bits(list(again.model.parameters())) == jobs.bits(drawn)
    assert all(p.grad is None for p in again.model.parameters())
