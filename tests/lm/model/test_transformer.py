"""The Transformer: no word sees a later one, positions count, and half through fp32 is half."""

from pathlib import Path

import pytest
import torch

import lm.model.kernels
import lm.model.transformer
from lm.model.language_model import RNNModel, next_word_loss
from lm.model.model_file import save_model
from lm.options.config import parse_args
from lm.training.build import make_model
from programs import WORDS, Programs
from roundoff.errors import UsageError


def make(dtype: torch.dtype = torch.float32, **options: int) -> RNNModel:
    torch.manual_seed(0)
    return RNNModel("Transformer", 16, 8, 12, 2, 0.0, **options).to(dtype).eval()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_word_sees_a_later_one(dtype, train) -> None:
    model = make(dtype).train(train)
    tokens = torch.randint(16, (7, 3), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[4:] = (changed[4:] + 1) % 16
    before, after = model(tokens, ())[0], model(changed, ())[0]
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).any(dim=2).all()


def test_a_word_sees_all_earlier_ones_and_where_they_are() -> None:
    model = make()
    tokens = torch.randint(16, (7, 1), generator=torch.Generator().manual_seed(1))
    last = model(tokens, ())[0][-1]
    for i in range(6):
        changed = tokens.clone()
        changed[i] = (changed[i] + 1) % 16
        assert not torch.equal(model(changed, ())[0][-1], last), i
    swapped = tokens[[1, 0, *range(2, 7)]]
    assert tokens[0] != tokens[1]
    assert not torch.allclose(model(swapped, ())[0][-1], last, atol=1e-6)


def test_columns_are_apart() -> None:
    model, tokens = make(), torch.randint(16, (5, 4), generator=torch.Generator().manual_seed(1))
    together = model(tokens, ())[0]
    for column in range(4):
        assert torch.allclose(model(tokens[:, [column]], ())[0], together[:, [column]], atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("half", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_half_through_fp32_is_half(monkeypatch, half, tolerance, autocast) -> None:
    """Both ways on any CPU: torch's own kernels and those in fp32 agree as far as half goes, gradients too."""
    tokens = torch.randint(16, (7, 3), generator=torch.Generator().manual_seed(1))
    results = []
    for instructions in (False, True):
        monkeypatch.setattr(lm.model.kernels, "cpu_multiplies", lambda _, answer=instructions: answer)
        model = make(torch.float32 if autocast else half).train()
        with torch.autocast("cpu", half, enabled=autocast):
            loss, hidden = next_word_loss(model, tokens, tokens.flatten(), model.init_hidden(3))
            assert model(tokens, ())[0].dtype == half
        assert hidden == ()
        (loss * 1024).backward()
        results.append([loss.detach(), *(p.grad.float() for p in model.parameters())])
    for through, native in zip(*results, strict=True):
        assert float((through - native).norm() / native.norm()) < tolerance


@pytest.mark.parametrize("script", ["main", "main_fp16_optimizer", "main_amp"])
def test_its_learning_rate(script) -> None:
    """20 is that of recurrent layers."""

    def lr(*flags: str) -> float:
        return parse_args(f"{script}.py", "", flags).lr

    assert lr("--model", "Transformer") == 5
    assert lr("--model", "Transformer", "--lr", "20") == 20
    assert lr("--model", "Transformer", "--optimizer", "adamw") == 0.001
    assert lr("--model", "GRU") == lr() == 20


def test_it_is_the_mistake_of_the_flags(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"--nhead 3 with --emsize 200"):
        parse_args("main.py", "", ["--model", "Transformer", "--nhead", "3"])
    args = parse_args(
        "main.py",
        "",
        ["--model", "Transformer", "--tied", "--nhid", "7", "--emsize", "6", "--nhead", "3", "--bptt", "11"],
    )
    assert make_model(args, 16).options == {
        "kind": "Transformer", "ntokens": 16, "emsize": 6, "nhid": 7, "nlayers": 2, "dropout": 0.2, "tied": True,
        "nhead": 3, "context": 11,
    }  # fmt: skip
    parse_args("main.py", "", ["--nhead", "3"])  # an LSTM has none
    with pytest.raises(ValueError, match="no multiple of nhead 3"):
        make(nhead=3)


@pytest.mark.parametrize("change", [{"nhead": 0}, {"nhead": "x"}, {"context": 0}, {"context": None}])
def test_a_hostile_file(programs: Programs, change) -> None:
    model = make()
    model.options |= change
    save_model(programs.folder / "model.safetensors", model, WORDS)
    assert "contradicts itself" in programs.refuse("generate")


def test_text_from_as_many_words_as_it_was_trained_on(programs: Programs) -> None:
    """Against the plain way, at a temperature that leaves nothing to chance; one word more or less says otherwise."""
    model = make(context=4)
    torch.manual_seed(8)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and name != "decoder.bias":
                weight.normal_()  # so that earlier words count for much
    save_model(programs.folder / "model.safetensors", model, WORDS)

    def plain(context: int) -> list[str]:
        torch.manual_seed(1111)
        ids = [int(torch.randint(len(WORDS), (1, 1)))]
        for _ in range(30):
            seen = torch.tensor(ids[-context:])[:, None]
            ids.append(int(model(seen, ())[0][-1, 0, : len(WORDS)].argmax()))
        return [WORDS[i] for i in ids[1:]]

    assert programs.run("generate", "--words", "30", "--temperature", "0.001").code == 0
    text = Path("generated.txt").read_text(encoding="utf-8").split()
    assert text == plain(4)
    assert all(plain(other) != text for other in (3, 5, 30))
