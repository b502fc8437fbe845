"""No masking: the baseline a masked method is compared with."""

from __future__ import annotations

from torch import Tensor

from ..config.registry import register_masker


@register_masker("none")
class NoMasker:
    """Hides nothing. It returns None, which a batch carries in place of `Masks` and a model reads as "all visible"."""

    def check(self, grid: tuple[int, int]) -> None:
        """Every grid will do."""

    def __call__(self, keys: Tensor, grid: tuple[int, int]) -> None:
        return None
