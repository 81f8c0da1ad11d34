"""Runs an unchanged script that imports apex, provides apex in a whole environment, and migrates scripts to torch.amp.

python -m apex_compat [--device cpu] SCRIPT [ARGS...]
python -m apex_compat [--device cpu] -m MODULE [ARGS...]
python -m apex_compat enable | disable | status
python -m apex_compat migrate SCRIPT [--write]
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path

from apex_compat import environment
from apex_compat.migration.command import migrate
from apex_compat.run import run_script

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {"enable": environment.enable, "disable": environment.disable, "status": environment.status}
DESCRIPTION = """\
Run SCRIPT as it is: its `import apex` gets apex_compat. So does that of the processes that it starts.

Or, instead of a script:
  enable               let `import apex` work in every process of this Python environment; writes one .pth file
  disable              undo that
  status               say where each module of apex comes from
  migrate SCRIPT       print what each apex call of SCRIPT is in torch.amp; --write changes the file

A script that is called like one of these words is run as ./enable.
"""


def main(argv: Sequence[str] | None = None, restore: bool = True) -> int:
    """Do what `argv`, by default the command line, says.

    Args:
        argv: the words.
        restore: False leaves what a script has changed in this process, for its threads and exit handlers.

    Returns:
        The exit code: that of `run_script`, or of the command, 0 for success.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in (*COMMANDS, "migrate"):
        return _command(*words)
    parser = argparse.ArgumentParser(
        prog="python -m apex_compat", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device",
        choices=["cpu"],
        help="run what the script does on CUDA on the CPU (.cuda(), device='cuda', nccl)",
    )
    # python -m torch.distributed.launch -m apex_compat SCRIPT puts the script's first argument before it.
    parser.add_argument("--local-rank", "--local_rank", dest="rank", help=argparse.SUPPRESS)
    parser.add_argument(
        "-m", dest="module", action="store_true", help="SCRIPT is the name of a module, as for python -m"
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    if not words:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(words)
    near = [] if options.module else difflib.get_close_matches(options.script, (*COMMANDS, "migrate"))
    if near and not Path(options.script).exists():
        print(f"error: SCRIPT is {options.script!r}: there is no such file; did you mean {near[0]}?", file=sys.stderr)
        return 2
    rank = [] if options.rank is None else [f"--local-rank={options.rank}"]
    return run_script(options.script, rank + options.args, options.device, options.module, restore)


def _command(name: str, *words: str) -> int:
    """Run a command that prints. Whoever reads may stop early, as `head` does."""
    try:
        code = _run_command(name, *words)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 1
    return code


def _run_command(name: str, *words: str) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m apex_compat {name}")
    if name in COMMANDS:
        parser.parse_args(words)
        return COMMANDS[name]()
    parser.description = "Print what each apex call of SCRIPT is in torch.amp, and where numbers will differ."
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.add_argument("--write", action="store_true", help="change SCRIPT as the diff says")
    options = parser.parse_args(words)
    return migrate(options.script, options.write)


if __name__ == "__main__":
    sys.exit(main(restore=False))
