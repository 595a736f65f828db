"""One fit started by one of Lightning's launchers, as a user's script: python tests/lightning_launch.py ddp_fork out.pt.

With ``more`` at the end: in half precision and compiled instead.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from syncnorm import SyncNorm
from tests.lightning_training import FEW, Compiled, CompiledTraining, Training, kinds, make_trainer


def fitted(module: Training, strategy: str, *callbacks: Any, **options: Any) -> dict[str, torch.Tensor]:
    make_trainer(strategy=strategy, callbacks=callbacks, **options).fit(module)
    return module.state_dict()


def more(strategy: str, out: str) -> None:
    result = {"compiled": fitted(CompiledTraining(), strategy, SyncNorm(), Compiled())}
    for precision in ("bf16-true", "bf16-mixed")[: 2 if strategy == "ddp_fork" else 1]:  # where a launch costs little
        options = {"precision": precision, "max_steps": FEW}
        result[precision] = fitted(Training(torch.float32), strategy, SyncNorm(), **options)
        if strategy == "ddp_fork":
            result[f"{precision}, without"] = fitted(Training(torch.float32), strategy, **options)
    torch.save(result, out)


def main(strategy: str, out: str) -> None:
    module = Training()
    trainer = make_trainer(strategy=strategy, callbacks=(SyncNorm(),))
    trainer.fit(module)
    result: dict[str, Any] = {"state": module.state_dict(), "after": kinds(module)}
    if strategy == "ddp_fork":  # a second launch costs little here
        result["without"] = fitted(Training(), strategy)
        refused = Training()
        try:
            make_trainer(strategy=strategy, callbacks=(SyncNorm(to="group_norm", num_groups=2),)).fit(refused)
        except Exception as error:
            result["refused"] = str(error)
        result["refused_after"] = kinds(refused)
    if trainer.is_global_zero:
        torch.save(result, out)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else more(*sys.argv[1:3])
