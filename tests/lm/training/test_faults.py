"""A run that is disturbed in any way, at any moment, and then resumed is, to the bit, the run that nobody disturbed."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import jobs
from lm.model.model_file import load_model
from lm.training.checkpoint import DAMAGED, FILE, PREVIOUS, read_checkpoint
from programs import MODEL, Done, Programs, read_rows, start, strict_json
from ranks import Ended
from runs import FLAGS, RUN_FILES, Command, Faulty, act_at, check_whole, one_line, outcome, read_one, state_bits


class Event(NamedTuple):
    """What happens, and how the run ends by it: exit code, status, whether it tests a model, what its error says."""

    do: str
    code: int
    status: str | None
    tested: bool = False
    error: tuple[str, ...] = ()


EVENTS = (
    Event("kill -9", -signal.SIGKILL, None),
    Event("SIGTERM", 128 + signal.SIGTERM, "interrupted"),
    Event("Ctrl-C", 0, "interrupted", tested=True),
    Event("Ctrl-C twice", 130, "interrupted"),
    Event("full disk", 1, None, error=("cannot write ", "No space left on device", "--resume run")),
)
MOMENTS = {  # -> its name, and the how-manieth of its kind; an epoch has 9 steps, a validation 2 batches
    "the first step": ("train_step", 1),
    "the last step of an epoch": ("backward", 9),
    "a step": ("backward", 15),
    "between two steps": ("update", 14),
    "the second validation": ("evaluation", 3),
    "the saving of a model": (f"write {MODEL}", 1),
    "the writing of a checkpoint": (f"write {FILE}", 6),
    "its taking the last one's place": (f"replace {FILE}", 6),
    "the test": ("evaluation", 7),
    "the writing of the result": ("write result.json", 1),
}
KINDS = {"LSTM": (), "GRU tied": ("--model", "GRU", "--tied"), "LSTM tied": ("--tied",), "GRU": ("--model", "GRU")}
KINDS["Transformer"] = ("--model", "Transformer", "--lr", "0.5")


def command(mode: str, kind: str, processes: int = 1) -> Command:
    """The run of that mode and model."""
    script, *flags = jobs.MODES[mode]
    return Command(processes, script, (*flags, *jobs.if_dynamic(mode, *WINDOW), *KINDS[kind]))


WINDOW = ("--scale-window", "4")
DYNAMIC = Command(1, "main_fp16_optimizer", ("--fp16", "--dynamic-loss-scale", "--init-scale", str(2.0**20), *WINDOW))
COMMANDS = {
    **{f"{mode} {kind}": command(mode, kind) for mode, kind in zip(jobs.MODES, itertools.cycle(KINDS))},
    "fp16-optimizer-dynamic LSTM": DYNAMIC,
    "amp-fp16 overflowing": Command(1, "main_amp", ("--lr", "60", *WINDOW)),
    "2 x fp16-optimizer-dynamic LSTM tied": command("fp16-optimizer-dynamic", "LSTM tied", 2),
}


def cases() -> Iterator[Any]:
    """Every command with every event and moment; quick is every second pair of these two, the commands in turn."""
    for i, (event, moment) in enumerate(itertools.product(EVENTS, MOMENTS)):
        for k, name in enumerate(COMMANDS):
            marks = [] if i % 2 == 0 and i // 2 % len(COMMANDS) == k else [pytest.mark.slow]
            yield pytest.param(COMMANDS[name], event, moment, marks=marks, id=f"{name}, {event.do}, {moment}")
    for mode, kind in itertools.product(jobs.MODES, KINDS):
        name = f"{mode} {kind}"
        if name not in COMMANDS:
            yield pytest.param(command(mode, kind), EVENTS[0], "a step", marks=pytest.mark.slow, id=f"{name}, kill -9")
    in_parts = Command(2, "main", ("--fp16", "--accumulate", "2", "--lr-schedule", "cosine", "--warmup", "5"))
    yield pytest.param(in_parts, EVENTS[0], "a step", marks=pytest.mark.slow, id="2 x parts on a cosine, kill -9")


@pytest.mark.parametrize(("command", "event", "moment"), list(cases()))
def test_resumed_equals_undisturbed(faulty: Faulty, command: Command, event: Event, moment: str) -> None:
    faulty.undisturbed(command)
    name, n = MOMENTS[moment]
    ended = faulty.start(command, at={"moment": name, "n": n, "do": event.do}, patience={})
    check_end(faulty, command, event, moment, ended)
    faulty.check(command)


def check_end(faulty: Faulty, command: Command, event: Event, moment: str, ended: Ended) -> None:
    """Before it is resumed, too, the run has left what it should."""
    late = moment == "the writing of the result"
    if (moment == "the test" and event.do == "Ctrl-C") or (late and event.do in ("Ctrl-C", "SIGTERM")):
        event = event._replace(code=event.code if moment == "the test" else 0, status="finished", tested=True)
    if command.processes > 1 and moment == "the test" and event.do == "SIGTERM":
        # Several processes hear of a signal one batch later, and the test has no later one.
        event = event._replace(code=0, status="finished", tested=True)
    assert event.code in ended.codes, ended
    check_whole(faulty.folder, killed=event.do == "kill -9")
    if command.processes == 1 and event.error:
        one_line(ended, 1, *event.error)
    if command.processes == 1 and not event.error:
        assert ended.err == [""]
    tested = event.tested or late or (moment == "the test" and event.do == "full disk")
    assert ("End of training" in ended.out[0]) == tested
    result = faulty.run_dir / "result.json"
    if event.status is None:
        assert not result.exists()
        return
    left = strict_json(result.read_text())
    assert (left["status"], left["test_loss"] is not None) == (event.status, event.tested)
    assert left["steps"] == len(read_rows(faulty.run_dir / "steps.jsonl"))
    if event.do == "SIGTERM" and event.code and (faulty.run_dir / FILE).exists():
        assert read_one(faulty.run_dir / FILE)["records"]["steps"] == left["steps"]  # no step is lost


def test_the_undisturbed_runs_have_what_a_resume_could_lose(faulty: Faulty) -> None:
    """A best model of an earlier epoch, a smaller learning rate, and steps without effect."""
    left = [faulty.undisturbed(COMMANDS[name]).outcome for name in ("fp32 LSTM", "amp-fp16 overflowing")]
    for each in left:
        losses = [row["valid_loss"] for row in json.loads(each["epochs"])]
        assert losses[1] > losses[0]
        assert json.loads(each["steps"].splitlines()[-1])["lr"] < json.loads(each["steps"].splitlines()[0])["lr"]
    assert left[1]["result"]["skipped"] > 3


def test_sigterm_ends_a_validation(faulty: Faulty) -> None:
    """Which would take long; it is done when the run goes on."""
    faulty.undisturbed(DYNAMIC)
    ended = faulty.start(DYNAMIC, at={"moment": "evaluation", "n": 3, "do": "SIGTERM"}, note={"name": "moments"})
    assert ended.out[0].endswith(f"| stopped by SIGTERM; to go on: python {DYNAMIC.script}.py --resume run\n")
    seen = Counter((faulty.folder / "moments").read_text().split("\n"))
    assert (seen["evaluation"], len(read_rows(faulty.run_dir / "epochs.jsonl"))) == (3, 1)
    faulty.check(DYNAMIC)


@pytest.mark.parametrize(("n", "which"), [(7, "model"), (13, "best_weights")], ids=["first epoch", "later"])
def test_what_ctrl_c_saves(faulty: Faulty, n: int, which: str) -> None:
    """The model so far in the first epoch, the best one later."""
    faulty.start(DYNAMIC, at={"moment": "backward", "n": n, "do": "Ctrl-C"})
    expected = read_one(faulty.run_dir / FILE)[which]
    saved = load_model(faulty.folder / MODEL)[0].state_dict()
    assert jobs.bits([saved[name].to(expected[name].dtype) for name in saved]) == jobs.bits(
        [expected[name] for name in saved]
    )


def test_a_streak_of_skipped_steps_goes_on(faulty: Faulty) -> None:
    """The run has diverged after 7 of them, whether it was killed or not; it is not resumed then."""
    diverging = Command(1, "main", ("--fp16", "--static-loss-scale", "1e38", "--max-skipped", "7"))
    expected = faulty.undisturbed(diverging)
    assert (expected.code, expected.outcome["result"]["status"], expected.outcome["model"]) == (1, "diverged", None)
    assert expected.outcome["result"]["steps"] == expected.outcome["result"]["skipped"] == 7
    ended = faulty.start(diverging)
    one_line(ended, 1, "7 steps in a row, up to step 7, at loss scale 1e+38")
    faulty.clear()
    faulty.start(diverging, at={"moment": "train_step", "n": 6, "do": "kill -9"})
    faulty.check(diverging)
    one_line(faulty.ranks.run(1, "main", "--resume", "run"), 2, "has diverged, and would again")
    faulty.clear()
    ended = faulty.start(diverging, at={"moment": "write result.json", "n": 1, "do": "full disk"})
    one_line(ended, 1, "7 steps in a row")  # a full disk does not hide it


def test_a_kill_as_the_directory_is_made_and_as_the_run_is_resumed(faulty: Faulty) -> None:
    """Before config.json there is no run yet, and after it one to resume."""
    faulty.undisturbed(DYNAMIC)
    for moment in ("replace config.json", "open steps.jsonl"):
        faulty.start(DYNAMIC, at={"moment": moment, "n": 1, "do": "kill -9"})
        assert (faulty.run_dir / "config.json").exists() == (moment == "open steps.jsonl")
        faulty.check(DYNAMIC)
        faulty.clear()
    for moment, n in (("backward", 10), ("open steps.jsonl", 1), ("train_step", 5), ("evaluation", 1)):
        run = faulty.resume if faulty.run_dir.exists() else faulty.start
        assert run(DYNAMIC, at={"moment": moment, "n": n, "do": "kill -9"}).codes == [-9]
    faulty.check(DYNAMIC)


@pytest.mark.slow
def test_fifty_kills(faulty: Faulty, record_testsuite_property: Callable[[str, object], None]) -> None:
    """At moments drawn at random, again and again, until a run comes through."""
    chance, kills = random.Random(0), 0
    for name in itertools.cycle(COMMANDS):
        drawn = [moment for moment in faulty.undisturbed(COMMANDS[name]).moments if "null" not in moment]
        while kills < 50:
            at = {"moment": chance.choice(drawn), "n": chance.randint(1, 3), "do": "kill -9"}
            run = faulty.resume if (faulty.run_dir / "config.json").exists() else faulty.start
            ended = run(COMMANDS[name], at=at, patience={})
            check_whole(faulty.folder, killed=True)
            if ended.codes[0] == 0:
                break
            kills += 1
        faulty.check(COMMANDS[name])
        faulty.clear()
        if kills == 50:
            break
    record_testsuite_property("kills survived", kills)


# Disks.

SHORT = Command(1, "main_fp16_optimizer", ("--fp16", "--dynamic-loss-scale", "--epochs", "1", *WINDOW))
CALLS = {
    **{f"{call} {name}": 1 for name in ("config.json", "result.json", MODEL) for call in ("write", "fsync", "replace")},
    **dict.fromkeys(("mkdir run", "fsync run", "open steps.jsonl", f"open {FILE}", f"chmod {FILE}"), 1),
    **dict.fromkeys(("write steps.jsonl", "fsync steps.jsonl", "fsync epochs.jsonl", f"replace {FILE}"), 2),
    **dict.fromkeys((f"write {FILE}", f"fsync {FILE}", f"unlink {PREVIOUS}", f"link {PREVIOUS}"), 2),
    **{"write epochs.jsonl": 1},
}
REFUSALS = ("full disk", "refused call", "read-only disk", "kill -9")


def failures() -> Iterator[Any]:
    """Every call with every failure; quick is one failure for every second call, in turn."""
    for i, moment in enumerate(CALLS):
        for k, do in enumerate(REFUSALS):
            quick = i % 2 == 0 and i // 2 % len(REFUSALS) == k
            yield pytest.param(moment, do, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("moment", "do"), list(failures()))
def test_a_disk_that_fails_at_any_call(request, faulty: Faulty, moment: str, do: str) -> None:
    """At one time that the call comes; with --slow at each."""
    expected = faulty.undisturbed(SHORT)
    every = range(1, expected.moments.count(moment) + 1)
    for n in every if request.config.getoption("--slow") else [CALLS[moment]]:
        ended = faulty.start(SHORT, at={"moment": moment, "n": n, "do": do})
        check_whole(faulty.folder, killed=do in ("kill -9", "read-only disk"))
        if do == "kill -9":
            assert ended.codes == [-9]
        elif ended.codes != [0]:
            begun = (faulty.run_dir / "config.json").exists()
            one_line(ended, ended.codes[0], "Read-only" if do == "read-only disk" else "No space left")
            assert ("--resume run" if ended.codes == [1] else "give another directory") in ended.err[0]
            assert ended.codes == [1] or not begun or moment in ("fsync run", "open steps.jsonl"), ended
        else:  # without links the checkpoint before the last one is moved; a full disk still takes a few changes
            assert moment == f"link {PREVIOUS}" or do != "refused call", ended
        faulty.check(SHORT)
        faulty.clear()


def test_the_order_of_a_checkpoints_writing(faulty: Faulty) -> None:
    """What it counts on is on the disk before it, and it is there before it takes its name; the last one is kept."""
    calls = [moment for moment in faulty.undisturbed(SHORT).moments if not moment.startswith("after ")]
    for name in ("steps.jsonl", "epochs.jsonl", FILE, MODEL, "config.json", "result.json"):
        unsafe = False
        for call in calls:
            unsafe = (unsafe or call == f"write {name}") and call != f"fsync {name}"
            assert not (unsafe and call in (f"replace {FILE}", f"replace {name}")), (name, call)
    ends = [i for i, call in enumerate(calls) if call == f"replace {FILE}"]
    assert len(ends) == 3
    for i in ends[1:]:
        assert calls[i - 2 : i + 2] == [f"unlink {PREVIOUS}", f"link {PREVIOUS}", f"replace {FILE}", "fsync run"]


def test_no_links_and_a_kill_between_two_renames(faulty: Faulty) -> None:
    """For a moment there is no checkpoint then, but the one before it."""
    faulty.undisturbed(SHORT)
    kill = {"moment": f"after replace {PREVIOUS}", "n": 1, "do": "kill -9"}
    assert faulty.start(SHORT, no_links={}, at=kill).codes == [-9]
    assert not (faulty.run_dir / FILE).exists()
    ended = faulty.ranks.run(1, SHORT.script, "--resume", "run")
    assert f"{FILE} is missing; going on from the one before it" in ended.out[0]
    faulty.check(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "sizes"),
    [
        ("config.json", [], [1000]),
        ("steps.jsonl", ["--checkpoint-interval", "1000", "--bptt", "1"], [4000]),
        (MODEL, ["--checkpoint-interval", "1000"], [3500]),
        (FILE, [], [4000, 8000, 12000]),
    ],
)
def test_files_that_may_not_grow(faulty: Faulty, name: str, flags: list[str], sizes: list[int]) -> None:
    """The limit is the system's own, RLIMIT_FSIZE: the kernel cuts a write short and then refuses it."""
    job = SHORT._replace(flags=(*SHORT.flags, *flags))
    faulty.undisturbed(job)
    for size in sizes:
        ended = faulty.start(job, largest_file={"size": size})
        check_whole(faulty.folder)
        if name == "config.json":
            one_line(ended, 2, "--run-dir run", "File too large", "give another directory")
            assert not faulty.run_dir.exists()
        else:
            one_line(ended, 1, name, "File too large", "--resume run")
        faulty.check(job)
        faulty.clear()


@pytest.fixture
def mounted(faulty: Faulty) -> Iterator[Callable[..., None]]:
    """`mount` with these options, at the folder of the runs."""
    disk = faulty.folder / "disk"
    disk.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, "tmpfs", str(disk)], check=True, capture_output=True)  # noqa: S607

    try:
        mount("-t", "tmpfs", "-o", "size=512k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user cannot mount a tmpfs here: {error}")
    shutil.move(faulty.folder / "corpus", disk)
    faulty.ranks.folder, faulty.folder, faulty.run_dir = disk, disk, disk / "run"
    faulty.undisturbed(SHORT)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(disk)], check=True)  # noqa: S607


@pytest.mark.slow
def test_a_small_disk(mounted: object, faulty: Faulty) -> None:
    """A real one, with less and less room for the run."""
    codes: Counter[int] = Counter()
    filler = faulty.folder / "filler"
    for pages in range(5, 60):  # there must be room for what the run prints
        with filler.open("wb") as file:
            file.write(b"x" * (4096 * (os.statvfs(faulty.folder).f_bavail - pages)))
        ended = faulty.start(SHORT)
        codes[ended.codes[0]] += 1
        filler.unlink()
        check_whole(faulty.folder)
        if ended.codes == [0]:
            break
        if ended.codes != [70]:  # then there was no room even for the line
            one_line(ended, ended.codes[0], "No space left")
            assert ended.codes == [1] or not faulty.run_dir.exists()
        faulty.check(SHORT)
        faulty.clear()
    assert codes[0] == 1
    assert codes[1] > 5


def test_a_disk_that_becomes_read_only(mounted: Callable[..., None], faulty: Faulty, programs: Programs) -> None:
    """Before the run, at a moment of it, and until after the resume."""
    os.chdir(faulty.folder)  # `programs` goes back
    try:
        mounted("-o", "remount,ro")
        one_line(programs.run(SHORT.script, *FLAGS, *SHORT.flags), 2, "Read-only", f"--save {MODEL}")
        mounted("-o", "remount,rw")
        for step in (1, 4, 9):
            with act_at(step, lambda: mounted("-o", "remount,ro")):
                done = programs.run(SHORT.script, *FLAGS, *SHORT.flags)
            one_line(done, 1, "Read-only", "--resume run")
            one_line(programs.run(SHORT.script, "--resume", "run"), 2, "Read-only")
            mounted("-o", "remount,rw")
            faulty.check(SHORT)
            faulty.clear()
    finally:
        os.chdir(programs.folder)


@pytest.mark.slow
def test_an_output_that_is_full(faulty: Faulty) -> None:
    """`python main.py > log` on a full disk."""
    faulty.undisturbed(SHORT)
    with Path("/dev/full").open("wb") as full:
        process = start(faulty.folder, SHORT.script, *FLAGS, *SHORT.flags, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=60)
    one_line(Done(process.returncode, "", err.decode()), 1, "standard output", "No space left", "--resume run")
    faulty.check(SHORT)


# Damage.


@pytest.fixture
def killed(faulty: Faulty) -> Path:
    """The directory of a run of `SHORT` that was killed after its second checkpoint, that of step 8."""
    faulty.undisturbed(SHORT)
    faulty.start(SHORT, at={"moment": "backward", "n": 9, "do": "kill -9"})
    return faulty.run_dir


def flip(path: Path, where: float, bit: int = 16) -> None:
    """Flip one bit of the file."""
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= bit
    path.write_bytes(data)


def make_directory(path: Path) -> None:
    """Put a directory in the file's place."""
    path.unlink()
    path.mkdir()
    (path / "file").touch()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": lambda path: flip(path, 0.5),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a text": lambda path: path.write_text("no checkpoint"),
    "a directory": make_directory,
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", jobs.mostly_slow(DAMAGES, "a bit", "a directory", "deleted"))
def test_a_damaged_checkpoint(faulty: Faulty, killed: Path, damage: str) -> None:
    """The one before it is used, and the damaged one is kept aside."""
    DAMAGES[damage](killed / FILE)
    ended = faulty.ranks.run(1, SHORT.script, "--resume", "run")
    said, going_on, *_ = ended.out[0].splitlines()
    assert said.startswith(f"| run/{FILE} " + ("is missing" if damage == "deleted" else "cannot be used ("))
    assert said.endswith(f"; going on from the one before it, {PREVIOUS}")
    assert going_on == "| going on with run at epoch 1, step 5"
    assert os.path.lexists(killed / DAMAGED) == (damage != "deleted")
    if damage != "deleted":
        shutil.rmtree(killed / DAMAGED) if damage == "a directory" else (killed / DAMAGED).unlink()
    (killed / "result.json").unlink()
    faulty.check(SHORT)


def test_every_damage_is_found_or_none(request, killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flipped bits and lengths at random: what is read is one of the two checkpoints, to the bit."""
    good, before = (killed / FILE).read_bytes(), (killed / PREVIOUS).read_bytes()
    newest, previous = state_bits(killed / FILE), state_bits(killed / PREVIOUS)
    chance, found, count = random.Random(0), 0, 250 if request.config.getoption("--slow") else 25
    for case in range(count):
        data = bytearray(good)
        if case % 5:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        else:
            del data[chance.randrange(len(data)) :]
        (killed / FILE).write_bytes(data)
        (killed / PREVIOUS).write_bytes(before)
        read_checkpoint(killed)
        damaged = "cannot be used" in capsys.readouterr().out
        found += damaged
        assert damaged or case % 5
        assert state_bits(killed / FILE) == (previous if damaged else newest)
    assert found >= 0.8 * count


@pytest.mark.parametrize("left", [(FILE, PREVIOUS), (FILE,), (PREVIOUS,)], ids=", ".join)
def test_no_good_checkpoint(faulty: Faulty, killed: Path, left: tuple[str, ...]) -> None:
    """The line says what to delete; after that the run starts from its beginning."""
    for name in (FILE, PREVIOUS):
        (os.truncate(killed / name, 1000) if name in left else (killed / name).unlink())
    ended = faulty.ranks.run(1, SHORT.script, "--resume", "run")
    one_line(ended, 2, f"delete {' and '.join(f'run/{name}' for name in left)} to start")
    for name in left:
        (killed / name).unlink()
    faulty.check(SHORT)


def test_a_torn_line_is_cut(faulty: Faulty, killed: Path) -> None:
    for name, rest in {"steps.jsonl": b'{"step": 16, "lo', "epochs.jsonl": b"{"}.items():
        with (killed / name).open("ab") as file:
            file.write(rest)
    faulty.check(SHORT)


@pytest.mark.parametrize("name", ["steps.jsonl", "epochs.jsonl"])
@pytest.mark.parametrize("how", ["shorter", "gone"])
def test_records_shorter_than_the_checkpoint_says(faulty: Faulty, name: str, how: str) -> None:
    """The run is refused, and left as it is."""
    faulty.start(DYNAMIC, at={"moment": "backward", "n": 14, "do": "kill -9"})
    path, other = (faulty.run_dir / each for each in sorted(["steps.jsonl", "epochs.jsonl"], key=lambda n: n != name))
    other.write_bytes(other.read_bytes() + b"{")  # which must not be cut first
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, read_one(faulty.run_dir / FILE)["records"][name] - 1)
    before = {each.name: each.read_bytes() for each in faulty.run_dir.iterdir()}
    one_line(faulty.ranks.run(1, DYNAMIC.script, "--resume", "run"), 2, f"{name} has ", "start a new run")
    assert {each.name: each.read_bytes() for each in faulty.run_dir.iterdir()} == before


# Two runs in one place.


def test_two_runs_in_one_directory(programs: Programs, faulty: Faulty) -> None:
    """A second one is refused, a resume too, while the first one runs; that one notices nothing."""
    expected, refused = faulty.undisturbed(SHORT), []

    def second() -> None:
        for flags in ([*FLAGS, *SHORT.flags], ["--resume", "run"]):
            refused.append(faulty.ranks.run(1, SHORT.script, *flags, "--save", "other.pt"))

    with act_at(6, second):
        assert programs.run(SHORT.script, *FLAGS, *SHORT.flags).code == 0
    for ended in refused:
        assert ended.out == [""]
        one_line(ended, 2, "run is in use by another run")
    assert not (faulty.folder / "other.pt").exists()
    assert outcome(faulty.folder) == expected.outcome
    assert {path.name for path in faulty.run_dir.glob("[!.]*")} <= {*RUN_FILES, PREVIOUS}


def test_a_child_of_a_dead_run_holds_no_lock(faulty: Faulty) -> None:
    faulty.undisturbed(SHORT)
    faulty.start(SHORT, at={"moment": "backward", "n": 6, "do": "kill -9 but a child"})
    child = int((faulty.folder / "child").read_text())
    os.kill(child, 0)  # still there
    try:
        faulty.check(SHORT)
    finally:
        os.kill(child, signal.SIGKILL)
