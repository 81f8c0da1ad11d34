"""Says in pure Python what amp does with loss scales, skipped steps and weights, whatever overflows when."""

import math
from dataclasses import dataclass, field

ITERATIONS, LOSSES = 5, 3
GRADIENTS = (1 / 32, 2 / 32, 3 / 32)
"""The gradient of each loss: all sums below are exact in half, at scales up to 2**17."""
LR = 0.5
START = 1992
"""Good updates at the start: the window of 2000 ends within the five iterations."""
SMALLEST, LARGEST = 2.0**15, 2.0**17


@dataclass
class Way:
    """How three losses reach two optimizers."""

    own_scalers: bool = False
    """Each loss has a scaler of its own; loss 0 is the first optimizer's, loss 1 the second's, loss 2 both's."""
    delayed: str = ""
    """The argument that is True for all losses but the last of an iteration."""

    def optimizers(self, loss):
        return (loss,) if self.own_scalers and loss < 2 else (0, 1)

    def scaler(self, loss):
        return loss if self.own_scalers else 0

    def is_delayed(self, loss):
        return bool(self.delayed) and loss < LOSSES - 1


WAYS = {
    "a scaler for each loss": Way(own_scalers=True),
    "one scaler": Way(),
    "delay_unscale": Way(delayed="delay_unscale"),
    "delay_overflow_check": Way(delayed="delay_overflow_check"),
}


@dataclass
class Scaler:
    """The loss scale's policy: down at once, up after 2000 good updates in a row, within bounds."""

    scale: float = 2.0**16
    good: int = START

    def update(self, overflow):
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.scale = max(self.scale / 2, SMALLEST)
        elif self.good == 2000:
            self.scale, self.good = min(self.scale * 2, LARGEST), 0


@dataclass
class Optimizer:
    """One weight; its gradient, and the scaler whose overflow makes it skip its next step."""

    weight: float = 1.0
    grad: float = 0.0
    pending: float = 0.0
    """What delay_unscale has left scaled."""
    skips_for: int | None = None

    def step(self, applied):
        if applied:
            self.weight -= LR * self.grad
        self.skips_for, self.grad = None, 0.0


@dataclass
class Model:
    """Follows five iterations of three losses."""

    way: Way
    scalers: list = field(default_factory=list)
    optimizers: list = field(default_factory=lambda: [Optimizer(), Optimizer()])
    printed: list = field(default_factory=list)

    def __post_init__(self):
        self.scalers = [Scaler() for _ in range(LOSSES if self.way.own_scalers else 1)]

    def backward(self, loss, factor):
        grad = GRADIENTS[loss] * factor
        listed = [self.optimizers[k] for k in self.way.optimizers(loss)]
        number = self.way.scaler(loss)
        if self.way.delayed == "delay_unscale" and self.way.is_delayed(loss):
            for optimizer in listed:
                optimizer.pending += grad
            return
        overflow = False
        for optimizer in listed:
            incoming = optimizer.pending + grad
            overflow |= not math.isfinite(incoming)
            optimizer.grad += incoming
            optimizer.pending = 0.0
        if self.way.is_delayed(loss):  # delay_overflow_check: nobody looks
            return
        self.scalers[number].update(overflow)
        for optimizer in listed:
            if overflow and optimizer.skips_for is None:
                optimizer.skips_for = number

    def step(self):
        for optimizer in self.optimizers:
            number = optimizer.skips_for
            if number is not None:
                scale = self.scalers[number].scale
                said = f"Gradient overflow.  Skipping step, loss scaler {number} reducing loss scale to {scale}"
                self.printed.append(said)
            optimizer.step(applied=number is None)

    def state(self):
        """Return the scales, the counters and the weights."""
        scalers = [(s.scale, s.good) for s in self.scalers]
        return scalers, [optimizer.weight for optimizer in self.optimizers]
