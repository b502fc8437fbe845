"""What the long form says of itself: the seed at the start, and how many cases each target had at the end."""

from fuzz import cases


def pytest_report_header() -> str:
    return f"fuzz: {cases.TOTAL} cases, {f'seed {cases.SEED}' if cases.LONG else 'the same ones each time'}"


def pytest_terminal_summary(terminalreporter) -> None:
    if cases.LONG:
        for target in sorted({target for target, _ in cases.DONE}):
            worked, refused = (cases.DONE[target, code] for code in (0, 2))
            terminalreporter.write_line(f"fuzz: {target}: {worked + refused} cases, {refused} of them refused")
