"""Has the optimizers of apex.optimizers on any device, by torch's foreach operations."""

from apex_compat.optimizers.fused_adagrad import FusedAdagrad
from apex_compat.optimizers.fused_adam import FusedAdam
from apex_compat.optimizers.fused_lamb import FusedLAMB
from apex_compat.optimizers.fused_mixed_precision_lamb import FusedMixedPrecisionLamb
from apex_compat.optimizers.fused_novograd import FusedNovoGrad
from apex_compat.optimizers.fused_sgd import FusedSGD

__all__ = ["FusedAdagrad", "FusedAdam", "FusedLAMB", "FusedMixedPrecisionLamb", "FusedNovoGrad", "FusedSGD"]
