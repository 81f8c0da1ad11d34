"""`python -m apex_compat migrate` turns scripts into ones that train alike with torch.amp, or says why it does not."""

import re
import textwrap

import pytest
import torch

import apex_compat
from apex_compat.__main__ import main
from apex_compat.migration.script import migrate_text

START = """
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
x, y = torch.randn(16, 8), torch.arange(16) % 3
"""
NETWORK = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
"""

SCRIPTS = {
    "one model": """
        from apex import amp
        {network}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = amp.initialize(model, optimizer, opt_level="O1", verbosity=0)
        losses = []
        for _ in range(8):
            output = model(x)  # the forward pass
            loss = F.cross_entropy(output, y)
            optimizer.zero_grad()
            with amp.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 0.5)
            optimizer.step()
            losses.append(loss.item())
        """,
    "accumulation, and a loss that is divided": """
        import apex
        {network}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        net, opt = apex.amp.initialize(model, optimizer, verbosity=0, loss_scale="dynamic")
        losses = []
        for step in range(8):
            loss = F.cross_entropy(net(x), y)
            if True:
                loss = loss / 2
            with apex.amp.scale_loss(loss, opt, delay_unscale=step % 2 == 0) as scaled:
                scaled.backward()
                losses.append(loss.item())
            if step % 2:
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                opt.step()
                opt.zero_grad()
        """,
    "functions, and half precision that is an option": """
        class Args:
            fp16, level = {fp16}, "O1"
        args = Args()
        if args.fp16:
            try:
                from apex import amp
            except ImportError:
                raise ImportError("install it")

        def train(model, optimizer):
            losses = []
            for _ in range(8):
                loss = F.cross_entropy(model(x), y)
                if args.fp16:
                    with amp.scale_loss(loss, optimizer) as scaled_loss:
                        scaled_loss.backward()
                else:
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        def run():
            {network}
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            if args.fp16:
                model, optimizer = amp.initialize(model, optimizer, opt_level=args.level, verbosity=0)
            return train(model, optimizer)

        losses = run()
        """,
    "two losses of one forward pass": """
        import apex.amp as amp
        {network}
        first = torch.optim.SGD(model[0].parameters(), lr=0.1)
        second = torch.optim.SGD(model[2].parameters(), lr=0.1)
        model, [first, second] = amp.initialize(model, [first, second], num_losses=2, verbosity=0)
        losses = []
        for _ in range(8):
            output = model(x)
            one = F.cross_entropy(output, y)
            two = output.square().mean()
            with amp.scale_loss(one, [first, second], loss_id=0) as scaled_loss:
                scaled_loss.backward(retain_graph=True)
            with amp.scale_loss(two, [first, second], loss_id=1) as scaled_loss:
                scaled_loss.backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
            losses.append(one.item())
        """,
    "fused optimizer, norms and a checkpoint": """
        from apex import amp
        from apex.optimizers import FusedAdam
        from apex.normalization import FusedLayerNorm as LayerNorm, FusedRMSNorm
        from apex.parallel import convert_syncbn_model
        model = nn.Sequential(FusedRMSNorm(8), nn.Linear(8, 16), LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
        model = convert_syncbn_model(model)
        assert isinstance(model[2], LayerNorm)
        optimizer = FusedAdam(model.parameters(), lr=0.01, adam_w_mode=True)
        model, optimizer = amp.initialize(model, optimizer, verbosity=0)
        losses = []
        for _ in range(8):
            loss = F.cross_entropy(model(x), y)
            with amp.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        amp.load_state_dict(amp.state_dict())
        """,
}


def written(name, fp16=True):
    """The script of the table: one that runs."""
    text = textwrap.dedent(SCRIPTS[name])
    lines = []
    for line in text.splitlines():
        margin = line[: len(line) - len(line.lstrip())]
        network = textwrap.indent(NETWORK.strip(), margin)
        lines.append(network if line.strip() == "{network}" else line.replace("{fp16}", str(fp16)))
    return START + "\n".join(lines) + "\n"


def losses_of(text, apex):
    """Run the script. One that was migrated runs without apex."""
    names = {"__name__": "__main__"}
    if not apex:
        exec(compile(text, "migrated", "exec"), names)  # noqa: S102
        return names["losses"]
    with apex_compat.provide_apex():
        exec(compile(text, "script", "exec"), names)  # noqa: S102
        apex_compat.amp._amp_state.handle._deactivate()
    return names["losses"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_migrated_script_trains_alike(name):
    """Within half precision: 2**-11 for a number, and more after eight steps."""
    if torch.cuda.is_available():
        pytest.skip("the scripts compute on the CPU; on a machine with CUDA the migrated ones autocast there")
    before = written(name)
    after = migrate_text(before).text
    code = re.sub(r"#.*", "", after)
    assert not re.search(r"\b(apex|scale_loss|master_params|Fused)", code), after
    assert "# the forward pass" in after or "# the forward pass" not in before
    expected, found = losses_of(before, apex=True), losses_of(after, apex=False)
    assert found == pytest.approx(expected, rel=2e-3)
    assert found[-1] < found[0]
    assert migrate_text(after).text == after


def test_without_half_precision_a_migrated_script_is_plain_fp32():
    name = "functions, and half precision that is an option"
    before = written(name, fp16=False)
    assert losses_of(migrate_text(before).text, apex=False) == losses_of(before, apex=False)


LOOP = """\
from apex import amp
model, opt = amp.initialize(model, opt, opt_level={level})
loss = model(x)
with amp.scale_loss(loss, opt) as scaled:
    scaled.backward()
opt.step()
"""

GAN = """\
from apex import amp
(G, D), (oG, oD) = amp.initialize([G, D], [oG, oD])
d = D(x)
with amp.scale_loss(d, oD) as s:
    s.backward()
g = G(x)
with amp.scale_loss(g, oG) as s: s.backward()
"""
ATTACK = LOOP.format(level='"O1"').replace("opt.step", "grad = delta.grad\nopt.step")

KEPT = {
    "O2": (LOOP.format(level='"O2"'), "O2: torch.amp has no half-precision weights with fp32 masters"),
    "O3": (LOOP.format(level='"O3"'), "O3: model.half()"),
    "an argument that autocast does not have": (
        LOOP.format(level='"O1", cast_model_type=half'),
        "left as it is: cast_model_type is given",
    ),
    "arguments in a dict": (LOOP.format(level='"O1", **more'), "the arguments of amp.initialize are not written out"),
    "no loss scale": (LOOP.format(level='"O1", loss_scale="static"'), "left as it is: loss_scale is 'static'"),
    "a computed loss scale": (LOOP.format(level='"O1", loss_scale=ask()'), "loss_scale is computed in the call"),
    "O2 by position": (LOOP.replace("opt_level={level}", 'True, "O2"'), "left as it is: opt_level is O2"),
    "private names": (
        LOOP.format(level='"O1"') + "amp._amp_state.loss_scalers[0]._loss_scale = 1\n",
        "private: the scale",
    ),
    "private attributes": (LOOP.format(level='"O1"') + "opt._amp_stash\n", "private: torch.amp has no masters"),
    "the old interface": ("from apex import amp\namp.init()\n", "torch.autocast around the forward pass and the loss"),
    "no initialize": (
        "from apex import amp\nwith amp.scale_loss(loss, opt) as scaled:\n    scaled.backward()\n",
        "amp.initialize is not called in this file",
    ),
    "the loss comes from elsewhere": (
        LOOP.format(level='"O1"').replace("loss = model(x)\n", ""),
        "the forward pass that belongs to line 3 is in another function",
    ),
    "steps under unlike conditions": (
        GAN + "oD.step()\nif i % 2:\n    oG.step()\n",
        "the steps of line 8 and of others are taken under unlike conditions",
    ),
    "gradients that wait while another optimizer steps": (
        GAN.replace("with amp.scale_loss(g, oG)", "oD.step()\nwith amp.scale_loss(g, oG)")
        + "if i % 2:\n    oG.step()\n",
        "gradients of line 8 wait for a later step while another optimizer steps",
    ),
    "the gradient of an input": (
        ATTACK.replace("delta.grad", "delta.grad.detach()"),
        "line 6 reads a gradient that is still times the scale",
    ),
    "a gradient that is logged": (
        LOOP.format(level='"O1"').replace("opt.step", "log(model.w.grad)\nopt.step"),
        "line 6 reads a gradient that is still times the scale",
    ),
    "clipping at each micro-batch": (
        LOOP.format(level='"O1"').replace("opt.step", "clip_grad_norm_(amp.master_params(opt), 1)\nif i % 2: opt.step"),
        "line 6 looks at gradients elsewhere than before a step",
    ),
    "clipping in a loop before the step": (
        LOOP.format(level='"O1"').replace("opt.step", "for _ in x: clip_grad_norm_(model.parameters(), 1)\nopt.step"),
        "line 6 looks at gradients elsewhere than before a step",
    ),
    "clipping twice": (
        LOOP.format(level='"O1"').replace("opt.step", "if a: clip_grad_norm_(p, 1)\nclip_grad_norm_(p, 1)\nopt.step"),
        "line 7 looks at gradients a second time",
    ),
    "clipping for one of two optimizers": (
        GAN + "clip_grad_norm_(D.parameters(), 1)\noD.step()\noG.step()\n",
        "line 8 looks at gradients elsewhere than before a step",
    ),
    "a scaler of an object, outside of its methods": (
        """\
from apex import amp
class Trainer:
    def __init__(self, model, opt):
        self.model, self.opt = amp.initialize(model, opt)
        loss = self.model(x)
        with amp.scale_loss(loss, self.opt) as scaled: scaled.backward()
        self.opt.step()
save(amp.state_dict())
""",
        "line 8 uses amp outside of the methods of the class that calls amp.initialize",
    ),
    "a closure": (LOOP.format(level='"O1"').replace("step()", "step(closure)"), "scaler.step takes no closure"),
    "LARC": ("from apex.parallel import LARC\nopt = LARC(opt)\n", "torch has none; apex_compat.parallel keeps it"),
    "positions": ("from apex.optimizers import FusedAdam\nFusedAdam(p, 1, True)\n", "name the others"),
    "an option of apex alone": (
        "from apex.optimizers import FusedSGD\nFusedSGD(p, lr=1, wd_after_momentum=True)\n",
        "it has only what wd_after_momentum=False means",
    ),
    "fp16_utils": ("from apex.fp16_utils import *\n", "autocast and GradScaler, with fp32 weights"),
    "extension": ("import amp_C\namp_C.multi_tensor_scale(1, 2, 3, 4)\n", "the functions torch._foreach_*"),
    "not offered": ("from apex.contrib.xentropy import Loss\nLoss()\n", "use torch.nn.functional.cross_entropy"),
    "decorator": (
        "from apex import amp\n@amp.float_function\ndef f(x): return x\n",
        "torch.autocast(device, enabled=False)",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_mechanical_is_kept_with_a_remark(name):
    """It is imported from apex_compat, if that has it, and nothing else changes."""
    text, remark = KEPT[name]
    migrated = migrate_text(text)
    assert [said for _, _, said in migrated.remarks if remark in said], migrated.remarks
    expected = text if name == "not offered" else re.sub(r"\bapex\b", "apex_compat", text, count=1)
    expected = expected.replace("import amp_C", "from apex_compat import amp_C")
    assert migrated.text.removeprefix("import torch\n") == expected


CHANGED = {
    "apex DDP": (
        "from apex.parallel import DistributedDataParallel as DDP\nmodel = DDP(model, delay_allreduce=True)\n",
        "model = torch.nn.parallel.DistributedDataParallel(\n"
        "model, find_unused_parameters=True, broadcast_buffers=False)\n",
    ),
    "SyncBatchNorm": (
        "import apex\nmodel = apex.parallel.convert_syncbn_model(model, process_group=g)  # synced\n",
        "model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=g)  # synced\n",
    ),
    "Adam": (
        "from apex.optimizers import FusedAdam\nFusedAdam(p, lr=1, adam_w_mode=False)\n",
        "torch.optim.Adam(p, lr=1)\n",
    ),
    "AdamW": (
        "from apex.optimizers import FusedAdam\nFusedAdam(p, 1)\n",
        "torch.optim.AdamW(p, 1, weight_decay=0.0)\n",
    ),
    "SGD": (
        "from apex.optimizers import FusedSGD\nFusedSGD(p, 0.1, momentum=0.9, set_grad_none=True)\n",
        "torch.optim.SGD(p, 0.1, momentum=0.9)\n",
    ),
    "Adagrad": ("from apex.optimizers import FusedAdagrad\nFusedAdagrad(p)\n", "torch.optim.Adagrad(p)\n"),
    "RMSNorm": ("from apex import normalization as n\nn.FusedRMSNorm(8)\n", "torch.nn.RMSNorm(8, eps=1e-5)\n"),
    "columns count bytes": (
        "from apex.optimizers import FusedSGD\nname = 'größe'; o = FusedSGD(p, lr=1)  # ü\n",
        "name = 'größe'; o = torch.optim.SGD(p, lr=1)  # ü\n",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_classes_become_those_of_torch(name):
    text, expected = CHANGED[name]
    assert migrate_text(text).text == "import torch\n" + expected.replace("(\nmodel, ", "(model, ")


IN_FUNCTIONS = """\
'''A docstring.'''
from __future__ import annotations
@decorated
def train(model, opt):
    from apex import amp
    model, opt = amp.initialize(model, opt)
    loss = model(x)
    with amp.scale_loss(loss, opt) as s: s.backward()
    opt.step()
"""


@pytest.mark.parametrize("lines", [0, 1, 2], ids=["first line", "after the docstring", "after __future__"])
def test_torch_is_imported_for_the_whole_script(lines):
    head, text = IN_FUNCTIONS.splitlines(keepends=True)[:lines], IN_FUNCTIONS.splitlines(keepends=True)[2:]
    after = migrate_text("".join(head + text)).text
    assert after.startswith("".join([*head, "import torch\n@decorated\n"]))
    assert after.count("import") == after.count("__future__ import") + 1


INITIALIZED = {
    "opt_level=args.level": 'enabled=args.level != "O0"',
    'use or forced, "O1"': "enabled=use or forced",
    "use or forced, args.level, loss_scale=None": 'enabled=(use or forced) and args.level != "O0"',
    'True, "O1", None, None, None, None, 128': "enabled=True, init_scale=128.0",
    'loss_scale="dynamic"': "",
    "loss_scale=args.scale": 'init_scale=2.0**16 if args.scale in (None, "dynamic") else float(args.scale)',
}
"""Arguments of initialize after the optimizer -> those of GradScaler after the device."""


@pytest.mark.parametrize("arguments", INITIALIZED)
def test_arguments_of_initialize_reach_the_scaler(arguments):
    text = LOOP.replace("opt_level={level}", arguments)
    options = ", ".join(filter(None, ("amp_device", INITIALIZED[arguments])))
    assert f"\nscaler = torch.amp.GradScaler({options})\n" in migrate_text(text).text


ODD = {
    "methods of a class": (
        """
        import torch
        from apex import amp
        class Trainer:
            def __init__(self, model, opt):
                self.model, self.opt = amp.initialize(model, opt, enabled=opt is not None)
            def step(self, x):
                loss = self.model(x).mean()
                with amp.scale_loss(loss, self.opt) as scaled:
                    scaled.backward()
                    # clip
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1)
                self.opt.step()
        """,
        """
        import torch
        class Trainer:
            def __init__(self, model, opt):
                self.model, self.opt = model, opt
                self.amp_device = "cuda" if torch.cuda.is_available() else "cpu"
                self.scaler = torch.amp.GradScaler(self.amp_device, enabled=opt is not None)
            def step(self, x):
                with torch.autocast(self.amp_device, torch.float16, enabled=self.scaler.is_enabled()):
                    loss = self.model(x).mean()
                scaled = self.scaler.scale(loss)
                scaled.backward()
                # clip
                self.scaler.unscale_(self.opt)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1)
                self.scaler.step(self.opt)
                self.scaler.update()
        """,
    ),
    "several statements on a line": (
        """
        from apex import amp; import torch
        def train(model, opt, xs, fp16):
            if fp16: net, opt = amp.initialize(model, opt)
            for i, x in enumerate(xs):
                loss = net(x).mean()
                with amp.scale_loss(loss, opt) as s: s.backward()
                if i % 2: opt.step(); opt.zero_grad()
        """,
        """
        pass; import torch
        def train(model, opt, xs, fp16):
            amp_device = "cuda" if torch.cuda.is_available() else "cpu"
            scaler = torch.amp.GradScaler(amp_device, enabled=False)
            if fp16: net, opt = model, opt; scaler = torch.amp.GradScaler(amp_device)
            for i, x in enumerate(xs):
                with torch.autocast(amp_device, torch.float16, enabled=scaler.is_enabled()):
                    loss = net(x).mean()
                scaler.scale(loss).backward()
                if i % 2: scaler.step(opt); scaler.update(); opt.zero_grad()
        """,
    ),
    "two rounds, and gradients that are read when they are unscaled": (
        """
        import torch
        from apex import amp
        model, opt = amp.initialize(model, opt)
        loss = model(x)
        with amp.scale_loss(loss, opt) as s: s.backward()
        torch.nn.utils.clip_grad_norm_(amp.master_params(opt), 1)
        print([p.grad for p in model.parameters() if p.grad is not None])
        opt.step()
        loss = model(x)
        with amp.scale_loss(loss, opt) as s: s.backward()
        torch.nn.utils.clip_grad_norm_(amp.master_params(opt), 1)
        opt.step()
        """,
        """
        import torch
        amp_device = "cuda" if torch.cuda.is_available() else "cpu"
        scaler = torch.amp.GradScaler(amp_device)
        with torch.autocast(amp_device, torch.float16, enabled=scaler.is_enabled()):
            loss = model(x)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_((p for group in opt.param_groups for p in group["params"]), 1)
        print([p.grad for p in model.parameters() if p.grad is not None])
        scaler.step(opt)
        scaler.update()
        with torch.autocast(amp_device, torch.float16, enabled=scaler.is_enabled()):
            loss = model(x)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_((p for group in opt.param_groups for p in group["params"]), 1)
        scaler.step(opt)
        scaler.update()
        """,
    ),
    "calls within calls, over lines": (
        """
        import torch
        import apex
        from apex import (
            amp,  # mixed precision
            optimizers,
        )
        model = apex.parallel.DistributedDataParallel(apex.parallel.convert_syncbn_model(model).cuda())
        model, opt = amp.initialize(
            model,
            optimizers.FusedAdam(
                model.parameters(),
                lr=1,
                set_grad_none=True,
            ),
        )
        for x in xs:
        \tloss = model(x)
        \twith amp.scale_loss(loss, opt) as s:
        \t\ts.backward()
        \topt.step()
        """,
        """
        import torch
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).cuda(), \
        broadcast_buffers=False)
        model, opt = model, torch.optim.AdamW(
                model.parameters(),
                lr=1, weight_decay=0.0,
            )
        amp_device = "cuda" if torch.cuda.is_available() else "cpu"
        scaler = torch.amp.GradScaler(amp_device)
        for x in xs:
        \twith torch.autocast(amp_device, torch.float16, enabled=scaler.is_enabled()):
        \t\tloss = model(x)
        \tscaler.scale(loss).backward()
        \tscaler.step(opt)
        \tscaler.update()
        """,
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_the_form_of_a_script_is_kept(name):
    before, after = (textwrap.dedent(text).replace("\\t", "\t") for text in ODD[name])
    assert migrate_text(before).text == re.sub(r"(?<=\S)  +", " ", after)


def test_functions_whose_casts_differ_are_named():
    text = LOOP.format(level='"O1"').replace("model(x)", "F.gelu(model(x)).softmax(-1).sum()")
    said = {(line, what): remark for line, what, remark in migrate_text(text).remarks}
    assert said[3, "F.gelu"].startswith("float32 under O1")
    assert said[3, "F.gelu(model(x)).softmax"].startswith("as a method of a tensor: half under O1, float32")


def test_the_command_changes_nothing_unless_it_is_told_to(tmp_path, capsys):
    path = tmp_path / "train.py"
    before = ("# coding: latin-1\r\n# gr\xfc\xdfe\r\n" + LOOP.format(level='"O1"').replace("\n", "\r\n")).encode(
        "latin-1"
    )
    path.write_bytes(before)
    assert main(["migrate", str(path)]) == 0
    out = capsys.readouterr().out
    assert path.read_bytes() == before
    assert f"{path}:4: amp.initialize: GradScaler, and torch.autocast" in out
    assert f"--- {path}\n+++ {path}\n" in out
    assert "\n-    scaled.backward()\n" in out
    assert "\n+scaler.scale(loss).backward()\n" in out
    assert main(["migrate", str(path), "--write"]) == 0
    assert capsys.readouterr().out == out + f"{path} is changed\n"
    after = path.read_bytes()
    assert after.startswith(b"# coding: latin-1\r\n# gr\xfc\xdfe\r\n")
    assert after.count(b"\n") == after.count(b"\r\n")
    assert main(["migrate", str(path)]) == 0
    assert capsys.readouterr().out == f"{path} has nothing of apex\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory; give a Python file"),
        (b"a = = 1\n", "cannot be read as Python in line 1: invalid syntax"),
        (b"print 'python 2'\n", "cannot be read as Python in line 1: Missing parentheses"),
        (b"\xff\xfe\n", "cannot be read as Python: "),
        (b"x = '\0'\n", "cannot be read as Python: "),
    ],
)
def test_a_script_that_cannot_be_read_is_one_line(tmp_path, capsys, content, reason):
    path = tmp_path / "train.py"
    if content is not None:
        path.write_bytes(content)
    assert main(["migrate", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: SCRIPT is {str(path)!r}: {reason}")
    assert error.count("\n") == 1
