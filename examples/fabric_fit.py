"""The same with Lightning Fabric: your own loop, and one call of syncnorm.convert, before or after fabric.setup.

python examples/fabric_fit.py
python examples/fabric_fit.py --devices 4 --epochs 10 --norm local
"""

import argparse

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import syncnorm


def build() -> nn.Sequential:
    layers: list[nn.Module] = []
    for num_in in (64, 128, 128):
        layers += [nn.Linear(num_in, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=["sync", "local"], default="sync")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu or auto")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=2, help="per process")
    parser.add_argument("--steps", type=int, default=None, help="steps per epoch, if not all")
    args = parser.parse_args()

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices, strategy="ddp" if args.devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0)

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    train, held_out = random_split(TensorDataset(images, labels), [1000, 797])
    loader = fabric.setup_dataloaders(DataLoader(train, args.batch_size, shuffle=True, drop_last=True))

    model = build()
    if args.norm == "sync":
        model = syncnorm.convert(model)
    lr = 0.001 * args.batch_size * args.devices
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))

    for epoch in range(args.epochs):
        model.train()
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for step, (x, y) in enumerate(loader):
            if step == args.steps:
                break
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            schedule.step()

        model.eval()
        x, y = fabric.to_device(held_out[:])
        with torch.no_grad():
            error = (model(x).argmax(1) != y).float().mean()
        fabric.print(f"epoch {epoch}: test error {100 * error:.2f} %")

    syncnorm.revert(model)
    fabric.print(f"after revert: {model.module[1]}")


if __name__ == "__main__":
    main()
