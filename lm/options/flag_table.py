"""Writes the page of all flags, from the options themselves: python -m lm.options.flag_table > docs/flags.md."""

from itertools import groupby

from lm.options.options import SCRIPTS, flag, option_of, options_of

HEAD = """# Flags

All three trainers take these flags, unless a script is named. A flag without a value is a switch. `--no-NAME` undoes
it. The same names stand in a `--config` file. The other programs list theirs: `python generate.py --help`,
`python compare.py --help`, `python probe.py --help`.
"""


def page() -> str:
    """Return the page as Markdown: a table for each group of options, in the order of --help."""
    fields = options_of(None).items()
    parts = [HEAD]
    for group, options in groupby(fields, lambda item: option_of(item[1]).group):
        parts += [f"\n## {group.capitalize()}\n\n| flag | default | |\n|---|---|---|\n"]
        parts += [_row(name, field.default) for name, field in options]
    return "".join(parts)


def _row(name: str, default: object) -> str:
    facts = option_of(options_of(None)[name])
    value = "" if facts.kind is bool else f" {facts.metavar or name.upper()}"
    shown = facts.otherwise or ("" if facts.kind is bool or default is None else f"`{default}`")
    notes = [facts.help[0].upper() + facts.help[1:]]
    if facts.choices:
        notes.append(", ".join(f"`{choice}`" for choice in facts.choices))
    if facts.scripts != SCRIPTS:
        notes.append("only " + ", ".join(f"`{script}.py`" for script in facts.scripts))
    if facts.may_change:
        notes.append("may be given anew to `--resume`")
    return f"| `{flag(name)}{value}` | {shown} | {'. '.join(note[0].upper() + note[1:] for note in notes)} |\n"


if __name__ == "__main__":
    print(page(), end="")
