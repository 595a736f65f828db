"""Someone else's network: look at its norms, convert them, prove the result, train, give them back, export.

    python examples/convert_resnet.py [--small]

A Hugging Face ResNet, built from a config: nothing is downloaded.
"""

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import syncnorm


def make_resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer training steps")
    num_steps = 40 if parser.parse_args().small else 200
    images, labels = digits()
    model = make_resnet()

    say("what is there", syncnorm.inspect(model))
    say("what convert would do", syncnorm.plan(model, exclude="*.shortcut.*"))

    # All of them, then. The object stays: parameters, optimizers and hooks notice nothing.
    before = classes(model)
    assert syncnorm.convert(model) is model
    say("one layer's path, now", syncnorm.explain(model, images[:8]).partition("\nSync")[0])

    # The proof, on the model as it came: 2 ranks against one process with torch's own layers, on an uneven split.
    report = syncnorm.verify(make_resnet, images[:9], ranks=2)
    say("2 ranks and one process", report)
    assert report

    # In one process the layers are plain batch norm. Under torchrun and DDP, as in torchrun_ddp.py, they meet.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    say("training", f"{num_steps} steps of 32 digits")
    for step in range(num_steps):
        start = 32 * step % 1600
        loss = nn.functional.cross_entropy(model(images[start : start + 32]).logits, labels[start : start + 32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % (num_steps // 4) == 0:
            print(f"step {step + 1}/{num_steps}: loss {loss.item():.3f}", flush=True)

    wrong = model.eval()(images[1600:]).logits.argmax(1) != labels[1600:]
    print(f"test error {100 * wrong.double().mean():.1f} % of {len(wrong)}")

    syncnorm.revert(model)
    assert classes(model) == before
    say("reverted", "every layer has its original class")
    say("exported to ONNX", f"largest difference of the logits {onnx_error(model, images[:5]):.1e}")

    # Another architecture that needs no batch: other modules, with the same weights, under the same names.
    syncnorm.convert(model, to="group_norm", num_groups=8)
    say("as group norm", syncnorm.inspect(model))
    syncnorm.revert(model)
    assert classes(model) == before


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def onnx_error(model: ResNetForImageClassification, images: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "resnet.onnx"
        torch.onnx.export(model, (images[:2],), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
        session = onnxruntime.InferenceSession(path)
        logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        return (torch.from_numpy(logits) - model(images).logits).abs().max().item()


def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits [1, 32, 32], each pixel of 8×8 drawn as 4×4, and their labels; in random order."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = torch.tensor(load_digits().images / 16, dtype=torch.float32)[order].unsqueeze(1)
    return nn.functional.interpolate(images, scale_factor=4), torch.tensor(load_digits().target)[order]


def say(what: str, text: object) -> None:
    print(f"\n== {what}\n{text}", flush=True)


if __name__ == "__main__":
    main()
