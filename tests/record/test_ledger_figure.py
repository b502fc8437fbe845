"""The ledger of a run in words and as a figure."""

from PIL import Image

from ssl_ib.record import ledger


def row(step: int, **norms: float) -> dict[str, float]:
    found = {"step": step, "epoch": step / 10, "ledger/images": 64, "ledger/norm": 3.0}
    for term, norm in norms.items():
        found |= {f"ledger/{term}/norm": norm, f"ledger/{term}/depth_1": norm / 2, f"ledger/{term}/depth_2": norm / 3}
    return found


def test_the_line():
    numbers = row(0, a=1.0, norm=5.0, c=0.0) | {"ledger/a/share": -0.1, "ledger/norm/share": 1.1, "ledger/c/share": 0.0}
    numbers |= {"ledger/cosine/a/norm": -0.456, "knn/top1": 0.5}
    assert ledger.terms_of(numbers) == ["a", "norm", "c"]
    assert ledger.summary(numbers) == "norm 110 %, a -10 %; a and norm fight (cosine -0.46); none from c"
    assert ledger.summary(numbers | {"ledger/cosine/a/norm": -0.05}) == "norm 110 %, a -10 %; none from c"
    assert ledger.summary({"knn/top1": 0.5, "held_out/loss": 1.0}) == ""


def test_the_figure(tmp_path):
    pair = {"ledger/cosine/a/b": 0.5, "ledger/a/share": 0.6, "ledger/b/share": 0.4}
    # At first a term without a gradient; over powers of ten; among rows without a ledger; of one evaluation.
    rows = [row(0, a=1.0, b=0.0), {"step": 5, "epoch": 0.5, "loss": 1.0}, row(10, a=100.0, b=0.1) | pair]
    for number, given in enumerate((rows, rows[:1])):
        ledger.draw(given, tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as image:
            assert image.size == (1320, 816)
    ledger.draw(rows[1:2], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
