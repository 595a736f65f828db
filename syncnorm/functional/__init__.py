"""Differentiable public functions: core mathematics, a kernel backend and the meeting of ranks, joined."""

from syncnorm.functional._adaptive_gradient_clip import adaptive_gradient_clip_
from syncnorm.functional._adaptive_instance_norm import adaptive_instance_norm
from syncnorm.functional._batch_instance_norm import batch_instance_norm
from syncnorm.functional._batch_renorm import batch_renorm
from syncnorm.functional._conditional_norm import conditional_affine
from syncnorm.functional._dynamic_tanh import dynamic_tanh
from syncnorm.functional._evo_norm import evo_norm_s0
from syncnorm.functional._evo_norm_b0 import evo_norm_b0
from syncnorm.functional._filter_response_norm import filter_response_norm, thresholded_linear_unit
from syncnorm.functional._frozen_batch_norm import frozen_batch_norm
from syncnorm.functional._ghost_batch_norm import ghost_batch_norm
from syncnorm.functional._group_norm import group_norm
from syncnorm.functional._instance_norm import instance_norm
from syncnorm.functional._layer_norm import layer_norm
from syncnorm.functional._lstm import lstm_layer
from syncnorm.functional._masked_batch_norm import masked_batch_norm
from syncnorm.functional._moving_average_batch_norm import moving_average_batch_norm
from syncnorm.functional._rms_norm import rms_norm
from syncnorm.functional._running_norm import running_norm
from syncnorm.functional._softmax_entropy import softmax_entropy
from syncnorm.functional._spectral_norm import spectral_norm
from syncnorm.functional._standardize import destandardize, min_max_scale, standardize, undo_min_max_scale
from syncnorm.functional._switchable_norm import switchable_norm
from syncnorm.functional._sync_batch_norm import sync_batch_norm
from syncnorm.functional._weight_centralization import weight_centralization
from syncnorm.functional._weight_standardization import weight_standardization

__all__ = [
    "adaptive_gradient_clip_",
    "adaptive_instance_norm",
    "batch_instance_norm",
    "batch_renorm",
    "conditional_affine",
    "destandardize",
    "dynamic_tanh",
    "evo_norm_b0",
    "evo_norm_s0",
    "filter_response_norm",
    "frozen_batch_norm",
    "ghost_batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "lstm_layer",
    "min_max_scale",
    "masked_batch_norm",
    "moving_average_batch_norm",
    "rms_norm",
    "running_norm",
    "softmax_entropy",
    "spectral_norm",
    "standardize",
    "switchable_norm",
    "sync_batch_norm",
    "thresholded_linear_unit",
    "undo_min_max_scale",
    "weight_centralization",
    "weight_standardization",
]
