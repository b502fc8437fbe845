"""Several masks an image: disjoint, covering, uniform, and drawn from an image's key alone."""

import logging
import math
import re

import pytest
import torch

from ssl_ib import UserError, random
from ssl_ib.config.registry import build_part, check_part
from ssl_ib.maskers.independent import IndependentMasker
from ssl_ib.maskers.orthogonal import OrthogonalMasker

SEVERAL = [OrthogonalMasker, IndependentMasker]
#: grid, ratio, n_masks -> number of masks, kept patches a mask
CASES = {
    ((8, 8), 0.75, "complete"): (4, 16),
    ((8, 8), 0.5, "complete"): (2, 32),
    ((10, 10), 0.9, "complete"): (10, 10),
    ((14, 14), 0.75, 4): (4, 49),
    ((14, 14), 0.75, 6): (6, 49),
    ((14, 14), 0.75, 8): (8, 49),
    ((14, 14), 0.9, "complete"): (10, 19),
    ((14, 14), 0.9, 4): (4, 19),
    ((14, 14), 0.1, "complete"): (2, 176),
    ((14, 14), 0.1, 5): (5, 176),
    ((14, 14), 0.6, "complete"): (2, 78),
    ((4, 4), 0.75, "complete"): (4, 4),
    ((3, 5), 0.4, 7): (7, 9),
    ((1, 2), 0.5, 5): (5, 1),
    ((2, 2), 0.1, "complete"): (2, 3),
    ((1, 3), 0.3, 4): (4, 2),
}
SHORT = [case for case, (n, k) in CASES.items() if n * k > case[0][0] * case[0][1]]


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return random.image_keys(seed, 0, torch.arange(n))


@pytest.mark.parametrize("masker", SEVERAL)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_and_no_repeats_within_a_mask(masker, case):
    grid, ratio, n_masks = case
    num_masks, num_kept = CASES[case]
    num_patches = grid[0] * grid[1]
    masks = masker(ratio, n_masks)(keys(9), grid)
    assert masks.keep.shape == (9, num_masks, num_kept) and masks.keep.dtype == torch.int64
    assert masks.mask.shape == (9, num_masks, num_patches)
    assert num_kept == int(num_patches * (1 - ratio) + 1e-6)
    for keep, mask in zip(masks.keep.flatten(0, 1).tolist(), masks.mask.flatten(0, 1).tolist(), strict=True):
        assert keep == [number for number, hidden in enumerate(mask) if not hidden]  # so ascending, without repeats


@pytest.mark.parametrize("case", CASES, ids=str)
def test_orthogonal_masks_show_patches_equally_often(case):
    """So they are disjoint where there is room, and cover the image where they can."""
    grid, ratio, n_masks = case
    num_masks, num_kept = CASES[case]
    num_patches = grid[0] * grid[1]
    seen = (~OrthogonalMasker(ratio, n_masks)(keys(50), grid).mask).sum(dim=1)
    assert (seen.sum(dim=1) == num_masks * num_kept).all()
    assert (seen >= num_masks * num_kept // num_patches).all()
    assert (seen <= math.ceil(num_masks * num_kept / num_patches)).all()
    assert ((seen > 0).sum(dim=1) == min(num_patches, num_masks * num_kept)).all()


def test_coverage_of_the_papers_cases():
    def covered(ratio: float, n_masks: int | str = "complete") -> set[int]:
        masks = OrthogonalMasker(ratio, n_masks)(keys(30), (14, 14))
        return set((~masks.mask).any(dim=1).sum(dim=1).tolist())

    assert covered(0.75) == covered(0.5) == covered(0.1) == covered(0.75, 6) == covered(0.75, 8) == {196}
    assert covered(0.9) == {190} and covered(0.9, 4) == {76}


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_the_first_masks_are_disjoint_and_the_others_share_no_more_than_they_must(case):
    grid, ratio, n_masks = case
    num_masks, num_kept = CASES[case]
    num_patches = grid[0] * grid[1]
    visible = ~OrthogonalMasker(ratio, n_masks)(keys(50), grid).mask
    whole = num_patches // num_kept
    assert (visible[:, :whole].sum(dim=1) <= 1).all()
    # The mask on which the permutation runs out shows all that was left of it.
    if num_patches % num_kept:
        assert visible[:, : whole + 1].any(dim=1).all()
    # Further masks come from permutations of their own, so that each run of them within one is disjoint again.
    first = math.ceil(num_patches / num_kept)
    last = min(2 * num_patches // num_kept, num_masks)
    assert (visible[:, first:last].sum(dim=1) <= 1).all()


@pytest.mark.parametrize("masker", SEVERAL)
@pytest.mark.parametrize(("grid", "ratio", "n_masks"), [((4, 4), 0.75, 4), ((4, 4), 0.75, 7), ((3, 4), 0.4, 3)])
def test_every_patch_is_as_likely_in_every_mask(masker, grid, ratio, n_masks):
    images, num_patches = 4000, grid[0] * grid[1]
    masks = masker(ratio, n_masks)(keys(images, seed=3), grid)
    share = masks.keep.shape[2] / num_patches
    counts = (~masks.mask).sum(dim=0).double()  # [N, L]
    # Pearson's statistic, corrected for drawing K of L without repeats: chi-square with L - 1 degrees of freedom.
    variance = images * share * (1 - share) * num_patches / (num_patches - 1)
    statistic = (counts - images * share).square().sum(dim=1) / variance
    degrees = num_patches - 1
    bound = degrees + 5 * math.sqrt(2 * degrees)
    assert (statistic < bound).all() and statistic.min() > 0


@pytest.mark.parametrize("n_masks", [4, 7])
def test_any_two_patches_are_as_likely_together(n_masks):
    visible = (~OrthogonalMasker(0.75, n_masks)(keys(4000), (4, 4)).mask).double()
    together = torch.einsum("bni,bnj->nij", visible, visible) / 4000
    expected = torch.full((16, 16), 4 / 16 * 3 / 15).double().fill_diagonal_(0.25)
    torch.testing.assert_close(together, expected.expand(n_masks, -1, -1), atol=0.035, rtol=0)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_independent_masks_overlap_by_chance(ratio):
    """A mask shares the share 1 - ratio of its patches with another."""
    visible = (~IndependentMasker(ratio, 3)(keys(4000), (4, 4)).mask).double()
    shared = torch.einsum("bnl,bml->nm", visible, visible) / 4000 / (16 * (1 - ratio))
    expected = torch.full((3, 3), 1 - ratio).double().fill_diagonal_(1.0)
    torch.testing.assert_close(shared, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("masker", SEVERAL)
@pytest.mark.parametrize("n_masks", ["complete", 6])
def test_masks_depend_on_their_images_key_alone(masker, n_masks):
    together = masker(0.75, n_masks)(keys(32), (8, 8))
    assert torch.equal(together.keep, masker(0.75, n_masks)(keys(32), (8, 8)).keep)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    for rows in (order, order[:5], torch.tensor([31])):
        part = masker(0.75, n_masks)(keys(32)[rows], (8, 8))
        assert torch.equal(part.keep, together.keep[rows]) and torch.equal(part.mask, together.mask[rows])
    other = masker(0.75, n_masks)(keys(32, seed=1), (8, 8))
    assert not (other.keep == together.keep).flatten(1).all(dim=1).any()
    assert len(together.keep.flatten(0, 1).unique(dim=0)) == together.keep[:, :, 0].numel()


@pytest.mark.parametrize("masker", SEVERAL)
def test_more_masks_leave_the_first_ones_as_they_were(masker):
    few, many = (masker(0.75, n)(keys(8), (8, 8)).keep for n in (2, 9))
    assert torch.equal(few, many[:, :2])


def test_the_number_of_complete_masks():
    found = {ratio: OrthogonalMasker(ratio).num_masks for ratio in (0.1, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 0.95)}
    assert found == {0.1: 2, 0.5: 2, 0.6: 2, 2 / 3: 3, 0.7: 3, 0.75: 4, 0.8: 5, 0.9: 10, 0.95: 20}
    assert OrthogonalMasker(0.9, 4).num_masks == 4
    moved = OrthogonalMasker(0.75)
    moved.ratio = 0.5  # a schedule moves it
    assert moved(keys(2), (4, 4)).keep.shape == (2, 2, 8)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (((8, 8), 0.75, "complete"), None),
        (((14, 14), 0.75, 4), None),
        (((14, 14), 0.75, 6), r"6 masks that keep 49 of 196 .* cannot be disjoint: the first 4 are, .* topped up"),
        (((14, 14), 0.1, 2), r"2 masks that keep 176 of 196 .* cannot be disjoint: the first 1 are"),
        (((14, 14), 0.9, "complete"), r"10 masks that keep 19 of 196 .* are disjoint and together see 190 of the"),
        (((14, 14), 0.75, 3), r"3 masks that keep 49 of 196 .* are disjoint and together see 147 of the patches"),
    ],
)
def test_what_the_masks_fall_short_of_is_said(case, said, caplog):
    grid, ratio, n_masks = case
    with caplog.at_level(logging.WARNING):
        OrthogonalMasker(ratio, n_masks).check(grid)
        IndependentMasker(ratio, n_masks).check(grid)  # which promises nothing
    messages = [record.getMessage() for record in caplog.records]
    if said is None:
        assert messages == []
    else:
        assert len(messages) == 1
        assert re.search(said, messages[0])


@pytest.mark.parametrize("masker", SEVERAL)
def test_a_ratio_that_leaves_nothing_is_a_users_mistake(masker):
    for call in (lambda m: m.check((2, 3)), lambda m: m(keys(2), (2, 3))):
        with pytest.raises(UserError, match=r"ratio 0\.9 on a grid of 2 x 3 patches keeps 0"):
            call(masker(0.9))


@pytest.mark.parametrize("name", ["orthogonal", "independent"])
def test_recipes_build_them(name):
    problems: list[str] = []
    built = build_part("masker", check_part("masker", {"name": name}, "masker", problems))
    assert not problems and (built.part.ratio, built.part.n_masks, built.part.num_masks) == (0.75, "complete", 4)
    given = check_part("masker", {"name": name, "ratio": 0.9, "n_masks": 4}, "masker", problems)
    assert not problems and build_part("masker", given).part(keys(2), (10, 10)).keep.shape == (2, 4, 10)
    for wrong in ({"ratio": 0.0}, {"ratio": 1.0}, {"ratio": -0.1}, {"n_masks": 1}, {"n_masks": "all"}):
        problems.clear()
        check_part("masker", {"name": name, **wrong}, "masker", problems)
        assert problems and all(p.startswith(f"masker.{next(iter(wrong))}") for p in problems), (wrong, problems)
