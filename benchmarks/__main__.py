"""`python -m benchmarks`: the trainers against a plain loop.

`python -m benchmarks gpu` measures all that a GPU must show, `python -m benchmarks growth` how cost grows. Each command
imports what it needs when it is chosen: `gpu` must start where only torch and numpy are.
"""

import sys

from roundoff.program import exit_code


def main() -> int:
    """Run the command that the first word names."""
    command, *words = sys.argv[1:] or [""]
    if command == "gpu":
        from benchmarks.gpu import command as gpu

        return gpu.main(words)
    if command == "growth":
        from benchmarks.growth import command as growth

        return growth.main(words)
    from benchmarks import against_reference

    return against_reference.main()


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
