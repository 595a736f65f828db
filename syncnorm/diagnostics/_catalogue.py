"""The catalogue: every norm of the package, what it is for and what it depends on."""

from typing import NamedTuple

from syncnorm import modules
from syncnorm.conversion import To
from syncnorm.conversion._table import table

__all__ = ["NormInfo", "NormList", "list_norms"]


class NormInfo(NamedTuple):
    """One method.

    Attributes:
        names: The layers, as found in :mod:`syncnorm.modules`.
        use: What it is for.
        statistics: Of what its statistics are: the batch (of all ranks), a sample, both, weights, or none.
        same_in_eval: Whether training and evaluation compute the same function.
        convert: Target of :func:`syncnorm.convert`; empty where a layer is put in by hand.
        paper: Where it comes from.
    """

    names: tuple[str, ...]
    use: str
    statistics: str
    same_in_eval: bool
    convert: To | str
    paper: str


class NormList(tuple[NormInfo, ...]):
    """The methods; ``print`` it."""

    __slots__ = ()

    def __str__(self) -> str:
        """One line a method."""
        header = ("norm", "for", "statistics of", "train = eval", "convert(to=...)", "paper")
        rows = [
            (" ".join(i.names), i.use, i.statistics, "yes" if i.same_in_eval else "no", i.convert or "-", i.paper)
            for i in self
        ]
        return table(header, rows)


def _dims(name: str) -> tuple[str, ...]:
    return (f"{name}1d/2d/3d",)


_ALL = (
    NormInfo(
        ("SyncBatchNorm", "SyncBatchNorm1d/2d/3d"), "BatchNorm whose batch is that of all ranks; masks", "the batch", False,
        "sync_batch_norm", "Ioffe & Szegedy 2015; Peng et al. 2018",
    ),
    NormInfo(_dims("BatchRenorm"), "small or unrepresentative batches", "the batch", False, "batch_renorm", "Ioffe 2017"),
    NormInfo(
        _dims("GhostBatchNorm"), "a chosen number of samples per statistic", "the batch", False, "ghost_batch_norm",
        "Hoffer et al. 2017",
    ),
    NormInfo(
        _dims("MovingAverageBatchNorm"), "batches of 1 to 4, behind centred weights", "the last batches", False,
        "moving_average_batch_norm", "Yan et al. 2020",
    ),
    NormInfo(_dims("FrozenBatchNorm"), "fine-tuning with tiny batches", "none (running)", True, "frozen_batch_norm", "-"),
    NormInfo(("GroupNorm",), "small batches in vision", "a sample", True, "group_norm", "Wu & He 2018"),
    NormInfo(
        ("LayerNorm",), "transformers, recurrent nets; channels of a map", "a sample", True, "layer_norm", "Ba et al. 2016"
    ),
    NormInfo(("RMSNorm",), "LayerNorm without centring; partial", "a sample", True, "rms_norm", "Zhang & Sennrich 2019"),
    NormInfo(
        _dims("InstanceNorm"), "style, image generation", "a sample", True, "instance_norm", "Ulyanov et al. 2016"
    ),
    NormInfo(
        ("FilterResponseNorm", "TLU"), "batches of one, with its own activation", "a sample", True, "filter_response_norm",
        "Singh & Krishnan 2020",
    ),
    NormInfo(("EvoNormB0",), "norm and activation in one", "batch and sample", False, "evo_norm_b0", "Liu et al. 2020"),
    NormInfo(("EvoNormS0",), "norm and activation in one, no batch", "a sample", True, "evo_norm_s0", "Liu et al. 2020"),
    NormInfo(("DynamicTanh",), "transformers without a norm", "none", True, "dynamic_tanh", "Zhu et al. 2025"),
    NormInfo(
        _dims("SwitchableNorm"), "learns its mixture of instance, layer and batch", "batch and sample", False,
        "switchable_norm", "Luo et al. 2019",
    ),
    NormInfo(
        _dims("BatchInstanceNorm"), "learns how much style to keep", "batch and sample", False, "batch_instance_norm",
        "Nam & Kim 2018",
    ),
    NormInfo(
        ("ConditionalNorm",), "scale and shift from a condition or a class", "of the norm inside", False, "",
        "Dumoulin et al. 2017; Perez et al. 2018",
    ),
    NormInfo(("AdaptiveInstanceNorm",), "one image's style on another", "a sample", True, "", "Huang & Belongie 2017"),
    NormInfo(_dims("WeightStandardizedConv"), "beside GroupNorm at batches of one", "weights", True, "", "Qiao et al. 2019"),
    NormInfo(_dims("WeightCentralizedConv"), "before MovingAverageBatchNorm", "weights", True, "", "Yan et al. 2020"),
    NormInfo(("spectral_norm",), "GAN critics, Lipschitz bounds", "weights", False, "", "Miyato et al. 2018"),
    NormInfo(("LayerNormLSTM",), "recurrent nets", "a sample", True, "", "Ba et al. 2016"),
    NormInfo(("BatchNormLSTM",), "recurrent nets, per time step", "the batch", False, "", "Cooijmans et al. 2017"),
    NormInfo(("RunningNorm",), "observations in reinforcement learning", "all seen so far", False, "", "-"),
    NormInfo(("Standardize", "MinMaxScale"), "features, fitted over ranks", "fitted data", True, "", "-"),
)  # fmt: skip


def list_norms() -> NormList:
    """Every norm of the package; ``print(syncnorm.list_norms())`` is the catalogue."""
    return NormList(info for info in _ALL if all(hasattr(modules, name.partition("/")[0]) for name in info.names))
