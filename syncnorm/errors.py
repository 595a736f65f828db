"""The errors that are ours. They stand on the lowest floor, so that every floor can raise them."""

__all__ = ["SyncNormError", "SyncNormMismatch", "SyncNormNonFinite", "SyncNormPeerLost", "SyncNormTimeout"]


class SyncNormError(RuntimeError):
    """A synchronised layer cannot do what was asked: no such group, a rank outside of it, a backend that refuses."""


class SyncNormMismatch(SyncNormError):  # noqa: N818 - the name is what ranks find, not that something failed
    """Ranks that meet in one exchange disagree. Raised on every rank that took part."""


class SyncNormNonFinite(SyncNormError):  # noqa: N818 - as above
    """The statistics of a batch are not finite. Raised on every rank, before anything was changed.

    Attributes:
        ranks: The channels of each rank that has NaN or infinity in them.
    """

    def __init__(self, message: str, ranks: dict[int, list[int]] | None = None) -> None:
        super().__init__(message)
        self.ranks = ranks or {}


class SyncNormPeerLost(SyncNormError):  # noqa: N818 - as above
    """A rank that this one waits for is gone: its process died, or it has left the group. The text names it."""


class SyncNormTimeout(SyncNormError):  # noqa: N818 - as above
    """A rank that this one waits for lives and did not come within the group's time limit. The text names it."""
