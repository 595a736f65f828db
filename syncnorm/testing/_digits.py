"""Real data without a download: scikit-learn's handwritten digits, split once for everybody."""

from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["NUM_TRAIN_DIGITS", "digits", "need_digits"]

NUM_TRAIN_DIGITS = 1000
"""Of 1,797; the other 797 are held out."""


def need_digits() -> None:
    """See that the digits are there.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise ImportError("the digits come with scikit-learn, which is not there: pip install syncnorm[examples]")


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images to train on ``[1000, 64]`` in [0, 1] and their labels ``[1000]``; images held out ``[797, 64]`` and labels.

    The same split on every rank and in every run.
    """
    need_digits()
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(data.data, dtype=torch.float32) / 16)[order]
    labels = torch.tensor(data.target, dtype=torch.int64)[order]
    train, held_out = slice(None, NUM_TRAIN_DIGITS), slice(NUM_TRAIN_DIGITS, None)
    return images[train], labels[train], images[held_out], labels[held_out]
