"""The errors that are ours. They stand on the lowest floor, so that every floor can raise them."""

__all__ = ["SyncNormError", "SyncNormMismatch", "SyncNormPeerLost", "SyncNormTimeout"]


class SyncNormError(RuntimeError):
    """A synchronised layer cannot do what was asked: no such group, a rank outside of it, a backend that refuses."""


class SyncNormMismatch(SyncNormError):  # noqa: N818 - the name is what ranks find, not that something failed
    """Ranks that meet in one exchange disagree. Raised on every rank that took part."""


class SyncNormPeerLost(SyncNormError):  # noqa: N818 - as above
    """A rank that this one waits for is gone: its process died, or it has left the group. The text names it."""


class SyncNormTimeout(SyncNormError):  # noqa: N818 - as above
    """A rank that this one waits for lives and did not come within the group's time limit. The text names it."""
