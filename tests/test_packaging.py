"""What is built, installed and cited."""

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import ssl_ib

ROOT = Path(__file__).resolve().parents[1]


def test_the_citation_is_of_this_version_and_complete():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == ssl_ib.__version__ and cited["license"] == "MIT"
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    for paper in cited["references"]:
        assert {"type", "title", "authors", "year"} <= set(paper) and all("family-names" in a for a in paper["authors"])
        arxiv = re.search(r"arXiv:(\d{2})\d{2}\.\d{5}", paper["notes"])
        assert 2000 + int(arxiv[1]) in (paper["year"], paper["year"] - 1)


def test_the_changelog_knows_this_version():
    headings = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == ssl_ib.__version__


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_environment_from_another_folder(tmp_path, monkeypatch):
    """Built from a copy of the tracked files and installed with what it asks for; it takes minutes."""
    # With the checkout on it, pip finds the package installed already.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    source, away = tmp_path / "source", tmp_path / "away"
    away.mkdir()
    subprocess.run(["git", "clone", "-q", "--depth", "1", ROOT.as_uri(), str(source)], check=True)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(wheel, check=True)
    (built,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(built).namelist())
    assert {"ssl_ib/py.typed", "ssl_ib/recipes/mrcl_digits.yaml", "ssl_ib_kernels/__init__.py"} <= names
    metadata = next(name for name in names if name.endswith("METADATA"))
    told = zipfile.ZipFile(built).read(metadata).decode()
    assert f"Version: {ssl_ib.__version__}" in told and "Author: ssl_ib contributors" in told and "License: MIT" in told
    assert not any(name.startswith(("tests/", "tools/", "docs/")) for name in names)

    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    subprocess.run([programs / "pip", "install", "-q", "--no-compile", str(built)], check=True)
    done = subprocess.run([programs / "ssl-ib-train", "mrcl_digits", "epochs=1", "--out", "run"], cwd=away)
    assert done.returncode == 0 and (away / "run" / "results.json").is_file()
    for command in ("ssl-ib-eval", "ssl-ib-info", "ssl-ib-export", "ssl-ib-embed", "ssl-ib-sweep", "ssl-ib-bench"):
        assert subprocess.run([programs / command, "--help"], cwd=away, capture_output=True).returncode == 0
    answer = subprocess.run([programs / "ssl-ib-eval", "knn", "run"], cwd=away, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
