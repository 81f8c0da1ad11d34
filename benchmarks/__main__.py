"""`python -m benchmarks`: the trainers against a plain loop; `python -m benchmarks gpu`: all that a GPU must show.

Each command imports what it needs when it is chosen: `gpu` must start where only torch and numpy are.
"""

import sys

from roundoff.program import exit_code


def main() -> int:
    """Run the command that the first word names."""
    if sys.argv[1:2] == ["gpu"]:
        from benchmarks.gpu import command

        return command.main(sys.argv[2:])
    from benchmarks import against_reference

    return against_reference.main()


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
