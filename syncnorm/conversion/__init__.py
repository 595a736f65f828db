"""Surgery on someone else's model: convert its batch norms, give them back, and say beforehand what would happen."""

from syncnorm.conversion._adapters import register_adapter
from syncnorm.conversion._contexts import disabled, no_stats_update
from syncnorm.conversion._convert import convert
from syncnorm.conversion._join import join
from syncnorm.conversion._plan import Entry, Plan, plan
from syncnorm.conversion._revert import revert
from syncnorm.conversion._state_dict import ConvertedLayer, convert_state_dict
from syncnorm.conversion._targets import To
from syncnorm.conversion._validate import validate_state_dict

__all__ = [
    "ConvertedLayer",
    "Entry",
    "Plan",
    "To",
    "convert",
    "convert_state_dict",
    "disabled",
    "join",
    "no_stats_update",
    "plan",
    "register_adapter",
    "revert",
    "validate_state_dict",
]
