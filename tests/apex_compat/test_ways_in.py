"""Scripts that import apex run unchanged, in every process that they start, and nothing of it stays behind."""

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from apex_compat import environment
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


def test_a_relative_path_is_as_in_python(script, tmp_path, monkeypatch, capsys):
    script("import sys; print(__file__, sys.argv)", name="say.py")
    (tmp_path / "sub").mkdir()
    for folder, word in ((tmp_path, "say.py"), (tmp_path, "./say.py"), (tmp_path / "sub", "../say.py")):
        monkeypatch.chdir(folder)
        assert main([word]) == 0
        python = subprocess.run([sys.executable, "-I", word], capture_output=True, text=True, check=True).stdout
        assert capsys.readouterr().out == python


def test_a_module_runs_as_by_python_m(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "pkg_to_run").mkdir()
    (tmp_path / "pkg_to_run" / "part.py").write_text("VALUE = 3")
    text = (
        "import sys\nfrom .part import VALUE\nprint(__name__, __file__, __package__, __spec__.name, sys.argv, VALUE)\n"
    )
    for name in ("train", "__main__"):
        script(text, name=f"pkg_to_run/{name}.py")
    monkeypatch.chdir(tmp_path)
    for name in ("pkg_to_run.train", "pkg_to_run"):
        assert main(["-m", name, "-m", "--lr"]) == 0
        python = [sys.executable, "-m", name, "-m", "--lr"]
        assert capsys.readouterr().out == subprocess.run(python, capture_output=True, text=True, check=True).stdout
    for module in [name for name in sys.modules if name.startswith("pkg_to_run")]:
        del sys.modules[module]
    assert main(["-m", "pkg_not_there"]) == 2
    assert capsys.readouterr().err.startswith("error: MODULE is 'pkg_not_there': there is no such module to run")


LIVES_ON = """
    import atexit, sys, threading
    def say(who):
        import apex, __main__
        print(who, apex.__name__, __main__.__file__, sys.argv[1:])
        del sys.modules["apex"]
    threading.Thread(target=lambda: (threading.main_thread().join(), say("thread"))).start()
    atexit.register(say, "exit")
"""


def test_threads_and_exit_handlers_still_have_apex(script):
    path = script(LIVES_ON)
    command = [sys.executable, "-m", "apex_compat", path, "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == f"thread apex {path} ['x']\nexit apex {path} ['x']\n"


SED = {
    "import apex  # noqa": "import apex_compat as apex  # noqa",
    "    import apex": "    import apex_compat as apex",
    "import apex as amp": "import apex_compat as amp",
    "import apex.amp as amp": "import apex_compat.amp as amp",
    "from apex.parallel import DDP": "from apex_compat.parallel import DDP",
    "  from apex import amp": "  from apex_compat import amp",
    "print('from apex import amp; see apex.amp')": "print('from apex import amp; see apex.amp')",
    "import os, apex": "import os, apex",
    "import apex_other": "import apex_other",
}


def test_the_line_for_code_that_one_maintains(script):
    path = script("\n".join(SED) + "\n")
    line = next(x for x in (ROOT / "apex_compat" / "README.md").read_text().splitlines() if x.startswith("sed -i"))
    subprocess.run(line.replace("train.py", path), shell=True, check=True)  # noqa: S602
    assert Path(path).read_text() == textwrap.dedent("\n".join(SED.values()) + "\n")


def test_words_that_name_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "migrate SCRIPT" in capsys.readouterr().err
    assert main(["enabel"]) == 2
    assert capsys.readouterr().err == "error: SCRIPT is 'enabel': there is no such file; did you mean enable?\n"
    (tmp_path / "enabel").touch()
    assert main(["enabel"]) == 0


def test_a_reader_may_stop_early(site_packages, monkeypatch, tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["status"]) == 1


def test_a_script_that_cannot_be_read(tmp_path, capsys):
    assert main([str(tmp_path / "missing.py")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: SCRIPT is ")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--device", "tpu", "x.py"])


def test_an_older_apex_that_is_used_is_named(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "apex" / "amp.py").write_text("OLD = 1")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([script("from apex.amp import OLD")]) == 0
    assert capsys.readouterr().err == "apex_compat: the script gets amp of the installed apex, not of apex_compat\n"


def test_the_first_argument_of_the_old_launcher_reaches_the_script(script, capsys):
    """`python -m torch.distributed.launch -m apex_compat SCRIPT` puts it before SCRIPT."""
    path = script("import sys; print(sys.argv[1:])")
    assert main(["--local-rank=1", path, "--lr", "2"]) == 0
    assert capsys.readouterr().out == "['--local-rank=1', '--lr', '2']\n"


# --- processes of a script ---

SPAWNS = """
    import multiprocessing, os, subprocess, sys
    import torch
    from apex import amp

    def child(path):
        with open(path, "w") as file:
            print(amp.__name__, torch.zeros(1, device="cuda").device, torch.zeros(1).cuda().device, file=file)

    if __name__ == "__main__":
        process = multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1],))
        process.start()
        process.join()
        command = "import apex, sys; print('torch' in sys.modules, any('children' in p for p in sys.path))"
        done = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
        print(process.exitcode, done.stdout + done.stderr, end="")
"""


def test_a_spawned_process_has_apex_and_its_device(script, tmp_path, monkeypatch, capsys):
    """And a subprocess. Each reads its environment alone, and a sitecustomize that was there runs, too."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("import sys; print('own', file=sys.stderr)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), str(ROOT)]))
    before = dict(os.environ)
    assert main(["--device", "cpu", script(SPAWNS), str(tmp_path / "said")]) == 0
    assert (tmp_path / "said").read_text() == "apex_compat.amp cpu cpu\n"
    assert capsys.readouterr().out == "0 False False\nown\n"
    assert dict(os.environ) == before


TWO_RANKS = """
    import argparse, os
    import torch
    from torch import distributed as dist
    from apex import amp
    from apex.parallel import DistributedDataParallel

    parser = argparse.ArgumentParser()
    parser.add_argument("--local-rank", type=int, default=int(os.environ["LOCAL_RANK"]))
    rank = parser.parse_args().local_rank
    torch.cuda.set_device(rank)
    dist.init_process_group(backend="nccl", init_method="env://")
    torch.manual_seed(rank)
    model = torch.nn.Linear(4, 2).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = amp.initialize(model, optimizer, opt_level="O2", verbosity=0)
    model = DistributedDataParallel(model)
    for _ in range(3):
        loss = model(torch.randn(8, 4, device="cuda")).square().mean()
        with amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = next(amp.master_params(optimizer))
    weights = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(weights, weight)
    open(f"said-{rank}", "w").write(f"{dist.get_backend()} {torch.equal(*weights)}")
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "torch.distributed.launch"])
def test_a_script_trains_in_two_processes(script, tmp_path, launcher):
    command = [sys.executable, "-m", launcher, "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "apex_compat", "--device", "cpu", script(TWO_RANKS)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=threads, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)] == ["gloo True"] * 2


# --- a whole environment ---


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    monkeypatch.setattr(environment, "is_installed", lambda: True)
    return folder


def starts_with(site_packages, text, *paths):
    """Run `text` in a Python that has the folder as site-packages, and `paths` where it looks for modules."""
    program = f"import site, sys; sys.path += {[*map(str, paths)]}; site.addsitedir({str(site_packages)!r}); {text}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_an_environment_is_switched_on_and_off(site_packages, capsys):
    pth = site_packages / "apex_compat-enabled.pth"

    def said(command):
        assert main([command]) == 0
        return capsys.readouterr().out.splitlines()

    assert said("disable") == [f"apex_compat is not enabled: there is no {pth}"]
    assert said("status")[0] == f"not enabled: python -m apex_compat enable would write {pth}"
    wrote = said("enable")
    assert list(site_packages.iterdir()) == [pth]
    assert wrote[:2] == [f"wrote {pth}, one line:", f"    {pth.read_text().strip()}"]
    assert "disable" in wrote[-1]
    assert said("enable") == [f"apex_compat is enabled already, by {pth}"]
    assert said("status")[0] == f"enabled by {pth}"
    # A process finds apex. Its start costs no import of torch, and works where apex_compat is gone.
    assert starts_with(site_packages, "import apex; print(apex, 'torch' in sys.modules)", ROOT).endswith("> False\n")
    assert starts_with(site_packages, "print(*[n for n in sys.modules if 'apex' in n])") == "\n"
    assert said("disable") == [f"removed {pth}; `import apex` is again what it was"]
    assert list(site_packages.iterdir()) == []
    assert starts_with(site_packages, "print(*[n for n in sys.modules if 'apex' in n])", ROOT) == "\n"


@pytest.mark.parametrize("command", ["enable", "disable"])
def test_an_environment_that_cannot_be_written_is_refused(site_packages, capsys, command):
    pth = site_packages / "apex_compat-enabled.pth"
    if command == "enable":
        site_packages.rmdir()
    else:
        (pth / "folder").mkdir(parents=True)
    assert main([command]) == 1
    error = capsys.readouterr().err
    assert re.match(f"error: cannot (write|remove) {re.escape(str(pth))}: .*; use a virtual environment, or", error)
    assert error.count("\n") == 1


def test_an_environment_without_this_package_is_refused(site_packages, monkeypatch, capsys):
    monkeypatch.setattr(environment, "is_installed", lambda: False)
    assert main(["enable"]) == 1
    assert capsys.readouterr().err.startswith("error: apex_compat is not installed in ")
    assert list(site_packages.iterdir()) == []


def test_status_says_where_each_module_comes_from(site_packages, monkeypatch, capsys):
    for name in ("__init__", "optimizers", "normalization"):
        path = site_packages / "apex" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (site_packages / "amp_C.py").touch()
    assert main(["status"]) == 0
    assert "  apex.amp                  apex_compat" in capsys.readouterr().out.splitlines()
    monkeypatch.syspath_prepend(site_packages)
    assert main(["status"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:-1])
    assert {name for name, origin in rows.items() if origin != "apex_compat"} == {
        *("apex.optimizers", "apex.normalization", "amp_C")
    }
    assert rows["apex.optimizers"] == str(site_packages / "apex" / "optimizers.py")


def test_a_script_that_is_called_like_a_command(script, monkeypatch, tmp_path, capsys):
    script("print('I am', __file__)", name="enable")
    monkeypatch.chdir(tmp_path)
    assert main(["./enable"]) == 0
    assert capsys.readouterr().out == f"I am {tmp_path}/./enable\n"
    with pytest.raises(SystemExit, match="2"):
        main(["enable", "now"])


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


CALLS = {
    "a script asks if it may": (lambda: torch.cuda.is_available(), False),
    "devices": (lambda: (torch.cuda.device_count(), torch.cuda.get_device_name(0)), (1, "CPU")),
    "memory": (lambda: (torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()), (None, None)),
    "peak": (lambda: torch.cuda.max_memory_allocated(), 0),
    "random state": (lambda: torch.cuda.set_rng_state(torch.cuda.get_rng_state()), None),
    "nvtx": (lambda: (torch.cuda.nvtx.range_push("step"), torch.cuda.nvtx.range_pop()), (None, None)),
    "storage": (lambda: torch.ones(1).untyped_storage().cuda(0).device.type, "cpu"),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_of_torch_cuda_on_the_cpu(name):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA: these are the answers without it")
    call, answer = CALLS[name]
    with cuda_on_cpu():
        assert call() == answer


def test_streams_and_events_on_the_cpu():
    with cuda_on_cpu():
        stream, begin, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
        begin.record()
        with torch.cuda.stream(stream), torch.cuda.device(0):
            x = torch.ones(2).cuda(non_blocking=True) * 2
        torch.cuda.current_stream().wait_stream(stream)
        x.record_stream(torch.cuda.current_stream())
        end.record()
        end.synchronize()
        assert begin.elapsed_time(end) >= 0
    assert x.tolist() == [2, 2]


@pytest.mark.parametrize("where", [None, "cuda:0", torch.device("cuda"), {"cuda:0": "cuda:1"}, lambda s, at: s.cuda(1)])
def test_a_file_is_loaded_on_the_cpu(tmp_path, where):
    torch.save({"w": torch.ones(2)}, tmp_path / "file")
    with cuda_on_cpu():
        assert torch.load(tmp_path / "file", map_location=where)["w"].tolist() == [1, 1]


def test_nccl_is_gloo_on_the_cpu(tmp_path):
    with cuda_on_cpu():
        dist.init_process_group("nccl", init_method=f"file://{tmp_path}/nccl-store", rank=0, world_size=1)
        try:
            model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1).cuda(), device_ids=[0])
            model(torch.ones(1, 2).cuda()).sum().backward()
            assert dist.get_backend(dist.new_group(backend="NCCL")) == dist.get_backend() == "gloo"
        finally:
            dist.destroy_process_group()
    assert next(model.parameters()).grad.tolist() == [[1, 1]]
