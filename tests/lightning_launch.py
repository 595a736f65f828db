"""One fit started by one of Lightning's launchers, as a user's script: python tests/lightning_launch.py ddp_fork out.pt."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from syncnorm import SyncNorm
from tests.lightning_training import Training, kinds, make_trainer


def main(strategy: str, out: str) -> None:
    module = Training()
    trainer = make_trainer(strategy=strategy, callbacks=(SyncNorm(),))
    trainer.fit(module)
    result: dict[str, Any] = {"state": module.state_dict(), "after": kinds(module)}
    if strategy == "ddp_fork":  # a second launch costs little here
        plain = Training()
        make_trainer(strategy=strategy).fit(plain)
        result["without"] = plain.state_dict()
        refused = Training()
        try:
            make_trainer(strategy=strategy, callbacks=(SyncNorm(to="group_norm", num_groups=2),)).fit(refused)
        except Exception as error:
            result["refused"] = str(error)
        result["refused_after"] = kinds(refused)
    if trainer.is_global_zero:
        torch.save(result, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
