"""`import apex` gives apex_compat, lazily and as one copy. An installed apex keeps what it has."""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import apex_compat
from apex_compat import amp, fp16_utils, parallel

STATE, LARC = amp._amp_state, parallel.LARC
"""Names of packages that are no modules, though a module of the same name is in them."""
ROOT = Path(__file__).parents[2]
TOPS = ("apex", "amp_C", "apex_C")


def apex_modules():
    return [name for name in sys.modules if name.split(".")[0] in TOPS]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    finders = list(sys.meta_path)
    yield
    assert apex_modules() == []
    assert sys.meta_path == finders


IMPORTS = """
import apex
import apex.amp as amp
import amp_C, apex_C
import apex.RNN, apex.fused_dense, apex.mlp
from apex import amp, fp16_utils, optimizers, parallel
from apex.RNN.models import LSTM
from apex.amp import _amp_state, scale_loss
from apex.amp._amp_state import _amp_state, maybe_print
from apex.amp._initialize import applier
from apex.amp._process_optimizer import *
from apex.amp.amp import init
from apex.amp.compat import *
from apex.amp.frontend import O2, Properties, opt_levels
from apex.amp.handle import AmpHandle, NoOpHandle
from apex.amp.lists import functional_overrides, tensor_overrides, torch_overrides
from apex.amp.opt import OptimWrapper
from apex.amp.rnn_compat import *
from apex.amp.scaler import LossScaler
from apex.amp.utils import *
from apex.amp.wrap import *
from apex.fp16_utils import *
from apex.fp16_utils.fp16_optimizer import FP16_Optimizer
from apex.fp16_utils.fp16util import network_to_half
from apex.fp16_utils.loss_scaler import DynamicLossScaler
from apex.multi_tensor_apply import multi_tensor_applier
from apex.normalization import FusedLayerNorm, FusedRMSNorm
from apex.normalization.fused_layer_norm import FusedLayerNorm as LayerNorm, fused_layer_norm_affine
from apex.optimizers import FusedAdam, FusedLAMB, FusedNovoGrad, FusedSGD
from apex.optimizers.fused_adam import FusedAdam
from apex.parallel import DistributedDataParallel as DDP, Reducer, SyncBatchNorm, convert_syncbn_model
from apex.parallel.LARC import LARC
from apex.parallel.distributed import flat_dist_call
from apex.parallel.optimized_sync_batchnorm import SyncBatchNorm
from amp_C import multi_tensor_l2norm, multi_tensor_scale
from apex_C import flatten, unflatten
"""


def test_what_scripts_import_is_apex_compat_itself():
    """One copy of each module, in whatever order; `amp._amp_state` stays the object, whoever imports its module."""
    lines = IMPORTS.strip().splitlines()
    for order in (lines, lines[::-1]):
        with apex_compat.provide_apex():
            names = {}
            for line in order:
                exec(line, names)  # noqa: S102
                assert importlib.import_module("apex.amp")._amp_state is STATE
                assert importlib.import_module("apex.parallel").LARC is LARC
            found = {name: sys.modules[name] for name in apex_modules() if name != "apex"}
            apex = names["apex"]
            assert apex.amp.initialize is amp.initialize
            assert importlib.util.find_spec("apex").name == "apex"
            assert not hasattr(apex, "reparameterization")
        for name, module in found.items():
            ours = "apex_compat" + (f".{name}" if name in TOPS else name.removeprefix("apex"))
            assert module is sys.modules[ours], name
            assert module.__spec__.name == ours
    for name in ("apex", "apex.fp16_utils", "amp_C"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_the_line_of_the_readme_changes_a_script(tmp_path):
    """Way in: another word in the imports. Nothing is provided, and everything is found."""
    if shutil.which("sed") is None:
        pytest.skip("there is no sed on this machine")
    line = re.search(r"^sed .*", (ROOT / "apex_compat" / "README.md").read_text(), re.MULTILINE)[0]
    script = tmp_path / "train.py"
    of_apex = [line for line in IMPORTS.splitlines() if not re.search("amp_C|apex_C|import apex[.].*,", line)]
    script.write_text("\n".join([*of_apex, "import apex", "assert apex.amp.initialize is apex.amp.initialize"]))
    subprocess.run([*shlex.split(line)[:-1], str(script)], check=True)
    names = {}
    exec(script.read_text(), names)  # noqa: S102
    assert names["amp"] is names["apex"].amp is amp


@pytest.mark.parametrize(
    ("statement", "kind", "message"),
    [
        ("import apex.contrib.xentropy", ImportError, "apex.contrib.xentropy is not offered: use torch.nn.functional."),
        ("from apex.contrib import sparsity", ImportError, "apex.contrib.sparsity is not offered: use torch.sparse."),
        ("from apex.contrib.optimizers import FP16_Optimizer", ImportError, "apex.fp16_utils.FP16_Optimizer"),
        ("from apex import transformer", ImportError, "apex.transformer is not offered: use Megatron-Core"),
        ("import apex; apex.transformer", AttributeError, "apex.transformer is not offered: use Megatron-Core"),
        ("import apex.nothing", ModuleNotFoundError, "No module named 'apex.nothing'"),
        ("import apex.amp.nothing", ModuleNotFoundError, "No module named 'apex.amp.nothing'"),
        ("from apex import nothing", ImportError, "cannot import name 'nothing'"),
        ("import apex; apex.nothing", AttributeError, "module 'apex' has no attribute 'nothing'"),
    ],
)
def test_what_is_not_offered_says_what_to_use(statement, kind, message):
    with apex_compat.provide_apex(), pytest.raises(kind) as raised:
        exec(statement, {})  # noqa: S102
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_it_can_be_restored_more_than_once_and_in_any_order():
    first, second = apex_compat.provide_apex(), apex_compat.provide_apex()
    module = importlib.import_module("apex.fp16_utils")
    first.restore()
    assert importlib.import_module("apex.fp16_utils") is module is fp16_utils
    second.restore()
    first.restore()


def test_packages_are_attributes_before_they_are_imported(monkeypatch):
    """`import apex_compat` then gives apex_compat.mlp, as `import apex` gave apex.mlp."""
    monkeypatch.delattr(apex_compat, "mlp", raising=False)
    assert apex_compat.mlp is importlib.import_module("apex_compat.mlp")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = apex_compat.nothing


def test_import_apex_alone_imports_no_torch():
    text = (
        "import sys, apex_compat; apex_compat.provide_apex(); import apex; print({'torch', 'typing'} & {*sys.modules})"
    )
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.check_output([sys.executable, "-S", "-W", "error", "-c", text], env=here, text=True)
    assert said == "set()\n"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An apex of NVIDIA's that kept some modules."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / "apex" / (name.replace("__", "/") if not name.startswith("__") else name)
            path = path.with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    return write


@pytest.mark.parametrize("imported", [False, True], ids=["not imported yet", "imported before"])
def test_an_installed_apex_keeps_what_it_has(installed, tmp_path, imported):
    installed(
        __init__="from . import optimizers\nVERSION = 7", optimizers="FusedAdam = 1", contrib__xentropy="LOSS = 2"
    )
    (tmp_path / "apex" / "parallel").mkdir()  # an empty folder, as uninstalling leaves it, is no module
    before = importlib.import_module("apex") if imported else None
    attributes = dict(vars(before)) if before else {}
    with apex_compat.provide_apex() as provided:
        apex = importlib.import_module("apex")
        assert (apex.VERSION, apex.optimizers.FusedAdam) == (7, 1)
        assert importlib.import_module("apex.contrib.xentropy").LOSS == 2
        assert importlib.import_module("apex.amp") is apex.amp is amp
        assert apex.fp16_utils is fp16_utils
        assert apex.parallel is sys.modules["apex_compat.parallel"]
        assert apex.__spec__.loader is apex.__loader__
        assert apex.__file__ == apex.__spec__.loader.get_filename("apex")
    if before:
        provided.restore()  # does nothing
        assert sys.modules["apex"] is before
        assert dict(vars(before)) == attributes
        for name in apex_modules():
            del sys.modules[name]


def test_an_older_apex_keeps_its_amp(installed):
    installed(__init__="", amp="initialize = 1")
    with apex_compat.provide_apex():
        assert importlib.import_module("apex.amp").initialize == 1
        assert importlib.import_module("apex.fp16_utils") is fp16_utils


def test_an_installed_apex_that_is_broken_is_replaced_with_a_warning(installed):
    installed(__init__="from apex import optimizers\nraise OSError('libcudart is missing')", optimizers="FusedAdam = 1")
    with apex_compat.provide_apex():
        with pytest.warns(UserWarning, match="libcudart is missing") as caught:
            exec("import apex", {})  # noqa: S102
        assert caught[0].filename == "<string>"
        assert importlib.import_module("apex.optimizers") is importlib.import_module("apex_compat.optimizers")


@pytest.mark.parametrize("name", ["apex.transformer", "apex.contrib.xentropy"])
def test_who_looks_for_a_part_that_is_not_offered_finds_none(name):
    with apex_compat.provide_apex():
        assert importlib.util.find_spec(name) is None
        with pytest.raises(ModuleNotFoundError, match="is not offered: use"):
            importlib.import_module(name)
