"""What the emulator of CUDA's execution model shows and reports, on small kernels that are right or wrong."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COUNT = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name, order): the numbers that a program leaves, or the message of its error."""
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler: c++ is not on the PATH")
    program = tmp_path_factory.mktemp("emulator") / "programs"
    flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-DSSL_IB_EMULATED", "-U_FORTIFY_SOURCE"]
    include = f"-I{HERE.parents[1] / 'csrc' / 'common'}"
    subprocess.run([compiler, *flags, include, HERE / "emulator_programs.cpp", "-o", program], check=True)

    def run(name: str, order: str) -> list[float] | str:
        answer = subprocess.run([program, name, order], capture_output=True, text=True, timeout=60, check=True).stdout
        return answer if answer.startswith("emulator") else [float(x) for x in answer.split()]

    return run


every_order = pytest.mark.parametrize("order", ["forward", "reverse", "random"])
EXPECTED = {
    "mirror": [COUNT - 1 - i for i in range(COUNT)],
    "rotate": [4 * ((i + 1) % COUNT + (i - 1) % COUNT) + 2 * 600 for i in range(COUNT)],
    "pass_along": [i ^ 31 for i in range(COUNT)],
}


@every_order
@pytest.mark.parametrize("name", EXPECTED)
def test_right_kernels_are_right(run, name, order):
    assert run(name, order) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_missing_barrier_shows(run, name):
    answers = [run(f"{name} without barrier", order) for order in ("forward", "reverse")]
    assert all(answer != EXPECTED[name] for answer in answers)


def test_warps_that_step_on_each_others_toes_show(run):
    right = [i // 32 * 32 + 31 - i % 32 for i in range(COUNT)]
    assert [run("step_on_toes", order) for order in ("forward", "reverse", "random")] == [right] * 3
    assert run("step_on_toes in one place", "reverse") != right


@every_order
def test_operations_of_a_warp(run, order):
    assert run("shuffles", order) == [1] * COUNT


@every_order
def test_threads_that_returned_are_not_waited_for(run, order):
    assert run("leave_early", order) == [1, 0] * (COUNT // 2)
    answer = run("shuffle_from_a_lane_that_left", order)
    assert answer[1] == 0 and math.isnan(answer[0]) and answer[31] == 1


@every_order
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wait_in_two_places", "threads of a block wait at emulator_programs.cpp:"),
        ("shuffle_in_two_places", "lanes of a warp wait at emulator_programs.cpp:"),
        ("wait_for_ever", "threads wait for others that never come: 1 at emulator_programs.cpp:"),
        ("outside_the_mask", "a lane that its mask leaves out, at emulator_programs.cpp:"),
        ("overrun", "a write 8 bytes past the end of 256 bytes of shared memory"),
        ("unaligned", "a vector of 16 bytes that is not aligned to them [block (0, 0, 0), thread (1, 0, 0)]"),
        ("too many threads", "a launch that no GPU takes"),
        ("no blocks", "a launch that no GPU takes"),
        ("too much shared memory", "233472 bytes of shared memory"),
    ],
)
def test_mistakes_are_reported(run, name, message, order):
    answer = run(name, order)
    assert message in answer and "went wrong" not in answer


@every_order
def test_shared_memory(run, order):
    assert run("read_unset", order) == [1] * COUNT
    assert run("no overrun", order) == [1] * COUNT


def test_asynchronous_copies_land_as_late_as_they_may_or_at_once(run):
    for order in ("forward", "reverse", "random"):
        assert run("copies, 0 pending", order) == [4] * COUNT
    assert run("copies, 3 pending", "forward") == run("copies, 3 pending", "random") == [1] * COUNT
    assert run("copies, 3 pending", "reverse") == [4] * COUNT
    assert "a thread returns while asynchronous copies of its are under way" in run("copy_and_leave", "forward")


@every_order
def test_blocks(run, order):
    assert run("coordinates", order) == list(range(COUNT))
    turns = run("order_of_blocks", order)
    assert sorted(turns) == list(range(COUNT))
    if order == "random":
        assert turns not in (sorted(turns), sorted(turns, reverse=True))
    else:
        assert turns == sorted(turns, reverse=order == "reverse")
