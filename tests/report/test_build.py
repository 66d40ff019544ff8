"""Reports: one file that needs nothing else, from whatever a folder holds."""

import contextlib
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from limbeck.core.errors import DataError
from limbeck.report import build

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects text, checks that every element is closed, and finds whatever a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [
            v for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data", "srcset") and v
        ]

    def handle_startendtag(self, tag, attributes) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if "style" not in self.open:
            self.words.append(data)


def page_of(path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert "@import" not in text
    assert "url(" not in text
    assert path.stat().st_size < 6_000_000
    return page


def write(folder, facts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(facts))
    return folder


def test_a_comparison_with_its_runs_shows_all_of_it(compared):
    path = build(compared)
    assert path == compared / "report.html"
    page = page_of(path)
    for words in (
        "mlp_8 learns from mlp_16",
        "KD",
        "cross entropy alone",
        "95% interval",
        "Validation accuracy",
        "Calibration",
        "Accuracy by class",
        "Which layers see the same",
        "penultimate",
        "limbeck compare digits",
        "batch_size: 32",
        "torch",
    ):
        assert words in page.text, words
    facts = json.loads((compared / "compare.json").read_text())
    for row in facts["methods"]:
        assert f"{100 * row['accuracy']['mean']:.1f}" in page.text


def test_a_run_shows_its_figures_beside_its_teachers(compared):
    run = compared / "runs" / "kd-seed0"
    page = page_of(build(run, run.parent / "other" / "page.html"))
    result = json.loads((run / "result.json").read_text())
    for value in (result["accuracy"], result["teacher"]["accuracy"], result["agreement"]):
        assert f"{100 * value:.1f} %" in page.text
    for words in ("Loss by term", "cross_entropy", "Learning rate", "weight_decay", "One run with one seed"):
        assert words in page.text, words


def test_a_comparison_alone_is_a_table(comparison, tmp_path):
    file = tmp_path / "digits.json"
    file.write_text(json.dumps(comparison))
    path = build(file)
    assert path == tmp_path / "digits.html"
    page = page_of(path)
    assert "KD gains 4.1 points" in page.text
    assert "within noise" in page.text
    assert "Calibration" not in page.text


def test_an_unfinished_run_and_comparison_say_so(compared, comparison, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "metrics.jsonl"):
        shutil.copy(compared / "runs" / "kd-seed0" / name, run)
    (run / "run.json").write_text(json.dumps({"status": "stopped"}))
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"split": "train", "st')  # cut by a crash
    page = page_of(build(run))
    assert "not finished (status: stopped)" in page.text
    assert "Loss by term" in page.text
    comparison["status"] = "running"
    assert "15 runs are in" in page_of(build(write(tmp_path / "c", comparison))).text


def test_one_seed_claims_nothing(tmp_path):
    from tests.report.facts import ACCURACY, facts_of

    page = page_of(build(write(tmp_path, facts_of({k: v[:1] for k, v in ACCURACY.items()}))))
    assert "One seed tells nothing" in page.text
    assert "▲" not in page.text


def test_what_stands_in_files_is_text_not_markup(comparison, compared, tmp_path):
    evil = "</pre><script>alert(1)</script><img src=http://x.example/a.png>"
    comparison["name"] = comparison["command"] = comparison["methods"][2]["name"] = evil
    comparison["environment"]["device"] = evil
    comparison["recipe"]["student"]["model"] = evil
    page = page_of(build(write(tmp_path / "c", comparison)))
    assert page.text.count("<script>alert(1)</script>") >= 5
    run = tmp_path / "run"
    shutil.copytree(compared / "runs" / "kd-seed0", run)
    (run / "recipe.yaml").write_text(f"student: {{model: '{evil}'}}\n")
    result = json.loads((run / "result.json").read_text())
    result["name"] = evil
    result["per_class"]["names"] = [evil] * 10
    result["cka"]["student"] = [evil] * len(result["cka"]["student"])
    (run / "result.json").write_text(json.dumps(result))
    page_of(build(run))


def test_runs_outside_the_comparison_are_not_read(comparison, compared, tmp_path):
    folder = write(tmp_path / "c", comparison)
    shutil.copytree(compared / "runs" / "kd-seed0", tmp_path / "elsewhere")
    for run in comparison["methods"][2]["runs"]:
        run["folder"] = "../elsewhere"
    write(folder, comparison)
    assert "Calibration" not in page_of(build(folder)).text


def test_a_report_is_replaced_at_once(compared, monkeypatch):
    path = build(compared)
    before = path.read_text()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build(compared)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("compare.json", "{", "damaged"),
        ("compare.json", "[1]", "damaged.*wanted a mapping"),
        ("compare.json", "{}", "no comparison"),
        ("result.json", '{"accuracy": ', "damaged"),
        ("other.txt", "", "no run and no comparison"),
    ],
)
def test_what_is_no_run_is_one_readable_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        build(tmp_path)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    "key", ["methods", "seeds", "data", "recipe", "environment", "command", "teacher", "best_control"]
)
@pytest.mark.parametrize("value", ["gone", None, 7, "text", [1], {"a": 1}])
def test_a_comparison_that_was_tampered_with_is_a_report_or_one_readable_error(comparison, tmp_path, key, value):
    if value == "gone":
        del comparison[key]
    else:
        comparison[key] = value
    with contextlib.suppress(DataError):
        build(write(tmp_path, comparison))


def test_a_path_that_is_not_there_is_one_readable_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        build(tmp_path / "nowhere")


def in_browser(tmp_path, page: str) -> tuple[str, str]:
    """What the browser made of a page, and what it said."""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=4000 --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to open reports with")
def test_a_browser_has_nothing_to_complain_of_and_nothing_runs_off_a_phone(compared, tmp_path):
    pages = {
        name: build(p).read_text(encoding="utf-8") for name, p in (("c", compared), ("r", compared / "runs/kd-seed0"))
    }
    dom, said = in_browser(tmp_path, pages["c"])
    assert "Methods and controls" in dom
    assert "CONSOLE" not in said
    frames = "".join(
        f'<iframe id="{name}{width}" width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in (390, 1280)
    )
    measure = (
        "<pre id=out></pre><script>onload = () => { out.textContent = [...document.querySelectorAll('iframe')].map("
        "f => f.id + '=' + (f.contentDocument.documentElement.scrollWidth - f.width)).join(' ') }</script>"
    )
    dom, _ = in_browser(tmp_path, f"<!doctype html>{frames}{measure}")
    found = dict(pair.split("=") for pair in re.search(r'id="out">(.*?)<', dom)[1].split())
    assert set(found) == {"c390", "c1280", "r390", "r1280"}
    assert all(int(over) <= 0 for over in found.values()), found
