"""What an audit found: which tensors differ over ranks, and where the first of them does."""

from dataclasses import dataclass

from syncnorm.conversion._layers import display
from syncnorm.conversion._plan import shorten

__all__ = ["AuditReport", "Drift"]


@dataclass(frozen=True)
class Drift:
    """One tensor that is not the same on all ranks.

    Attributes:
        layer: Qualified name of its layer.
        tensor: Its name in the layer.
        parties: Ranks with equal bytes, one tuple for each version, that of the lowest rank first.
        channel: The first that differs; None for a scalar.
        values: There, one for each party.
        largest: Largest absolute difference to the first party, over channels and ranks.
    """

    layer: str
    tensor: str
    parties: tuple[tuple[int, ...], ...]
    channel: int | None
    values: tuple[float, ...]
    largest: float

    def __str__(self) -> str:
        at = "" if self.channel is None else f", channel {self.channel}"
        sides = "; ".join(
            f"ranks {list(ranks)} have {value:.9g}" for ranks, value in zip(self.parties, self.values, strict=True)
        )
        return f"{display(self.layer)}.{self.tensor}{at}: {sides} (largest difference {self.largest:.3g})"


@dataclass(frozen=True)
class AuditReport:
    """What :func:`audit` found; true if all ranks hold the same bits. Prints as text.

    Attributes:
        drifts: Tensors that differed, in the model's order.
        num_tensors: Tensors compared.
        ranks: Global ranks that were.
        repaired: ``"broadcast"`` or ``"pool"`` where that was done.
    """

    drifts: tuple[Drift, ...]
    num_tensors: int
    ranks: tuple[int, ...]
    repaired: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing differed."""
        return not self.drifts

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        over = f"{self.num_tensors} tensors of norms over ranks {list(self.ranks)}"
        if self.ok:
            return f"{over}: the same bits on all"
        layers = list(dict.fromkeys(display(drift.layer) for drift in self.drifts))
        done = f"; repaired by {self.repaired}" if self.repaired else ""
        head = f"{over}: {len(self.drifts)} differ, in {len(layers)} layers ({shorten(layers)}){done}. First "
        return head + str(self.drifts[0])
