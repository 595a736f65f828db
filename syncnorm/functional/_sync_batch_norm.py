"""Batch normalisation over the ranks of a group, as a function.

Evaluation and a group of one are ``torch.nn.functional.batch_norm`` itself, bit for bit and without a collective.
"""

import torch
from torch import Tensor
from torch.nn import functional

from syncnorm.core.activation import Activation, find_activation
from syncnorm.core.layout import flatten, flatten_like, unflatten
from syncnorm.core.running import RunningStatistics
from syncnorm.core.traced import is_transformed
from syncnorm.distributed.exchange import send_poison
from syncnorm.distributed.groups import Group, group_spec, resolve
from syncnorm.distributed.ledger import begin_call
from syncnorm.errors import SyncNormError
from syncnorm.functional._batch_normalize import batch_normalize
from syncnorm.functional._checkpoint import is_recomputing, unseen_by_selective_checkpointing
from syncnorm.functional._fused import check_invertible, check_residual, follow
from syncnorm.functional._nonfinite import OnNonFinite, check_policy
from syncnorm.functional._walk import Walk
from syncnorm.kernels import choose

__all__ = ["check_pending", "enter", "evaluate", "needs_grad", "sync_batch_norm", "tell_others", "validate"]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    group: object = "world",
    backend: str = "auto",
    pending: Tensor | None = None,
    accumulate: int = 1,
    num_features: int | None = None,
    input_dims: tuple[int, ...] | None = None,
    site: object = None,
    residual: Tensor | None = None,
    activation: str | Activation | None = None,
    negative_slope: float = 0.01,
    memory_efficient: bool = False,
    on_nonfinite: OnNonFinite = "propagate",
) -> Tensor:
    """Batch normalisation with the statistics of all ranks of a group, and what often follows it.

    Computes ``act(batch_norm(x) + residual)``.

    Equal to ``torch.nn.functional.batch_norm`` on the concatenation of all ranks' inputs: output, input gradient, the sum
    over ranks of the parameter gradients, running statistics and second derivatives, for any split of the batch, by N or
    by the spatial dims, empty shards included. One all-reduce forward and one backward; none in evaluation, nor in a
    group of one.

    In evaluation without running statistics the batch of this rank alone is used, as in torch's own SyncBatchNorm.

    Args:
        input: ``[N, C, *]``, any floating dtype, any layout; N or the spatial size may be 0 and may differ between ranks.
        running_mean: ``[C]`` or None; updated in place when training.
        running_var: Unbiased variance over the global count, ``[C]`` or None; updated in place when training.
        weight: γ, ``[C]`` or None.
        bias: β, ``[C]`` or None.
        training: Use and update the statistics of the batch.
        momentum: Weight of the new batch; None for the cumulative average, which needs ``num_batches_tracked``.
        eps: Added to the variance; positive when training.
        num_batches_tracked: int64 scalar, counted up in place by every batch that has a sample on some rank.
        group: The ranks that share statistics, as ``process_group`` of :class:`syncnorm.SyncBatchNorm`, or a resolved
            :class:`syncnorm.distributed.Group`.
        backend: ``"auto"`` or the name of a kernel backend. A named backend walks the synchronised path in a group of
            one, too, where ``"auto"`` leaves the work to torch.
        pending: float64 ``[2C + 2]``, zero at first: gathers statistics over micro-batches; with ``accumulate``.
        accumulate: Micro-batches per update of the running statistics.
        num_features: Channels that ``input`` must have; by default as many as ``running_mean`` or ``weight``.
        input_dims: Numbers of dims that ``input`` may have; at least 2 by default.
        site: Any object that stands for the layer; lets a checkpointed recompute reuse the statistics of its forward.
        residual: Added before the activation; of the shape, dtype and device of ``input``, in any layout.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"`` (the exact one), or None. Kept for the backward are
            ``input`` and O(C); with a residual also its signs, one bit an element (of the residual itself for ``"silu"`` and
            ``"gelu"``, whose derivative needs more than a sign).
        negative_slope: Of ``"leaky_relu"``.
        memory_efficient: Keep the output for the backward in place of the input, which is found again from it. For no
            activation, or ``"leaky_relu"`` with a positive slope; without a residual. There is no second derivative then.
        on_nonfinite: Where the statistics of all ranks' batch are not finite: ``"propagate"`` them, as torch; or
            ``"skip_update"``, the running statistics stay as they were; or ``"raise"`` on every rank, naming the ranks and
            channels, before anything is changed (on an accelerator the host waits for it).

    Returns:
        Tensor like ``input``; dense layouts are preserved.

    Raises:
        ValueError: If the input or the residual does not fit, eps is not positive, or the whole group has one value per
            channel; for an unknown activation; if ``memory_efficient`` goes with what cannot be inverted, a weight near
            zero included; or if ``accumulate`` is below 1, or has no ``pending`` to gather in.
        TypeError: If the input is not floating point.
        SyncNormError: If this rank is outside the group, the group is gone, or the named backend refuses.
        SyncNormMismatch: If ranks are at different places, disagree on the backward to come, or one refused its input.
        SyncNormNonFinite: With ``on_nonfinite="raise"``.

    Reference: Ioffe & Szegedy (2015), algorithm 1; Peng et al. (2018), section 3.3, for statistics over devices.
    """
    if num_features is None:
        known = running_mean if running_mean is not None else weight
        num_features = None if known is None else known.numel()
    if not training:
        act = find_activation(activation, negative_slope)
        check_policy(on_nonfinite)
        validate(input, num_features, input_dims)
        check_residual(input, residual)
        return evaluate(input, running_mean, running_var, weight, bias, eps, residual, act)
    ranks = enter(input, eps, group, num_features, input_dims, site, backend)
    try:
        act = find_activation(activation, negative_slope)
        check_policy(on_nonfinite)
        if accumulate != 1:
            check_pending(pending, accumulate, running_mean)
        check_residual(input, residual)
        if memory_efficient:
            check_invertible(weight, bias, residual, act)
    except ValueError:
        tell_others(input, ranks, site=site)
        raise
    has_statistics = running_mean is not None or pending is not None or num_batches_tracked is not None
    running = RunningStatistics(
        running_mean, running_var, num_batches_tracked, momentum, pending, accumulate,
        skip_nonfinite=on_nonfinite == "skip_update",
    )  # fmt: skip
    plain = residual is None and act is None and not memory_efficient and pending is None
    plain = plain and on_nonfinite == "propagate"
    if ranks.size == 1 and backend == "auto" and plain and _torch_serves(input, weight, bias, running):
        return _torch_batch_norm(input, weight, bias, eps, running)
    needs_backward = needs_grad(input, weight, bias, residual)
    walk = Walk(
        eps, ranks, backend, needs_backward, site,
        activation=act, memory_efficient=memory_efficient, refuses_nonfinite=on_nonfinite == "raise",
    )  # fmt: skip
    return batch_normalize(input, weight, bias, walk, running if has_statistics else None, residual)


def check_pending(pending: Tensor | None, accumulate: int, running_mean: Tensor | None) -> None:
    """Raise if micro-batches are to be gathered and there is nothing to gather them in."""
    if accumulate < 1:
        raise ValueError(f"accumulate is a number of micro-batches, at least 1; got {accumulate}.")
    if pending is None and running_mean is not None:
        raise ValueError(
            f"accumulate={accumulate} gathers micro-batches in pending, which is None: the running statistics would move with "
            "each of them. Keep pending=torch.zeros(2 * C + 2, dtype=torch.float64) and give it to every call."
        )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward follows a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def evaluate(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """Evaluate by torch's own batch norm, for any mix of dtypes; by the local batch where nothing was tracked.

    With a residual or an activation and without a gradient it is one pass of a kernel.
    """
    if running_mean is None or running_var is None:
        weight, bias = _in_dtype(input, weight, bias)
        y = functional.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
        return follow(y, residual, activation)
    if (residual is not None or activation is not None) and _kernel_evaluates(input, weight, bias, residual):
        flat = flatten(input)
        rstd = running_var.double().add_(eps).rsqrt_()
        residual = None if residual is None else flatten_like(residual, flat)
        fused = choose("auto", input).batch_normalize
        y = fused(flat, running_mean.double(), rstd, weight, bias, activation, residual)[0]
        return unflatten(y, input.shape)
    running_mean, running_var, weight, bias = _in_dtype(input, running_mean, running_var, weight, bias)
    y = functional.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    return follow(y, residual, activation)


def enter(
    input: Tensor,
    eps: float,
    group: object,
    num_features: int | None,
    input_dims: tuple[int, ...] | None,
    site: object = None,
    backend: str = "auto",
) -> Group:
    """The live group of a training forward, with an input that fits; a refusal is told to the other ranks, too.

    A backend asked for by name may refuse on one rank alone: where nothing has been built, say.
    """
    ranks: Group = group if isinstance(group, Group) else resolve(group_spec(group))
    try:
        validate(input, num_features, input_dims)
        if not eps > 0:
            raise ValueError(f"eps must be positive when training, got {eps}.")
        if type(input) is not Tensor and ranks.size > 1 and hasattr(input, "to_local"):
            raise TypeError(
                f"expected a tensor of this rank's samples, got a {type(input).__name__} {list(input.shape)}. Give the layer "
                "input.to_local(), of shards along dim 0: samples that are replicated would count once for each rank."
            )
        is_named = backend != "auto" and ranks.size > 1 and input.numel()
        if is_named and not torch.compiler.is_compiling() and not is_transformed():
            choose(backend, input)
    except (ValueError, TypeError, SyncNormError):
        tell_others(input, ranks, num_features, site)
        raise
    return ranks


def tell_others(input: Tensor, ranks: Group, num_features: int | None = None, site: object = None) -> None:
    """Send a refusal of this rank's arguments to the ranks that would wait for it."""
    if num_features is None and input.dim() > 1:
        num_features = input.size(1)
    if ranks.size > 1 and num_features is not None and not torch.compiler.is_compiling():
        send_poison(num_features, input.device, ranks, begin_call(site, ranks, input))


def validate(input: Tensor, num_features: int | None, input_dims: tuple[int, ...] | None) -> None:
    """Raise what is wrong with ``input`` itself."""
    dims = input.dim()
    # torch.compile makes symbols of the numbers of a layer under FSDP, which it compares but does not find in a tuple.
    fits = input_dims is None or dims in input_dims or any(dims == known for known in input_dims)
    if dims < 2 or not fits:
        wanted = "at least 2" if input_dims is None else " or ".join(map(str, input_dims))
        raise ValueError(f"expected an input [N, C, *] of {wanted} dims, got {list(input.shape)}.")
    if not input.is_floating_point():
        raise TypeError(
            f"expected a floating-point input, got {input.dtype}. Convert it, for example with input.float()."
        )
    if num_features is not None and input.size(1) != num_features:
        hint = " The channels seem to be last: use x.movedim(-1, 1)." if input.size(-1) == num_features else ""
        raise ValueError(f"expected {num_features} channels in dim 1, got an input {list(input.shape)}.{hint}")


def _kernel_evaluates(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or not input.numel():
        return False
    return not needs_grad(input, weight, bias, residual) and not is_transformed()


def _in_dtype(input: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Bring vectors of mixed dtypes to one that ``batch_norm`` takes beside ``input``; as they are if they fit."""
    if _fits(input, *tensors):
        return list(tensors)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return [None if t is None else t.to(dtype) for t in tensors]


def _fits(input: Tensor, *tensors: Tensor | None) -> bool:
    dtypes = {t.dtype for t in tensors if t is not None}
    wide = torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
    return not dtypes or dtypes in ({input.dtype}, {wide})


def _torch_serves(input: Tensor, weight: Tensor | None, bias: Tensor | None, running: RunningStatistics) -> bool:
    cumulative = running.momentum is None and running.mean is not None and running.num_batches_tracked is not None
    if cumulative and (input.device.type != "cpu" or torch.compiler.is_compiling()):
        return False  # torch reads its counter on the host here; the walk over a group of one gives the same average
    tracks = running.mean is not None or running.num_batches_tracked is not None
    if tracks and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False  # torch cannot move its statistics inside torch.func's transforms; the walk does so beneath them
    return _fits(input, weight, bias, running.mean, running.var)


def _torch_batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: RunningStatistics
) -> Tensor:
    if input.numel() == input.size(1):
        raise ValueError(
            f"expected more than 1 value per channel when training, got an input {list(input.shape)}. Variance needs two: "
            "use a larger batch or map, or a norm that does not use the batch (syncnorm.convert(model, to='group_norm'))."
        )
    if is_recomputing():
        # Copies: torch saves the statistics it was given, and a checkpoint counts what a recompute saves.
        with unseen_by_selective_checkpointing():
            mean, var = (None if t is None else t.clone() for t in (running.mean, running.var))
        return functional.batch_norm(input, mean, var, weight, bias, True, 0.0, eps)
    counter, momentum = running.num_batches_tracked, running.momentum
    if momentum is None:
        momentum = 0.0 if counter is None or running.mean is None else 1.0 / max(int(counter) + 1, 1)
    mean, var = running.mean, running.var
    if not torch.compiler.is_compiling():
        # torch saves them for a backward that does not read them. As .data a later call that moves them in the walk, with a
        # residual or a mask, is no write to what is saved.
        mean, var = (None if t is None else t.data for t in (mean, var))
    y = functional.batch_norm(input, mean, var, weight, bias, True, momentum, eps)
    if counter is not None and input.numel():
        with unseen_by_selective_checkpointing():
            counter.add_(1)
    return y
