"""The training loop. It knows no precision mode: everything that depends on one is behind `Precision`."""

import argparse
import math
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lm.checkpoint import check_writable, load_weights, save_model
from lm.console import Log, say, stop_on_interrupt
from lm.data import Corpus, batchify, get_batch
from lm.device import device_name, peak_memory_bytes
from lm.errors import RunError
from lm.model import Hidden, RNNModel, next_word_loss
from lm.precision import Precision
from lm.records import RunDirectory, environment, perplexity
from lm.trial import try_once

EVAL_BATCH_SIZE = 10
ANNEAL_FACTOR = 4.0


def detach(hidden: Hidden) -> Hidden:
    """`hidden` without its history, so that gradients stop at the batch's first word.

    What is not finite starts anew at 0, as all of it does in each epoch: one bad batch must not spoil every later one.
    """
    if isinstance(hidden, tuple):
        return _finite(hidden[0].detach()), _finite(hidden[1].detach())
    return _finite(hidden.detach())


def _finite(state: Tensor) -> Tensor:
    return state.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # without a wait for the device


@torch.no_grad()
def evaluate(model: RNNModel, precision: Precision, source: Tensor, bptt: int, max_batches: int | None = None) -> float:
    """Mean cross entropy in nats a word over `source` (shape (rows, columns)), summed in float64."""
    model.eval()
    losses, words = [], []
    with precision.forward():
        hidden = model.init_hidden(source.size(1))
        starts = range(0, len(source) - 1, bptt)[:max_batches]
        for i in tqdm(starts, desc="evaluation", unit="batch", leave=False, disable=None):
            tokens, targets = get_batch(source, i, bptt)
            loss, hidden = next_word_loss(model, tokens, targets, hidden)
            losses.append(loss)
            words.append(targets.numel())
    weights = torch.tensor(words, dtype=torch.float64)
    return float((torch.stack(losses).cpu().double() * weights).sum() / weights.sum())


def fit(args: argparse.Namespace, corpus: Corpus, model: RNNModel, precision: Precision) -> int:
    """Train, keep the best model, test it, and record the run; return the exit code.

    Raises:
        UsageError: the text is too short for the batch, this machine cannot run the dtype, or a place for the
            results cannot be written. Nothing was written then.
        RunError: the run diverged.
    """
    return Training(args, corpus, model, precision).run()


class Training:
    """One run from the first batch to the test perplexity; see `fit`."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, model: RNNModel, precision: Precision) -> None:
        self.args = args
        self.corpus = corpus
        self.model = model
        self.precision = precision
        self.train_data = batchify(corpus.train, args.batch_size, args.device, "train")
        self.valid_data = batchify(corpus.valid, EVAL_BATCH_SIZE, args.device, "valid")
        self.test_data = batchify(corpus.test, EVAL_BATCH_SIZE, args.device, "test")
        self.dtypes = try_once(model, precision, args)
        if args.run_dir is None or args.run_dir != args.save.parent:  # which is made, and tried, next
            check_writable("--save", args.save)
        self.records = RunDirectory(args.run_dir, f"{args.script}-{args.mode}")
        self.records.write_config(self.config())
        self.eval_batches = 1 if args.dry_run else None
        self.max_steps: int = 1 if args.dry_run else args.max_steps or sys.maxsize
        self.lr = args.lr
        self.best: float | None = None
        self.skipped_in_a_row = 0
        self.words = 0
        self.training_seconds = 0.0

    def config(self) -> dict[str, Any]:
        """What `config.json` holds: every flag, and what this run really is."""
        corpus = self.corpus
        return vars(self.args) | {
            "device_name": device_name(self.args.device),
            "environment": environment(),
            "dtypes": self.dtypes,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "corpus": {
                "name": corpus.name,
                "sha256": corpus.sha256,
                "train_tokens": len(corpus.train),
                "valid_tokens": len(corpus.valid),
                "test_tokens": len(corpus.test),
                "words": len(corpus.dictionary),
                "vocab_size": corpus.vocab_size,
            },
        }

    def run(self) -> int:
        """See `fit`."""
        status = "finished"
        try:
            with stop_on_interrupt() as interrupted:
                self.train(interrupted)
                if interrupted.is_set():
                    status = "interrupted"
                    say("-" * 89)
                    say("Exiting from training early")
                self.finish(status)
        except RunError:
            self.write_result("diverged", None)
            raise
        except KeyboardInterrupt:
            self.write_result("interrupted", None)
            raise
        finally:
            self.records.flush()
        return 0

    def train(self, interrupted: threading.Event) -> None:
        """All epochs, until the last one, --max-steps or an interrupt."""
        for epoch in range(1, self.args.epochs + 1):
            start = time.monotonic()
            try:
                self.train_epoch(epoch, interrupted)
            finally:
                self.training_seconds += time.monotonic() - start
            if interrupted.is_set():
                break
            valid_loss = evaluate(self.model, self.precision, self.valid_data, self.args.bptt, self.eval_batches)
            seconds = time.monotonic() - start
            self.records.epoch(epoch, valid_loss, self.lr, seconds)
            say("-" * 89)
            say(
                f"| end of epoch {epoch:3d} | time: {seconds:5.2f}s | valid loss {valid_loss:5.2f} "
                f"| valid ppl {perplexity(valid_loss):8.2f}"
            )
            say("-" * 89)
            self.keep_or_anneal(valid_loss)
            if self.records.steps >= self.max_steps or interrupted.is_set():
                break

    def train_epoch(self, epoch: int, interrupted: threading.Event) -> None:
        """One pass over the training text."""
        args, records = self.args, self.records
        starts = range(0, len(self.train_data) - 1, args.bptt)[: self.max_steps - records.steps]
        log = Log(epoch, len(self.train_data) // args.bptt)
        flush_interval = min(args.log_interval, args.max_skipped)
        self.model.train()
        with self.precision.forward():
            hidden = self.model.init_hidden(args.batch_size)
        with tqdm(starts, desc=f"epoch {epoch}", unit="batch", leave=False, disable=None) as bar:
            for batch, i in enumerate(bar, 1):
                hidden = self.train_step(epoch, i, hidden)
                # Once steps are skipped, each one is looked at: the run must end while the bad gradients are there.
                if self.skipped_in_a_row or batch % flush_interval == 0 or batch % args.log_interval == 0:
                    log.add(self.check(records.flush()))
                if batch % args.log_interval == 0:
                    log.line(batch, self.lr)
                if interrupted.is_set():
                    break
        self.check(records.flush())

    def train_step(self, epoch: int, i: int, hidden: Hidden) -> Hidden:
        """One batch, starting at row `i`."""
        tokens, targets = get_batch(self.train_data, i, self.args.bptt)
        self.model.zero_grad()
        with self.precision.forward():
            loss, hidden = next_word_loss(self.model, tokens, targets, detach(hidden))
        self.precision.backward(loss)
        result = self.precision.step(self.args.clip)
        self.records.step(epoch, self.lr, loss, result)
        self.words += targets.numel()
        return hidden

    def check(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give `rows` back, or raise RunError where too many steps in a row came to nothing."""
        for row in rows:
            good = row["applied"] and math.isfinite(row["loss"])
            self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= self.args.max_skipped:
                raise RunError(self.diverged(row))
        return rows

    def diverged(self, row: dict[str, Any]) -> str:
        """The message of a run that cannot be saved."""
        args = self.args
        bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        advice = "a smaller --lr"
        if args.dtype == "float16":
            if args.static_loss_scale is not None:
                dynamic = (
                    "--dynamic-loss-scale" if args.script == "main_fp16_optimizer" else "main_amp.py's dynamic one"
                )
                advice += f", a smaller --static-loss-scale, {dynamic}"
            advice += ", or main_amp.py --dtype bfloat16"
        return (
            f"{args.script}.py in mode {args.mode} has diverged: the loss or a gradient was not finite in "
            f"{args.max_skipped} steps in a row, up to step {row['step']}, at loss scale {row['loss_scale']:g}; "
            f"first parameter with a non-finite gradient: {bad[0] if bad else 'none'}; try {advice}"
        )

    def keep_or_anneal(self, valid_loss: float) -> None:
        """Save the model where it is the best so far; divide the learning rate where it is not."""
        if self.best is None or valid_loss < self.best or not math.isfinite(self.best):
            save_model(self.args.save, self.model, self.corpus.dictionary.idx2word)
            self.best = valid_loss
            return
        self.lr /= ANNEAL_FACTOR
        for group in self.precision.param_groups:
            group["lr"] = self.lr

    def finish(self, status: str) -> None:
        """Test the best model, say so, and write the result."""
        if self.best is None:  # stopped before the first validation: the model so far is the best one
            save_model(self.args.save, self.model, self.corpus.dictionary.idx2word)
        else:
            load_weights(self.args.save, self.model)
        test_loss = evaluate(self.model, self.precision, self.test_data, self.args.bptt, self.eval_batches)
        say("=" * 89)
        say(f"| End of training | test loss {test_loss:5.2f} | test ppl {perplexity(test_loss):8.2f}")
        say("=" * 89)
        self.write_result(status, test_loss)

    def write_result(self, status: str, test_loss: float | None) -> None:
        """Write `result.json`."""
        self.records.flush()
        self.records.write_result(
            status,
            test_loss,
            tokens_per_second=self.words / self.training_seconds if self.training_seconds else None,
            peak_memory_bytes=peak_memory_bytes(self.args.device),
        )
