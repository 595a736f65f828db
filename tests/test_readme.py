"""Tier: gloo ranks. What README offers to copy runs as it stands, on two ranks, and synchronises: the frameworks in one launch.

A block finds the names that README calls the reader's own; after it, running statistics have moved, alike on both ranks.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRELUDE = """
import os, torch, torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning import LightningDataModule, LightningModule

criterion = nn.functional.cross_entropy
data = TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3)

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x, labels=None):
        y = super().forward(x)
        return y if labels is None else {"loss": criterion(y, labels), "logits": y}

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return criterion(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def fresh():
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    model, module = Net(), Module()
    datamodule = LightningDataModule.from_datasets(data, batch_size=2)
    rows = [{"x": x, "labels": y} for x, y in data]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine = torch.utils.data.Subset(data, range(int(os.environ["RANK"]), 32, 2))  # of a rank, where the block does not cut
    return {"model": model, "module": module, "datamodule": datamodule, "dataset": rows, "optimizer": optimizer,
            "loader": DataLoader(data, 2), "criterion": criterion, "mine": DataLoader(mine, 2)}

def check(name, names):
    norms = [m for m in (names["module"] if name == "lightning" else names["model"]).modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == 1 and norms[0].num_batches_tracked == 8, (name, norms)
    assert (type(norms[0]) is nn.BatchNorm1d) == (name == "lightning"), norms
    both = [torch.empty(8), torch.empty(8)]
    dist.all_gather(both, norms[0].running_mean)
    assert torch.equal(*both) and both[0].abs().max() > 0, both
    if dist.get_rank() == 0:
        print("ran", name, flush=True)
"""


def blocks() -> dict[str, str]:
    text = (ROOT / "README.md").read_text()
    found = re.findall(
        r"```python\n(.*?)```", text[text.index("## Copy, paste") : text.index("**And for any of them**")], re.DOTALL
    )
    names = {"from lightning import": "lightning", "Fabric(": "fabric", "DistributedDataParallel(": "torchrun"}
    names |= {"Accelerator(": "accelerate", "TrainingArguments(": "transformers"}
    return {next(name for mark, name in names.items() if mark in block): block for block in found}


def test_every_framework_has_a_block() -> None:
    assert list(blocks()) == ["lightning", "fabric", "torchrun", "accelerate", "transformers"]


def test_the_flow_quotes_the_study() -> None:
    text, study = ((ROOT / name).read_text() for name in ("README.md", "docs/study.md"))
    numbers = re.findall(r"\d+\.\d+ ± \d+\.\d+", text[text.index("```mermaid") : text.index("## The catalogue")])
    assert len(numbers) >= 7 and all(number in study for number in numbers), numbers


@pytest.mark.gloo
@pytest.mark.slow
def test_what_is_offered_to_copy_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs it, too")
    script = [PRELUDE]
    order = sorted(blocks(), key="torchrun".__ne__)  # it makes the group, and the others take it as it is
    for name in order:
        script.append("names = fresh()")
        script += ["names['loader'] = names['mine']"] if name == "torchrun" else []
        script.append(f"exec({blocks()[name]!r}, names)\ncheck({name!r}, names)")
    # Not by Python's own end: a thread of gloo's that frees what it gathered too late would abort the process there.
    script.append("dist.destroy_process_group()\nos._exit(0)")
    (tmp_path / "blocks.py").write_text("\n".join(script))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "blocks.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.findall(r"ran (\w+)", done.stdout) == order
