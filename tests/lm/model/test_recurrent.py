"""The recurrent layers that CPUs without half instructions run, against torch's own."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm.model import kernels, recurrent

TIME, BATCH, SIZE, LAYERS = 7, 3, 12, 2
KINDS: dict[str, tuple[Any, dict[str, str]]] = {
    "LSTM": (recurrent.LSTM, {}),
    "GRU": (recurrent.GRU, {}),
    "RNN_TANH": (recurrent.RNN, {"nonlinearity": "tanh"}),
    "RNN_RELU": (recurrent.RNN, {"nonlinearity": "relu"}),
}


HALF = {torch.float16: 11, torch.bfloat16: 8}
"""dtype -> bits of its significand"""


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return str(request.param)


@pytest.fixture(params=HALF, ids=str)
def half(request) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


def make(kind: str, dropout: float = 0.0) -> nn.RNNBase:
    torch.manual_seed(1)
    layers, options = KINDS[kind]
    rnn: nn.RNNBase = layers(SIZE, SIZE, LAYERS, dropout=dropout, **options)
    with torch.no_grad():
        for p in rnn.parameters():
            p.copy_(p.half().bfloat16())  # so that the same values can run in every dtype
    return rnn


def run(rnn: nn.RNNBase, dtype: torch.dtype, autocast: bool = False, chunks: int = 2) -> dict[str, Tensor]:
    """Output, last state and all gradients of chunks of text."""
    torch.manual_seed(2)
    x = torch.randn(chunks, TIME, BATCH, SIZE).bfloat16().to(dtype).requires_grad_()
    h = torch.randn(LAYERS, BATCH, SIZE).bfloat16().to(dtype)
    state: Any = (h, h.flip(2)) if rnn.mode == "LSTM" else h
    outputs = []
    with torch.autocast("cpu", dtype, enabled=autocast):
        for chunk in x:
            output, state = rnn(chunk, state)
            outputs.append(output)
    results = {"output": torch.stack(outputs), "state": torch.stack(state) if rnn.mode == "LSTM" else state}
    weights = torch.randn(chunks, TIME, BATCH, SIZE)
    grads = torch.autograd.grad((results["output"].float() * weights).sum(), [x, *rnn.parameters()])
    return results | {"input": grads[0]} | dict(zip(dict(rnn.named_parameters()), grads[1:], strict=True))


def without_instructions(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda _: False)


@contextmanager
def native_kernels() -> Iterator[None]:
    """torch's own kernels, which every CPU has, in the place of oneDNN's; `mkldnn.flags` warns about TF32."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def test_is_nearer_to_exact_arithmetic_than_torchs_half(monkeypatch, kind, half) -> None:
    exact = run(make(kind).double(), torch.float64)
    without_instructions(monkeypatch)
    ours = run(make(kind).to(half), half)
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda _: True)
    with native_kernels():
        torchs = run(make(kind).to(half), half)
    for name, value in exact.items():
        assert ours[name].dtype == half
        error, torchs_error = ((x[name].double() - value).norm() / value.norm() for x in (ours, torchs))
        assert 0 < error < 1.5 * torchs_error, name
        assert error < 2.0 ** (2 - HALF[half]), name


def test_autocast_gives_the_same_with_fp32_gradients(monkeypatch, kind, half) -> None:
    without_instructions(monkeypatch)
    halves = run(make(kind).to(half), half)
    mixed = run(make(kind), half, autocast=True)
    tolerance = 2.0 ** (2 - HALF[half])  # two chunks, added
    for name, value in halves.items():
        assert mixed[name].dtype == (torch.float32 if "_l" in name else half)
        torch.testing.assert_close(mixed[name].to(half), value, rtol=tolerance, atol=tolerance)


def test_sums_are_rounded_before_the_nonlinearities(monkeypatch, kind, half) -> None:
    """So a cell does not tell its sums, which fp32 holds exactly here, from the nearest half numbers in their place."""
    without_instructions(monkeypatch)
    layers, options = KINDS[kind]
    torch.manual_seed(1)
    x, h, c, b_x, b_h = ((torch.randn(500).to(half) * 2**13).round() / 2**13 for _ in range(5))

    def output(x: Tensor, h: Tensor, b_x: Tensor, b_h: Tensor) -> Tensor:
        """That of the second of two units, which sees the state of the first one, and has none but c."""
        rnn = layers(1, 2, 1, **options).to(half)
        with torch.no_grad():
            rnn.weight_ih_l0.fill_(1.0)
            rnn.weight_hh_l0.copy_(torch.tensor([1.0, 0.0]).expand_as(rnn.weight_hh_l0))
            rnn.bias_ih_l0.fill_(float(b_x[0]))
            rnn.bias_hh_l0.fill_(float(b_h[0]))
            state = torch.stack((h, torch.zeros_like(h)), 1)[None].to(half)
            cell = torch.stack((c, c), 1)[None].to(half)
            return rnn(x[None, :, None].to(half), (state, cell) if kind == "LSTM" else state)[0][0, :, 1]

    none = torch.zeros_like(x)
    in_x, in_h = x.float() + b_x[0].float(), h.float() + b_h[0].float()  # a GRU's are apart
    sums = (in_x, in_h) if kind == "GRU" else (in_x + in_h, none)
    assert sum(float(s) != float(s.to(half)) for s in sums[0]) > 100
    assert torch.equal(output(x, h, b_x, b_h), output(*(s.to(half) for s in sums), none, none))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"], indirect=True)
def test_gradients_are_rounded_to_fp16_at_every_time_step(monkeypatch, kind) -> None:
    """Each of those summed into a bias's gradient is flushed where it is too small, before they add up to something."""
    without_instructions(monkeypatch)
    rnn, x, h = make(kind).half(), torch.randn(TIME, BATCH, SIZE).half(), torch.zeros(LAYERS, BATCH, SIZE).half()
    sums = []
    for smallest in (2.0**-24, 2.0**-16):
        output = rnn(x, (h, h) if kind == "LSTM" else h)[0]
        (grad,) = torch.autograd.grad(output, rnn.bias_hh_l1, torch.full_like(output, smallest))
        sums.append(grad.abs().sum() / smallest)
    assert 0 < sums[0] < 0.75 * sums[1]


def test_draws_the_dropout_masks_of_torch(monkeypatch, kind, half) -> None:
    results = []
    for instructions in (True, False):
        monkeypatch.setattr(kernels, "cpu_multiplies", lambda _, answer=instructions: answer)
        rnn = make(kind, dropout=0.5).to(half)
        with native_kernels():
            results.append((run(rnn, half)["output"], torch.get_rng_state()))
    tolerance = 2.0 ** (3 - HALF[half])  # another mask differs by 1
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    assert torch.equal(results[0][1], results[1][1])


def test_training_and_evaluation_are_equal(monkeypatch, kind, half) -> None:
    without_instructions(monkeypatch)
    rnn, x = make(kind, dropout=0.5).to(half).eval(), torch.randn(TIME, BATCH, SIZE).to(half)
    h = torch.zeros(LAYERS, BATCH, SIZE).to(half)
    state: Any = (h, h) if kind == "LSTM" else h
    output = rnn(x, state)[0]
    with torch.no_grad():
        assert torch.equal(rnn(x, state)[0], output)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_where_the_cpu_multiplies_layers_one_at_a_time_are_torchs_in_every_bit(
    monkeypatch, kind, dtype, autocast
) -> None:
    """With the dropout between them; one chunk, since autocast adds up in half the gradients of a weight used twice."""
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda half: half is dtype)
    weights = torch.float32 if autocast else dtype
    ours = make(kind, dropout=0.5).to(weights)
    torchs: Any = getattr(nn, "RNN" if "RNN" in kind else kind)(SIZE, SIZE, LAYERS, dropout=0.5, **KINDS[kind][1])
    torchs.to(weights).load_state_dict(ours.state_dict())
    use = autocast and dtype is not torch.float32
    a, b = run(ours, dtype, use, 1), run(torchs, dtype, use, 1)
    assert {name: x.dtype for name, x in a.items()} == {name: x.dtype for name, x in b.items()}
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_weights_that_are_cast_together_lie_together(kind, half) -> None:
    weights = make(kind).all_weights[0]
    cast = recurrent.cast_together(weights, half)
    places = [w.storage_offset() for w in cast]
    assert places == [sum(w.numel() for w in weights[:i]) for i in range(4)]
    assert len({w.untyped_storage().data_ptr() for w in cast}) == 1
    assert all(torch.equal(w.to(half), copy) for w, copy in zip(weights, cast, strict=True))
    grads = torch.autograd.grad([w.sum() for w in cast], weights, [torch.tensor(3, dtype=half)] * 4)
    assert all(torch.equal(grad, torch.full_like(w, 3)) for w, grad in zip(weights, grads, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize(("half", "autocast"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, True)])
def test_cudnn_takes_the_weights_where_they_lie(kind, half, autocast) -> None:
    """Else torch copies them in each call, and warns of it once; bfloat16 weights, which no mode has, it does copy."""
    rnn = make(kind).cuda() if autocast else make(kind).cuda().to(half)
    for layer in rnn.all_weights:
        assert len({w.untyped_storage().data_ptr() for w in layer}) == 1
        assert [w.storage_offset() for w in layer] == [sum(x.numel() for x in layer[:i]) for i in range(4)]
    x, h = (torch.randn(n, BATCH, SIZE, device="cuda", dtype=half) for n in (TIME, LAYERS))
    with torch.autocast("cuda", half, enabled=autocast), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        output, _ = rnn(x, (h, h) if kind == "LSTM" else h)
    assert output.dtype is half
    assert not [w for w in warned if "contiguous chunk" in str(w.message)]


def test_a_state_is_half_at_every_time_step(monkeypatch, kind, half) -> None:
    """So a text read in two pieces, whose state is handed over in half, gives the bits of one read at once."""
    without_instructions(monkeypatch)
    rnn, x = make(kind).to(half), torch.randn(TIME, BATCH, SIZE).to(half)
    h = torch.randn(LAYERS, BATCH, SIZE).to(half)
    state: Any = (h, h) if kind == "LSTM" else h
    at_once, last = rnn(x, state)
    first, state = rnn(x[:3], state)
    second, state = rnn(x[3:], state)
    assert torch.equal(torch.cat((first, second)), at_once)
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))
