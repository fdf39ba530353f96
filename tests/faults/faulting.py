"""Causes faults while the program runs, and judges what comes of each."""

import argparse
import collections
import itertools
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import traceback
from typing import Any

# The part of the cases that each kind has.
SHARES = {
    "kill": 0.25,
    "signal": 0.25,
    "full disk": 0.15,
    "damage": 0.25,
    "two processes": 0.05,
    "no access": 0.05,
}


def main() -> int:
    """Causes so many faults, prints a table by kind; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=2400.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=[*SHARES], default=[*SHARES])
    parser.add_argument("--verbs", nargs="*")
    parser.add_argument("--case", help="KIND:NUMBER, the one of an earlier call")
    args = parser.parse_args()
    root = pathlib.Path(__file__).parents[2]
    # Every process of a command executes the very same programs.
    cache = os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(root / ".pytest_cache" / "faults")
    )
    pathlib.Path(cache).mkdir(parents=True, exist_ok=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    sys.path.insert(0, str(root))
    import program
    from scenarios import SCENARIOS

    # A disk that was made goes with this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    names = [name for name in SCENARIOS if name in (args.verbs or SCENARIOS)]
    program.import_all()
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        place = pathlib.Path(folder)
        place.chmod(0o755)
        return _run(args, names, place)


def _run(args: argparse.Namespace, names: list[str], place: pathlib.Path) -> int:
    from faults import all_cases
    from program import seconds_of_children
    from session import Session

    session = Session(place)
    everything = all_cases(session, names)
    print(f"{seconds_of_children():.0f} CPU s to run each command once", flush=True)
    kinds = [args.case.partition(":")[0]] if args.case else args.kinds
    counts = {kind: collections.Counter() for kind in kinds}
    try:
        for kind in kinds:
            start = seconds_of_children()
            _cause(args, session, kind, everything[kind], counts[kind])
            counts[kind]["CPU s"] += round(seconds_of_children() - start)
    finally:  # also where Ctrl-C ends it
        _print_table(counts)
    return 1 if any(found["FAILED"] for found in counts.values()) else 0


def _cause(
    args: argparse.Namespace,
    session: Any,
    kind: str,
    cases: list[tuple],
    counts: collections.Counter,
) -> None:
    """Causes the faults of a kind, and counts how they end."""
    from faults import SkippedError
    from program import seconds_of_children
    from scenarios import new_folder
    from session import Case, some_of

    order = some_of(cases, random.Random(f"{args.seed}:{kind}"))
    share = SHARES[kind] / sum(SHARES[name] for name in args.kinds)
    only = int(args.case.partition(":")[2]) if args.case else None
    count = max(1, round(args.faults * share)) if only is None else only + 1
    for number, (call, name, *what) in enumerate(itertools.islice(order, count)):
        if only not in (None, number):
            continue
        if seconds_of_children() > args.seconds:
            counts["left out"] += 1
            continue
        rng = random.Random(f"{args.seed}:{kind}:{number}")
        case = Case(session, name, rng, session.root / "case" / "work")
        shutil.rmtree(session.root / "case", ignore_errors=True)
        new_folder(session.given, case.folder)
        try:
            ending = call(case, *what)
        except SkippedError as error:
            print(f"skipped: {kind}: {error}")
            ending = "skipped"
        except Exception as error:
            ending = "FAILED"
            _print_failure(" ".join([call.__name__, name, *map(str, what)]), error)
            verbs = "" if args.verbs is None else f"--verbs {' '.join(args.verbs)} "
            print(
                f"again: {sys.executable} {sys.argv[0]} --seed {args.seed} {verbs}"
                f"--case '{kind}:{number}'",
                flush=True,
            )
        counts[ending] += 1
        counts["caused"] += case.caused
        counts["cases"] += 1


def _print_failure(what: str, error: Exception) -> None:
    from session import Failure

    text = str(error)
    if not isinstance(error, Failure):
        text = "".join(traceback.format_exception(error))
    first, _, rest = text.partition("\n")
    print(f"FAILED: {what}: {first}\n{rest[-2000:]}")


def _print_table(counts: dict[str, collections.Counter]) -> None:
    heads = ["cases", "caused", "same", "refused", "FAILED", "skipped", "left out"]
    heads.append("CPU s")
    total = collections.Counter()
    print(f"{'kind':<14}" + "".join(f" {head:>8}" for head in heads))
    for kind, found in counts.items():
        total += found
        print(f"{kind:<14}" + "".join(f" {found[head]:>8}" for head in heads))
    print(f"{'all':<14}" + "".join(f" {total[head]:>8}" for head in heads))


if __name__ == "__main__":
    sys.exit(main())
