"""FusedMixedPrecisionLamb, which is not offered."""

from typing import NoReturn


class FusedMixedPrecisionLamb:
    """Refuses to be made. Its use is a learning rate and a step count on the GPU, for CUDA graphs.

    Raises:
        NotImplementedError: always.
    """

    def __init__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            "FusedMixedPrecisionLamb is not offered: use FusedLAMB, with amp O2 or torch.amp for the half precision"
        )
