"""What a training step of synchronised layers sends, told from the words of their rows alone."""

from collections.abc import Sequence

from syncnorm.distributed.ledger import Ledger, check_level

__all__ = ["step_cost"]


def step_cost(layers: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Exchanges of each layer in a training step, and the bytes that a rank hands over in them.

    Where ranks compare their places, the rows of a group have one width, which the longest of them decides: this is the cost
    once every layer has been called.

    Args:
        layers: That share a group; for each the words of its rows: a forward one and, if there is one, a backward one.
    """
    if check_level() == "off":
        return [(len(rows), 8 * (sum(rows) + 1)) for rows in layers]
    ledger = Ledger()
    for rows in layers:
        for words in rows:
            if not ledger.fits(words):
                ledger.grow(words)
    costs = []
    for rows in layers:
        alone = [words for words in rows if not ledger.fits(words)]  # announced by an empty row, then sent by itself
        costs.append((len(rows) + len(alone), 8 * (len(rows) * ledger.width + sum(alone))))
    return costs
