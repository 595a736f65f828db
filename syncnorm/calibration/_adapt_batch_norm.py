"""AdaBN: the batch norms of a trained model get the statistics of another domain, over all batches of all ranks.

Each batch is normalised by itself while it is measured, so what a rank finds does not depend on its batches' order or on
the other ranks; one merge at the end gives every rank what one process would have found with all the batches.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from syncnorm.calibration._layers import Forward, batch_norms, call_with_first_tensor, unwrap
from syncnorm.calibration._population import Meeting, take_population
from syncnorm.distributed.groups import group_spec, resolve

__all__ = ["adapt_batch_norm"]


def adapt_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    process_group: object = "world",
) -> int:
    """Replace the running statistics of every batch norm by those of ``batches``, as for a new domain (AdaBN).

    The model runs in evaluation mode without gradients, each batch norm normalising every batch by that batch's own
    statistics and adding them to the domain's: mean, and unbiased variance, over all samples of all batches of all ranks. A
    layer that is called several times pools all its calls. Weights, counters, training flags and everything else stay as
    they are; no labels are read. Ours, torch's and ``nn.SyncBatchNorm`` are treated alike, and so is
    :class:`~syncnorm.modules.BatchRenorm2d`, whose correction is off in evaluation.

    Ranks may have different numbers of batches, and none, and meet once at the end (not so under FSDP, where forwards
    meet). The result is that of one process with the batches of all ranks; how samples are divided into batches matters
    for all but the first batch norm, so batches should be as large and as mixed as they can be.

    Args:
        model: Any model; one wrapped in DDP or ``torch.compile`` too.
        batches: An iterable, such as a DataLoader, of inputs or of tuples or lists that begin with one.
        forward: How the model is called, ``forward(model, batch)``; by default with the input, on its device.
        process_group: The ranks whose batches make up the domain, as in :class:`syncnorm.SyncBatchNorm`.

    Returns:
        Number of samples, over all ranks: the sum of the sizes of dim 0 of each batch's first tensor, in
            tuples, lists, mappings and dataclasses; a batch that is another object counts as none.

    Raises:
        ValueError: If no rank has a sample; if the model has no batch norm with running statistics; if a layer gets one
            value per channel, or samples that are not finite. Nothing has changed then.
        TypeError: If a batch is not a tensor and does not begin with one, and ``forward`` is not given.
        SyncNormMismatch: If another rank raised an error over its batches.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> adapt_batch_norm(model, torch.randn(100, 2).split(25))
        100

    Reference: Li et al. (2016), arXiv:1603.04779, section 3.2.
    """
    model = unwrap(model)
    layers = {name: layer for name, layer in batch_norms(model).items() if layer.running_mean is not None}
    if not layers:
        raise ValueError(
            "adapt_batch_norm needs a batch norm with running statistics, and the model has none. One with "
            "track_running_stats=False uses each batch's own statistics and needs no adaptation."
        )
    meeting = Meeting(resolve(group_spec(process_group)))
    counted = ((batch, True) for batch in batches)
    return take_population("adapt_batch_norm", model, layers, counted, forward or call_with_first_tensor, meeting)
