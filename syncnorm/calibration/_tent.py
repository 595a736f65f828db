"""TENT: a trained model adapts to what it is tested on, by making its own predictions more certain.

Only the affine parameters of the batch norms move, and normalisation is by the batch. Between two calls the model is as
its owner left it, but for those parameters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import Self

from syncnorm.calibration._layers import batch_norms, unwrap
from syncnorm.distributed.exchange import exchange_sums
from syncnorm.distributed.groups import group_spec, resolve
from syncnorm.errors import SyncNormError
from syncnorm.functional._softmax_entropy import softmax_entropy
from syncnorm.modules import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d

__all__ = ["TentAdapter"]

_FROZEN = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d)  # its owner wants it fixed


class TentAdapter:
    """Predict with a model and, with every batch, adapt its batch norms so that the predictions' entropy falls.

    A call normalises by the statistics of the batch (over all ranks, where the layers are synchronised), returns the
    logits, and moves weight and bias of every batch norm by one step on the mean entropy. Over ranks that mean is over all
    samples of all ranks and the parameters stay the same bits everywhere; shards may be uneven or empty, and ranks must
    make the same calls. Running statistics never change. Everything but the batch norms runs as in evaluation, so dropout
    is off.

    It works inside ``torch.no_grad()`` and ``torch.inference_mode()``, as evaluation loops use them.

        with TentAdapter(model) as adapter:
            for x, _ in loader:
                predictions = adapter(x).argmax(1)
        # the model is what it was

    Args:
        model: A classifier with batch norms; one wrapped in DDP too.
        lr: Learning rate of Adam, if ``optimizer`` is not given.
        steps: Steps per batch.
        episodic: Start every call from the parameters that the model came with.
        optimizer: Makes an optimizer from the list of parameters; Adam without weight decay by default.
        logits: Takes the logits ``[N, K, *]`` out of what the model returns; by default it returns them itself.
        process_group: The ranks that adapt together, as in :class:`syncnorm.SyncBatchNorm`.

    Raises:
        ValueError: If the model has no batch norm with affine parameters, or ``steps`` is below 1.

    Reference: Wang et al. (2021), arXiv:2006.10726, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        steps: int = 1,
        episodic: bool = False,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        process_group: object = "world",
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        self.model = unwrap(model)
        self._layers = [layer for layer in batch_norms(self.model).values() if not isinstance(layer, _FROZEN)]
        affine = (p for layer in self._layers for p in (layer.weight, layer.bias) if p is not None)
        self.parameters = list(dict.fromkeys(affine))
        if not self.parameters:
            raise ValueError(
                "TentAdapter adapts weight and bias of batch norms, and the model has none. Models with group or layer norms "
                "do not depend on the batch and gain nothing from its statistics."
            )
        self.steps, self.episodic, self._logits, self._group_spec = steps, episodic, logits, group_spec(process_group)
        self._make_optimizer = optimizer or (lambda parameters: Adam(parameters, lr=lr))
        self._source: list[Tensor] | None = [p.detach().clone() for p in self.parameters]
        self._optimizer = self._make_optimizer(self.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with these arguments, adapt, and return what it returned, without gradient.

        With several steps, the output is that of the last forward; the last step shows in the next call.

        Raises:
            SyncNormError: After :meth:`restore`.
            TypeError: If the model returns no logits ``[N, K, *]``.
        """
        if self._source is None:
            raise SyncNormError("this TentAdapter has been restored and is done. Make a new one to adapt again.")
        if self.episodic:
            self.reset()
        with torch.inference_mode(False), torch.enable_grad():
            args, kwargs = _usable(args), _usable(kwargs)
            with _adapting(self.model, self._layers, self.parameters):
                for _ in range(self.steps):
                    output = self._step(args, kwargs)
        return _detached(output)

    def _step(self, args: Any, kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        logits = output if self._logits is None else self._logits(output)
        if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
            got = f"{list(logits.shape)} {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(
                f"TentAdapter needs floating-point logits [N, K, *], got {got}. Say where they are: "
                "TentAdapter(model, logits=lambda output: output.logits)."
            )
        entropy = softmax_entropy(logits)
        # The sum here and the count over all ranks: uneven shards weigh by their samples.
        gradients = torch.autograd.grad(entropy.sum(), self.parameters, allow_unused=True)
        wide = [
            (torch.zeros_like(p) if g is None else g).double().flatten()
            for p, g in zip(self.parameters, gradients, strict=True)
        ]
        count = wide[0].new_full((1,), float(entropy.numel()))
        row = exchange_sums(torch.cat([count, *wide]), resolve(self._group_spec))
        if row[0] > 0:
            self._descend(row[1:] / row[0])
        return output

    @torch.no_grad()
    def _descend(self, gradient: Tensor) -> None:
        kept = [p.grad for p in self.parameters]
        try:
            for p, part in zip(self.parameters, gradient.split([p.numel() for p in self.parameters]), strict=True):
                p.grad = part.view_as(p).to(p.dtype)
            self._optimizer.step()
        finally:
            for p, old in zip(self.parameters, kept, strict=True):
                p.grad = old

    @torch.no_grad()
    def reset(self) -> Self:
        """Take the parameters back to what the model came with, and start the optimizer anew."""
        if self._source is not None:
            for p, source in zip(self.parameters, self._source, strict=True):
                p.copy_(source)
            self._optimizer = self._make_optimizer(self.parameters)
        return self

    def restore(self) -> nn.Module:
        """Take the parameters back for good; the model, as it was before the adapter came."""
        self.reset()
        self._source = None
        return self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


# With these limits no output is pulled towards the running statistics, which are the source's.
_NO_PULL = {"r_max": 1.0, "d_max": 0.0}


@contextmanager
def _adapting(model: nn.Module, layers: list[Any], parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within: batch norms by the batch and nothing else in training mode, gradients for ``parameters`` and no others."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(p, p.requires_grad) for p in {*model.parameters(), *parameters}]
    tracks = [(layer, layer.track_running_stats) for layer in layers]
    limits = [(layer, name, getattr(layer, name)) for layer in layers for name in _NO_PULL if hasattr(layer, name)]
    # A layer with a forward of its own may update them all the same.
    buffers = [(b, b.clone()) for layer in layers for b in layer.buffers(recurse=False)]
    try:
        for module, _ in modes:
            module.training = False
        for p, _ in grads:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
            if hasattr(layer, "empty_windows"):  # the batches of the source are no part of these
                layer.empty_windows()
        for layer, name, _ in limits:
            setattr(layer, name, _NO_PULL[name])
        yield
    finally:
        for layer, name, limit in limits:
            setattr(layer, name, limit)
        for layer, track in tracks:
            layer.track_running_stats = track
        for p, needs in grads:
            p.requires_grad_(needs)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _usable(value: Any) -> Any:
    """Copies of tensors that inference mode made, as autograd cannot keep those."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _usable(part) for key, part in value.items()}
    return type(value)(map(_usable, value)) if type(value) in (tuple, list) else value


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):  # in place: Hugging Face's outputs are dicts of a class of their own
        for key in list(value):
            value[key] = _detached(value[key])
        return value
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value
