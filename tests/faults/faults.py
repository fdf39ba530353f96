"""The kinds of faults: each is caused, and what comes of it is judged."""

import contextlib
import os
import pathlib
import signal
import subprocess
from collections.abc import Iterator

from program import in_child, on_change
from scenarios import SCENARIOS, files_made, new_folder, outcome
from session import Case, Failure, Session, arrays_of, differences, judge, killing

# The user and group that have nothing, of most systems.
NOBODY = 65534


class SkippedError(Exception):
    """The machine does not let this fault be caused."""


def kill(case: Case) -> str:
    """SIGKILL, once to three times, between two starts or before a change."""
    kept: set[str] = set()
    for _ in range(case.rng.randint(1, 3)):
        number = case.rng.randint(1, len(case.whole.changes))
        is_at_change = case.rng.random() < 0.6
        moment = case.rng.uniform(0, case.whole.seconds)
        before = killing(case.folder, number) if is_at_change else None
        is_fresh = not is_at_change and case.rng.random() < 0.3
        process = case.start(is_fresh=is_fresh, before=before)
        if not is_at_change:
            process.wait(moment)
            process.send(signal.SIGKILL)
        code, output = process.end()
        kept = case.check_kept(kept)
        if code != -signal.SIGKILL:
            judge(code, output)
            break
        case.caused += 1
    return case.finish()


_SENT = {
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
    "SIGHUP": (signal.SIGHUP,),
}


def send(case: Case, which: str) -> str:
    """A signal, or two, at a moment or before a change."""
    signals = _SENT[which]
    number = case.rng.randint(1, len(case.whole.changes))
    moment = case.rng.uniform(0, case.whole.seconds)
    pause = case.rng.choice((0.0, 0.05, 0.5))
    is_at_change = case.rng.random() < 0.6
    if is_at_change:
        process = case.start(before=killing(case.folder, number, *signals))
    else:
        process = case.start(is_fresh=case.rng.random() < 0.5)
        process.wait(moment)
        for sent in signals:
            process.send(sent)
            process.wait(pause)
    code, output = process.end()
    case.caused += 1
    last = signals[-1]
    # Python itself takes its handler of SIGINT away when it ends.
    allowed = {0, 130, -last} if last == signal.SIGINT else {0, -last}
    if code not in allowed:
        raise Failure(f"after {which} the exit code is {code}:\n{output}")
    if "Traceback" in output or "Exception ignored" in output:
        raise Failure(f"after {which} there is a traceback:\n{output}")
    said = "stopped" in output or "interrupted" in output
    is_cut = code == -signal.SIGINT and output.strip() and _is_short(case)
    if (code == 130 or is_cut) and not said:
        raise Failure(f"after {which} nothing is said:\n{output}")
    if code == 0 and (last == signal.SIGINT or not said) and _is_short(case):
        raise Failure(f"after {which} it ends with 0, and has not ended:\n{output}")
    case.check_kept(set())
    return case.finish()


@contextlib.contextmanager
def small_disk(place: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a disk of 16 MB, which only root can make."""
    place.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    try:
        made = subprocess.run(["mount", *options], capture_output=True, check=False)
    except OSError as error:
        raise SkippedError(f"a disk cannot be made: {error}") from error
    if made.returncode:
        raise SkippedError(f"a disk cannot be made: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(case: Case, path: str) -> str:
    """A full disk, from the first change of a path on."""
    number = 1 + case.whole.changes.index(path)
    spare = case.rng.choice((0, 4096, 16384))
    with small_disk(case.folder.with_name("disk")) as disk:
        case.folder = disk / "work"
        new_folder(case.session.given, case.folder)
        ballast = disk / "ballast"

        def act(change: int, path: str) -> None:
            if change == number:
                room = os.statvfs(disk)
                size = room.f_bavail * room.f_bsize - spare
                with ballast.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(size, 1))

        code, output = case.start(before=lambda: on_change(case.folder, act)).end()
        case.caused += ballast.exists()
        ending = judge(code, output)
        if ending == "refused" and "No space left on device" not in output:
            raise Failure(f"no full disk is named:\n{output}")
        if ending == "refused" and not _is_named(case, output):
            raise Failure(f"no file is named:\n{output}")
        if ending == "done" and "warning: " not in output and _is_short(case):
            raise Failure(f"something is missing, and nothing was said:\n{output}")
        ballast.unlink(missing_ok=True)
        case.check_kept(set())
        return case.finish()


def _is_named(case: Case, output: str) -> bool:
    (line,) = (x for x in output.splitlines() if x.startswith("error: "))
    firsts = (path.partition("/")[0] for path in case.whole.changes)
    tops = {first.removeprefix(".").partition(".partial")[0] for first in firsts}
    return any(top in line for top in tops)


def _is_short(case: Case) -> bool:
    found = in_child(outcome, str(case.folder))
    return bool(differences(case.whole.outcome, found))


def _flip(file: pathlib.Path, case: Case) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[case.rng.randrange(len(content))] ^= 1 << case.rng.randrange(8)
    file.write_bytes(content)


def _truncate(file: pathlib.Path, case: Case) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: case.rng.randrange(max(len(content), 1))])


def _replace(file: pathlib.Path, case: Case) -> None:
    aside = case.folder.with_name("aside")
    file.rename(aside)
    file.symlink_to(aside)


DAMAGE = {
    "a flipped bit": _flip,
    "a truncated file": _truncate,
    "other JSON": lambda file, case: file.write_text("[1]\n"),
    "an empty file": lambda file, case: file.write_bytes(b""),
    "no file": lambda file, case: file.unlink(),
    "a link to the file": _replace,
    "a link to nothing": lambda file, case: _odd(file, "link"),
    "a pipe": lambda file, case: _odd(file, "pipe"),
    "a folder": lambda file, case: _odd(file, "folder"),
}


def _odd(file: pathlib.Path, kind: str) -> None:
    file.unlink()
    if kind == "link":
        file.symlink_to(file.with_name("nothing"))
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
        (file / "something").touch()


def damage(case: Case, state: str, path: str, how: str) -> str:
    """A damaged file, or no file in its place, before the command goes on."""
    new_folder(case.session.root / state / case.name, case.folder)
    DAMAGE[how](case.folder / path, case)
    case.caused += 1
    code, output = case.start().end()
    # Its own name, or that of a directory which holds it, or of what is made already.
    parts = pathlib.PurePath(path).parts
    ending = judge(code, output, names=(*parts, "must not exist"))
    if ending == "refused":
        return ending
    found = in_child(outcome, str(case.folder))
    if differing := differences(*arrays_of(case.whole.outcome, found)):
        raise Failure(
            f"the arrays differ in {differing[:5]}, without a word:\n{output}"
        )
    return "same"


def damage_exported(case: Case, how: str) -> str:
    """A damaged exported file, which is loaded."""
    new_folder(case.session.root / "done" / case.name, case.folder)
    DAMAGE[how](case.folder / "net.ijx", case)
    case.caused += 1
    said = in_child(_load, str(case.folder / "net.ijx"))
    if said is None and how != "a link to the file":
        raise Failure("the damaged file is loaded")
    if said is not None and "net.ijx" not in said:
        raise Failure(f"the message does not name the file: {said}")
    return "same" if said is None else "refused"


def _load(file: str) -> str | None:
    import inertia_jax as ij

    try:
        ij.load_exported(file)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def two(case: Case) -> str:
    """Two processes of one command in one folder."""
    first = case.start()
    first.wait(case.rng.uniform(0, 0.7 * case.whole.seconds))
    second = case.start()
    ends = [process.end() for process in (first, second)]
    case.caused += 1
    endings = [judge(code, output) for code, output in ends]
    if "done" not in endings and not _is_short(case):
        raise Failure(f"both are refused:\n{ends[0][1]}\n{ends[1][1]}")
    case.check_kept(set())
    ending = case.finish()
    return "refused" if "refused" in endings else ending


def forbid(case: Case, what: str) -> str:
    """A folder, or a home, in which nothing can be written, or no standard streams."""
    nobody = what in ("read-only folder", "read-only home")
    if nobody and os.geteuid() != 0:
        raise SkippedError("another user is needed, which root alone can become")
    home = case.folder.with_name("home")
    home.mkdir(exist_ok=True)
    home.chmod(0o555)
    if what == "read-only home":
        subprocess.run(["chown", "-R", str(NOBODY), str(case.folder)], check=True)

    def before() -> None:
        if nobody:
            os.environ["HOME"] = str(home)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        if what == "closed output":
            os.close(1)
        elif what == "closed error":
            os.close(2)
        elif what == "no reader":
            ours, theirs = os.pipe()
            os.dup2(theirs, 1)
            os.close(ours)

    # Another user may not be allowed to start this Python, but a fork of it goes on.
    code, output = case.start(is_fresh=not nobody, before=before).end()
    case.caused += 1
    ending = judge(code, output)
    if what != "read-only folder":
        if ending != "done":
            raise Failure(f"it does not run with a {what}:\n{output}")
    elif not _is_read_only_named(case, output):
        raise Failure(f"what cannot be written is not named:\n{output}")
    if ending == "refused":
        case.finish()
        return ending
    return case.finish()


def _is_read_only_named(case: Case, output: str) -> bool:
    (line,) = (x for x in output.splitlines() if x.startswith("error: "))
    return any(word in line for word in case.scenario.words[1:])


def all_cases(session: Session, names: list[str]) -> dict[str, list[tuple]]:
    """Returns, by kind, what each case is given after its scenario's name."""
    cases: dict[str, list[tuple]] = {}
    cases["kill"] = [(kill, name) for name in names]
    cases["signal"] = [(send, name, which) for name in names for which in _SENT]
    cases["full disk"] = [
        (fill, name, path)
        for name in names
        for path in dict.fromkeys(session.whole(name).changes)
    ]
    cases["damage"] = [
        (damage, name, state, path, how)
        for name in names
        for state in ("half", "done")
        for path in files_made(session.root / state / name, SCENARIOS[name])
        for how in DAMAGE
    ]
    if "export" in names:
        cases["damage"] += [(damage_exported, "export", how) for how in DAMAGE]
    cases["two processes"] = [(two, name) for name in names]
    whats = ("read-only folder", "read-only home", "closed output", "closed error")
    cases["no access"] = [
        (forbid, name, what) for name in names for what in (*whats, "no reader")
    ]
    return cases
