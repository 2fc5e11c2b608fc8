#!/usr/bin/env python3
"""Uses the page of `still serve` in headless Chromium, by keyboard, on a desktop and on a phone, light and dark.

    pip install playwright    # and Chromium of the system, or `playwright install chromium`
    python scripts/serve_page.py --still target/release/still --model demo --screenshots shots

Each check prints a line; the exit code is 1 if one fails. The screenshots are for eyes.
"""

import argparse
import re
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from playwright.sync_api import sync_playwright

from serving import Server

WAIT_MS = 120_000
CHECKS = []
STORY = "Remember this. " + "The harbour of Bergen was founded by Olaf Kyrre in 1070, and the fish market stands there still. " * 12
# Of every text that shows, its color and the first color behind it that is not transparent.
COLORS = """() => [...document.querySelectorAll("body *")].flatMap(e => {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const box = e.getBoundingClientRect();
  if (!own || box.width < 2 || box.height < 2 || e.disabled || /SCRIPT|STYLE/.test(e.tagName)) return [];
  let back = e;
  while (back && /, 0\\)$|transparent/.test(getComputedStyle(back).backgroundColor)) back = back.parentElement;
  return [[e.textContent.trim().slice(0, 30), getComputedStyle(e).color, getComputedStyle(back ?? document.body).backgroundColor]];
})"""
# What a person can operate and a screen reader cannot name.
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, select, summary")]
  .filter(e => !(e.textContent.trim() && /BUTTON|SUMMARY/.test(e.tagName)) && !e.labels?.length && !e.ariaLabel)
  .map(e => e.outerHTML)"""


def check(function):
    """Adds a check. It gets a page that has loaded, and the folder for screenshots."""
    CHECKS.append(function)
    return function


def say(page, text):
    """Sends a message by keyboard, and waits for the end of the answer."""
    page.focus("#text")
    page.keyboard.insert_text(text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible", timeout=WAIT_MS)
    answered(page)


def answered(page):
    page.wait_for_selector("#send:visible", timeout=WAIT_MS)
    assert not page.query_selector_all(".note.error"), page.inner_text("#log")


def number(page, place):
    return float(re.search(r"[\d,.]+", page.inner_text(place))[0].replace(",", ""))


@check
def a_conversation_is_streamed_and_its_second_turn_spares_the_first(page, shots):
    page.click("summary:text('Settings')")
    page.fill("#limit", "24")
    page.fill("#temperature", "0")
    # Every state of the text that showed while it grew.
    page.evaluate("""() => { window.grew = new Set(); new MutationObserver(() => {
      const last = [...document.querySelectorAll(".turn.assistant .said")].at(-1); if (last) grew.add(last.textContent); })
      .observe(document.getElementById("log"), { childList: true, characterData: true, subtree: true }); }""")
    say(page, STORY)
    assert page.evaluate("grew.size") > 5, "the answer came at once"
    first = number(page, "#tokens")
    say(page, "Who founded it?")
    assert number(page, "#spared") + 64 >= first, (page.inner_text("#spared"), first)
    kept, dense = page.inner_text("#kept-words"), page.inner_text("#dense-words")
    assert re.search(r"[\d.]+ [KM]iB", kept) and re.search(r"[\d.]+ [KM]iB", dense), (kept, dense)
    assert number(page, "#speed") > 0
    page.screenshot(path=shots / "conversation.png")
    return f"{page.inner_text('#spared')} tokens spared, {kept}, {dense}, {page.inner_text('#speed')}"


@check
def it_shows_what_each_head_keeps(page, shots):
    page.click("summary:text('What each head kept')")
    page.click("#look")
    page.wait_for_selector("#text-kept .token", timeout=WAIT_MS)
    kept = "#text-kept .token.some, #text-kept .token.many"
    every, words = len(page.query_selector_all(kept)), page.inner_text("#most-kept")
    page.select_option("#layer", "0")
    page.select_option("#head", "0")
    one = len(page.query_selector_all(kept))
    assert 0 < one < every, (one, every, words)
    page.screenshot(path=shots / "kept.png")
    return f"{words} One head: {one}"


@check
def escape_stops_an_answer_and_it_can_be_asked_for_again(page, shots):
    page.fill("#limit", "2000")
    page.focus("#text")
    page.keyboard.insert_text("Count from 1 to 500, each on a line.")
    page.keyboard.press("Enter")
    page.wait_for_function("() => [...document.querySelectorAll('.turn.assistant .said')].at(-1).textContent.length > 3", timeout=WAIT_MS)
    page.keyboard.press("Escape")
    answered(page)
    assert "stopped" in page.inner_text(".turn.assistant:last-child .note")
    page.fill("#limit", "8")
    turns = len(page.query_selector_all(".turn"))
    page.focus("#again")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible", timeout=WAIT_MS)
    answered(page)
    assert len(page.query_selector_all(".turn")) == turns
    assert page.evaluate("document.activeElement.id") == "text", "the keyboard is not back in the message"
    return f"{turns} turns"


@check
def all_of_it_is_reached_by_keyboard_and_has_a_name(page, shots):
    assert not page.evaluate(NAMELESS), page.evaluate(NAMELESS)
    # An answer hides what heads kept before it.
    page.click("#look")
    page.wait_for_selector("#text-kept .token", timeout=WAIT_MS)
    page.focus("#text")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    wanted = {"text", "send", "again", "fresh", "look", "layer", "head", "text-kept", "system", "temperature", "limit", "key", "log"}
    assert wanted <= reached, wanted - reached
    return f"{len(wanted)} places"


def contrast(one, other):
    """Of two colors, as WCAG 2 computes it."""

    def luminance(color):
        parts = [float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted([luminance(one), luminance(other)], reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@check
def text_can_be_read_in_light_and_dark_and_on_a_phone(page, shots):
    worst, backs = (22, None), set()
    for scheme in ("light", "dark"):
        for name, width, height in (("desktop", 1280, 800), ("phone", 360, 740)):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": height})
            page.screenshot(path=shots / f"{scheme}-{name}.png")
            wide, send = page.evaluate("document.documentElement.scrollWidth"), page.locator("#send").bounding_box()
            assert wide <= width and send["x"] + send["width"] <= width and send["y"] + send["height"] <= height, (name, wide, send)
            assert send["height"] >= 44 - 0.5, "too small for a finger"
            worst = min([worst, *((contrast(text, back), what) for what, text, back in page.evaluate(COLORS))])
        backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert worst[0] >= 4.5, worst
    assert len(backs) == 2, backs
    return f"the least contrast is {worst[0]:.1f}: {worst[1]!r}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--still", default="target/release/still")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--chromium", help="its program, if not `chromium` or playwright's own")
    parser.add_argument("--screenshots", type=Path, help="folder for them; otherwise they are thrown away")
    options = parser.parse_args()
    program = options.chromium or shutil.which("chromium") or shutil.which("chromium-browser")
    shots = options.screenshots or Path(tempfile.mkdtemp())
    failed, foreign, told = 0, [], []
    with Server(options.still, options.model) as server, sync_playwright() as playwright:
        # Containers of CI often run as root, where Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("request", lambda request: request.url.startswith(server.url) or foreign.append(request.url))
        page.on("console", lambda message: message.type in ("error", "warning") and told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto(server.url)
        page.wait_for_function("document.title.includes('·')", timeout=WAIT_MS)

        @check
        def nothing_came_from_elsewhere_and_the_browser_complained_of_nothing(page, shots):
            assert not foreign and not told, (foreign, told)
            return f"all is from {server.url}"

        for function in CHECKS:
            try:
                print(f"ok      {function.__name__}: {function(page, shots)}", flush=True)
            except Exception:
                failed += 1
                page.screenshot(path=shots / f"FAILED-{function.__name__}.png")
                print(f"FAILED  {function.__name__}\n{traceback.format_exc()}", flush=True)
        browser.close()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
