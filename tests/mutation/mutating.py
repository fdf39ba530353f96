"""Changes the code in small ways, and sees whether the tests that run it notice."""

import argparse
import ast
import collections
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Sequence
from typing import Any

import coverage
from changes import GROUPS, ROOT, changed, choose

# Of the seconds that its tests took when they were traced, and to start with.
PATIENCE, START = 3.0, 60.0


def _statements(source: str) -> dict[int, tuple[int, int]]:
    """Returns the first and last line of the innermost statement on each line."""
    found = {}
    for node in ast.walk(ast.parse(source)):  # outer ones come first
        if isinstance(node, ast.stmt):
            first, last = node.lineno, node.end_lineno
            if body := getattr(node, "body", None):
                last = max(first, body[0].lineno - 1)
            found.update(dict.fromkeys(range(first, last + 1), (first, last)))
    return found


class Tests:
    """The tests that run a line, the quickest first, as `make coverage` saw them."""

    def __init__(self, data: pathlib.Path, times: Sequence[pathlib.Path]) -> None:
        self._data = coverage.CoverageData(str(data))
        self._data.read()
        self._files = self._data.measured_files()
        cases = [c for file in times for c in xml.etree.ElementTree.parse(file).iter()]
        self._seconds = {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": (
                float(case.get("time", 0))
            )
            for case in cases
            if case.tag == "testcase"
        }
        self._statements: dict[str, dict[int, tuple[int, int]]] = {}

    def of(self, file: str, line: int, most_seconds: float) -> tuple[list[str], float]:
        """Returns tests, and the seconds that they took.

        Code that runs when it is imported alone is tested by what runs its file.
        """
        if file not in self._statements:
            self._statements[file] = _statements((ROOT / file).read_text())
        first, last = self._statements[file].get(line, (line, line))
        measured = next(path for path in self._files if path.endswith(f"/{file}"))
        contexts = self._data.contexts_by_lineno(measured)
        names = {n for at in range(first, last + 1) for n in contexts.get(at, ()) if n}
        names = names or {n for at in contexts.values() for n in at if n}
        tests = {name.rpartition("|")[0] for name in names}
        chosen, whole = [], 0.0
        for name in sorted(tests, key=lambda name: (self._time(name), name)):
            if chosen and whole + self._time(name) > most_seconds:
                break
            chosen.append(name)
            whole += self._time(name)
        return chosen, whole

    def _time(self, name: str) -> float:
        return self._seconds.get(name, 1.0)


def import_all() -> None:
    """Imports what all tests import, but for the code that is changed."""
    for name in ("flax.nnx", "optax", "orbax.checkpoint", "scipy.stats"):
        importlib.import_module(name)


def run_tests(tests: Sequence[str], log: pathlib.Path, seconds: float) -> str:
    """Runs tests in a process of their own until one fails; returns the outcome."""
    process = os.fork()
    if process == 0:
        code = 70
        try:
            os.setsid()
            with log.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            import pytest

            sys.path.insert(0, os.getcwd())
            code = pytest.main(
                ["-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
            )
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(int(code))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            # 1: a test failed; 2: its file cannot be imported.
            if code in (0, 1, 2) or code < 0:
                return "survived" if code == 0 else "killed"
            raise RuntimeError(f"pytest ended with {code}; see {log}")
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "killed by time"


class Judge:
    """Tries changes in a tree of its own.

    Attributes:
        tree: A copy of the code.
        log: The file in which the last tests say what they found.
    """

    def __init__(self, tree: pathlib.Path, log: pathlib.Path) -> None:
        self.tree, self.log = tree, log
        self._passes: dict[str, bool] = {}

    def try_out(
        self, mutant: dict[str, Any], names: Sequence[str], seconds: float
    ) -> dict[str, Any]:
        """Returns what became of a change, and the first test that failed."""
        start = time.monotonic()
        while True:
            tests = [name for name in names if self._passes.get(name, True)]
            with changed(self.tree / mutant["file"], mutant) as line:
                outcome = "survived"
                if tests:
                    outcome = run_tests(tests, self.log, START + PATIENCE * seconds)
            found = re.search("^(?:FAILED|ERROR) (.+?)(?: - |$)", self._said(), re.M)
            failed = found[1] if found and outcome == "killed" else None
            # A test that fails without the change, too, notices nothing.
            if failed is None or self._passes_unchanged(failed):
                break
            if failed not in tests:
                raise RuntimeError(f"{failed} fails without any change")
        return {
            **mutant,
            "changed": line,
            "outcome": outcome,
            "by": failed,
            "tests": len(tests),
            "seconds": round(time.monotonic() - start, 1),
        }

    def _said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _passes_unchanged(self, name: str) -> bool:
        if name not in self._passes:
            log = self.log.with_suffix(".unchanged")
            self._passes[name] = run_tests([name], log, 10 * START) == "survived"
            if not self._passes[name]:
                print(f"fails without any change: {name}", flush=True)
        return self._passes[name]


def copy_tree(folder: pathlib.Path) -> pathlib.Path:
    """Copies what git tracks: a change must not be left in the user's own files."""
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return tree


def work(
    mutants: Sequence[tuple[dict[str, Any], list[str], float]], out: pathlib.Path
) -> None:
    """Tries changes, each with its tests, and writes a line about each."""
    import_all()
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        tree = copy_tree(pathlib.Path(folder))
        os.chdir(tree)
        judge = Judge(tree, pathlib.Path(folder, "log"))
        for mutant in mutants:
            result = judge.try_out(*mutant)
            with out.open("a") as stream:
                stream.write(json.dumps(result) + "\n")
            took = f"{result['seconds']:>5.1f} s"
            place = f"{result['file']}:{result['line']}"
            print(
                f"{result['outcome']:<14} {took} {place} {result['changed']}",
                flush=True,
            )


def read_results(path: pathlib.Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Returns the last result of each change."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {_key(result): result for result in map(json.loads, lines)}


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("file", "text", "operator", "occurrence"))


def main() -> int:
    """Tries so many changes of each group; returns 1 if under 90% are noticed.

    Those that the record says to change no result do not count.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=40, help="of each group")
    parser.add_argument("--groups", nargs="*", choices=[*GROUPS], default=[*GROUPS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for one")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / ".coverage")
    times = sorted(ROOT.glob(".coverage-*.xml"))
    parser.add_argument("--times", type=pathlib.Path, nargs="+", default=times)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "mutants.jsonl")
    args = parser.parse_args()
    args.out = args.out.absolute()
    if not args.data.exists():
        parser.error(f"there is no {args.data}: run `make coverage` first.")
    tests = Tests(args.data, args.times)
    chosen = [
        {"group": group, **mutant}
        for group in args.groups
        for mutant in choose(GROUPS[group], args.mutants, args.seed)
    ]
    before = read_results(args.out)
    # In a process that was forked, coverage erases the file that it has open.
    left = [
        (mutant, *tests.of(mutant["file"], mutant["line"], args.seconds))
        for mutant in chosen
        if _key(mutant) not in before
        or (args.again and before[_key(mutant)]["outcome"] == "survived")
    ]
    workers = []
    for job in range(args.jobs):
        if (process := os.fork()) == 0:
            work(left[job :: args.jobs], args.out)
            return 0
        workers.append(process)
    if any(os.waitpid(process, 0)[1] for process in workers):
        return 1
    after = read_results(args.out)
    same = changes_of_no_result()
    counts = collections.Counter(
        (result["group"], "same" if _words(result) in same else result["outcome"])
        for result in (after[_key(mutant)] for mutant in chosen)
    )
    enough = True
    for group in args.groups:
        survived, equal = counts[group, "survived"], counts[group, "same"]
        total = sum(count for (name, _), count in counts.items() if name == group)
        noticed = total - survived - equal
        enough = enough and noticed >= 0.9 * (noticed + survived)
        print(
            f"{group:<13} {noticed:>4} of {total:>4} noticed; {equal} change no result"
        )
    return 0 if enough else 1


def changes_of_no_result() -> set[tuple[str, ...]]:
    """Returns the changes that no test can notice, by what the record says of them."""
    lines = (ROOT / "results" / "mutants.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return {_words(row) for row in rows if (row["why"] or "").startswith("same")}


def _words(result: dict[str, Any]) -> tuple[str, ...]:
    return result["file"], result["operator"], result["changed"]


if __name__ == "__main__":
    sys.exit(main())
