"""Real data that needs no download: scikit-learn's digits, wine and breast cancer, scikit-image's textures.

A seed is a weight draw and an order of samples; the split of the digits is the same for all, that of the tables is not.
"""

from functools import lru_cache

import torch
from torch import Tensor

NUM_TRAIN = 1000  # digits, of 1797
BATCH = 32  # of all ranks together


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [1000, 64] and labels [1000] to train on, images [797, 64] and labels [797] to test on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(data.data, dtype=torch.float32) / 16)[order]
    labels = torch.tensor(data.target)[order]
    return images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:]


def orders(num: int, seeds: list[int], epochs: int, batch: int = BATCH) -> Tensor:
    """Which samples each seed has in each step, [steps, batch, S]; an epoch drops what does not fill a batch."""
    per_epoch = num // batch
    each = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        each.append(
            torch.cat([torch.randperm(num, generator=draw)[: per_epoch * batch].view(-1, batch) for _ in range(epochs)])
        )
    return torch.stack(each, -1)


def table(name: str) -> tuple[Tensor, Tensor]:
    """Features [N, F], float32 and as they are, and labels [N] of 'wine' or 'breast_cancer'."""
    from sklearn.datasets import load_breast_cancer, load_wine

    data = {"wine": load_wine, "breast_cancer": load_breast_cancer}[name]()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


@lru_cache(maxsize=1)
def textures() -> Tensor:
    """Brick, grass and gravel, [3, 512, 512], each standardised, so that brightness and contrast tell nothing."""
    import skimage.data

    images = torch.stack([torch.tensor(getattr(skimage.data, n)()) for n in ("brick", "grass", "gravel")]).float()
    var, mean = torch.var_mean(images, (1, 2), keepdim=True)
    return (images - mean) / var.sqrt()


def scenes(num: int, draw: torch.Generator, *, test: bool, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images [num, size, size] that are one texture outside a disc and another inside, and the texture of every pixel.

    Of the four upright strips of each photograph, the first and third are for training, the others for tests. Exposure
    differs between images: contrast by a factor of up to 1.5, brightness by up to half a standard deviation.
    """
    photos = textures()

    def patches(kind: Tensor) -> Tensor:
        top = torch.randint(512 - size, (num,), generator=draw)
        strip = 2 * torch.randint(2, (num,), generator=draw) + test
        left = 128 * strip + torch.randint(128 - size, (num,), generator=draw)
        rows, columns = (at[:, None] + torch.arange(size) for at in (top, left))
        return photos[kind[:, None, None], rows[:, :, None], columns[:, None, :]]

    outer = torch.randint(3, (num,), generator=draw)
    inner = (outer + torch.randint(1, 3, (num,), generator=draw)) % 3
    centre = size * (0.25 + 0.5 * torch.rand(2, num, 1, 1, generator=draw))
    radius = size * (0.2 + 0.2 * torch.rand(num, 1, 1, generator=draw))
    at = torch.arange(size, dtype=torch.float32)
    inside = (at[None, :, None] - centre[0]) ** 2 + (at[None, None, :] - centre[1]) ** 2 < radius**2
    images = torch.where(inside, patches(inner), patches(outer))
    labels = torch.where(inside, inner[:, None, None], outer[:, None, None])
    contrast = 1.5 ** (2 * torch.rand(num, 1, 1, generator=draw) - 1)
    brightness = torch.rand(num, 1, 1, generator=draw) - 0.5
    return images * contrast + brightness, labels


SHIFTS = ("none", "contrast", "brightness", "blur")


def shifted(images: Tensor, shift: str) -> Tensor:
    """Digits [N, 64] as another camera would see them."""
    if shift == "contrast":
        return 0.3 * images
    if shift == "brightness":
        return images + 0.5
    if shift == "blur":
        maps = torch.nn.functional.pad(images.view(-1, 1, 8, 8), (1, 1, 1, 1), mode="replicate")
        return torch.nn.functional.avg_pool2d(maps, 3, 1).flatten(1)
    return images
