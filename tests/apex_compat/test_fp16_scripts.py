"""Scripts that import apex.fp16_utils run unchanged, and nothing of it stays behind."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import apex_compat
from apex_compat import fp16_utils
from apex_compat.__main__ import main
from apex_compat.cuda_on_cpu import cuda_on_cpu

ROOT = Path(__file__).parents[2]

TRAINING = """
    import sys
    import torch
    import apex
    from apex.fp16_utils import FP16_Optimizer, network_to_half
    from apex.fp16_utils.loss_scaler import DynamicLossScaler

    x = torch.randn(8, 4, device="cuda", dtype=torch.half)
    y = torch.cuda.HalfTensor(8, 3).fill_(0.5)
    model = torch.nn.Linear(4, 3).cuda().half()
    optimizer = FP16_Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), static_loss_scale=128.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x.cuda(non_blocking=True)).float(), y.float())
        optimizer.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    torch.cuda.synchronize()
    assert losses[-1] < losses[0], losses
    print("trained", sys.argv[1:])
"""


@pytest.fixture
def script(tmp_path):
    def write(text, name="script.py"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return write


def apex_modules():
    return [name for name in sys.modules if name.split(".")[0] == "apex"]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    def surroundings():
        return list(sys.argv), list(sys.path), sys.modules["__main__"], torch.zeros(1).device

    before, cuda = surroundings(), dict(vars(torch.cuda))
    yield
    assert apex_modules() == []
    assert surroundings() == before
    assert {name for name, value in cuda.items() if vars(torch.cuda)[name] is not value} == set()


@pytest.mark.slow
def test_a_script_for_cuda_runs_from_the_command_line(script):
    command = [sys.executable, "-W", "error", "-m", "apex_compat", "--device", "cpu", script(TRAINING), "--device", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trained ['--device', 'x']\n"
    assert done.stderr == "apex_compat: running on the CPU what the script does on CUDA (--device cpu)\n"


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(7)", 7), ("sys.exit()", None), ("raise SystemExit('no')", "no")]
)
def test_exit_codes_pass_through(script, ending, code):
    with pytest.raises(SystemExit) as exit_info:
        main([script(f"import sys\nimport apex.fp16_utils\n{ending}")])
    assert exit_info.value.code == code


def test_the_script_is_main_with_its_arguments_and_folder(script, capsys):
    script("VALUE = 41", name="helper.py")
    path = script(
        """
        import sys
        import helper
        import apex.fp16_utils as utils
        class Local: pass
        assert sys.modules["__main__"].Local is Local
        print(__name__, __file__, sys.argv, helper.VALUE, utils.__name__)
        """
    )
    assert main([path, "-h", "--", "x"]) == 0
    assert capsys.readouterr().out == f"__main__ {path} {[path, '-h', '--', 'x']} 41 apex_compat.fp16_utils\n"
    del sys.modules["helper"]


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        (
            "import apex.fp16_utils\ndef f():\n    raise KeyError('mine')\nf()\n",
            'Traceback (most recent call last):\n  File "{path}", line 4, in <module>\n',
            "KeyError: 'mine'\n",
        ),
        ("a = = 1\n", '  File "{path}", line 1\n', "SyntaxError: invalid syntax\n"),
    ],
    ids=["traceback", "syntax error"],
)
def test_an_error_is_the_scripts_own(script, capsys, text, first, last):
    path = script(text)
    assert main([path]) == 1
    error = capsys.readouterr().err
    assert error.startswith(first.format(path=path))
    assert error.endswith(last)
    assert "apex_compat" not in error


TRY = "apex_compat: this script asks for CUDA, which is not here; try: python -m apex_compat --device cpu {} --lr '1 2'"


@pytest.mark.parametrize(
    ("text", "helps"),
    [
        ("import torch\ntorch.zeros(1).cuda()", True),
        ("import torch\ntorch.nn.Linear(1, 1).to('cuda:0')", True),
        ("import torch\ntorch.zeros(1).pin_memory()", True),
        ("import torch\ntorch.cuda.HalfTensor(2)", True),
        ("import torch\ntorch.cuda.set_device(0)", True),
        ("raise RuntimeError('Found no NVIDIA driver on your system.')", True),
        ("raise RuntimeError('No CUDA GPUs are available')", True),
        ("import torch\ntorch.zeros(1, device='cudda')", False),
        ("raise ValueError('CUDA')", False),
    ],
)
def test_a_script_for_cuda_is_told_of_the_cpu_where_there_is_no_gpu(script, monkeypatch, capsys, text, helps):
    """Last, after its own traceback; and nobody is where there is a GPU, or on the CPU already."""
    if torch.cuda.is_available() and "import torch" in text:
        pytest.skip("this machine has CUDA: torch does what the script asks")
    path = script(text)

    def lines(*options, available):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        main([*options, path, "--lr", "1 2"])
        return capsys.readouterr().err.splitlines()

    here = lines(available=False)
    assert [line for line in here if line.startswith("apex_compat: ")] == [TRY.format(path)] * helps
    assert "Traceback (most recent call last):" in here[:3]  # older torch first warns of its tensor types
    assert "Error: " in here[-1 - helps]
    assert TRY.format(path) not in lines(available=True) + lines("--device", "cpu", available=False)


def test_a_script_that_cannot_be_read(tmp_path, capsys):
    assert main([str(tmp_path / "missing.py")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: SCRIPT is ")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--device", "tpu", "x.py"])


def test_apex_is_provided_until_it_is_restored():
    def imports_apex():
        apex = importlib.import_module("apex")
        assert importlib.import_module("apex.fp16_utils") is apex.fp16_utils is fp16_utils
        for name in ("fp16_optimizer", "fp16util", "loss_scaler"):
            ours = importlib.import_module(f"apex_compat.fp16_utils.{name}")
            assert importlib.import_module(f"apex.fp16_utils.{name}") is ours
        assert importlib.util.find_spec("apex").name == "apex"
        with pytest.raises(ModuleNotFoundError, match=r"apex\.contrib"):
            importlib.import_module("apex.contrib")

    def finds_none():
        for name in ("apex", "apex.fp16_utils"):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(name)

    finds_none()
    with apex_compat.provide_apex():
        imports_apex()
    finds_none()
    provided = apex_compat.provide_apex()
    imports_apex()
    provided.restore()
    provided.restore()
    finds_none()


@pytest.mark.parametrize("own", ["", "from apex import fp16_utils"], ids=["without", "with its own"])
@pytest.mark.parametrize("imported", [False, True])
def test_an_installed_apex_keeps_the_rest(tmp_path, monkeypatch, own, imported):
    package = tmp_path / "apex"
    (package / "contrib").mkdir(parents=True)
    (package / "__init__.py").write_text(own)
    (package / "contrib" / "__init__.py").write_text("initialize = 1")
    (package / "fp16_utils.py").write_text("OLD = True")
    monkeypatch.syspath_prepend(tmp_path)
    before = importlib.import_module("apex") if imported else None
    attributes = dict(vars(before)) if imported else {}
    with apex_compat.provide_apex() as provided:
        assert importlib.import_module("apex.contrib").initialize == 1
        assert importlib.import_module("apex.fp16_utils") is fp16_utils
        assert importlib.import_module("apex").fp16_utils is fp16_utils
    if imported:
        assert sys.modules["apex"] is before
        assert vars(before).get("fp16_utils") is attributes.get("fp16_utils")
        contrib = importlib.import_module("apex.contrib")
        provided.restore()  # does nothing
        assert sys.modules["apex.contrib"] is contrib
    for name in apex_modules():
        assert imported
        del sys.modules[name]


def test_an_installed_apex_that_is_broken_is_replaced_with_a_warning(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise OSError('libcudart is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="libcudart is missing"), apex_compat.provide_apex():
        assert importlib.import_module("apex.fp16_utils") is fp16_utils


def test_cuda_on_cpu():
    with cuda_on_cpu():
        one = torch.tensor([1.0])
        tensors = [
            *(torch.zeros(2, device=device) for device in ("cuda", torch.device("cuda:1"))),
            *(one.cuda(), one.cuda(1, non_blocking=True), one.to("cuda:0"), one.to(0), one.pin_memory()),
            *(one.to(device=torch.device("cuda"), dtype=torch.half), torch.cuda.FloatTensor([1.0])),
            *torch.nn.LSTM(2, 2).cuda().parameters(),
            *torch.nn.Linear(2, 2, device="cuda").to("cuda").parameters(),
        ]
        half, long = one.type("torch.cuda.HalfTensor"), one.type(torch.cuda.LongTensor)
        torch.cuda.synchronize()
        torch.cuda.set_device(0)
        assert torch.cuda.current_device() == 0
    assert (half.dtype, long.dtype) == (torch.float16, torch.int64)
    assert {t.device.type for t in (*tensors, half, long)} == {"cpu"}
