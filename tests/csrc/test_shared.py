"""The building blocks of the softmax kernels on their own: instructions, tiles, arithmetic, indices.

What PTX says of its fragments is stated here once more, from the matrices' side: which lane and register hold the
number at (row, column). The emulated instructions state it from the lanes' side.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
every_half = pytest.mark.parametrize("dtype", HALVES, ids=lambda x: str(x).removeprefix("torch."))


class Library:
    """The functions of shared.cpp; tensors are passed as pointers."""

    def __init__(self, path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.probability_of.restype = ctypes.c_float
        self.functions.bounded.restype = ctypes.c_bool

    def __getattr__(self, name):
        function = getattr(self.functions, name)

        def call(*arguments):
            return function(*[_as_c(x) for x in arguments])

        return call


def _as_c(x):
    if isinstance(x, torch.Tensor):
        assert x.is_contiguous()
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_long(x)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: c++ is not on the PATH")
    path = tmp_path_factory.mktemp("shared") / "shared.so"
    source = Path(__file__).with_name("shared.cpp")
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DSSL_IB_EMULATED", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
    flags += ["-fvisibility-inlines-hidden", "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas", f"-I{CSRC / 'common'}"]
    subprocess.run(["c++", *flags, str(source), "-o", str(path)], check=True)
    return Library(path)


@pytest.fixture(params=[False, True], ids=["forward", "reverse"])
def any_order(request, shared):
    shared.set_reverse(int(request.param))
    yield
    shared.set_reverse(0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- Instructions ----


def left_place(row, column):
    """Lane, register and half that hold the number at (row, column) of mma's left operand [16, 16]."""
    return row % 8 * 4 + column % 8 // 2, row // 8 + column // 8 * 2, column % 2


def right_place(row, column):
    """The same of its right operand [16, 8]."""
    return column * 4 + row % 8 // 2, row // 8, row % 2


def sum_place(row, column):
    """Lane and register of its sums [16, 8]."""
    return row % 8 * 4 + column // 2, row // 8 * 2 + column % 2


@every_half
def test_mma(shared, any_order, dtype):
    left, right, start = draw(16, 16).to(dtype), draw(16, 8, seed=1).to(dtype), draw(16, 8, seed=2)
    a, b = torch.full((32, 4, 2), torch.nan, dtype=dtype), torch.full((32, 2, 2), torch.nan, dtype=dtype)
    d = torch.full((32, 4), torch.nan)
    for row in range(16):
        for column in range(16):
            a[left_place(row, column)] = left[row, column]
        for column in range(8):
            b[right_place(row, column)] = right[row, column]
            d[sum_place(row, column)] = start[row, column]
    shared.mma(int(dtype == torch.float16), a, b, d)
    expected = start.double() + left.double() @ right.double()
    for row in range(16):
        for column in range(8):
            assert abs(d[sum_place(row, column)] - expected[row, column]) < 1e-5


def test_mma_s_fragments_as_ptx_draws_them():
    """Some of the places in the figures of the PTX ISA, "Matrix Fragments for mma.m16n8k16": T{lane}: {a0, a1, ...}."""
    assert left_place(0, 0) == (0, 0, 0) and left_place(0, 7) == (3, 0, 1) and left_place(1, 0) == (4, 0, 0)
    assert left_place(8, 0) == (0, 1, 0) and left_place(0, 8) == (0, 2, 0) and left_place(15, 15) == (31, 3, 1)
    assert right_place(0, 0) == (0, 0, 0) and right_place(1, 0) == (0, 0, 1) and right_place(8, 0) == (0, 1, 0)
    assert right_place(0, 1) == (4, 0, 0) and right_place(15, 7) == (31, 1, 1)
    assert sum_place(0, 1) == (0, 1) and sum_place(8, 0) == (0, 2) and sum_place(15, 7) == (31, 3)


def panel(rows):
    """[64, 64] in PTX's 128B swizzling mode: within 8 rows of 128 bytes, chunk j of row i lies at place j ^ i."""
    swizzled = torch.empty_like(rows)
    for row in range(64):
        for chunk in range(8):
            place = chunk ^ row % 8
            swizzled[row, 8 * place : 8 * place + 8] = rows[row, 8 * chunk : 8 * chunk + 8]
    return swizzled


@every_half
@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("step", [0, 3])
def test_wgmma(shared, any_order, columns, step, dtype):
    """Each warp has 16 rows, in mma's places; a step is 16 numbers of both operands' rows, or 16 rows of the right."""
    left, right, weights = draw(64, 64).to(dtype), draw(64, 64, seed=1).to(dtype), draw(64, 16, seed=2).to(dtype)
    fragments = torch.empty(4, 32, 4, 2, dtype=dtype)
    for row in range(64):
        for column in range(16):
            fragments[row // 16][left_place(row % 16, column)] = weights[row, column]
    scores, sums, early = draw(4, 32, columns // 8, 4, seed=3), draw(4, 32, 8, 4, seed=4), torch.empty(4, 32)
    before = scores.clone(), sums.clone()
    which = int(dtype == torch.float16)
    shared.panels(which, columns, panel(left), panel(right), 32 * step, fragments, scores, sums, early)
    assert torch.equal(early, before[1][:, :, 0, 0])
    part = slice(16 * step, 16 * step + 16)
    for answer, start, product in (
        (scores, before[0], left.double()[:, part] @ right.double()[:columns, part].T),
        (sums, before[1], weights.double() @ right.double()[part]),
    ):
        for row in range(64):
            for column in range(product.shape[1]):
                lane, register = sum_place(row % 16, column % 8)
                place = (row // 16, lane, column // 8, register)
                assert abs(answer[place] - start[place] - product[row, column]) < 1e-4


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(shared, any_order, transposed):
    """Lane i gets two neighbours of row i // 4 of each matrix, or of its transpose."""
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    words = torch.full((32, 4, 2), -1, dtype=torch.int16)
    shared.load(matrices, words, int(transposed))
    seen = matrices.transpose(1, 2) if transposed else matrices
    for i in range(32):
        for m in range(4):
            assert words[i, m].tolist() == seen[m, i // 4, 2 * (i % 4) : 2 * (i % 4) + 2].tolist()


def test_copies_arrive_when_waited_for(shared):
    source = torch.arange(1, 32 * 4 * 4 + 1, dtype=torch.int32).view(32, 4, 4)
    early, late = torch.zeros_like(source), torch.zeros_like(source)
    shared.copy(source, early, late)
    expected = source.clone()
    expected[:, 3] = 0  # not valid: zeros
    assert torch.equal(late, expected)
    assert torch.equal(early[:, :2], source[:, :2]) and (early[:, 2:] != expected[:, 2:]).all()


# ---- Tiles ----


def test_a_tile_s_chunks_have_places_and_banks_of_their_own(shared):
    offsets = torch.full((3, 2, 32, 8), -1, dtype=torch.int32)
    shared.offsets(offsets)
    assert sorted(offsets.flatten().tolist()) == list(range(0, 3 * 32 * 128 * 2, 16))
    # A matrix of ldmatrix: eight rows of one column of chunks. Shared memory has 32 banks of 4 bytes.
    banks = offsets.view(3, 2, 4, 8, 8).transpose(3, 4) % 128
    assert (banks.sort(dim=-1).values == torch.arange(0, 128, 16)).all()
    # A copy: the chunks of one row.
    assert ((offsets % 128).sort(dim=-1).values == torch.arange(0, 128, 16)).all()


@every_dtype
@pytest.mark.parametrize("warpgroups", [False, True])
@pytest.mark.parametrize(("num_owned", "num_streamed", "stride"), [(64, 32, 128), (50, 20, 72), (3, 1, 8)])
def test_products_of_tiles(shared, any_order, num_owned, num_streamed, stride, warpgroups, dtype):
    shared.use_warpgroups(int(warpgroups))
    owned, streamed = draw(num_owned, stride).to(dtype), draw(num_streamed, stride, seed=1).to(dtype)
    weights, scores, out = draw(64, 32, seed=2), torch.full((64, 32), torch.nan), torch.full((64, 128), torch.nan)
    panels = math.ceil(stride / 64)
    which = DTYPES.index(dtype)
    shared.tiles(which, owned, num_owned, streamed, num_streamed, stride, panels, weights, scores, out)
    shared.use_warpgroups(0)
    # Zeros past the ends of the matrices.
    a, b = torch.zeros(64, 128).double(), torch.zeros(32, 128).double()
    a[:num_owned, :stride], b[:num_streamed, :stride] = owned.double(), streamed.double()
    rounded = weights.to(dtype).double()
    allowed = 1e-6 * stride**0.5 * 4
    assert (scores - a @ b.T).abs().max() < allowed and (out - rounded @ b).abs().max() < 4e-5


def test_products_over_the_first_panel_alone(shared):
    owned, streamed, weights = draw(64, 128), draw(32, 128, seed=1), torch.zeros(64, 32)
    scores, out = torch.empty(64, 32), torch.empty(64, 128)
    shared.tiles(0, owned, 64, streamed, 32, 128, 1, weights, scores, out)
    assert (scores - owned[:, :64] @ streamed[:, :64].T).abs().max() < 1e-4


def test_three_planes_make_a_float(shared):
    numbers = draw(1000) * 10 ** (draw(1000, seed=1) * 5)
    planes = torch.empty(3, 1000)
    shared.planes(numbers, 1000, planes)
    assert torch.equal(planes.bfloat16().float(), planes)
    assert torch.equal(planes[0], numbers.bfloat16().float())
    assert ((planes.double().sum(dim=0) - numbers.double()).abs() <= numbers.double().abs() * 2.0**-24).all()


# ---- Arithmetic ----

LOGITS = {
    "ordinary": draw(37) * 5,
    "rising": torch.linspace(-50, 50, 37),
    "falling": torch.linspace(50, -50, 37),
    "huge": draw(37) * 1e4,
    "all alike": torch.full((37,), -1e4),
    "some left out": torch.where(torch.arange(37) % 3 == 0, draw(37), -torch.inf),
    "first tiles left out": torch.where(torch.arange(37) > 30, draw(37), -torch.inf),
    "one": torch.tensor([3.0]),
    "all left out": torch.full((37,), -torch.inf),
    "none": torch.empty(0),
}


@pytest.mark.parametrize("step", [1, 5, 64])
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_online_softmax(shared, logits, step):
    values, answer = draw(len(logits), seed=1), torch.full((2,), torch.nan)
    shared.online(logits, values, len(logits), step, answer[:1], answer[1:])
    lse = logits.double().logsumexp(dim=0)
    if lse == -torch.inf:
        assert answer.tolist() == [-torch.inf, 0.0]
        return
    largest = logits[logits.isfinite()].abs().max().item()
    mean = ((logits.double() - lse).exp() * values.double()).sum()
    assert abs(answer[0].item() - lse) <= 1e-6 + 1e-6 * largest
    assert abs(answer[1].item() - mean) <= 2e-6 + 2e-6 * largest


def test_online_softmax_keeps_nan(shared):
    answer = torch.zeros(2)
    shared.online(torch.tensor([1.0, torch.nan, 2.0]), torch.ones(3), 3, 1, answer[:1], answer[1:])
    assert answer.isnan().all()


def test_probability(shared):
    infinity = math.inf
    for logit, lse in ((0.0, 0.0), (-3.0, 1.0), (-1e4, 0.0), (5.0, 4.9999)):
        assert shared.probability_of(logit, lse) == pytest.approx(math.exp(logit - lse), rel=1e-6)
    # A row with nothing left, whatever the logit; a column left out; a number past the end of a ragged tile.
    assert shared.probability_of(3.0, -infinity) == shared.probability_of(-infinity, 3.0) == 0
    assert shared.probability_of(0.0, -1e4) == 0
    assert math.isnan(shared.probability_of(math.nan, 0.0))


def test_labels(shared):
    assert shared.are_of_one_label(4, 5, 4, 5)
    assert not shared.are_of_one_label(4, 5, 4, 6) and not shared.are_of_one_label(4, 5, 3, 5)
    words = torch.zeros(2, dtype=torch.int32)
    assert shared.is_of_no_label(words, words, 1, 2)
    # Past the last row, and where no labels are given, a row has one that columns do not have.
    assert not shared.is_of_no_label(words, words, 2, 2) and not shared.is_of_no_label(0, 0, 1, 2)


# ---- Indices ----


@pytest.mark.parametrize("tiles", [0, 1, 2, 7, 64, 100_003])
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 264])
def test_parts_cover_all_tiles_evenly(shared, tiles, splits):
    spans = torch.full((splits, 2), -1, dtype=torch.int32)
    for split in range(splits):
        shared.part(tiles, split, splits, spans[split])
    begin, end = spans.T.tolist()
    assert begin[0] == 0 and end[-1] == tiles and begin[1:] == end[:-1]
    sizes = [e - b for b, e in zip(begin, end, strict=True)]
    assert min(sizes) >= 0 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_a_block_s_own_piece_comes_last(shared, pieces):
    for own in range(pieces):
        order = [shared.piece(step, own, pieces) for step in range(pieces)]
        assert sorted(order) == list(range(pieces)) and order[-1] == own


def test_lengths_bound_the_logits_of_unit_vectors_where_twice_their_inverse_temperature_is_below_87(shared):
    assert shared.bounded(1.0, 1.0, 87 / 2) and not shared.bounded(1.0, 1.0, 90 / 2)
    assert not shared.bounded(9.0, 1.0, 87 / 2) and not shared.bounded(1.0, 9.0, 87 / 2)
    # A number that is none bounds nothing, and neither does an infinite one.
    assert not shared.bounded(math.nan, 1.0, 1.0) and not shared.bounded(math.inf, 1.0, 1.0)


def test_splits_fill_the_device_and_no_more(shared):
    # 6144 rows of a mixture of 65536: 480 of the 528 places of two waves. Two parts would fill 192 of one wave's 264.
    assert shared.splits(96, 1024, 264, 5) == shared.splits(96, 1024, 264, 100) == 5
    assert shared.splits(96, 1024, 264, 3) == 2  # three parts would be two waves
    assert shared.splits(1, 100, 264, 128) == 100  # no split without a tile
    assert shared.splits(4, 10000, 264, 128) == 60
    assert shared.splits(4, 10000, 264, 7) == 7
    assert shared.splits(260, 1000, 264, 128) == shared.splits(5000, 1000, 264, 128) == 1
    assert shared.splits(1, 1, 264, 0) == 1
