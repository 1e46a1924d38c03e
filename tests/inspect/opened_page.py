"""The page of a run in a browser, as a test reads and drives it."""

import json
import time


class Page:
    def __init__(self, browser, path):
        self.browser = browser
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(path.as_uri())
        self.wait("return document.body.dataset.ready === 'true'")

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, script, seconds=10):
        end = time.monotonic() + seconds
        while not self.js(script):
            assert time.monotonic() < end, (
                f"never true: {script}; {self.browser.get_log('browser')}"
            )
            time.sleep(0.05)

    def see_all(self):
        for section in ("look", "groups", "trajectory", "curves", "ablations", "config"):
            self.js("document.getElementById(arguments[0]).scrollIntoView()", section)
            time.sleep(0.15)

    def shown_groups(self):
        return self.js(
            "return [...document.querySelectorAll('#table tbody tr')]"
            ".map(r => Number(r.dataset.group))"
        )

    def set(self, field, value):
        script = "const f = document.getElementById(arguments[0]);"
        script += "if (f.type === 'checkbox') f.checked = arguments[1];"
        script += "else f.value = arguments[1];"
        script += "for (const name of ['input', 'change']) f.dispatchEvent(new Event(name))"
        self.js(script, field, value)

    def requests(self):
        """URLs that the page asked for, itself aside; data URIs stay inside it."""
        messages = [
            json.loads(entry["message"])["message"]
            for entry in self.browser.get_log("performance")
        ]
        sent = [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
        ]
        return [
            url
            for url in sent
            if not url.startswith(("data:", "about:")) and not url.endswith(".html")
        ]


def pixels(page):
    return page.js("return document.getElementById('heat').toDataURL()")


def open_latent_group(page):
    """Opens the group with the most latent steps."""
    page.js(
        "openGroup(OVERVIEW.groups.reduce("
        "(best, g, i, all) => (g.steps > all[best].steps ? i : best), 0))"
    )
    assert page.js("return document.querySelectorAll('#viewer .step').length") > 3


def choose(page, index):
    """Chooses a latent step and waits for its heat map."""
    page.js("document.querySelectorAll('#viewer .step')[arguments[0]].click()", index)
    script = "return document.getElementById('heat').dataset.drawn === arguments[0]"
    drawn = page.js("return `${current.imageIdx}/${VIEW.mode}/${current.probe.cosines}`")
    page.wait(script.replace("arguments[0]", json.dumps(drawn)))
