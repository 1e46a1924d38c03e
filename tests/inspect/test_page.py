"""The page in headless Chromium, as a user has it: opened from a file.

Not covered: other browsers.
"""

import sys
import time
from pathlib import Path

import pytest
import run_folder
from opened_page import Page, choose, open_latent_group, pixels

from grpo_latent.inspect.__main__ import main

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from headless import CHROMIUM, DRIVER, headless  # noqa: E402

pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'"
)
pytest.importorskip("plotly", reason="plotly is not installed: pip install -e '.[inspect]'")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no Chromium: apt-get install chromium chromium-driver (Debian)",
)


@pytest.fixture(scope="module")
def browser():
    with headless() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    plain = run_folder.make_run(root / "lvr_s0")
    hostile = run_folder.make_run(root / "lvr_s1", xss=True)
    run_folder.write_metrics(hostile / "metrics.jsonl", steps=20, offset=0.2)
    run_folder.write_evaluation(hostile / "evaluation.json", num_right=85)
    assert main([str(plain)]) == 0
    assert main([str(hostile)]) == 0
    assert main([str(plain), str(hostile), "--out", str(root / "both.html")]) == 0
    return {
        "plain": plain / "report.html",
        "hostile": hostile / "report.html",
        "both": root / "both.html",
    }


@pytest.mark.parametrize("name", ["plain", "hostile", "both"])
def test_no_console_message_and_no_request(browser, pages, name):
    page = Page(browser, pages[name])
    page.see_all()
    page.wait("return document.querySelectorAll('#charts .main-svg').length > 4")
    page.wait("return document.querySelectorAll('#ablation-charts .main-svg').length > 0")
    assert browser.get_log("browser") == []
    assert page.requests() == []


def test_the_policy_forbids_requests(browser, pages):
    """The page could not fetch if a script of its wanted to."""
    page = Page(browser, pages["plain"])
    page.js("window.done = ''; fetch('https://example.org/').catch(e => { window.done = e.name })")
    page.wait("return window.done === 'TypeError'")
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


def test_heat_map_changes_with_the_chosen_step(browser, pages):
    page = Page(browser, pages["plain"])
    open_latent_group(page)
    choose(page, 0)
    first, facts = pixels(page), page.js("return document.getElementById('facts').textContent")
    choose(page, 1)
    second = pixels(page)
    assert first != second
    assert facts != page.js("return document.getElementById('facts').textContent")
    choose(page, 0)
    assert pixels(page) == first
    page.js("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
    page.wait("return document.querySelector('#viewer .step.chosen').dataset.latent === '1'")
    page.wait(
        "return document.getElementById('heat').dataset.drawn.endsWith(current.probe.cosines)"
    )
    assert pixels(page) == second


def test_heat_map_shows_the_cosines(browser, pages):
    """The brightest patch, read back from the canvas, is the probe's nearest visual token."""
    page = Page(browser, pages["plain"])
    open_latent_group(page)
    page.js("VIEW.mode = 'spotlight'")
    choose(page, 0)
    page.js("current.block.boxes = []; showStep()")
    page.wait("return document.getElementById('heat').dataset.drawn.includes('spotlight')")
    # ratio of drawn to original brightness, patch by patch
    script = """
      const done = arguments[0], canvas = document.getElementById('heat');
      const image = current.block.images[0];
      picture(image.src).then((source) => {
        const plain = document.createElement('canvas');
        [plain.width, plain.height] = [canvas.width, canvas.height];
        const context = plain.getContext('2d');
        context.imageSmoothingEnabled = false;
        context.drawImage(source, 0, 0, plain.width, plain.height);
        const w = canvas.width / image.columns, h = canvas.height / image.rows, out = [];
        for (let i = 0; i < image.rows * image.columns; i++) {
          const left = (i % image.columns) * w, top = Math.floor(i / image.columns) * h;
          const box = [left + 0.25 * w, top + 0.2 * h, 0.5 * w, 0.4 * h];
          const light = (c) => c.getImageData(...box).data
            .reduce((sum, v, k) => sum + (k % 4 < 3 ? v : 0), 0);
          out.push(light(canvas.getContext('2d')) / light(context));
        }
        done({ light: out, cosines: [...cosines(current.probe)], top: current.probe.top });
      });"""
    found = browser.execute_async_script(script)
    order = sorted(range(len(found["light"])), key=lambda i: found["light"][i])
    assert order[-1] == found["top"] == max(range(16), key=lambda i: found["cosines"][i])
    assert order[0] == min(range(16), key=lambda i: found["cosines"][i])


def test_filters_and_sorting(browser, pages):
    page = Page(browser, pages["plain"])
    groups = page.js("return OVERVIEW.groups")
    assert len(page.shown_groups()) == len(groups) == 6
    page.set("filter-step", "2")
    assert [groups[i]["step"] for i in page.shown_groups()] == [2, 2, 2]
    page.set("filter-step", "")
    page.set("filter-text", groups[0]["question"])
    wanted = {i for i, group in enumerate(groups) if group["question"] == groups[0]["question"]}
    assert set(page.shown_groups()) == wanted and len(wanted) < 6
    page.set("filter-text", "")
    page.set("filter-low", "0.6")
    assert page.shown_groups() == []
    page.set("filter-low", "")
    page.set("filter-disagree", True)
    assert set(page.shown_groups()) == {
        i for i, group in enumerate(groups) if group["disagreement"] > 0
    }
    page.set("filter-disagree", False)
    for column in ("steps", "truth"):
        for reverse in (True, False):
            page.js(
                "document.querySelector(`#table th[data-column='${arguments[0]}']`).click()",
                column,
            )
            values = [float(groups[i][column]) for i in page.shown_groups()]
            assert values == sorted(values, reverse=reverse)


def test_clicking_a_row_opens_its_group(browser, pages):
    page = Page(browser, pages["plain"])
    page.js("document.querySelector('#table tr[data-group=\"4\"]').click()")
    assert page.js("return document.querySelector('#viewer h3').textContent").startswith(
        "step 1, group 1"
    )
    assert (
        page.js("return document.querySelectorAll('#viewer .trajectory').length") == run_folder.G
    )


def test_token_log_probs(browser, pages):
    page = Page(browser, pages["plain"])
    page.js("openGroup(0)")
    position = page.js("return current.block.trajectories[0].acted.indexOf('1')")
    page.js(
        "document.querySelector(`#viewer .token[data-trajectory='0']"
        "[data-position='${arguments[0]}']`).click()",
        position,
    )
    reading = page.js("return document.getElementById('reading').textContent")
    for name in ("rollout", "old", "ref", "new"):
        value = page.js(
            "return current.block.trajectories[0].log_probs[arguments[0]][arguments[1]]",
            name,
            position,
        )
        assert f"{value:.4f}" in reading


def address(page, idx, group=4):
    """The link of a trajectory of a group, as its card has it."""
    page.js("openGroup(arguments[0])", group)
    script = "return document.querySelectorAll('#viewer .trajectory .link')[arguments[0]].href"
    return page.js(script, idx)


def test_a_link_opens_one_trajectory(browser, pages):
    page = Page(browser, pages["both"])
    link = address(page, 2)
    assert link.startswith(pages["both"].as_uri() + "#at=lvr_s0/")
    browser.get("about:blank")
    browser.get(link)
    page.wait("return document.body.dataset.ready === 'true'")
    opened = "return document.querySelector('#viewer .trajectory.linked').dataset.card"
    assert page.js("return current.index") == 4 and page.js(opened) == "2"
    page.js("location.hash = arguments[0]", address(page, 1, group=0).partition("#")[2])
    page.wait("return current.index === 0")
    page.wait(f"{opened} === '1'")
    assert page.js("return document.getElementById('missed').textContent") == ""


def test_a_link_to_what_is_not_there_is_told(browser, pages):
    page = Page(browser, pages["plain"])
    page.js("location.hash = '#at=lvr_s0/99/%3Cb%3E/0'")
    page.wait("return document.getElementById('missed').textContent.includes('<b>')")
    assert page.js("return document.querySelectorAll('#missed b').length") == 0
    assert browser.get_log("browser") == []


def press(page, key, target="document"):
    event = "new KeyboardEvent('keydown', {key: arguments[0], bubbles: true})"
    page.js(f"{target}.dispatchEvent({event})", key)


def test_keys_go_along_latents_and_groups(browser, pages):
    page = Page(browser, pages["plain"])
    order = page.shown_groups()
    page.js("openGroup(arguments[0])", order[1])
    chosen = "return [...document.querySelectorAll('#viewer .step')].findIndex("
    chosen += "(step) => step.classList.contains('chosen'))"
    first = page.js(chosen)
    press(page, "ArrowRight"), press(page, "ArrowRight"), press(page, "ArrowLeft")
    assert page.js(chosen) == first + 1
    press(page, "j")
    assert page.js("return current.index") == order[2]
    press(page, "k"), press(page, "k"), press(page, "k")  # there is none before the first
    assert page.js("return current.index") == order[0]
    press(page, "j", "document.getElementById('filter-text')")  # typed, not pressed
    assert page.js("return current.index") == order[0]


def test_colours_have_a_legend(browser, pages):
    page = Page(browser, pages["plain"])
    open_latent_group(page)
    legend = "return document.getElementById('viewer-legend').textContent"
    assert "latent steps: nearest patch's cosine" in page.js(legend)
    assert "nats" not in page.js(legend)
    page.js("VIEW.tokenColor = 'surprise'; paintTokens()")
    assert "tokens: −log-prob (old), nats 0" in page.js(legend)
    assert "the nearest; " in page.js("return document.querySelector('.eye .hint').textContent")
    page.see_all()
    meanings = page.js("return document.getElementById('charts').textContent")
    assert "near 0: nothing is explored any more" in meanings


def test_hostile_completion_is_shown_and_not_run(browser, pages):
    page = Page(browser, pages["hostile"])
    page.see_all()
    page.js("openGroup(OVERVIEW.groups.findIndex((g) => g.group === '0'))")
    assert page.js("return window.hacked") is None
    assert (
        page.js(
            "return document.querySelectorAll('img[src=x], #viewer script, #table script').length"
        )
        == 0
    )
    assert run_folder.XSS in page.js("return document.getElementById('table').textContent")
    assert run_folder.XSS in page.js("return document.getElementById('viewer').textContent")
    page.js("document.getElementById('config').scrollIntoView()")
    page.wait("return document.getElementById('config-table').textContent.includes('onerror')")
    assert browser.get_log("browser") == []


def test_the_policy_stops_inline_scripts(browser, pages):
    """The second line of defence: even markup that got in would not run."""
    page = Page(browser, pages["hostile"])
    page.js("document.body.insertAdjacentHTML('beforeend', arguments[0])", run_folder.XSS)
    time.sleep(0.3)
    assert page.js("return window.hacked") is None


def test_ablations_of_runs_are_overlaid_with_their_spread(browser, pages):
    """lvr_s0 and lvr_s1 are one family: one chart shows their mean and their range.

    Own accuracies are .95 and .85.
    """
    page = Page(browser, pages["both"])
    page.js("document.getElementById('ablations').scrollIntoView()")
    page.wait("return document.querySelectorAll('#ablation-charts .main-svg').length > 0")
    assert page.js("return document.querySelectorAll('#ablation-charts .ablation').length") == 1
    script = """const members = OVERVIEW.runs.flatMap(
      (run) => run.ablations.map((report) => ({ run, report })));
      return ablationTraces(members, ['own', 'shuffle'])"""
    spread, dots = page.js(script)
    assert spread["x"] == [pytest.approx(0.9), pytest.approx(0.1)]
    assert [spread["error_x"][side][0] for side in ("array", "arrayminus")] == [
        pytest.approx(0.05)
    ] * 2
    assert dots["x"] == [0.95, 0.85, 0.1, 0.1]
    cells = page.js(
        "return [...document.querySelectorAll('#ablation-charts td')]"
        ".map((cell) => cell.textContent)"
    )
    assert cells[:6] == ["own", "0.950", "0.850", "shuffle", "used (+0.850)", "used (+0.750)"]


def test_the_verdict_stands_on_the_page(browser, pages):
    page = Page(browser, pages["plain"])
    cards = page.js("return document.getElementById('cards').textContent")
    assert "latents areusedby ablation shuffle" in cards
    page.js("document.getElementById('ablations').scrollIntoView()")
    text = page.js("return document.getElementById('ablations').textContent")
    assert "The latents are used: the gap is above 0" in text and "noise" in text


def test_runs_are_overlaid_with_their_spread(browser, pages):
    page = Page(browser, pages["both"])
    page.js("document.getElementById('curves').scrollIntoView()")
    page.wait("return document.querySelectorAll('#charts .main-svg').length > 2")
    traces = page.js("return curveTraces('critic/score/mean')")
    low, high, mean = (trace["y"] for trace in traces)
    assert (
        low[0] == pytest.approx(0.05)
        and high[0] == pytest.approx(0.25)
        and mean[0] == pytest.approx(0.15)
    )
    assert "mean of 2" in traces[2]["name"]
    page.set("filter-run", "1")
    assert {
        page.js("return OVERVIEW.groups[arguments[0]].run", i) for i in page.shown_groups()
    } == {1}
