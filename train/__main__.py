"""The command line: `python -m train VERB`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from train.errors import UsageError
from train.machine.host_memory import give_back_after_compiling, restart_with_huge_pages

VERBS = {
    "fit": "train a network",
    "evaluate": "evaluate a checkpoint",
    "compress": "make a trained checkpoint smaller: Tucker-2 factors, or inertial",
    "finetune": "train a checkpoint further",
    "import": "make a checkpoint from PyTorch weights",
    "export": "write a checkpoint as one file that needs JAX alone to run",
    "pipeline": "compress and fine-tune PyTorch weights, beside a dense control",
    "sweep": "train many configurations, and write a record of each run",
    "report": "draw a run's learning curve and write its record",
    "benchmark": "measure speed and memory, beside PyTorch if asked",
    "quickstart": "train and evaluate a small network on digits, in minutes",
}

# `import` is a keyword of Python, so that no module can have this name.
_MODULES = {"import": "import_torch"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code: 0, 1 where a sweep's run failed, 2 after
    bad input, 130 after Ctrl-C.
    """
    # These import JAX, which is not needed before the process may be replaced.
    import inertia_jax
    from train.machine.platform import choose_cpu_flags, use_compilation_cache

    argv = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {verb:<12}{words}" for verb, words in VERBS.items())
    hint = "`python -m train VERB --help` says more."
    parser = argparse.ArgumentParser(
        prog="python -m train",
        usage="python -m train VERB ...",
        description=f"{__doc__}\n\n{listed}\n\n{hint}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", metavar="VERB", choices=VERBS)
    version = inertia_jax.__version__
    parser.add_argument("--version", action="version", version=version)
    verb = parser.parse_args(argv[:1] or ["--help"]).verb
    use_compilation_cache()
    choose_cpu_flags()
    give_back_after_compiling()
    try:
        # Each verb is imported when it is called: a benchmark may need PyTorch, a
        # report a plotting library.
        return importlib.import_module(f"train.verbs.{_MODULES.get(verb, verb)}").run(
            argv[1:]
        )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
