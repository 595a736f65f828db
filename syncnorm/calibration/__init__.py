"""Whole models brought to data they were not trained on: population statistics, and adaptation while testing."""

from syncnorm.calibration._adapt_batch_norm import adapt_batch_norm
from syncnorm.calibration._recalibrate import recalibrate
from syncnorm.calibration._reduce_buffers import reduce_buffers
from syncnorm.calibration._tent import TentAdapter

__all__ = ["TentAdapter", "adapt_batch_norm", "recalibrate", "reduce_buffers"]
