"""Mixed-precision training: the seam, the record of a run, and what a precision does to it, for any model and any loop.

`MasterWeights`, `WrappedOptimizer`, `Autocast` and `AmpPrecision` are each a `Precision`, and `step` of each returns a
`StepResult`.
`RunDirectory` writes the record of a run and tells each `Listener` of it. `read_run` reads a record. `compare_runs`
puts runs side by side, and `compare` trains them first. Each name is imported when it is first asked for, so that
`import roundoff` takes no time.
"""

from typing import TYPE_CHECKING

from roundoff.lazy import front_door

if TYPE_CHECKING:
    from roundoff.apex_amp import AmpPrecision as AmpPrecision
    from roundoff.errors import CheckError as CheckError
    from roundoff.errors import UsageError as UsageError
    from roundoff.library.comparing import ComparisonReport as ComparisonReport
    from roundoff.library.comparing import compare as compare
    from roundoff.library.probing import ProbeReport as ProbeReport
    from roundoff.library.probing import probe as probe
    from roundoff.precision import Autocast as Autocast
    from roundoff.precision import MasterWeights as MasterWeights
    from roundoff.precision import Precision as Precision
    from roundoff.precision import StepResult as StepResult
    from roundoff.precision import WrappedOptimizer as WrappedOptimizer
    from roundoff.runs.directory import RunDirectory as RunDirectory
    from roundoff.runs.listeners import Listener as Listener
    from roundoff.runs.reading import read_run as read_run
    from roundoff.verdict.comparison import compare_runs as compare_runs

__version__ = "0.2.0"

_HOMES = {
    "roundoff.apex_amp": ("AmpPrecision",),
    "roundoff.errors": ("CheckError", "UsageError"),
    "roundoff.library.comparing": ("ComparisonReport", "compare"),
    "roundoff.library.probing": ("ProbeReport", "probe"),
    "roundoff.precision": (
        "Autocast",
        "MasterWeights",
        "Precision",
        "StepResult",
        "WrappedOptimizer",
    ),
    "roundoff.runs.directory": ("RunDirectory",),
    "roundoff.runs.listeners": ("Listener",),
    "roundoff.runs.reading": ("read_run",),
    "roundoff.verdict.comparison": ("compare_runs",),
}
__getattr__, __dir__ = front_door(__name__, _HOMES)
