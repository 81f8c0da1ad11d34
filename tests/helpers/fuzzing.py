"""Random changes of files, the same in every run of the tests."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

share = 1 / 3
"""How much of the examples a test tries; `conftest` makes it 1 for --slow."""


def fuzz(examples: int) -> settings:
    """Always the same examples: as many with --slow, and a share of them without."""
    examples = round(examples * share)
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


def changed(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with one to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        # Half of them near the start, where a tensor file has its table, which is small beside the tensors.
        place = draw(st.integers(0, len(whole)) | st.integers(0, min(2500, len(whole))))
        length = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["flip", "write", "insert", "remove", "cut", "repeat", "zero"]))
        piece = {
            "flip": bytes(b ^ (1 << draw(st.integers(0, 7))) for b in whole[place : place + 1]),
            "write": draw(st.binary(min_size=1, max_size=8)),
            "insert": draw(st.binary(min_size=1, max_size=40)),
            "repeat": whole[place : place + length] * 2,
            "zero": bytes(length),
        }.get(kind, b"")
        skipped = {"flip": 1, "write": len(piece), "insert": 0, "cut": len(whole)}.get(kind, length)
        whole = whole[:place] + piece + whole[place + skipped :]
    return whole


byte_changes = st.composite(changed)
