"""Progress of computations that take minutes, told to a function of the caller's."""

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

# A function of what is being done, the number of parts done, and the number of all.
Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")


def counted(
    items: Collection[Item], progress: Progress | None, what: str
) -> Iterator[Item]:
    """Yields the items, and tells before each, and at the end, how many are done.

    Args:
        items: The parts of the computation.
        progress: The function that is told; None: nobody is.
        what: The computation and the name of its parts, e.g. "factorising layers".
    """
    for done, item in enumerate(items):
        if progress is not None:
            progress(what, done, len(items))
        yield item
    if progress is not None:
        progress(what, len(items), len(items))
