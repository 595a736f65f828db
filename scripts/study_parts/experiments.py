"""What a configuration may name under ``run``: a function of the seeds and a cell's settings, which returns rows."""

from collections.abc import Callable
from typing import Any

from study_parts import adversarial, bootstrapping, costs, exact, ranks, sequences, supervised, vision

FUNCTIONS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "train_digits": supervised.train_digits,
    "lagging_statistics": supervised.lagging_statistics,
    "dropout_order": supervised.dropout_order,
    "noise_of_companions": supervised.noise_of_companions,
    "shifted_domain": supervised.shifted_domain,
    "segment_textures": vision.segment_textures,
    "classify_table": vision.classify_table,
    "style_probe": vision.style_probe,
    "transferred_style": vision.transferred_style,
    "read_rows": sequences.read_rows,
    "train_gan": adversarial.train_gan,
    "learn_values": bootstrapping.learn_values,
    "invariance": exact.invariance,
    "attribution": exact.attribution,
    "compare": ranks.compare,
    "overhead": costs.overhead,
    "deployment": costs.deployment,
}
