"""Runs inputs against targets, within bounds of memory and time."""

import argparse
import contextlib
import faulthandler
import pathlib
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings

import hypothesis
from hypothesis import HealthCheck, Phase

# Seconds of the processor that an input may take.
MOST_SECONDS = 10.0
# An error is a few sentences, whatever a file holds.
MOST_LETTERS = 1500


class _Hang(BaseException):
    """Raised where no handler of `Exception` takes it for a damaged file."""


def _raise_hang(*_):
    raise _Hang


@contextlib.contextmanager
def limits(num_bytes):
    """Gives no more address space than `num_bytes` beyond what is taken already."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, _raise_hang)
    try:
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        most = pages * resource.getpagesize() + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        yield
    except _Hang:
        raise AssertionError(f"it takes more than {MOST_SECONDS} s") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def _chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def attempt(target, given, folder):
    """Tells whether an input is taken: else it must be refused as is documented."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limits(target.most_bytes):
                target.read(given, folder)
        except target.errors as error:
            is_over = any(isinstance(cause, MemoryError) for cause in _chain(error))
            if is_over and not target.may_exhaust:
                raise AssertionError(f"it takes over {target.most_bytes} B") from error
            assert len(str(error)) <= MOST_LETTERS, str(error)[:MOST_LETTERS]
            return False
    return True


def fuzz(target, count, folder, *, seed=None):
    """Tries inputs until one fails; returns how many were taken and how many not."""
    tried = {True: 0, False: 0}

    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=seed is None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(target.inputs)
    def run(given):
        tried[attempt(target, given, folder)] += 1

    if seed is not None:
        run = hypothesis.seed(seed)(run)
    run()
    return tried[True], tried[False]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*")
    args = parser.parse_args()
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    from targets import TARGETS

    # What hangs where Python's signals do not reach is shown, and ends the program.
    faulthandler.dump_traceback_later(60 * args.minutes, exit=True)
    chosen = {n: t for n, t in TARGETS.items() if n in (args.targets or TARGETS)}
    whole = sum(target.share for target in chosen.values())
    total, failed = 0, []
    print(f"{'target':<12} {'inputs':>7} {'taken':>7} {'refused':>7} {'CPU s':>6}")
    for name, target in chosen.items():
        count = max(1, round(args.inputs * target.share / whole))
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                taken, refused = fuzz(
                    target, count, pathlib.Path(folder), seed=args.seed
                )
            except Exception as error:
                notes = "\n".join(getattr(error, "__notes__", ()))
                last = "".join(traceback.format_tb(error.__traceback__)[-3:])
                print(f"{name}: {error!r:.500}\n{last}{notes[:MOST_LETTERS]}")
                failed.append(name)
                continue
        seconds = time.process_time() - start
        total += taken + refused
        line = f"{taken + refused:>7} {taken:>7} {refused:>7} {seconds:>6.0f}"
        print(f"{name:<12} {line}", flush=True)
    print(f"{'all':<12} {total:>7}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
