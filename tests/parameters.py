"""Which pairs of a test's parameters are tried every time, and which in the slow tests alone."""

import pytest


def spread(cases: list, kinds: list, when_slow: tuple | list = ()) -> list:
    """Every case with one of the kinds (dtypes, say) in turn, and the first case with all of them.

    All pairs are tried when slow, and so are the cases `when_slow`.

    A GPU compiles a Triton kernel for every pair, which takes seconds, and the interpreter is slow.
    """
    chosen = {(i, i % len(kinds)) for i in range(len(cases))} | {(0, j) for j in range(len(kinds))}
    return [
        pytest.param(case, kind, marks=() if (i, j) in chosen else pytest.mark.slow)
        for i, case in enumerate([*cases, *when_slow])
        for j, kind in enumerate(kinds)
    ]
