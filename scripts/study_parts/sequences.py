"""Recurrent nets: digits read row by row. Not vectorised over seeds: the recurrent layers have none."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from study_parts import data
from study_parts.training import fit
from syncnorm import modules

Row = dict[str, Any]

ROWS = 8  # time steps, of 8 pixels each


class Reader(nn.Module):
    """Reads digits [N, 64] in rows, and classifies by the last state; local ranks have copies with shared weights."""

    def __init__(self, cell: nn.Module, hidden: int, ranks: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(hidden, 10)
        self.others = nn.ModuleList(copy.deepcopy(cell) for _ in range(ranks - 1))
        for other in self.others:
            for name, parameter in cell.named_parameters():
                other._parameters[name] = parameter

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, ROWS, 8).transpose(0, 1)
        if not self.training:  # with what rank 0 has, as DDP's checkpoints
            return self.head(self.cell(rows)[0][-1])
        cells = [self.cell, *self.others]
        parts = [cell(part)[0][-1] for cell, part in zip(cells, rows.chunk(len(cells), 1), strict=True)]
        return self.head(torch.cat(parts))


def read_rows(
    seeds: list[int],
    *,
    cell: str,
    batch: int = 8,
    gain: float = 0.1,
    lr: float = 0.01,
    steps: int = 300,
    hidden: int = 48,
    samples: int = 8,
) -> list[Row]:
    """Test error of an LSTM without norms, with layer norm, or with batch norm per time step.

    For batch norm also with the statistics of all time steps averaged into one set, as a layer that knows no time would
    have them; and how far apart the statistics of the steps are: the standard deviation over steps of a running mean, in
    the mean running deviation.
    """
    images, labels, test_x, test_y = data.digits()
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        made: nn.Module = {
            "LSTM": lambda: nn.LSTM(8, hidden),
            "LayerNormLSTM": lambda: modules.LayerNormLSTM(8, hidden),
            "BatchNormLSTM": lambda: modules.BatchNormLSTM(8, hidden, max_length=ROWS, gain=gain),
        }[cell]()
        net = Reader(made, hidden, samples // batch)
        order = data.orders(data.NUM_TRAIN, [seed], -(-steps // (data.NUM_TRAIN // samples)), samples)[:steps, :, 0]
        fit(net, ((images[chosen], labels[chosen, None]) for chosen in order), steps, lr=lr, adam=True)
        row: Row = {"seed": seed, "error": _error(net, test_x, test_y)}
        if cell == "BatchNormLSTM":
            mean, var = made.running_mean_l0, made.running_var_l0
            row["step_spread"] = float((mean.std(0) / var.mean(0).sqrt().clamp(min=1e-6)).mean())
            mean.copy_(mean.mean(0).expand_as(mean).clone())
            var.copy_(var.mean(0).expand_as(var).clone())
            row["error_shared"] = _error(net, test_x, test_y)
        rows.append(row)
    return rows


@torch.no_grad()
def _error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    return 100 * float((net(x).argmax(1) != y).float().mean())
