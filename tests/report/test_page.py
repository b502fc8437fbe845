"""The page: every panel, names from outside as text, nothing from a network, and what the command refuses."""

import json
import re
import shutil

import pytest
from written_run import EVIL, picture, write_run, write_sweep

from ssl_ib.cli.report import main
from ssl_ib.report import render, write
from ssl_ib.report.panels import PANELS, modules


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run):
    assert main([str(run)]) == 0
    return (run / "report.html").read_text()


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page)


def data(page: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]


def test_every_panel_of_a_run(page):
    assert sections(page) == [name for name in PANELS if name not in ("sweep", "differences")]
    assert "could not be made" not in page and "could not be read" not in page


def test_every_module_of_the_panels_is_listed():
    files = {path.stem for path in (render.HERE / "panels").glob("*.py")} - {"__init__"}
    assert files == set(PANELS) and all(module.__doc__ for _, module in modules())


def test_names_from_outside_are_text(page, run, tmp_path):
    write_run(tmp_path / EVIL.replace("/", "|"))
    assert main([str(run), str(tmp_path / EVIL.replace("/", "|")), "--out", str(tmp_path / "both.html")]) == 0
    for text in (page, (tmp_path / "both.html").read_text()):
        assert "<script>alert" not in text and "&lt;script&gt;alert" in text
        # Two scripts of ours, the others are data; and none of these can be ended early.
        assert len(re.findall(r"<script>", text)) == 2 and len(re.findall("</script>", text)) == 2 + len(data(text))


def test_nothing_comes_from_a_network(page):
    markup = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href|action|poster|srcset)="(?!#|data:)', markup)
    assert "url(" not in page.lower() and "@import" not in page and "https://" not in markup
    assert "default-src 'none'; img-src data:" in page


def test_charts_have_their_numbers_and_tables(page):
    charts = data(page)
    loss = next(chart for chart in charts if len(chart["xs"][0]) == 40)
    assert [line["name"] for line in loss["lines"]] == ["training, each value", "training", "held out"]
    assert len(charts) == page.count("<summary>Data</summary>") and all(c["range"][0] < c["range"][1] for c in charts)


def test_one_point_is_no_curve(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert data(text) == [] and 'class="bars' in text and "Not finished" in text


def test_runs_that_are_compared(run, tmp_path):
    other = write_run(tmp_path / "other", seed=1, criterion={"name": "info_nce", "temperature": 0.5})
    out = tmp_path / "both.html"
    assert main([str(run), str(other), "--out", str(out)]) == 0
    text = out.read_text()
    assert "differences" in sections(text) and "could not be made" not in text
    rows = re.findall(r'<th scope="row">([\w.]+)</th><td class="number">(.*?)</td><td class="number">(.*?)</td>', text)
    assert ("criterion.temperature", "0.2", "0.5") in rows and ("seed", "0", "1") in rows
    assert not any(name == "epochs" for name, *_ in rows)
    names = {line["name"] for chart in data(text) for line in chart["lines"] if chart["unit"] == "%"}
    assert {"run", "other"} <= names


def test_a_run_that_has_not_begun_or_is_damaged_has_a_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("recipe: mine\n")
    assert main([str(run)]) == 0
    assert "Nothing is logged yet" in (run / "report.html").read_text()
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 2, "loss/a": 1}\n{"step"\n')
    (run / "bad_batch.txt").write_text("1\n")
    assert main([str(run)]) == 0
    assert "Ended at step 1: its loss or its gradient was no longer finite" in (run / "report.html").read_text()
    (run / "about.json").write_text('{"nats": 3, "classes": 4}')
    (run / "results.json").write_text('{"trained": {"knn/top1": "NaN"}, "raw_pixels": {"knn/top1": "NaN"}}')
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "could not be made" in text and "1 line of metrics.jsonl could not be read" in text


def test_pictures_have_a_limit(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    picture(run / "figures" / "attention.png", width=3000, height=300)
    (run / "figures" / "mine.png").write_bytes(b"no picture")
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert 'width="1400" height="140"' in text and text.count("This picture is left out") == 1
    monkeypatch.setattr(render, "MOST_BYTES", 10)
    assert main([str(run)]) == 0
    assert "data:image" not in (run / "report.html").read_text()


@pytest.mark.parametrize(
    "axes",
    [
        {"optim.lr": ["0.001", "0.01", "0.1"]},
        {"case": ["A", EVIL]},
        {"masker.ratio": ["0.1", "0.4"], "case": ["A", "B"]},
    ],
)
def test_a_sweep(tmp_path, axes):
    sweep = write_sweep(tmp_path / "sweep", axes, (0, 1) if len(axes) == 1 else (0,))
    assert main([str(next(sweep.glob("*/seed_0")))]) == 0
    assert main([str(sweep)]) == 0
    text = (sweep / "report.html").read_text()
    assert (
        sections(text)[:2] == ["sweep", "differences"]
        and "could not be made" not in text
        and "<script>alert" not in text
    )
    assert ">failed<" in text and len(re.findall(r'<a href="[^"#]*/seed_0/report.html">', text)) == 1
    numeric = "case" not in axes or len(axes) == 2
    shown = [chart for chart in data(text) if chart["x"] == next(iter(axes))]
    assert bool(shown) == numeric and ('class="dot"' in text) == (not numeric)
    if list(axes) == ["optim.lr"]:
        assert shown[0]["log_x"] and [len(line["y"]) for line in shown[0]["lines"]] == [3, 3, 3]
        assert shown[0]["lines"][-1]["y"] == [0.505, 0.525, 0.545]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "there is no such folder"),
        (["empty"], "holds no run"),
        (["run", "run/../run", "--out", "a.html"], "each run once"),
        (["run", "other"], "with --out"),
        (["run", "--out", "empty"], "is a folder"),
        (["run", "--out", "no/where.html"], "there is no folder"),
        (["run", "--out", "note.html"], "is no page of ssl-ib-report"),
        (["run", "sweep", "--out", "a.html"], "give one sweep alone"),
        (["sweep"], "no run has ended yet"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, run, arguments, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.yaml").write_text("recipe: a\n")
    (tmp_path / "note.html").write_text("mine")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and (tmp_path / "note.html").read_text() == "mine"


def test_a_page_is_replaced_and_another_file_only_when_asked(run, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("mine")
    assert main([str(run), "--out", str(out), "--overwrite"]) == 0
    assert main([str(run), "--out", str(out)]) == 0 and out.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_fails_no_run(run, monkeypatch, caplog):
    def broken(*given):
        raise RuntimeError("no space")

    monkeypatch.setattr(write, "render", broken)
    write.report_of_run(run)
    assert "its page could not be written: RuntimeError: no space" in caplog.text
