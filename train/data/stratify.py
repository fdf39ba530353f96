"""A share of labelled examples, drawn class by class."""

import numpy as np


def stratified_split(
    labels: np.ndarray, num_held_out: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples that are kept and those that are held out, shuffled.

    Each class is in both by its share, and of each class at least one example is kept.
    They are those of scikit-learn's `train_test_split` with `stratify=labels` and
    `random_state=seed`, where that takes these labels.

    Args:
        labels: The class of each example [n], int.
        num_held_out: The number of examples to hold out, in [0, n].
        seed: The seed, in [0, 2^32).
    """
    rng = np.random.RandomState(seed)
    counts = np.bincount(labels)
    num_kept = _shares(counts, len(labels) - num_held_out, rng)
    num_kept = np.maximum(num_kept, np.minimum(counts, 1))
    num_out = _shares(counts - num_kept, int((counts - num_kept).sum()), rng)
    kept, held_out = [], []
    for label, (first, second) in enumerate(zip(num_kept, num_out, strict=True)):
        members = np.flatnonzero(labels == label)
        members = members[rng.permutation(len(members))]
        kept.append(members[:first])
        held_out.append(members[first : first + second])
    return (
        rng.permutation(np.concatenate(kept)),
        rng.permutation(np.concatenate(held_out)),
    )


def _shares(counts: np.ndarray, total: int, rng: np.random.RandomState) -> np.ndarray:
    """Returns how many of each class make up `total`; the largest remainders win."""
    wanted = counts / max(counts.sum(), 1) * total
    shares = np.floor(wanted)
    remainders = wanted - shares
    for remainder in np.unique(remainders)[::-1]:
        missing = int(total - shares.sum())
        if missing == 0:
            break
        equal = np.flatnonzero(remainders == remainder)
        chosen = rng.choice(equal, min(len(equal), missing), replace=False)
        shares[chosen] += 1
    return shares.astype(int)
