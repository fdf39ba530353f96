"""The command line: `inertia VERB`, or `python -m train VERB`."""

import argparse
import gc
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from train.command import install_command, program
from train.errors import (
    UsageError,
    in_words,
    is_full,
    leave_to_caller,
    one_of,
    user_input,
)
from train.machine.host_memory import (
    NO_HUGE_PAGES,
    give_back_after_compiling,
    restart_with_huge_pages,
)
from train.machine.interrupt import interrupt, leave
from train.machine.streams import is_output_lost, keep_streams
from train.result import JSON, printed_as_json
from train.versions import found_versions, versions_in_words

VERBS = {
    "fit": "train a network",
    "evaluate": "evaluate a checkpoint",
    "compress": "make a trained checkpoint smaller: Tucker-2 factors, or inertial",
    "finetune": "train a checkpoint further",
    "import": "make a checkpoint from weights of PyTorch or Flax",
    "export": "write a checkpoint for JAX alone, PyTorch, ONNX or StableHLO",
    "study": "train a network, make smaller ones of it in several ways, compare",
    "pipeline": "compress and fine-tune PyTorch weights, beside a dense control",
    "sweep": "train many configurations, and write a record of each run",
    "report": "write a page about runs and checkpoints, side by side",
    "models": "list the networks, with their parameters and multiply-accumulates",
    "plan": "show what stands at each layer of a checkpoint's network",
    "diff": "say in what two checkpoints differ",
    "predict": "say which classes a checkpoint's network sees in images",
    "benchmark": "measure speed and memory, beside PyTorch if asked",
    "completion": "print what completes verbs and options in bash or zsh",
    "quickstart": "train a small network, compress it and compare, in minutes",
}

# `import` is a keyword of Python, so that no module can have this name.
_MODULES = {"import": "import_torch"}

# Whatever these verbs print is also in the files that they leave.
_TRAINING = ("fit", "compress", "finetune", "pipeline", "sweep", "study", "quickstart")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code: 0, 1 where a sweep's run failed, 2 after
    bad input, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    is_json = JSON in argv
    argv = [word for word in argv if word not in (NO_HUGE_PAGES, JSON)]
    if argv[:1] == ["--version"]:
        print(json.dumps(found_versions()) if is_json else versions_in_words())
        return 0
    verb = _parser().parse_args(argv[:1] or ["--help"]).verb
    if argv[1:] in (["-h"], ["--help"]):
        return _guarded(verb, _show_help, argv)[0]
    if not is_json:
        return _guarded(verb, _run_verb, argv)[0]
    with printed_as_json(verb) as result:
        code, error = _guarded(verb, _run_verb, argv)
        result.update(exit_code=code, error=error)
    return code


def _guarded(
    verb: str, call: Callable[[str, Sequence[str]], int], argv: Sequence[str]
) -> tuple[int, str | None]:
    """Returns the exit code of a call, and the error that the user is told, if any."""
    try:
        return call(_MODULES.get(verb, verb), argv), None
    except UsageError as error:
        told = str(error)
    except ModuleNotFoundError as error:
        told = _missing(error, f"`{verb}`")
    except OSError as error:
        if not is_full(error):
            raise
        told = in_words(error)
    print(f"error: {told}", file=sys.stderr)
    return 2, told


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of the first word."""
    listed = "\n".join(f"  {verb:<12}{words}" for verb, words in VERBS.items())
    hint = (
        f"`{program()} VERB --help` says more. With --json, a verb prints one JSON "
        "object, and what people read goes to standard error. With --no-huge-pages, "
        "no verb starts itself again for huge pages of memory."
    )
    parser = argparse.ArgumentParser(
        prog=program(),
        usage=f"{program()} VERB ...",
        description=f"{__doc__}\n\n{listed}\n\n{hint}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", metavar="VERB", type=one_of(VERBS))
    parser.add_argument("--version", action="store_true", help="show versions and exit")
    return parser


def _show_help(name: str, argv: Sequence[str]) -> int:
    """Ends the program with a verb's help, which needs nothing that computes."""
    if importlib.util.find_spec(f"train.options.{name}") is not None:
        importlib.import_module(f"train.options.{name}").parse(argv[1:])
    code: int = importlib.import_module(f"train.verbs.{name}").run(argv[1:])
    return code


def _run_verb(name: str, argv: Sequence[str]) -> int:
    # These import JAX, which is not needed before the process may be replaced.
    from inertia_jax.calls import remembered_calls
    from inertia_jax.chips.compiler import tell_libtpu
    from train.machine.platform import choose_cpu_flags, use_compilation_cache

    use_compilation_cache()
    choose_cpu_flags()
    tell_libtpu()
    give_back_after_compiling()
    _check_local(argv)
    # Each verb is imported when it is called: a benchmark may need PyTorch, a report a
    # plotting library.
    module = importlib.import_module(f"train.verbs.{name}")
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, interrupt)
    with remembered_calls():
        code: int = module.run(argv[1:])
    return code


def _check_local(argv: Sequence[str]) -> None:
    """Raises UsageError where an argument, or the place of its data, is a URL."""
    for word in argv:
        found = re.search(r"(^|[=:])([A-Za-z][A-Za-z0-9+.-]+://.*)", word)
        if found:
            from inertia_jax.atomic import local_path

            with user_input():
                local_path(found[2])


def run_command() -> int:
    """Is the command `inertia`, which finds modules where `python -m train` does."""
    sys.path.insert(0, os.getcwd())
    return _run()


def _run() -> int:
    """Runs a verb as a program: Ctrl-C is one line, and lost streams end nothing."""
    code: Any
    # Imports and traces make a million objects that stay. To look for garbage among
    # them after every 700 took a fifth of the CPU before the first step is compiled.
    gc.set_threshold(100_000)
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, leave)
        keep_streams()
        leave_to_caller()
        restart_with_huge_pages()
        code = main()
    except SystemExit as leaving:  # after help, and after options that are refused
        code = leaving.code or 0
    except KeyboardInterrupt:
        print("interrupted before the end.", file=sys.stderr)
        sys.stdout.flush()
        # Threads that compile are still at work, and an end as usual crashes in them.
        os._exit(130)
    is_lost = is_output_lost() and not set(_TRAINING) & set(sys.argv[1:3])
    return code or int(is_lost)


def _missing(error: ModuleNotFoundError, who: str) -> str:
    """Returns what to install; raises the error where it is one of our own modules."""
    package = (error.name or "train").partition(".")[0]
    if package in ("train", "inertia_jax"):
        raise error
    return (
        f"{who} needs the package {package}, which {sys.executable} has not: "
        f"{install_command('train')}."
    )


if __name__ == "__main__":
    sys.exit(_run())
