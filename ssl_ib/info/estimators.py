"""The estimators of mutual information by name: functions of pairs and a seed that answer a `Reading`.

    @register_estimator("mine")
    def mine(x: Tensor, y: Tensor, seed: int = 0) -> Reading: ...

x [n, dx] and y [n, dy] are samples that belong together. An estimator raises UserError where it cannot read them.
"""

from __future__ import annotations

from torch import Tensor

from ..config.registry import Registry
from .gaussian import gaussian_of_samples
from .ksg import ksg as ksg_of_samples
from .learning import learn
from .reading import Reading

ESTIMATORS: Registry[Reading] = Registry("estimator", "ssl_ib.info.estimators")
register_estimator = ESTIMATORS.register


@register_estimator("i_nce")
def i_nce(x: Tensor, y: Tensor, seed: int = 0) -> Reading:
    """See `bounds.i_nce`."""
    return learn("i_nce", x, y, seed)


@register_estimator("nwj")
def nwj(x: Tensor, y: Tensor, seed: int = 0) -> Reading:
    """See `bounds.nwj`."""
    return learn("nwj", x, y, seed)


@register_estimator("mine")
def mine(x: Tensor, y: Tensor, seed: int = 0) -> Reading:
    """See `bounds.mine`."""
    return learn("mine", x, y, seed)


@register_estimator("smile")
def smile(x: Tensor, y: Tensor, seed: int = 0) -> Reading:
    """See `bounds.smile`; with the joint critic of its paper."""
    return learn("smile", x, y, seed, critic="joint")


@register_estimator("club")
def club(x: Tensor, y: Tensor, seed: int = 0) -> Reading:
    """See `club.club`."""
    return learn("club", x, y, seed)


@register_estimator("club_sampled")
def club_sampled(x: Tensor, y: Tensor, seed: int = 0) -> Reading:
    """See `club.club_sampled`."""
    return learn("club_sampled", x, y, seed)


@register_estimator("ksg")
def ksg(x: Tensor, y: Tensor, seed: int = 0) -> Reading:
    """See `ksg.ksg`; nothing in it is drawn."""
    return ksg_of_samples(x, y)


@register_estimator("gaussian")
def gaussian(x: Tensor, y: Tensor, seed: int = 0) -> Reading:
    """See `gaussian.gaussian_of_samples`; nothing in it is drawn."""
    return gaussian_of_samples(x, y)
