"""Tier: no process. Checkpoints are translated without their model, read without running them, and written whole or not at all.

The oracle is the model: converted by ``syncnorm.convert``, or built with torch's layers, it must load the result strictly.
"""

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file, save_file
from torch import nn

import syncnorm
from syncnorm.cli import main
from syncnorm.conversion import To, convert_state_dict
from syncnorm.lightning import DigitsMLP

State = dict[str, Any]


def net(norm: Any = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.ModuleDict(
        {"stem": nn.Sequential(nn.Conv2d(3, 8, 1), norm(8)), "head": nn.Sequential(norm(8), nn.Flatten())}
    )
    blocks["ln"] = nn.LayerNorm(8)
    return blocks


def trained(norm: Any = nn.BatchNorm2d) -> State:
    model = net(norm)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.fill_(7)
    return model.state_dict()


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    try:
        status = main(["convert-ckpt", *map(str, arguments)])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def equal(one: State, two: State) -> bool:
    return [*one] == [*two] and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("to", get_args(To))
def test_every_target_gives_what_convert_gives(to: str) -> None:
    """A model that was converted has these keys, in this order, and loads them without a word."""
    state, model = trained(), net()
    model.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups and activations
        syncnorm.convert(model, to=to, **({"virtual_batch_size": 4} if to == "ghost_batch_norm" else {}))
    translated, layers = convert_state_dict(state, to)
    assert equal(translated, model.state_dict())
    assert translated._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert [layer.name for layer in layers] == ["stem.1", "head.0"]
    assert equal(state, trained())


def test_norms_without_statistics_are_left_unless_batch_norms_are_wanted() -> None:
    """A glob for batch norms may well match a layer norm: it keeps its bias."""
    translated, layers = convert_state_dict(trained(), "rms_norm", include=["*"])
    assert [layer.name for layer in layers] == ["stem.1", "head.0"] and "ln.bias" in translated
    translated, layers = convert_state_dict(trained(), "batch_norm", include=["ln"])
    assert [(layer.name, layer.new) for layer in layers] == [
        ("ln", ("running_mean", "running_var", "num_batches_tracked"))
    ]


def test_there_and_back_through_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batch norm to GroupNorm, and from a file of torch's to safetensors; back, statistics are new, the rest is the same."""
    torch.save(trained(), tmp_path / "bn.pt")
    status, said = ran(capsys, tmp_path / "bn.pt", tmp_path / "gn.safetensors", "--to", "group_norm")
    assert status == 0
    assert "2 norms as group_norm, 2 with other entries" in said
    assert "stem.1  8         weight, bias       running_mean, running_var, num_batches_tracked" in said
    assert "num_groups is no part of a checkpoint" in said and "train on" in said
    translated = load_file(tmp_path / "gn.safetensors")
    net(lambda channels: nn.GroupNorm(4, channels)).load_state_dict(translated, strict=True)

    back = ("--to", "batch_norm", "--include", "stem.1", "--include", "head.*")
    status, said = ran(capsys, tmp_path / "gn.safetensors", tmp_path / "back.pt", *back)
    assert status == 0
    assert "2 layers have the statistics of a new one, mean 0 and variance 1: call syncnorm.recalibrate" in said
    found, want = torch.load(tmp_path / "back.pt", weights_only=True), trained()
    for name in ("stem.1", "head.0"):
        want |= {
            f"{name}.{entry}": tensor
            for entry, tensor in nn.BatchNorm2d(8).state_dict().items()
            if entry not in ("weight", "bias")
        }
    assert {*found} == {*want} and all(torch.equal(found[name], want[name]) for name in want)
    net().load_state_dict(found, strict=True)


def test_torchs_sync_batch_norm_has_the_same_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = trained(nn.SyncBatchNorm)
    torch.save(state, tmp_path / "torch.pt")
    for to in ("sync_batch_norm", "batch_norm"):
        status, said = ran(capsys, tmp_path / "torch.pt", tmp_path / f"{to}.pt", "--to", to)
        assert status == 0 and "have the same entries: a copy" in said
        assert equal(torch.load(tmp_path / f"{to}.pt", weights_only=True), state)
    syncnorm.convert(net()).load_state_dict(torch.load(tmp_path / "sync_batch_norm.pt", weights_only=True), strict=True)


def test_a_lightning_checkpoint_keeps_all_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The averaged copy is translated, too; the run resumes with the other norm."""
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 64), torch.arange(8)), 4)

    def fit(norm: str, ckpt: Path | None = None, epochs: int = 1) -> Any:
        options = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        callbacks = [syncnorm.SyncNorm(to=norm), EMAWeightAveraging()]
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, callbacks=callbacks, default_root_dir=tmp_path, **options
        )
        trainer.fit(DigitsMLP(width=8), data, ckpt_path=ckpt, weights_only=True)
        return trainer

    fit("sync_batch_norm").save_checkpoint(tmp_path / "bn.ckpt")
    status, said = ran(capsys, tmp_path / "bn.ckpt", tmp_path / "ln.ckpt", "--to", "layer_norm", "--json")
    assert status == 0
    report = json.loads(said[said.index("{") :])
    assert [*report["layers"]] == ["state_dict", "current_model_state"]
    assert len(report["layers"]["state_dict"]) == 3
    assert any("SyncNorm(to='sync_batch_norm') was taken out" in note for note in report["notes"])
    old, new = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("bn", "ln"))
    assert {*old} - {*new} == {"syncnorm"}
    for key in ("epoch", "global_step", "loops", "hyper_parameters", "lr_schedulers"):
        assert str(old[key]) == str(new[key])
    assert [*new["callbacks"]] == [key for key in old["callbacks"] if not key.startswith("SyncNorm")] != []
    fit("layer_norm", tmp_path / "ln.ckpt", epochs=2)
    capsys.readouterr()

    status, said = ran(capsys, tmp_path / "bn.ckpt", tmp_path / "ln.safetensors", "--to", "rms_norm")
    assert status == 0 and "holds the tensors of 'state_dict' alone; left out: epoch, " in said
    assert "optimizer_states are of the old parameters" in said
    assert {*load_file(tmp_path / "ln.safetensors")} == {
        k for k in new["state_dict"] if not k.endswith(("1.bias", "4.bias", "7.bias"))
    }


class Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def broken(change: str, value: Any) -> State:
    state = trained()
    state[change] = value
    return state


BAD: list[tuple[Any, list[str], str]] = [
    ({"state_dict": Code()}, [], "is a pickle that makes posix.system, which can run any code, so it is not loaded. Where you"),
    (b"", [], "is nothing that torch.save or safetensors wrote, or it is cut short."),
    (b"\x10\0\0\0\0\0\0\0{not json at all", [], "is no sound safetensors file"),
    (pickle.dumps(Code()), [], "is a pickle that makes objects of unknown classes, which can run any code"),
    ({"epoch": 3}, [], "holds no state dict"),
    ([1, 2], [], "holds no state dict"),
    (nn.Linear(2, 2).state_dict(), [], "no entry is a batch norm's, which would be a running_mean and a running_var"),
    (nn.Sequential(nn.LayerNorm(3)).state_dict(), [], "to='batch_norm' makes batch norms of those that include names"),
    (nn.Sequential(nn.LayerNorm(3)).state_dict(), ["--include", "0"], "no entry is a batch norm's"),
    (nn.Sequential(nn.LayerNorm(3)).state_dict(), ["--to", "batch_norm"], "those that include names, out of ['0']."),
    (broken("head.0.running_var", -torch.ones(8)), [], "nothing was loaded: head.0.running_var is negative in channels [0,"),
    (broken("head.0.bias", torch.ones(3)), [], "head.0.bias must have shape [8], has [3]"),
    (trained(), ["--include", "nowhere"], "include='nowhere' matches no normalisation layer"),
    (trained(), ["--exclude", "*"], "leaves no norm to translate; there are ['stem.1', 'head.0']."),
    (broken("forward.extra", 3), [], "safetensors holds tensors only, and 'forward.extra' is none. Name the target .ckpt"),
    (broken("forward.0.running_var", torch.ones(2)) | {"forward.0.running_mean": torch.ones(2), "": 3}, [], "'' is none."),
]  # fmt: skip


@pytest.mark.parametrize(("content", "arguments", "said"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    content: Any,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("in.ckpt").write_bytes(content)
    else:
        torch.save(content, "in.ckpt")
    status, text = ran(capsys, "in.ckpt", "out.safetensors", "--to", "group_norm", *arguments)
    assert status == 2
    assert said in text and text.count("\n") == 1 and text.startswith("syncnorm convert-ckpt: "), text
    assert os.listdir() == ["in.ckpt"]


def test_files_are_not_overwritten_nor_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = torch.ones(8)
    state = {**trained(), "ema.weight": shared, "ema.alias": shared}
    save_file(trained(), "in.safetensors", {"format": "pt", "of": "us"})
    torch.save(state, "in.pt")
    convert = ("in.safetensors", "out.safetensors", "--to", "group_norm")
    assert ran(capsys, *convert)[0] == 0
    before = load_file("out.safetensors")
    assert ran(capsys, *convert) == (
        2,
        "syncnorm convert-ckpt: out.safetensors is there already: choose another name, or say --force.\n",
    )
    assert "there is no folder" in ran(capsys, "in.pt", "no/out.pt", "--to", "group_norm")[1]
    assert ran(capsys, "nothing.pt", "out.pt", "--to", "group_norm")[0] == 2
    assert ran(capsys, *convert, "--force")[0] == 0
    assert equal(load_file("out.safetensors"), before) and b'"of":"us"' in Path("out.safetensors").read_bytes()
    assert ran(capsys, "in.pt", "alias.safetensors", "--to", "group_norm")[0] == 0
    assert torch.equal(load_file("alias.safetensors")["ema.alias"], shared)

    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    status, said = ran(capsys, "in.pt", "in.pt", "--to", "group_norm", "--force")
    assert status == 2 and "No space left on device" in said
    assert {*os.listdir()} == {"in.safetensors", "in.pt", "out.safetensors", "alias.safetensors"}
    assert equal(torch.load("in.pt", weights_only=True), state)
