"""Weight centralisation: the weights of each output filter get mean 0."""

from torch import Tensor

from syncnorm.functional._weight_standardization import filter_rows

__all__ = ["weight_centralization"]


def weight_centralization(weight: Tensor) -> Tensor:
    """Take its mean from each output filter: ``Ŵ = W - μ``, over all dims but the first.

    What the filter gives no longer depends on what its inputs have in common: a constant added to all of them adds nothing
    (away from padding). It stands in for the centring that moving average batch norm leaves out.

    Args:
        weight: ``[out, *]``, at least two dims and two values per filter, any floating dtype.

    Returns:
        Tensor like ``weight``, in its dtype. Means are taken in at least float32.

    Raises:
        ValueError: If a filter has fewer than two values, which would all become 0.
        TypeError: If the weight is not floating point.

    Reference: Yan, Wan, Zhang, Zhang, Wei & Sun (2020), arXiv:2001.06838, section 4.
    """
    rows = filter_rows("weight_centralization", weight, "centred")
    return (rows - rows.mean(1, keepdim=True)).reshape(weight.shape).to(weight.dtype)
