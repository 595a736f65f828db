"""Where ranks meet: which ranks belong together, the collectives between them, and the one exchange of a layer."""

from syncnorm.distributed.groups import Group, GroupSpec, group_spec, make_subgroups, resolve
from syncnorm.distributed.ledger import set_check
from syncnorm.distributed.loss_weight import loss_weight
from syncnorm.distributed.watch import set_watch
from syncnorm.distributed.wire import set_exchange

__all__ = [
    "Group",
    "GroupSpec",
    "group_spec",
    "loss_weight",
    "make_subgroups",
    "resolve",
    "set_check",
    "set_exchange",
    "set_watch",
]
