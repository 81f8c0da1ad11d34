"""The training loop. It knows no precision mode: everything that depends on one is behind `Precision`."""

import math
import sys
import time
from contextlib import closing, nullcontext, suppress

import torch
from torch import Tensor

from lm.data.corpus import Corpus, batchify, get_batch
from lm.model.language_model import RNNModel, detach, next_word_loss
from lm.model.model_file import save_model
from lm.model.onnx_file import export_onnx
from lm.options.options import Options
from lm.training import distributed
from lm.training.announcement import say_after, say_before, say_how_to_go_on
from lm.training.checkpoint import write_checkpoint
from lm.training.description import describe
from lm.training.divergence import END, check, skipped_too_often
from lm.training.evaluation import evaluate
from lm.training.parts import joined, parts_of
from lm.training.preflight import settle, try_once
from lm.training.run_start import NothingToDoError, start_run
from lm.training.schedule import batches_of_epoch, rate_of_step
from lm.training.signals import INTERRUPT, TERMINATE, StopSignals, Terminated
from lm.training.train_state import take_state
from roundoff import processes
from roundoff.device import peak_memory_bytes, release_freed_memory
from roundoff.errors import RunError
from roundoff.precision import Precision
from roundoff.program import own
from roundoff.terminal import progress_bar, say

EVAL_BATCH_SIZE = 10
ANNEAL_FACTOR = 4.0


def fit(args: Options, corpus: Corpus, model: RNNModel, precision: Precision) -> int:
    """Train, keep the best model, test it, and record the run; return the exit code.

    This process leaves the process group once all processes have come to the end of the run together. After an
    error it stays in the group until it ends. With nccl, leaving waits for messages under way. A process that is lost
    never answers them, and the line that names it is printed only after `fit`.

    A run to resume that has come to its end, and whose results are all there, stays as it is: a line says so.

    Raises:
        UsageError: the text is too short for the batch, this machine cannot run the dtype, a place for the
            results cannot be written, or the run cannot be resumed. Nothing was written then.
        RunError: the run diverged, its disk is full, or another process of it is lost.
        Terminated: SIGTERM has come; the run can be resumed.
    """
    try:
        training = Training(args, corpus, model, precision)
    except NothingToDoError as done:
        say(f"| nothing to do: {done}")
        distributed.destroy_process_group()
        return 0
    except RuntimeError as error:
        raise distributed.lost(error) or error from None
    with closing(training.records):
        try:
            code = training.run()
        except Terminated:  # all processes have agreed on it
            distributed.destroy_process_group()
            raise
    distributed.destroy_process_group()
    return code


class Training:
    """Takes one run from its first batch, or from its checkpoint, to the test perplexity; see `fit`."""

    def __init__(self, args: Options, corpus: Corpus, model: RNNModel, precision: Precision) -> None:
        self.args = args
        self.corpus = corpus
        self.model = model
        self.precision = precision
        self.train_data = distributed.shard(batchify(corpus.train, args.batch_size, args.device, "train"))
        self.valid_data = batchify(corpus.valid, EVAL_BATCH_SIZE, args.device, "valid")
        self.test_data = batchify(corpus.test, EVAL_BATCH_SIZE, args.device, "test")
        self.eval_batches = 1 if args.dry_run else None
        self.max_steps: int = 1 if args.dry_run else args.max_steps or sys.maxsize
        self.dtypes = try_once(model, precision, args)
        self.stop = StopSignals(distributed.STOP_INTERVAL.get(args.device.partition(":")[0], 1))
        distributed.own_random_numbers(args.seed)
        config = describe(args, corpus, model, self.dtypes)
        self.records, start = start_run(args, corpus, model, precision, config)
        self.at, self.hidden, self.best_weights = start
        self.parallel_model = distributed.data_parallel(model)
        settle(self.parallel_model, model, precision, args)
        release_freed_memory()  # by what ran until here; the logits fit in none of its holes, and gradients seldom
        self.clock = time.monotonic()

    def run(self) -> int:
        """See `fit`."""
        with self.stop:  # to the very end: torchrun sends SIGTERM as soon as one process fails
            try:
                say_before(self.args, self.records)
                interrupted = self.train()
                if interrupted:
                    say("-" * 89)
                    say("Exiting from training early")
                    say_how_to_go_on(self.args, self.records)
                self.finish("interrupted" if interrupted else "finished")
            except (RunError, Terminated) as error:
                with suppress(OSError):  # a full disk may not hide the reason
                    self.write_result("diverged" if isinstance(error, RunError) else "interrupted", None)
                distributed.barrier()
                raise
            except (KeyboardInterrupt, BrokenPipeError):
                with suppress(OSError):
                    self.write_result("interrupted", None)
                raise
            except OSError as error:
                message = (
                    f"cannot write {error.filename or 'standard output'} ({error.strerror}); all up to the last "
                    f"checkpoint is safe: make room, then go on with --resume {self.records.path}"
                )
                raise RunError(own(message)) from None
            except RuntimeError as error:
                raise distributed.lost(error) or error from None
            if self.args.onnx_export is not None and processes.rank() == 0:  # the run is over: nothing can spoil it
                words = self.corpus.dictionary.idx2word
                export_onnx(self.args.onnx_export, self.model, words, self.args.bptt, self.args.save)
            say_after(self.args, self.records, None if interrupted else self.at)
        return 0

    def train(self) -> bool:
        """Train all epochs, up to the last one, --max-steps or an interrupt; return whether an interrupt came."""
        try:
            while not self.is_trained():
                if self.train_epoch():
                    self.write_checkpoint()
                    return True
                self.end_epoch()
                self.write_checkpoint()
                if self.stop.poll():
                    return True
        except Terminated:  # raised between two steps, or in the validation after the last one
            self.write_checkpoint()
            say_how_to_go_on(self.args, self.records, "stopped by SIGTERM; ")
            raise
        return False

    def is_trained(self) -> bool:
        """Return whether no step and no validation is left."""
        return self.at.end(self.args, self.records.steps) is not None

    def train_epoch(self) -> bool:
        """Train the rest of one pass over the training text; return whether an interrupt came."""
        args, records, at = self.args, self.records, self.at
        starts = range(0, len(self.train_data) - 1, args.bptt)
        batches = len(starts)  # a short one at the end counts
        starts = starts[: at.batch + self.max_steps - records.steps]
        flush_interval = min(args.log_interval, args.max_skipped)
        self.model.train()
        self.clock = time.monotonic()
        records.begin_interval()
        stop = 0
        with progress_bar(starts[at.batch :], f"epoch {at.epoch}", at.batch, len(starts)) as bar:
            for i in bar:
                self.train_step(i)
                save = args.checkpoint_interval and records.steps % args.checkpoint_interval == 0
                end_of_interval = at.batch % args.log_interval == 0
                # Once steps are skipped, each one is looked at: the run must end while the bad gradients are there.
                if at.skipped_in_a_row or save or at.batch % flush_interval == 0 or end_of_interval:
                    self.flush()
                if end_of_interval:
                    records.end_interval(batch=at.batch, batches=batches)
                if save:
                    self.write_checkpoint()
                if stop := self.stop.poll():
                    break
        self.flush()
        records.end_interval(batch=at.batch, batches=batches)
        if stop == TERMINATE:
            raise Terminated
        return stop == INTERRUPT

    def train_step(self, i: int) -> None:
        """Take the step of one batch, which starts at row `i`."""
        tokens, targets = get_batch(self.train_data, i, self.args.bptt)
        lr = self.rate(self.records.steps)
        for group in self.precision.param_groups:
            group["lr"] = lr
        self.model.zero_grad()
        loss = self.backward(tokens, targets)
        result = self.precision.step(self.args.clip)
        words = targets.numel() * processes.world_size()
        self.records.step(loss, result, epoch=self.at.epoch, lr=lr, tokens=words)
        self.at.batch += 1
        self.at.words += words
        self.at.training_seconds += self.tick()

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over the whole run, with the validations so far."""
        return rate_of_step(self.args, self.at.lr, step, batches_of_epoch(self.args, len(self.corpus.train)))

    def backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Backpropagate a batch, and keep the hidden state after it; return the batch's loss (fp32, shape ())."""
        losses, states = [], []
        for part in parts_of(tokens, targets, self.hidden, self.args.accumulate):
            here = nullcontext() if part.is_last else distributed.no_sync(self.parallel_model)
            with here, self.precision.forward():
                hidden = self.model.init_hidden(part.tokens.size(1)) if part.hidden is None else detach(part.hidden)
                loss, state = next_word_loss(self.parallel_model, part.tokens, part.targets, hidden)
            loss = loss if part.weight == 1.0 else loss * part.weight
            self.precision.backward(loss)
            losses.append(loss.detach())
            states.append(state)
        self.hidden = joined(states)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def tick(self) -> float:
        """Return the seconds since the last call, and add them to those of the epoch."""
        before, self.clock = self.clock, time.monotonic()
        self.at.epoch_seconds += self.clock - before
        return self.clock - before

    def evaluate(self, data: Tensor) -> float:
        """Return the model's loss on `data` now; SIGTERM is heard between two batches."""
        between = self.stop.end_if_terminated
        return evaluate(self.model, self.precision, data, self.args.bptt, self.eval_batches, between)

    def end_epoch(self) -> None:
        """Validate, record, and keep the model or anneal."""
        loss = distributed.broadcast(self.evaluate(self.valid_data))
        self.tick()
        at = self.at
        self.records.epoch(loss, epoch=at.epoch, lr=self.rate(self.records.steps - 1), seconds=at.epoch_seconds)
        self.check(f"validation loss of epoch {at.epoch}", loss)
        self.keep_or_anneal(loss)
        at.epoch, at.batch, at.epoch_seconds, self.hidden = at.epoch + 1, 0, 0.0, None

    def check(self, name: str, loss: float) -> None:
        """Raise RunError where `loss`, or a weight, is that of a run that has diverged."""
        check(self.args, self.model, self.records.path, name, loss, self.corpus.vocab_size)

    def flush(self) -> None:
        """Write the rows of the steps since the last call; raise RunError where too many in a row came to nothing."""
        distributed.meet_before_a_wait(self.args.device)
        rows = self.records.flush()
        self.at.training_seconds += self.tick()  # a GPU's steps take theirs here, where they are waited for
        for row in rows:
            good = row["applied"] and math.isfinite(row["loss"])
            self.at.skipped_in_a_row = 0 if good else self.at.skipped_in_a_row + 1
            if self.at.skipped_in_a_row >= self.args.max_skipped:
                raise RunError(skipped_too_often(self.args, self.model, row))

    def keep_or_anneal(self, valid_loss: float) -> None:
        """Save the model where it is the best so far; where it is not, divide the learning rate that is annealed."""
        if self.at.best is None or valid_loss < self.at.best:
            self.save_model()
            self.best_weights = {name: weight.cpu().clone() for name, weight in self.model.state_dict().items()}
            self.at.best = valid_loss
            return
        if self.args.lr_schedule == "anneal":
            self.at.lr /= ANNEAL_FACTOR

    def save_model(self) -> None:
        """Write the model as it is now to --save."""
        if processes.rank() == 0:
            save_model(self.args.save, self.model, self.corpus.dictionary.idx2word)

    def write_checkpoint(self) -> None:
        """Write a checkpoint; all processes take part."""
        state = take_state(self.model, self.precision, self.at, self.hidden, self.best_weights)
        if self.records.path is not None:
            records = self.records.state()
            write_checkpoint(self.records.path, state | {"corpus": self.corpus.sha256, "records": records})
        self.clock = time.monotonic()

    def finish(self, status: str) -> None:
        """Test the best model, and record the result."""
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        loss = distributed.broadcast(self.evaluate(self.test_data))
        self.check(END if status == "finished" else "test loss so far", loss)
        if self.best_weights is None:  # stopped before the first validation: the model so far is the best one
            self.save_model()
        self.write_result(status, loss)

    def write_result(self, status: str, test_loss: float | None) -> None:
        """Write `result.json`."""
        if processes.world_size() == 1:  # else the other processes, which a flush needs, may have gone
            self.records.flush()
        self.records.write_result(
            status,
            test_loss,
            tokens_per_second=self.at.words / self.at.training_seconds if self.at.training_seconds else None,
            peak_memory_bytes=peak_memory_bytes(self.args.device),
        )
