"""Maskers: counts, patterns, and draws that depend on an image's key alone."""

import pytest
import torch

from ssl_ib import UserError, random
from ssl_ib.config.registry import MASKERS, build_part, check_part
from ssl_ib.maskers.block import BlockMasker
from ssl_ib.maskers.grid import GridMasker, bayer
from ssl_ib.maskers.none import NoMasker
from ssl_ib.maskers.random import RandomMasker

MASKING = [RandomMasker, BlockMasker, GridMasker]
GRIDS = [(1, 1), (3, 5), (8, 8), (14, 14), (7, 2)]


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return random.image_keys(seed, 0, torch.arange(n))


@pytest.mark.parametrize("masker", MASKING)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.5, 0.75, 0.9])
def test_keep_and_mask_are_complements_of_the_right_size(masker, grid, ratio):
    num_patches = grid[0] * grid[1]
    num_kept = round(num_patches * (1 - ratio) * 100) // 100
    if num_kept == 0:
        with pytest.raises(UserError):
            masker(ratio)(keys(2), grid)
        return
    masks = masker(ratio)(keys(6), grid)
    assert masks.keep.shape == (6, 1, num_kept) and masks.keep.dtype == torch.int64
    assert masks.mask.shape == (6, 1, num_patches) and masks.mask.dtype == torch.bool
    for keep, mask in zip(masks.keep[:, 0].tolist(), masks.mask[:, 0].tolist(), strict=True):
        assert keep == [number for number, hidden in enumerate(mask) if not hidden]  # so sorted and without repeats


@pytest.mark.parametrize("masker", MASKING)
def test_the_kept_count_is_guarded_against_float_error(masker):
    assert int(100 * (1 - 0.9)) == 9  # the trap
    assert masker(0.9).num_kept((10, 10)) == 10
    assert masker(0.7).num_kept((10, 1)) == 3
    assert masker(0.9).num_kept((14, 14)) == 19


@pytest.mark.parametrize("masker", MASKING)
def test_a_mask_depends_on_its_key_alone(masker):
    all_masks = masker(0.6)(keys(32), (8, 8))
    again = masker(0.6)(keys(32), (8, 8))
    assert torch.equal(all_masks.keep, again.keep)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    for rows in (order, order[:5], torch.tensor([31])):
        part = masker(0.6)(keys(32)[rows], (8, 8))
        assert torch.equal(part.keep, all_masks.keep[rows]) and torch.equal(part.mask, all_masks.mask[rows])


@pytest.mark.parametrize("masker", MASKING)
def test_other_keys_give_other_masks(masker):
    first, second = masker(0.6)(keys(64), (8, 8)), masker(0.6)(keys(64, seed=1), (8, 8))
    assert len(first.keep.unique(dim=0)) > 10
    assert not torch.equal(first.keep, second.keep)


@pytest.mark.parametrize("masker", MASKING)
def test_every_patch_is_hidden_at_times_and_visible_at_times(masker):
    hidden = masker(0.5)(keys(600), (6, 6)).mask.double().mean(dim=(0, 1))
    assert hidden.mean().item() == pytest.approx(0.5)
    assert 0.1 < hidden.min() and hidden.max() < 0.9


def test_random_masking_is_uniform():
    hidden = RandomMasker(0.75)(keys(4000), (4, 4)).mask[:, 0].double()
    torch.testing.assert_close(hidden.mean(dim=0), torch.full((16,), 0.75).double(), atol=0.035, rtol=0)
    together = hidden.T @ hidden / 4000  # P(both hidden) = 12/16 x 11/15 for two different patches
    expected = torch.full((16, 16), 12 / 16 * 11 / 15).double().fill_diagonal_(0.75)
    torch.testing.assert_close(together, expected, atol=0.04, rtol=0)


@pytest.mark.parametrize("masker", MASKING)
def test_a_ratio_that_leaves_nothing_is_a_users_mistake(masker):
    hopeless = masker(0.9)
    for call in (lambda: hopeless.check((2, 3)), lambda: hopeless(keys(2), (2, 3))):
        with pytest.raises(UserError, match=r"ratio 0\.9 on a grid of 2 x 3 patches keeps 0"):
            call()
    hopeless.check((4, 5))
    hopeless.ratio = 0.5  # a schedule moves it
    assert hopeless(keys(2), (2, 3)).keep.shape == (2, 1, 3)


def test_grid_masking_at_three_quarters_keeps_one_patch_of_every_two_by_two():
    mask = GridMasker(0.75)(keys(40), (8, 6)).mask.view(40, 4, 2, 3, 2)
    assert ((~mask).sum(dim=(2, 4)) == 1).all()
    within = (~mask).permute(0, 1, 3, 2, 4).flatten(3).long().argmax(dim=-1)  # which of the four
    assert (within == within[:, :1, :1]).all()
    assert len(within[:, 0, 0].unique()) == 4


def test_grid_masking_at_one_half_is_a_checkerboard():
    mask = GridMasker(0.5)(keys(20), (6, 8)).mask.view(20, 6, 8)
    assert (mask[:, 1:] != mask[:, :-1]).all() and (mask[:, :, 1:] != mask[:, :, :-1]).all()
    assert len(mask[:, 0, 0].unique()) == 2


def test_bayer_matrix():
    assert bayer(2, "cpu").tolist() == [[0, 2], [3, 1]]
    assert bayer(3, "cpu").tolist() == [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]


def shared_borders(mask: torch.Tensor) -> float:
    """How many pairs of neighbours are both hidden or both visible, as a share."""
    down, right = mask[:, 1:] == mask[:, :-1], mask[:, :, 1:] == mask[:, :, :-1]
    return torch.cat([down.flatten(), right.flatten()]).double().mean().item()


def test_block_masking_hides_in_blocks():
    blocks = BlockMasker(0.4)(keys(200), (14, 14)).mask.view(-1, 14, 14)
    scattered = RandomMasker(0.4)(keys(200), (14, 14)).mask.view(-1, 14, 14)
    assert shared_borders(scattered) < 0.6 < 0.8 < shared_borders(blocks)


def test_a_single_block_is_a_rectangle():
    """With the smallest block as large as the mask, the first block is all of it, or all but its rim."""
    masks = BlockMasker(0.25, min_share=0.25, min_aspect=1.0)(keys(50), (8, 8)).mask.view(50, 8, 8)
    for mask in masks:
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        assert mask.sum() == 16 and len(rows) == len(columns) == 4
        assert mask[rows[0] : rows[0] + 4, columns[0] : columns[0] + 4].all()


def test_a_block_that_would_hide_too_much_keeps_its_centre():
    masks = BlockMasker(4 / 64, min_share=0.5, min_aspect=1.0)(keys(50), (8, 8)).mask.view(50, 8, 8)  # of 6 x 6
    for mask in masks:
        row, column = mask.nonzero()[0].tolist()
        assert mask.sum() == 4 and mask[row : row + 2, column : column + 2].all()
        assert 2 <= row <= 4 and 2 <= column <= 4


def test_none_hides_nothing_and_takes_any_grid():
    masker = NoMasker()
    masker.check((1, 1))
    assert masker(keys(3), (4, 4)) is None


def test_recipes_build_maskers():
    assert {"random", "block", "grid", "none"} <= set(MASKERS.names())
    problems: list[str] = []
    spec = check_part("masker", {"name": "block", "ratio": {"from": 0.1, "to": 0.6}}, "masker", problems)
    built = build_part("masker", spec)
    assert not problems and built.part.ratio == 0.6 and built.schedules[0][:2] == (built.part, "ratio")
    check_part("masker", {"name": "random", "ratio": 1.0}, "masker", problems)
    check_part("masker", {"name": "block", "min_aspect": 0.0}, "masker", problems)
    assert [p.split(":")[0] for p in problems] == ["masker.ratio", "masker.min_aspect"]
