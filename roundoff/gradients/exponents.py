"""Predict how much of a gradient each loss scale 2**k flushes or overflows in fp16, all from one histogram.

fp16 has normal numbers from 2**-14 and subnormal ones from 2**-24. A product with 2**k is exact, and then rounded to
the nearest, ties to even (IEEE 754-2008, 4.3.1). It becomes 0 up to 2**-25, 2**-14 from 2**-14 - 2**-25, and inf from
65,520 = 2**16 - 2**4. These bounds lie at three places in a binade, whatever k is. So a binade has four classes.
"""

import numpy as np
import torch
from torch import Tensor

from roundoff.gradients.result import SHARES
from roundoff.gradients.tally import pieces

KS = range(-8, 25)
_BIAS, _BINADES, _FINE = 127, 256, 1 << 11
_FEW = 1 << 19
_AT_ONCE = 1 << 21  # several times the size of the fine histogram


class Exponents:
    """Counts the magnitudes that it is shown, by binade and within it.

    Attributes:
        counts: int64, shape (256, 4). Row e + 127 counts magnitudes 2**e * (1 + f), 0 <= f < 1. Its classes are f = 0;
            f below 1 - 2**-10; f from there on; and f from 1 - 2**-11 on.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros((_BINADES, 4), dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count `values` (rounded to fp32); zeros are not counted."""
        for part in pieces(values.detach(), _AT_ONCE):
            bits = part.to(torch.float32, copy=True).view(torch.int32).bitwise_and_(0x7FFFFFFF)
            if len(part) < _FEW:  # four classes a binade at once, where the fine histogram would be mostly empty
                fraction = bits & 0x7FFFFF
                near = fraction >> 12
                kinds = (bits >> 23) * 4 + (fraction != 0).int() + (near >= _FINE - 2).int() + (near == _FINE - 1).int()
                added = torch.bincount(kinds, minlength=4 * _BINADES).view(_BINADES, 4)
                added[0, 0] = 0  # zeros
                self.counts += added
                continue
            powers = torch.zeros(_BINADES, dtype=torch.int64)
            if np.count_nonzero(bits.numpy() << 9) < len(bits):  # few numbers are powers of two, or 0
                powers = torch.bincount(bits[bits & 0x7FFFFF == 0] >> 23, minlength=_BINADES)
            fine = torch.bincount(bits.bitwise_right_shift_(12), minlength=_BINADES * _FINE).view(_BINADES, _FINE)
            added = torch.stack((powers, fine.sum(1), fine[:, -2], fine[:, -1]), 1)
            added[:, 1] -= added[:, 0] + added[:, 2] + added[:, 3]
            added[0, 0] = 0  # zeros
            self.counts += added

    def shares(self, k: int) -> tuple[float, float, float]:
        """Return the shares of what was counted that fp16 flushes, makes subnormal and overflows at the scale 2**k."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0, 0.0, 0.0
        flushed = self._below(-25 - k) + self._class(-25 - k, 0)
        small = self._below(-14 - k) - self._class(-15 - k, 2) - self._class(-15 - k, 3)
        overflowed = total - self._below(16 - k) + self._class(15 - k, 3)
        return flushed / total, (small - flushed) / total, overflowed / total

    def _below(self, exponent: int) -> int:
        return int(self.counts[: exponent + _BIAS].sum())

    def _class(self, exponent: int, index: int) -> int:
        return int(self.counts[exponent + _BIAS, index])


def predict(exponents: Exponents) -> dict[str, list[float]]:
    """Return the shares of `Exponents.shares` for each of `KS`."""
    return dict(zip(SHARES, map(list, zip(*map(exponents.shares, KS), strict=True)), strict=True))
