"""Batch norm layers over all ranks, with the constructor and the state of torch's own.

They subclass torch's concrete batch norm classes and not ``nn.SyncBatchNorm``: DDP refuses that class on CPU, while FSDP,
``update_bn``, weight averaging, finetuning callbacks and conv-BN fusion look for the former.
"""

from torch import nn

from syncnorm.modules._batch_norm import BatchNorm
from syncnorm.modules._statistics import SyncStatistics
from syncnorm.modules._swap import TARGETS

__all__ = ["SyncBatchNorm", "SyncBatchNorm1d", "SyncBatchNorm2d", "SyncBatchNorm3d"]

_ARGUMENTS = """

    Args:
        num_features: C, the size of dim 1 of the input.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics; None for the cumulative average.
        affine: Learn a weight and a bias per channel.
        track_running_stats: Keep running statistics for evaluation. Without them evaluation uses the local batch.
        process_group: Which ranks share statistics: None or ``"world"``, ``"node"`` (ranks of one machine), an int (ranks per
            group), a ``ProcessGroup``, or a one-dimensional ``DeviceMesh`` such as ``mesh["dp"]``. Looked up at the first
            training forward; before there is a process group the layer is plain batch norm.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers. Running statistics are at least float32, also under ``.half()`` and ``.bfloat16()``.
        bias: With ``affine``, whether to learn the bias too.
        backend: ``"auto"``, or a kernel backend by name, which then runs or says why not.
        accumulate: Micro-batches whose pooled statistics make one update of the running ones (gradient accumulation).
            Each micro-batch is still normalised by its own.
        virtual_batch_size: Samples that share a statistic: fewer than the batch of a rank, which is then cut, or as many as
            several ranks have, which are then joined. The layer made is the :class:`syncnorm.GhostBatchNorm2d` of as many
            dims, a subclass of this class. None for all samples of all ranks.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"`` (the exact one) or None: applied to the result, in the
            same passes over memory. The backward keeps the input alone, and one bit an element where there is a residual.
        negative_slope: Of ``"leaky_relu"``.
        memory_efficient: Keep the output for the backward in place of the input, where the layer that follows keeps it
            anyway: no memory of its own. For no activation, or ``"leaky_relu"`` with a positive slope; no residual, no
            second derivative, no weight near zero.
        on_nonfinite: Where the statistics of the batch are not finite: ``"propagate"`` them, as torch; ``"skip_update"``, so
            that one bad batch does not ruin the running statistics; or ``"raise"`` on every rank, naming ranks and channels,
            before anything is changed. On an accelerator the host waits for ``"raise"``.

    Shape:
        Input {shape}, residual and output the same. Statistics over all dims but C and over all ranks of the group.

    Raises:
        ValueError: If an input or a residual does not fit, or one value per channel is all that the whole group has.
        TypeError: If an input is not floating point.
        SyncNormError: If this rank is outside the group, or the group no longer exists.

    Reference: Ioffe & Szegedy (2015), algorithm 1; Peng et al. (2018), section 3.3.
    """


class SyncBatchNorm(SyncStatistics):
    __doc__ = "Batch norm over all ranks, for inputs of any rank." + _ARGUMENTS.format(shape="``[N, C, *]``")
    reverts_to = BatchNorm


class SyncBatchNorm1d(SyncStatistics, nn.BatchNorm1d):
    __doc__ = "Batch norm over all ranks, for features and sequences." + _ARGUMENTS.format(
        shape="``[N, C]`` or ``[N, C, L]``"
    )
    reverts_to = nn.BatchNorm1d
    input_dims = (2, 3)


class SyncBatchNorm2d(SyncStatistics, nn.BatchNorm2d):
    __doc__ = "Batch norm over all ranks, for images." + _ARGUMENTS.format(shape="``[N, C, H, W]``")
    reverts_to = nn.BatchNorm2d
    input_dims = (4,)


class SyncBatchNorm3d(SyncStatistics, nn.BatchNorm3d):
    __doc__ = "Batch norm over all ranks, for volumes and videos." + _ARGUMENTS.format(shape="``[N, C, D, H, W]``")
    reverts_to = nn.BatchNorm3d
    input_dims = (5,)


TARGETS.update(
    {
        nn.BatchNorm1d: SyncBatchNorm1d,
        nn.BatchNorm2d: SyncBatchNorm2d,
        nn.BatchNorm3d: SyncBatchNorm3d,
        nn.SyncBatchNorm: SyncBatchNorm,
        BatchNorm: SyncBatchNorm,
    }
)
