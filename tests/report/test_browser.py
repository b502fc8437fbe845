"""The page in a browser: nothing is fetched, nothing runs over, the keyboard works, and axe-core finds no fault.

Skips where there is no Chromium (Debian's packages chromium and chromium-driver) or no selenium.
"""

import shutil
from pathlib import Path

import pytest
from written_run import EVIL, write_run, write_sweep

from ssl_ib.report.panels import PANELS
from ssl_ib.report.write import write_report

webdriver = pytest.importorskip("selenium.webdriver")
axe = pytest.importorskip("axe_core_python.selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of a run, of two that are compared, and of a sweep."""
    base = tmp_path_factory.mktemp("pages")
    runs = [
        write_run(base / name, seed=seed) for seed, name in enumerate(("run", EVIL.replace("/", "|") + "long" * 20))
    ]
    sweep = write_sweep(base / "sweep", {"optim.lr": ["0.001", "0.01"]})
    found = {"run": runs[:1], "both": runs, "sweep": [sweep]}
    for name, folders in found.items():
        write_report(folders, base / f"{name}.html")
    return {name: base / f"{name}.html" for name in found}


def show(browser, page: Path, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    # What is folded away counts too, and every chart is drawn.
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")


@pytest.mark.parametrize("name", ["run", "both", "sweep"])
def test_all_is_there_and_nothing_runs_over(browser, pages, name):
    for width in (360, 1440):
        show(browser, pages[name], width, "light")
        over = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert over <= 0, f"{over} pixels too wide at {width}"
    shown = browser.execute_script("return [...document.querySelectorAll('section')].map(s => s.id)")
    apart = {"run": {"sweep", "differences"}, "both": {"sweep"}, "sweep": {"about"}}[name]
    assert shown == [panel for panel in PANELS if panel not in apart]
    charts, drawn = browser.execute_script(
        "return [document.querySelectorAll('figure.chart').length, document.querySelectorAll('.plot canvas').length]"
    )
    assert charts == drawn > 5
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_axe_finds_no_fault(browser, pages):
    found = []
    # What the scheme changes is the contrast.
    for name, scheme, rules in (("run", "light", None), ("sweep", "light", None), ("run", "dark", ["color-contrast"])):
        show(browser, pages[name], 1000, scheme)
        options = {"resultTypes": ["violations"]} | ({"runOnly": rules} if rules else {})
        violations = axe.Axe().run(browser, options=options)["violations"]
        found += [(one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["any"][:1]) for one in violations]
    assert found == []


def test_the_arrow_keys_move_along_the_curves(browser, pages):
    show(browser, pages["run"], 1000, "light")
    box = browser.find_element("css selector", "#loss .plot")
    readout = browser.find_element("css selector", "#loss .readout")
    values = browser.find_element("css selector", "#loss .legend")
    assert readout.text == "epoch"
    keys = webdriver.common.keys.Keys
    box.send_keys(keys.ARROW_RIGHT)
    first = readout.text
    assert first.startswith("epoch 0: ") and readout.get_attribute("aria-live") == "polite"
    box.send_keys(keys.ARROW_RIGHT)
    assert readout.text.startswith("epoch 0.1: training ") and readout.text != first
    box.send_keys(keys.END)
    assert (
        readout.text.startswith("epoch 4: ")
        and "held out 3" in readout.text
        and "held out3" in values.text.replace("\n", "")
    )
    box.send_keys(keys.HOME)
    assert readout.text == first
