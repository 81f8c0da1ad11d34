"""Short scripts that use apex as its most common users do. Each ends with the line "done"."""

COMMON = """
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
x, y = torch.randn(16, 8).cuda(), (torch.arange(16) % 3).cuda()


def network(outputs=3):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, outputs)).cuda()


def check(losses):
    assert losses[-1] < 0.7 * losses[0], losses
    print("done")
"""

RUN_GLUE = """
import argparse
try:
    from apex import amp
except ImportError:
    raise ImportError("Please install apex from https://www.github.com/nvidia/apex to use fp16 training.")

parser = argparse.ArgumentParser()
parser.add_argument("--fp16_opt_level", default="O1")
args = parser.parse_args()
model = network()
no_decay = ["bias", "LayerNorm.weight"]
groups = [
    {"params": [p for n, p in model.named_parameters() if not any(d in n for d in no_decay)], "weight_decay": 0.01},
    {"params": [p for n, p in model.named_parameters() if any(d in n for d in no_decay)], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=0.02, eps=1e-8)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 30))
optimizer.load_state_dict(optimizer.state_dict())
model, optimizer = amp.initialize(model, optimizer, opt_level=args.fp16_opt_level)
losses = []
model.zero_grad()
for step in range(40):
    model.train()
    loss = F.cross_entropy(model(x), y) / 2
    with amp.scale_loss(loss, optimizer) as scaled_loss:
        scaled_loss.backward()
    if (step + 1) % 2 == 0:
        torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
    losses.append(loss.item())
check(losses)
"""

TIMM = """
import sys
try:
    from apex import amp
    has_apex = True
except ImportError:
    amp = None
    has_apex = False
assert has_apex


class ApexScaler:
    state_dict_key = "amp"

    def __call__(self, loss, optimizer, clip_grad=None, create_graph=False, need_update=True):
        with amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward(create_graph=create_graph)
        if need_update:
            if clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), clip_grad)
            optimizer.step()

    def state_dict(self):
        if "state_dict" in amp.__dict__:
            return amp.state_dict()

    def load_state_dict(self, state_dict):
        if "load_state_dict" in amp.__dict__:
            amp.load_state_dict(state_dict)


model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model, optimizer = amp.initialize(model, optimizer, opt_level="O1")
loss_scaler, losses = ApexScaler(), []
for step in range(30):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss_scaler(loss, optimizer, clip_grad=1.0)
    losses.append(loss.item())
state = loss_scaler.state_dict()
assert state["loss_scaler0"]["unskipped"] == 30, state
loss_scaler.load_state_dict(state)
check(losses)
"""

SWIN = """
try:
    # noinspection PyUnresolvedReferences
    from apex import amp
except ImportError:
    amp = None
assert amp is not None


def get_grad_norm(parameters, norm_type=2):
    parameters = list(filter(lambda p: p.grad is not None, parameters))
    return sum(p.grad.data.norm(norm_type).item() ** norm_type for p in parameters) ** (1.0 / norm_type)


losses = []
for level in ("O0", "O1", "O2"):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model, optimizer = amp.initialize(model, optimizer, opt_level=level)
    losses = []
    for step in range(12):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        with amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        if step % 2:
            grad_norm = torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 5.0)
        else:
            grad_norm = get_grad_norm(amp.master_params(optimizer))
        assert grad_norm > 0
        optimizer.step()
        losses.append(loss.item())
    save_state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "amp": amp.state_dict()}
    model.load_state_dict(save_state["model"], strict=False)
    optimizer.load_state_dict(save_state["optimizer"])
    amp.load_state_dict(save_state["amp"])
check(losses)
"""

SWAV = """
import apex
from apex.parallel.LARC import LARC

model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
model = apex.parallel.convert_syncbn_model(model, process_group=apex.parallel.create_syncbn_process_group(0)).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-6)
optimizer = LARC(optimizer=optimizer, trust_coefficient=0.02, clip=False)
model, optimizer = apex.amp.initialize(model, optimizer, opt_level="O1")


def restart_from_checkpoint(**kwargs):
    kwargs["amp"].load_state_dict(kwargs["amp"].state_dict())


restart_from_checkpoint(amp=apex.amp)
losses = []
for step in range(40):
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    with apex.amp.scale_loss(loss, optimizer) as scaled_loss:
        scaled_loss.backward()
    optimizer.step()
    losses.append(loss.item())
check(losses)
"""

XLM = """
import apex

names = ["encoder", "decoder"]
encoder, decoder = network(8), network()
optimizers = {"model": torch.optim.Adam(list(encoder.parameters()) + list(decoder.parameters()), lr=0.01)}
opt_names = list(optimizers)
models, opts = apex.amp.initialize(
    [encoder, decoder], [optimizers[k] for k in opt_names], opt_level=("O%i" % 1)
)
encoder, decoder = models
optimizers = dict(zip(opt_names, opts))
accumulate, losses = 2, []
for n_iter in range(40):
    loss = F.cross_entropy(decoder(encoder(x)), y)
    opts = [optimizers[k] for k in opt_names]
    if n_iter % accumulate == 0:
        with apex.amp.scale_loss(loss, opts) as scaled_loss:
            scaled_loss.backward()
        for name in opt_names:
            norm = nn.utils.clip_grad_norm_(apex.amp.master_params(optimizers[name]), 5.0).item()
            assert norm > 0
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
    else:
        with apex.amp.scale_loss(loss, opts, delay_unscale=True) as scaled_loss:
            scaled_loss.backward()
    losses.append(loss.item())
check(losses)
"""

MASKRCNN = """
from apex import amp


def _nms(boxes, scores, threshold):
    assert boxes.dtype == scores.dtype == torch.float32
    return scores.argsort()[:2]


nms = amp.float_function(_nms)


class ROIAlign(nn.Module):
    @amp.float_function
    def forward(self, input, rois):
        assert input.dtype == torch.float32
        return input * rois.sum()


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.align = network(), ROIAlign()

    def forward(self, x):
        out = self.body(x)
        assert out.dtype == torch.float16
        return self.align(out, torch.ones(2, device=x.device))


model = Detector()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
use_mixed_precision = True
amp_opt_level = "O1" if use_mixed_precision else "O0"
model, optimizer = amp.initialize(model, optimizer, opt_level=amp_opt_level)
losses = []
for step in range(30):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    with amp.scale_loss(loss, optimizer) as scaled_losses:
        scaled_losses.backward()
    optimizer.step()
    losses.append(loss.item())
amp_handle = amp.init(enabled=use_mixed_precision, verbose=False)
with torch.no_grad():
    kept = nms(x.half(), model(x)[:, 0].half(), 0.5)
assert len(kept) == 2
check(losses)
"""

PIX2PIXHD = """
from apex import amp

G, D = network(8), network(1)
model = nn.ModuleDict({"G": G, "D": D})
optimizer_G = torch.optim.Adam(G.parameters(), lr=0.01, betas=(0.5, 0.999))
optimizer_D = torch.optim.Adam(D.parameters(), lr=0.01, betas=(0.5, 0.999))
model, [optimizer_G, optimizer_D] = amp.initialize(model, [optimizer_G, optimizer_D], opt_level="O1")
losses = []
for step in range(15):
    fake = model["G"](x)
    loss_D = F.mse_loss(model["D"](fake.detach()), torch.zeros_like(x[:, :1])) + F.mse_loss(
        model["D"](x), torch.ones_like(x[:, :1])
    )
    loss_G = F.mse_loss(model["D"](fake), torch.ones_like(x[:, :1])) + 10 * F.l1_loss(fake, x)
    optimizer_G.zero_grad()
    with amp.scale_loss(loss_G, optimizer_G) as scaled_loss:
        scaled_loss.backward()
    optimizer_G.step()
    optimizer_D.zero_grad()
    with amp.scale_loss(loss_D, optimizer_D) as scaled_loss:
        scaled_loss.backward()
    optimizer_D.step()
    losses.append(loss_G.item())
check(losses)
"""

TACOTRON2 = """
class Tacotron(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.cell = nn.LSTMCell(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.gate = nn.Linear(8, 3)
        self.score_mask_value = torch.finfo(torch.float16).min

    def forward(self, x):
        assert x.dtype == torch.float16
        out, _ = self.encoder(x.view(8, 2, 8))
        hidden, _ = self.cell(out[:, -1])
        return self.gate(self.norm(hidden))


model = Tacotron().cuda()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=1e-6)
from apex import amp
model, optimizer = amp.initialize(model, optimizer, opt_level="O2")
losses = []
for iteration in range(30):
    model.zero_grad()
    loss = F.cross_entropy(model(x), y[:8])
    reduced_loss = loss.item()
    with amp.scale_loss(loss, optimizer) as scaled_loss:
        scaled_loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
    is_overflow = grad_norm != grad_norm or grad_norm == float("inf")
    assert not is_overflow or iteration < 5
    optimizer.step()
    losses.append(reduced_loss)
check(losses)
"""

FAST_ADVERSARIAL = """
from apex import amp

model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).cuda()
model.train()
opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
amp_args = dict(opt_level="O2", loss_scale="1.0", verbosity=False)
if amp_args["opt_level"] == "O2":
    amp_args["master_weights"] = True
model, opt = amp.initialize(model, opt, **amp_args)
criterion = nn.CrossEntropyLoss()
scheduler = torch.optim.lr_scheduler.CyclicLR(opt, base_lr=0.0, max_lr=0.2, step_size_up=15, step_size_down=15)
epsilon, losses = 0.05, []
delta = torch.zeros(16, 8).cuda()
delta.requires_grad = True
for i in range(30):
    output = model(x + delta[: x.size(0)])
    loss = F.cross_entropy(output, y)
    with amp.scale_loss(loss, opt) as scaled_loss:
        scaled_loss.backward()
    grad = delta.grad.detach()
    assert grad.abs().sum() > 0
    delta.data = torch.max(torch.min(delta + epsilon * torch.sign(grad), torch.tensor(epsilon)), torch.tensor(-epsilon))
    delta.grad.zero_()
    output = model(x + delta[: x.size(0)].detach())
    loss = criterion(output, y)
    opt.zero_grad()
    with amp.scale_loss(loss, opt) as scaled_loss:
        scaled_loss.backward()
    opt.step()
    scheduler.step()
    losses.append(loss.item())
check(losses)
"""

UNITER = """
from apex import amp

tasks = ["mlm", "itm", "mrfr"]
model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
task2scaler = {t: i for i, t in enumerate(tasks)}
model, optimizer = amp.initialize(model, optimizer, num_losses=len(tasks), enabled=True, opt_level="O2")
gradient_accumulation_steps, losses = 2, []
optimizer.zero_grad()
optimizer.step()
for step in range(48):
    name = tasks[step // 2 % 3]
    loss = F.cross_entropy(model(x), y, reduction="none").mean()
    delay_unscale = (step + 1) % gradient_accumulation_steps != 0
    with amp.scale_loss(loss, optimizer, delay_unscale=delay_unscale, loss_id=task2scaler[name]) as scaled_loss:
        scaled_loss.backward()
        if not delay_unscale:
            grads = [p.grad.data for p in model.parameters() if p.requires_grad and p.grad is not None]
            assert len(grads) == len(list(model.parameters()))
    if (step + 1) % gradient_accumulation_steps == 0:
        grad_norm = torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 2.0)
        assert grad_norm < 100
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
assert [s["unskipped"] for s in amp.state_dict().values()] == [8, 8, 8], amp.state_dict()
model = network()
model = amp.initialize(model, enabled=True, opt_level="O2")
assert model(x).dtype == torch.float32
check(losses)
"""

BERT = """
from apex import amp
from apex.amp import _amp_state

model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
model, optimizer = amp.initialize(model, optimizer, opt_level="O2", loss_scale="dynamic", master_weights=True)
amp._amp_state.loss_scalers[0]._loss_scale = 2**14
optimizer._lazy_init_maybe_master_weights()
optimizer._amp_stash.lazy_init_called = True
optimizer.load_state_dict(optimizer.state_dict())
for param, saved in zip(amp.master_params(optimizer), [p.clone() for p in amp.master_params(optimizer)]):
    param.data.copy_(saved.data)
losses = []
for step in range(60):
    loss = F.cross_entropy(model(x), y) / 2
    last = step % 2 == 1
    with amp.scale_loss(loss, optimizer, delay_overflow_check=not last) as scaled_loss:
        scaled_loss.backward()
    if last:
        scaler = _amp_state.loss_scalers[0]
        assert scaler.loss_scale() == 2.0**14
        optimizer.step()
        for param in model.parameters():
            param.grad = None
    losses.append(loss.item())
assert amp._amp_state.loss_scalers[0]._unskipped == 30
assert len(optimizer._amp_stash.all_fp32_from_fp16_params) == 6
check(losses)
"""

SCRIPTS = {
    "transformers": RUN_GLUE,
    "timm": TIMM,
    "Swin": SWIN,
    "swav": SWAV,
    "XLM": XLM,
    "maskrcnn": MASKRCNN,
    "pix2pixHD": PIX2PIXHD,
    "tacotron2": TACOTRON2,
    "fast_adversarial": FAST_ADVERSARIAL,
    "UNITER": UNITER,
    "BERT": BERT,
}
