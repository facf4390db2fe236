"""The drift viewer in headless Chromium: it opens, filters, sorts, searches, goes by keys, and hostile text stays text."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from viewer_helpers import ListTokenizer, make_rollouts, open_browser

from prune_opd_hf.tasks import load_tokenizer
from prune_opd_hf.viewer import write_drift_view

LENGTHS = [40, 7, 23, 61, 5, 30, 12, 90, 17]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def rollouts():
    return make_rollouts(LENGTHS)


@pytest.fixture(scope="module")
def file(rollouts, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "drift.html"
    return write_drift_view(rollouts, path, tokenizer=load_tokenizer(), tokenizer_name="embedded", source="rollouts")


@pytest.fixture
def page(browser, file):
    browser.open(file)
    return browser


def words(rollouts, row):
    tokens = load_tokenizer().convert_ids_to_tokens(rollouts.response_ids[row, : int(rollouts.lengths[row])].tolist())
    return "".join(f" {token}" for token in tokens)


def events(rollouts, row):
    return rollouts.drift_events[row].nonzero().flatten().tolist()


def set_value(browser, selector, value, event="input"):
    browser.run(
        "const n = document.querySelector(arguments[0]); n.value = arguments[1]; "
        "n.dispatchEvent(new Event(arguments[2], {bubbles: true}))",
        selector,
        value,
        event,
    )


def test_it_opens_at_the_first_event_and_asks_nobody_for_anything(page, file, rollouts):
    assert page.texts("#name") == ["Rollout 0"]
    assert page.focused == events(rollouts, 0)[0]
    assert page.requests() == [(file.as_uri(), None)]
    assert page.console() == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_tint_events_exhausted_and_spent_tokens_are_those_of_the_rollout(browser, file, rollouts, dark):
    browser.open(file, "#r=1", dark=dark)
    assert "".join(browser.texts(".response .tok")) == words(rollouts, 1)
    classes = browser.run("return [...document.querySelectorAll('.response .tok')].map((n) => [...n.classList])")
    overlap = rollouts.overlap[1, :7].tolist()
    for t in range(7):
        level = round(10 * (1 - overlap[t]) ** 1.3)
        assert f"h{level}" in classes[t]
        assert ("event" in classes[t]) == (t in events(rollouts, 1))
    spent = (rollouts.reliability[1, :7] == 0).nonzero().flatten().tolist()
    assert [t for t in range(7) if "spent" in classes[t]] == spent[1:]
    assert bool(browser.texts(".exhausted")) == bool(spent)
    colours = browser.run(
        "const c = getComputedStyle(document.body); return [c.backgroundColor, c.color].map((x) => x.match(/\\d+/g).map(Number))"
    )
    ground, ink = (sum(colour) for colour in colours)
    assert (ground < ink) == dark


def contrast(first, second):
    """WCAG 2's ratio of two colours of 0 to 255."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_every_tint_leaves_the_text_readable_and_events_stand_out_by_lightness(browser, file, dark):
    """WCAG AA: 4.5 for text; 3 for the bar of an event against the strongest tint it lies on."""
    browser.open(file, dark=dark)

    def drawn(colour):
        """sRGB of a CSS colour as the browser paints it on the page."""
        return browser.run(
            "const c = document.createElement('canvas').getContext('2d'); const s = getComputedStyle(document.documentElement); "
            "c.fillStyle = s.getPropertyValue('--paper'); c.fillRect(0, 0, 1, 1); "
            "const n = document.createElement('i'); document.body.append(n); n.className = arguments[0]; "
            "n.style.color = arguments[1]; const g = getComputedStyle(n); "
            "c.fillStyle = arguments[0] ? g.backgroundColor : g.color; n.remove(); c.fillRect(0, 0, 1, 1); "
            "return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3)",
            colour if colour.startswith("h") else "",
            colour,
        )

    ink, event, paper = drawn("var(--ink)"), drawn("var(--event)"), drawn("var(--paper)")
    spent = browser.run(
        "const n = document.createElement('i'); n.className = 'spent'; document.body.append(n); "
        "const o = getComputedStyle(n).opacity; n.remove(); return Number(o)"
    )
    assert 0.5 < spent < 1

    def faded(colour):
        return [spent * c + (1 - spent) * p for c, p in zip(colour, paper, strict=True)]

    for level in range(1, 11):
        tint = drawn(f"h{level}")
        assert contrast(tint, ink) >= 4.5
        assert contrast(faded(tint), faded(ink)) >= 4.5
    assert contrast(drawn("h10"), event) >= 3
    for name in ("muted", "student", "teacher", "event"):
        assert contrast(drawn(f"var(--{name})"), drawn("var(--paper)")) >= 4.5


def test_every_stop_reason_has_its_name_and_only_those_that_occur_have_a_filter(browser, rollouts, tmp_path):
    reasons = ("criterion", "eos", *["length"] * 7)
    path = write_drift_view(replace(rollouts, stop_reason=reasons), tmp_path / "drift.html")
    browser.open(path)
    assert browser.texts("#badge") == ["◆ other criterion"]
    assert browser.texts(".stop") == ["● ended 1", "▮ length cap 7", "◆ other criterion 1"]
    browser.press("End")
    assert f"ended by another criterion after {LENGTHS[0]} tokens" in browser.texts(".end")[0]


def test_filters_by_stop_reason_overlap_events_and_length(page, rollouts):
    rows = range(len(LENGTHS))
    page.find("[data-stop=eos]").click()
    assert page.order == [row for row in rows if rollouts.stop_reason[row] != "eos"]
    page.find("[data-stop=eos]").click()
    set_value(page, "#length-max", "30")
    set_value(page, "#length-min", "7")
    assert page.order == [row for row in rows if 7 <= LENGTHS[row] <= 30]
    assert page.texts("#shown") == ["5 of 9 rollouts"]
    set_value(page, "#length-max", "")
    set_value(page, "#length-min", "")
    set_value(page, "#events-min", "12")
    assert page.order == [row for row in rows if len(events(rollouts, row)) >= 12]
    set_value(page, "#events-min", "")
    means = [float(rollouts.overlap[row].sum()) / LENGTHS[row] for row in rows]
    middle = sorted(means)[4]
    set_value(page, "#agreement-max", f"{middle + 1e-4:.5f}")
    assert page.order == [row for row in rows if means[row] <= middle + 1e-4]
    set_value(page, "#agreement-max", "-1")
    assert page.texts(".none") == ["Nothing fits these filters."]
    page.find("#text").click()
    page.press("j")  # nowhere to go
    assert page.texts("#name") == ["Rollout 0"]


@pytest.mark.parametrize("key", ["length", "events", "overlap", "first", "file"])
def test_sorts_in_both_directions_with_rollouts_lacking_the_number_last(page, rollouts, key):
    def value(row):
        return {
            "length": LENGTHS[row],
            "events": len(events(rollouts, row)),
            "overlap": round(float(rollouts.overlap[row].double().sum()) / LENGTHS[row], 5),
            "first": events(rollouts, row)[0] if events(rollouts, row) else None,
            "file": row,
        }[key]

    with_it = [row for row in range(len(LENGTHS)) if value(row) is not None]
    without = [row for row in range(len(LENGTHS)) if value(row) is None]
    set_value(page, "#sort", key)
    assert page.order == sorted(with_it, key=value) + without
    page.find("#direction").click()
    assert page.order == sorted(with_it, key=lambda row: (-value(row), row)) + without


def test_search_keeps_the_rollouts_that_hold_the_text_and_goes_from_match_to_match(page, rollouts):
    tokens = words(rollouts, 7).split()
    query = f"{tokens[50]} {tokens[51]}"
    holding = [row for row in range(len(LENGTHS)) if f"{query.lower()}" in words(rollouts, row).lower()]
    assert 7 in holding
    page.press("/")
    page.press(query.upper())
    page.wait("!/^9 rollouts|searching/.test(document.getElementById('shown').textContent)")
    assert page.order == holding
    page.wait("document.querySelector('#name').textContent !== 'Rollout 0'" if 0 not in holding else "true")
    page.press("\ue007")  # Enter, back to the text
    page.wait("document.activeElement.id === 'text'")
    while page.texts("#name") != ["Rollout 7"]:
        page.press("j")
        page.wait("document.querySelector('.tok.found')")
    text = words(rollouts, 7).lower()
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token) + 1)
    at, expected = -1, []
    while (at := text.find(query.lower(), at + 1)) >= 0:
        expected.append(max(t for t in range(len(tokens)) if starts[t] <= at))
    visited = [page.focused]
    for _ in expected[1:]:
        page.press("n")
        visited.append(page.focused)
    assert sorted(visited) == expected


def test_keys_move_by_token_line_event_end_and_rollout(page, rollouts):
    end, home, right, left, down, up = "\ue010", "\ue011", "\ue014", "\ue012", "\ue015", "\ue013"
    page.press(home)
    assert page.focused == 0
    page.press(left)
    assert page.focused == 0
    page.press(right, right)
    assert page.focused == 2
    page.press(end)
    assert page.focused == 39
    page.press(right)
    assert page.focused == 39
    page.press("b")
    assert page.focused == events(rollouts, 0)[0]
    visited = [page.focused]
    for _ in events(rollouts, 0)[1:]:
        page.press("e")
        visited.append(page.focused)
    assert visited == events(rollouts, 0)
    page.press("E")
    assert page.focused == events(rollouts, 0)[-2]
    page.press("c")
    assert page.focused == (rollouts.reliability[0, :40] == 0).nonzero()[0]
    page.press(home, down)
    line = "document.querySelector('.tok.focused').parentElement.querySelector('.gutter b').textContent"
    assert int(page.run(f"return {line}")) > 1
    page.press(up)
    assert page.focused == 0
    page.press("j")
    page.wait("document.querySelector('#name').textContent === 'Rollout 1'")
    page.press("k")
    page.wait("document.querySelector('#name').textContent === 'Rollout 0'")
    page.press("?")
    assert page.run("return document.getElementById('help').open")
    page.press("\ue00c")
    assert not page.run("return document.getElementById('help').open")
    page.press("d", "d")
    assert page.run("return document.documentElement.dataset.theme") == "dark"
    page.press("t", "t", "t")
    assert not any(
        " h" in name
        for name in page.run("return [...document.querySelectorAll('.response .tok')].map((n) => n.className)")
    )
    page.press("p")
    assert page.texts(".prompt .tok") == []
    assert page.console() == []


def test_tab_reaches_every_control_and_the_list_goes_by_arrows(page):
    reached = []
    page.run("document.activeElement.blur()")
    for _ in range(24):
        page.press("\ue004")
        reached.append(page.run("return document.activeElement.id"))
    assert {"query", "agreement-min", "length-max", "sort", "direction", "list", "tint", "theme", "help-open"} <= set(
        reached
    )
    assert {"chart", "text"} <= set(reached)
    page.run("document.getElementById('list').focus()")
    page.press("\ue015", "\ue015")
    page.wait("document.querySelector('#name').textContent === 'Rollout 2'")
    page.press("\ue007")
    assert page.run("return document.activeElement.id") == "text"


def shown_percent(text):
    return float(text.strip("≤<% "))


def test_candidates_of_the_focused_token_are_those_of_the_record(page, rollouts):
    page.press("\ue011", "\ue014", "\ue014")
    t = page.focused
    expected = {}
    for token, p, q in zip(
        rollouts.student_topk_ids[0, t].tolist(),
        rollouts.student_topk_log_probs[0, t].tolist(),
        rollouts.teacher_log_probs[0, t].tolist(),
        strict=True,
    ):
        expected[token] = (100 * math.exp(p), 100 * math.exp(q))
    least = min(p for p, _ in expected.values())
    for token, q in zip(
        rollouts.teacher_topk_ids[0, t].tolist(), rollouts.teacher_topk_log_probs[0, t].tolist(), strict=True
    ):
        expected.setdefault(token, (least, 100 * math.exp(q)))
    names = {
        f"␣{word}": expected[token] for token in expected for word in [load_tokenizer().convert_ids_to_tokens(token)]
    }
    rows = page.candidates()
    assert {name for _, name, _ in rows} == set(names)
    for p, name, q in rows:
        assert shown_percent(p) == pytest.approx(names[name][0], rel=0.02, abs=2e-3)
        assert shown_percent(q) == pytest.approx(names[name][1], rel=0.02, abs=2e-3)
    order = [max(names[name][0] if not p.startswith("≤") else 0, names[name][1]) for p, name, _ in rows]
    assert order == sorted(order, reverse=True)


def test_the_verdict_counts_the_shared_candidates_and_names_the_teachers_wish(page, rollouts):
    page.press("b")
    t = page.focused
    shared = round(4 * float(rollouts.overlap[0, t]))
    verdict = page.texts(".verdict")[0]
    assert "Drift event 1 of 4: reliability 1.000 → 0.750." in verdict
    assert f"{shared} of 4 candidates are shared, below the threshold 0.6." in verdict
    wish = load_tokenizer().convert_ids_to_tokens(int(rollouts.teacher_topk_ids[0, t, 0]))
    sampled = int(rollouts.response_ids[0, t]) == int(rollouts.teacher_topk_ids[0, t, 0])
    assert ("first choice" in verdict) if sampled else (f"wants ␣{wish} instead" in verdict)


def test_the_pointer_shows_candidates_without_moving_the_focus(page):
    from selenium.webdriver.common.action_chains import ActionChains

    page.press("\ue011")
    assert "Token 1 of 40" in page.texts(".token-title")[0]
    ActionChains(page.driver).move_to_element(page.find("#t5")).perform()
    assert "Token 6 of 40" in page.texts(".token-title")[0]
    assert page.candidates()
    assert page.focused == 0
    ActionChains(page.driver).move_to_element(page.find("#name")).perform()
    assert "Token 1 of 40" in page.texts(".token-title")[0]
    page.find("#t5").click()
    assert page.focused == 5


def test_a_click_on_the_chart_jumps_there(browser, file):
    from selenium.webdriver.common.action_chains import ActionChains

    browser.open(file, "#r=7")
    chart = browser.find("#chart")
    inner = chart.size["width"] - 34 - 12
    for goal in (0, 45, 89):
        x = 34 + inner * (goal + 0.5) / 90
        ActionChains(browser.driver).move_to_element_with_offset(
            chart, round(x - chart.size["width"] / 2), 0
        ).click().perform()
        assert abs(browser.focused - goal) <= 1
        assert browser.run("return document.querySelector('.tok.focused') !== null")
    assert browser.run("return document.getElementById('chart').getAttribute('aria-valuemax')") == "90"


def test_an_address_with_rollout_and_token_opens_there(browser, file):
    browser.open(file, "#r=3&t=55")
    assert browser.texts("#name") == ["Rollout 3"]
    assert browser.focused == 54
    browser.open(file, "#r=999&t=oops")
    assert browser.texts("#name") == ["Rollout 0"]


def test_without_the_student_it_shows_the_teacher_alone(browser, tmp_path):
    rollouts = make_rollouts([20, 6], metric="nucleus", student=False)
    browser.open(write_drift_view(rollouts, tmp_path / "drift.html"))
    rows = browser.candidates()
    t = browser.focused
    teacher = [str(token) for token in rollouts.teacher_topk_ids[0, t].tolist()]
    assert set(teacher) <= {name for _, name, _ in rows} <= {*teacher, str(int(rollouts.response_ids[0, t]))}
    assert browser.texts("#tint option") == ["teacher's q of the token", "nothing"]
    assert "nucleus of mass 0.6" in browser.texts(".verdict")[0]
    assert browser.console() == []


def test_a_rollout_without_response_tokens_is_shown_as_such(browser, tmp_path):
    browser.open(write_drift_view(make_rollouts([0, 5]), tmp_path / "drift.html"))
    assert browser.texts(".wait") == ["This rollout has no response tokens."]
    browser.press("\ue014", "e", "b", "c", "\ue015", "\ue00f", "n", "p", "j")
    browser.wait("document.querySelector('#name').textContent === 'Rollout 1'")
    assert browser.candidates()
    browser.press("k")
    browser.wait("document.querySelector('.wait')")
    assert browser.console() == []


HOSTILE = [
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror='window.pwned=1'>",
    "--><svg onload=window.pwned=1>",
    "<iframe src=https://example.com/></iframe>",
    "<style>*{display:none}</style>",
    "\u202e\u2066drow",
    "\u200b",
    "\x00\x07\x1b[31m",
    "\ud83d",
    "👩\u200d🔬",
    "e" + "\u0301" * 60,
    "\n\n\n",
    "x" * 5000,
    "${window.pwned=1}",
    "javascript:window.pwned=1",
    " ",
    "مرحبا",
    "\ufdd0\uffff",
]


def test_hostile_text_is_shown_and_does_nothing(browser, tmp_path):
    rollouts = make_rollouts([60], vocabulary=len(HOSTILE))
    every = torch.arange(60) % len(HOSTILE)
    rollouts.response_ids.copy_(every.unsqueeze(0))
    name = "<img src=x onerror=window.pwned=1>\u202e"
    path = write_drift_view(
        rollouts,
        tmp_path / "drift.html",
        tokenizer=ListTokenizer(HOSTILE, special=[1]),
        tokenizer_name=name,
        source=name,
    )
    from selenium.common.exceptions import NoAlertPresentException

    browser.open(path)
    browser.press("\ue011")
    seen = []
    for _ in HOSTILE:
        seen.append(browser.texts(".big")[0])
        assert browser.candidates()
        browser.press("\ue014")
    browser.type("#query", "<img src=x")
    browser.wait("document.querySelector('.tok.found')")
    assert browser.run("return window.pwned") is None
    with pytest.raises(NoAlertPresentException):
        browser.driver.switch_to.alert  # noqa: B018 - reading it asks the browser
    assert browser.requests() == [(path.as_uri(), None)]
    assert browser.console() == []
    assert browser.run("return document.querySelectorAll('iframe, img, svg, .tok script, .tok style').length") == 0
    # All of it can be seen, and nothing turns the text around it.
    assert seen[0] == HOSTILE[0]
    assert seen[1] == HOSTILE[1]
    assert seen[5] == "⟨U+202E⟩⟨U+2066⟩drow"
    assert seen[6] == "⟨U+200B⟩"
    assert seen[7] == "␀␇␛[31m"
    assert seen[8] == "⟨U+D83D⟩"
    assert seen[9] == HOSTILE[9]
    assert seen[11] == "↵↵↵"
    assert seen[15] == "␣"
    assert seen[17] == "⟨U+FDD0⟩⟨U+FFFF⟩"
    assert browser.texts("#source")[0].startswith("<img src=x onerror=window.pwned=1>⟨U+202E⟩")
    boxes = browser.run(
        "return [...document.querySelectorAll('.line.response')].map((line) => [...line.querySelectorAll('.tok')]"
        ".map((n) => { const box = n.getBoundingClientRect(); return [box.left, box.right, box.height]; }))"
    )
    for line in boxes:
        assert all(left[1] <= right[0] + 1 for left, right in itertools.pairwise(line)), "tokens change places"
        assert all(height <= 28 for _, _, height in line), "a token grows out of its line"


def test_even_injected_markup_would_be_stopped_by_the_policy(page):
    """The second wall, should the first ever have a hole."""
    assert (
        page.run(
            "try { document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.pwned=1>'); return 'ran' } "
            "catch (error) { return error.name }"
        )
        == "TypeError"
    )
    page.run("const s = document.createElement('style'); s.textContent = 'body{display:none}'; document.head.append(s)")
    assert page.run("return getComputedStyle(document.body).display") == "block"
    page.requests()
    page.run("const i = document.createElement('img'); i.src = 'https://example.com/x.png'; document.body.append(i)")
    page.run("fetch('https://example.com/y').catch(() => { window.refused = true })")
    page.wait("window.refused")
    asked = dict(page.requests())
    assert asked == dict.fromkeys(asked, "csp")
    assert any("Content Security Policy" in line for line in page.console())


def test_only_the_lines_in_sight_are_drawn_and_every_token_can_be_reached(browser, tmp_path):
    rollouts = make_rollouts([1200] + [4] * 200)
    browser.open(write_drift_view(rollouts, tmp_path / "drift.html", tokenizer=load_tokenizer()))
    assert 100 < len(browser.texts(".response .tok")) < 1000
    assert len(browser.texts("[data-rollout]")) < 40
    seen = set()
    height = browser.run("return document.getElementById('text').scrollHeight")
    for top in range(0, height, 500):
        browser.run("document.getElementById('text').scrollTop = arguments[0]", top)
        browser.wait("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
        seen |= set(
            browser.run("return [...document.querySelectorAll('.response .tok')].map((n) => Number(n.dataset.t))")
        )
    assert seen == set(range(1200))
    browser.press("\ue010")
    assert browser.focused == 1199


def test_a_file_that_was_cut_short_says_so(browser, file, tmp_path):
    whole = file.read_text()
    at = whole.index('id="track-0"')
    broken = Path(tmp_path / "broken.html")
    broken.write_text(whole[:at])
    browser.driver.get(broken.as_uri())
    browser.wait("document.querySelector('.failed')")
    assert "the file is cut short: it lacks track-0" in browser.texts(".failed")[0]


OBSERVE = """
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.longTasks.push(Math.round(entry.duration));
}).observe({ type: "longtask", buffered: true });
"""

SCROLL = """
const [step, done] = arguments;
const box = document.getElementById("text");
const frames = [];
let last = performance.now();
const frame = () => {
  const now = performance.now();
  frames.push(now - last);
  last = now;
  box.scrollTop += step;
  if (box.scrollTop < box.scrollHeight - box.clientHeight - 1) return requestAnimationFrame(frame);
  frames.sort((a, b) => a - b);
  setTimeout(() => done({ frames: frames.length, median: frames[frames.length >> 1], slowest: frames.at(-1) }), 300);
};
requestAnimationFrame(frame);
"""


def test_256_rollouts_of_4096_tokens(browser, tmp_path, capsys):
    """Times are printed, not asserted: opening, scrolling a rollout from end to end, going through rollouts, searching all."""
    rollouts = make_rollouts([4096] * 256, vocabulary=20_000, k=8)
    tokenizer = ListTokenizer([f" {'abcdefgh'[: 1 + index % 8]}{index % 100}" for index in range(20_000)])
    path = write_drift_view(rollouts, tmp_path / "drift.html", tokenizer=tokenizer)
    script = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": OBSERVE})
    browser.open(path)

    def long_tasks():
        return browser.run("const seen = window.longTasks; window.longTasks = []; return seen")

    figures = {
        "MB": round(path.stat().st_size / 1e6, 1),
        "text_ms": int(browser.run("return document.documentElement.dataset.readyMs")),
    }
    figures["loaded_ms"] = round(browser.wait("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    figures["opening_long_tasks_ms"] = long_tasks()
    for step in (120, 400):
        browser.run("document.getElementById('text').scrollTop = 0")
        figures[f"scroll_by_{step}"] = browser.driver.execute_async_script(SCROLL, step)
        figures[f"scroll_by_{step}_long_tasks_ms"] = long_tasks()
    browser.find("#name").click()
    for row in range(1, 12):
        browser.press("j")
        browser.wait(
            f"document.querySelector('#name').textContent === 'Rollout {row}' && document.querySelector('.candidates')"
        )
    figures["next_rollout_long_tasks_ms"] = long_tasks()
    browser.type("#query", "f77")
    browser.wait(
        "/^\\d+ of 256|^256 rollouts$/.test(document.getElementById('shown').textContent) && document.querySelector('.found')"
    )
    figures["search_long_tasks_ms"] = long_tasks()
    browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    with capsys.disabled():
        print(f"\nviewer, 256 x 4,096: {json.dumps(figures)}")
    assert figures["scroll_by_400"]["frames"] > 5
    assert browser.console() == []
