"""Rollouts, tokenizers and a real browser for the tests of the drift viewer."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from prune_opd_hf.algorithm.drift import DriftConfig, ScoredPositions, find_drift_events, reliability
from prune_opd_hf.algorithm.overlap import topk_overlap
from prune_opd_hf.records.rollouts import Rollouts

REQUIRE_BROWSER = "PRUNE_OPD_REQUIRE_BROWSER"
"""Set where a missing browser must fail the tests instead of skipping them, as `.ci/run` does."""

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1440,980"
).split()


def make_rollouts(lengths, *, vocabulary=64, k=4, recorded=None, prompt=3, metric="overlap", student=True, seed=0):
    """A record with random candidates, where the teacher's differ from the student's more and more along each row."""
    random = torch.Generator().manual_seed(seed)
    config = DriftConfig(metric, top_k=k, threshold=0.6, weight_drop=0.25)
    shape = (len(lengths), max(lengths), recorded or k)
    mask = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(-1)
    # Distinct ids at each position: places on a circle, a random step apart.
    first = torch.randint(0, vocabulary, shape[:2], generator=random).unsqueeze(-1)
    student_ids = (first + torch.arange(shape[2])) % vocabulary
    stays = torch.rand(shape, generator=random) > torch.linspace(0.1, 0.9, shape[1]).unsqueeze(-1)
    teacher_ids = torch.where(stays, student_ids, (student_ids + vocabulary // 2) % vocabulary)
    teacher_ids = teacher_ids.gather(-1, torch.rand(shape, generator=random).argsort(-1))

    def log_probs():
        values = torch.log_softmax(6 * torch.rand(*shape[:2], shape[2] + 1, generator=random), -1)
        return values[..., :-1].sort(-1, descending=True).values

    log_p, log_q = log_probs(), log_probs()
    same = student_ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)
    log_q_on_student = torch.where(same.any(-1), (same * log_q.unsqueeze(-2)).sum(-1), log_q[..., -1:] - 1)
    record = {
        "teacher_topk_ids": teacher_ids,
        "teacher_topk_log_probs": log_q,
        "student_topk_ids": student_ids,
        "student_topk_log_probs": log_p,
        "teacher_log_probs": log_q_on_student,
    }
    tokens = student_ids[..., 0]
    events = find_drift_events(
        config, mask, ScoredPositions(tokens, **record, teacher_token_log_probs=log_q_on_student[..., 0])
    )
    record = {name: tensor * mask.unsqueeze(-1) for name, tensor in record.items()}
    if student:
        record["token_log_probs"] = log_p[..., 0] * mask
        record["overlap"] = topk_overlap(student_ids[..., :k], teacher_ids[..., :k]) * mask
    else:
        record = {name: record[name] for name in ("teacher_topk_ids", "teacher_topk_log_probs")}
    rows = range(len(lengths))
    return Rollouts(
        prompt_ids=torch.randint(0, vocabulary, (len(lengths), prompt), generator=random),
        prompt_mask=torch.arange(prompt) >= torch.tensor([row % prompt for row in rows]).unsqueeze(-1),
        response_ids=tokens * mask,
        response_mask=mask,
        teacher_token_log_probs=log_q_on_student[..., 0] * mask,
        drift_events=events,
        reliability=reliability(events, mask, config.weight_drop),
        stop_reason=tuple(("drift", "eos", "length")[row % 3] for row in rows),
        config=config,
        **record,
    )


class ListTokenizer:
    """A tokenizer of fixed texts, which may be any Python string: also those that no tokenizer file can hold."""

    def __init__(self, texts, special=()):
        self.texts = list(texts)
        self.all_special_ids = list(special)

    def __len__(self):
        return len(self.texts)

    def get_vocab(self):
        return {f"{index}": index for index in range(len(self.texts))}

    def convert_ids_to_tokens(self, ids):
        return [f"{index}" for index in ids]

    def decode(self, ids, **_):
        return "".join(self.texts[index] for index in ids)

    def batch_decode(self, sequences, **_):
        return [self.decode(ids) for ids in sequences]


@contextmanager
def open_browser(folder) -> Iterator["Browser"]:
    """Headless Chromium with an empty profile in `folder`."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        message = "Chromium is missing: the drift viewer was not tried in a browser (apt-get install chromium chromium-driver)"
        if os.environ.get(REQUIRE_BROWSER):
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={folder}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")  # a dialog must stay, to be found
    instance = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(instance)
    finally:
        instance.quit()


class Browser:
    """What the tests do with a page."""

    def __init__(self, driver):
        self.driver = driver
        self.run = driver.execute_script
        driver.set_script_timeout(120)

    def open(self, path, fragment="", dark=False):
        """Open a file and wait until its first rollout is there."""
        media = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get("about:blank")  # else another fragment of the same file would not load it again
        self.requests(), self.console()  # forget those before
        self.driver.get(path.as_uri() + fragment)
        self.wait("document.documentElement.dataset.readyMs")

    def wait(self, condition, seconds=20):
        """Until a JavaScript expression is true; its value."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.run(f"return {condition}")
            if value:
                return value
            assert time.monotonic() < deadline, f"never true: {condition}; the console says {self.console()}"
            time.sleep(0.02)

    def press(self, *keys):
        """Real key presses, to whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def find(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def type(self, selector, text):
        box = self.find(selector)
        box.clear()
        box.send_keys(text)

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map((n) => n.textContent)", selector)

    @property
    def focused(self):
        """The token that has the focus."""
        return int(self.run("return document.querySelector('.tok.focused').dataset.t"))

    @property
    def order(self):
        """Rollouts in the list, as far as they are drawn, in their order."""
        nodes = "[...document.querySelectorAll('[data-rollout]')]"
        place = "(n) => Number(n.getAttribute('aria-posinset'))"
        return self.run(
            f"const at = {place}; return {nodes}.sort((a, b) => at(a) - at(b)).map((n) => Number(n.dataset.rollout))"
        )

    def candidates(self):
        """Rows of the table: what the student gives, the candidate, what the teacher gives."""
        self.wait("document.querySelector('.candidates')")
        return self.run(
            "return [...document.querySelectorAll('.candidates tbody tr')].map((row) => "
            "[...row.children].map((cell) => cell.textContent))"
        )

    def console(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Addresses asked for since the last call, each with what stopped it: None for what went out."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        stopped = {
            message["params"]["requestId"]: message["params"].get("blockedReason")
            for message in messages
            if message["method"] == "Network.loadingFailed"
        }
        return [
            (message["params"]["request"]["url"], stopped.get(message["params"]["requestId"]))
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
            and not message["params"]["request"]["url"].startswith("chrome:")  # the browser's own first tab
        ]
