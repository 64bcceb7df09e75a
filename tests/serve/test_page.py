"""The page in a real browser, against the real server on the embedded models.

They want Chromium (`apt-get install chromium`, or its path in `IA3_CHROMIUM`) and playwright; run
them with `pytest -m browser`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

import playwright.sync_api as playwright
from support.contrast import AA, of_page
from support.paths import REPOSITORY
from support.served import Server, files_of, form

import ia3
from ia3.files.tables import read_csv_text

CHROMIUM = os.environ.get("IA3_CHROMIUM") or shutil.which("chromium")
HOW = "there is no Chromium: apt-get install chromium, or set IA3_CHROMIUM to its path"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason=HOW),
]

TICKETS = {
    "I was charged twice this month.": "billing",
    "The invoice has the wrong amount.": "billing",
    "Please refund my last payment.": "billing",
    "Where is my parcel?": "delivery",
    "The courier never came.": "delivery",
    "My package arrived a week late.": "delivery",
}
CSV = "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in TICKETS.items())
PARTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "ia3_task.json",
    "ia3_head.safetensors",
)
VIEWS = ("classify", "chat", "adapters", "learn")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each embedded model, one that is broken, and beside them one to upload."""
    folder = tmp_path_factory.mktemp("page")
    texts, labels = [*TICKETS], [*TICKETS.values()]
    sorted_ = ia3.FewShotClassifier("all-minilm-l6-v2", steps=4).fit(texts, labels)
    sorted_.save(folder / "served/tickets")
    sorted_.save(folder / "uploaded")
    fields = [{"title": text.split()[0], "body": text} for text in texts]
    ia3.FewShotClassifier("all-minilm-l6-v2", steps=2).fit(fields, labels).save(folder / "fields")
    written = ia3.FewShotClassifier("smollm2-135m-instruct", steps=1, upper_blocks=4)
    written.fit(texts, labels).save(folder / "served/by-words")
    (folder / "served/broken").mkdir()
    (folder / "served/broken/adapter_config.json").write_text("{")
    (folder / "served/broken/adapter_model.safetensors").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def server(adapters: Path) -> Iterator[Server]:
    with Server("--adapters", adapters / "served") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """A tab, with the page open. What its console says is an error of the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    context.set_default_timeout(60_000)
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(server.url)
    tab.get_by_role("checkbox", name="tickets").wait_for()
    yield tab
    context.close()
    # A refusal that a test provokes is in the console as well.
    assert [text for text in said if "Failed to load resource" not in text] == []


def view(page: Any, name: str) -> Any:
    page.get_by_role("link", name=name.capitalize(), exact=True).click()
    return page.get_by_role("region", name=name.capitalize())


def show_much(page: Any, name: str) -> None:
    """Go to a view, and have it show as much as it may."""
    inside = view(page, name)
    if name == "adapters":
        inside.locator("summary", has_text="by-words").click()
        inside.locator(".heat").wait_for()
    if name == "learn":
        inside.get_by_label("Paste a table").fill(CSV)


def test_a_text_is_classified_as_the_api_says(page: Any, server: Server) -> None:
    text = "Nobody has brought my order yet."
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("checkbox", name="tickets").check()
    page.get_by_role("button", name="Classify").click()
    result = page.locator(".result")
    result.wait_for()
    body = {"texts": [text], "adapter": "tickets"}
    [expected] = server.post("/v1/classify", body).body["results"]
    assert result.locator(".answer b").inner_text() == expected["label"]
    shown = {
        row.locator(".label").inner_text(): row.locator(".share b").inner_text()
        for row in result.locator(".bars li").all()
    }
    for each in expected["probabilities"]:
        assert float(shown[each["label"]].rstrip("%")) == pytest.approx(
            100 * each["probability"], abs=0.06
        )


def test_an_adapter_stands_beside_its_base_model(page: Any, server: Server) -> None:
    page.get_by_label("Text", exact=True).fill("Where is it?")
    page.get_by_role("button", name="Pick all").click()
    page.get_by_label("Beside the base model").first.check()
    page.get_by_role("button", name="Classify").click()
    page.locator(".result").nth(1).wait_for()
    assert page.locator(".result").count() == 2
    beside = page.locator(".result", has_text="by-words")
    assert beside.locator("i.tuned").count() == beside.locator("i.base").count() == 2
    assert "base model alone" in page.locator(".legend").inner_text()
    # A sentence encoder has no answer of its own.
    alone = page.locator(".result", has_text="all-minilm")
    assert alone.locator("i.base").count() == 0


def test_a_text_of_several_fields_has_a_place_for_each(
    page: Any, server: Server, adapters: Path
) -> None:
    body, headers = form(files_of(adapters / "fields"))
    assert server.ask("PUT", "/v1/adapters/fields", body, headers=headers).status == 200
    page.reload()
    page.get_by_role("checkbox", name="tickets").wait_for()
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("checkbox", name="fields").check()
    assert page.locator(".texts label").all_inner_texts() == ["title", "body"]
    page.get_by_role("checkbox", name="tickets").check()
    for name in ("title", "body", "Text"):
        page.get_by_label(name, exact=True).fill("Where is it?")
    page.get_by_role("button", name="Classify").click()
    page.locator(".result .answer").nth(1).wait_for()
    assert server.ask("DELETE", "/v1/adapters/fields").status == 204


def test_many_answers_are_a_line_each(page: Any, server: Server, adapters: Path) -> None:
    body, headers = form(files_of(adapters / "uploaded"))
    names = [f"more-{number}" for number in range(8)]
    for name in names:
        assert server.ask("PUT", f"/v1/adapters/{name}", body, headers=headers).status == 200
    page.reload()
    page.get_by_role("checkbox", name="more-7").wait_for()
    page.get_by_label("Text", exact=True).fill("Where is it?")
    page.get_by_role("button", name="Pick all").click()
    page.get_by_role("button", name="Classify").click()
    page.locator(".lines details").nth(9).wait_for()
    page.locator(".lines summary", has_text="more-7").click()
    assert page.locator(".lines details[open] .bars li").count() == 2
    for name in names:
        assert server.ask("DELETE", f"/v1/adapters/{name}").status == 204


def test_an_address_names_an_adapter(page: Any, server: Server) -> None:
    page.goto("about:blank")
    page.goto(f"{server.url}/#chat/by-words")
    page.locator(".pane h3", has_text="by-words").wait_for()
    assert page.locator(".pane").count() == 2
    page.goto("about:blank")
    page.goto(f"{server.url}/#classify/tickets")
    page.get_by_role("checkbox", name="tickets").and_(page.locator(":checked")).wait_for()
    assert page.locator(".picker :checked").count() == 1


def test_an_address_that_means_nothing_shows_a_view(page: Any, server: Server) -> None:
    for address, shown in (("toString", "classify"), ("chat/%E0%A4%A", "chat")):
        page.goto("about:blank")
        page.goto(f"{server.url}/#{address}")
        page.locator(f"#view-{shown}").wait_for()


def test_a_chat_is_streamed_from_adapter_and_base_side_by_side(page: Any) -> None:
    view(page, "chat")
    page.get_by_label("Model", exact=True).select_option("by-words")
    page.locator("#view-chat").get_by_label("Beside the base model").check()
    page.get_by_label("Most tokens").fill("24")
    page.get_by_label("Message").fill("Count from one to ten.")
    page.evaluate(
        """() => {
            window.lengths = [];
            new MutationObserver(() => window.lengths.push(
                document.querySelector(".pane .said")?.textContent.length ?? 0
            )).observe(document.querySelector(".panes"), {subtree: true, childList: true});
        }"""
    )
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="Send").wait_for()
    said = page.locator(".pane .said").all_inner_texts()
    assert len(said) == 2
    assert all(said)
    # The text grew as it was read.
    assert len({length for length in page.evaluate("lengths") if length}) > 2
    assert "24 tokens" in page.locator(".pane header").first.inner_text()


def test_an_adapter_is_uploaded_and_answers_and_is_deleted(
    page: Any, adapters: Path, server: Server
) -> None:
    inside = view(page, "adapters")
    assert "broken" in inside.locator(".warning").inner_text()
    files = [adapters / "uploaded" / part for part in PARTS]
    inside.locator("input[type=file]").set_input_files(files[1])
    assert "adapter_config.json\nis missing" in inside.locator(".chosen").inner_text()
    assert inside.get_by_role("button", name="Load", exact=True).is_disabled()
    inside.locator("input[type=file]").set_input_files(files)
    inside.get_by_label("Name").fill("second")
    inside.get_by_role("button", name="Load", exact=True).click()
    inside.get_by_role("link", name="Try it").click()
    page.get_by_label("Text", exact=True).fill("Where is it?")
    page.keyboard.press("Control+Enter")
    page.locator(".result h3", has_text="second").wait_for()
    view(page, "adapters")
    page.once("dialog", lambda dialog: dialog.accept())
    inside.locator("summary", has_text="second").click()
    inside.locator("details", has_text="second").get_by_role("button", name="Delete").click()
    inside.locator("summary", has_text="second").wait_for(state="detached")
    assert server.get("/v1/adapters/second").status == 404


def test_a_dropped_folder_is_an_upload(page: Any, adapters: Path) -> None:
    inside = view(page, "adapters")
    given = {part: (adapters / "uploaded" / part).read_bytes().hex() for part in PARTS[:3]}
    page.evaluate(
        """(given) => {
            const transfer = new DataTransfer();
            for (const [name, hex] of Object.entries(given)) {
                const bytes = Uint8Array.from(hex.match(/../g), (each) => parseInt(each, 16));
                transfer.items.add(new File([bytes], name));
            }
            const drop = new DragEvent("drop", {dataTransfer: transfer, bubbles: true});
            document.querySelector("#view-adapters .drop").dispatchEvent(drop);
        }""",
        given,
    )
    inside.locator(".chosen li").nth(2).wait_for()
    assert inside.get_by_role("button", name="Load", exact=True).is_enabled()


def test_a_heat_map_shows_each_vector(page: Any, adapters: Path) -> None:
    inside = view(page, "adapters")
    inside.locator("summary", has_text="by-words").click()
    inside.locator(".heat").wait_for()
    config = json.loads((adapters / "served/by-words/adapter_config.json").read_text())
    cells = inside.locator(".heat tbody td:not(.lacking)")
    sites = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert cells.count() == 4 * len(sites)
    cells.first.hover()
    assert re.search(r"layer 26: [+-]\d\.\d{3} octaves", inside.locator(".reading").inner_text())
    cells.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert ", layer 27: " in inside.locator(".reading").inner_text()
    assert page.evaluate("document.activeElement.parentElement.sectionRowIndex") == 1
    inside.get_by_label("Show").select_option(label="Spread")
    assert inside.locator(".heat caption").inner_text() == "Spread by site and layer"


def test_a_task_is_learned_from_a_pasted_table_and_tried(page: Any, server: Server) -> None:
    inside = view(page, "learn")
    inside.get_by_label("Paste a table").fill(CSV)
    assert "6 texts of 2 labels" in inside.locator(".preview").inner_text()
    inside.get_by_label("Name").fill("learned")
    inside.get_by_label("Base model").select_option("all-minilm-l6-v2")
    inside.get_by_role("button", name="Learn", exact=True).click()
    inside.locator(".curve .mean").wait_for()
    # A connection that breaks is made anew, and a training goes on while its page is loaded again.
    page.context.set_offline(True)
    page.wait_for_timeout(1500)
    page.context.set_offline(False)
    playwright.expect(inside.get_by_role("alert")).to_have_count(0)
    inside.get_by_label("Try learned").wait_for()
    page.reload()
    inside.get_by_label("Try learned").fill("The invoice is too high.")
    page.keyboard.press("Enter")
    inside.locator(".result .answer").wait_for()
    assert inside.locator(".result .answer b").inner_text() == "billing"
    stop = inside.get_by_role("button", name="Stop measuring")
    if stop.is_visible():
        stop.click()
    inside.get_by_role(
        "heading", name=re.compile("^Learned(, but not measured)? learned")
    ).wait_for()
    listed = server.get("/v1/adapters").body["adapters"]
    assert "learned" in [each["name"] for each in listed]
    assert server.ask("DELETE", "/v1/adapters/learned").status == 204


def test_what_is_wrong_is_said_where_it_was_asked(page: Any) -> None:
    inside = view(page, "learn")
    inside.get_by_label("Paste a table").fill("text,label\na,x\nb,x\n")
    inside.get_by_label("Name").fill("../escape")
    inside.get_by_role("button", name="Learn", exact=True).click()
    assert "escape" in inside.get_by_role("alert").inner_text()
    inside.get_by_label("Name").fill("one-label")
    inside.get_by_role("button", name="Learn", exact=True).click()
    inside.get_by_text("expected 2 to").wait_for()
    inside.get_by_label("Name").fill("tickets")
    inside.get_by_role("button", name="Learn", exact=True).click()
    inside.get_by_role("alert").get_by_text("tickets").wait_for()
    inside = view(page, "adapters")
    files = [{"name": each, "mimeType": "", "buffer": b"{"} for each in PARTS[:2]]
    inside.locator("input[type=file]").set_input_files(files)
    inside.get_by_label("Name").fill("bad")
    inside.get_by_role("button", name="Load", exact=True).click()
    inside.get_by_role("alert").get_by_text("adapter_config.json").wait_for()


def test_markup_in_texts_and_labels_stays_text(page: Any) -> None:
    inside = view(page, "learn")
    nasty = "<img src=x onerror=window.hit=1>"
    inside.get_by_label("Paste a table").fill(f"text,label\n{nasty},{nasty}\nb,y\n")
    assert nasty in inside.locator(".preview").inner_text()
    assert page.evaluate("window.hit") is None
    assert inside.locator("img").count() == 0


def test_only_the_pages_own_files_may_run(page: Any, server: Server) -> None:
    answer = server.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    again = server.ask("GET", "/page/page.js", headers={"If-None-Match": '"other"'})
    assert again.status == 200
    assert again.headers["content-type"].startswith("text/javascript")
    assert server.get("/page/page.py").status == 404
    assert server.get("/page/..%2fpage_files.py").status == 404
    # Everything that the browser has loaded is from here.
    loaded = page.evaluate("performance.getEntriesByType('resource').map((each) => each.name)")
    assert loaded
    assert all(each.startswith(server.url) for each in loaded)


def test_all_of_it_works_from_the_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.outerHTML.slice(0, 60)"))
        shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert shown != "none", reached[-1]
        if "textarea" in reached[-1]:
            break
    page.keyboard.type("Where is my parcel?")
    page.keyboard.press("Tab")  # the search
    page.keyboard.type("tickets")
    for _ in range(2):  # pick all, the box
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.get_by_role("checkbox", name="tickets").is_checked()
    assert page.evaluate("document.activeElement.value") == "tickets"
    page.keyboard.press("Control+Enter")
    page.locator(".result").nth(1).wait_for()


def test_every_control_has_a_name(page: Any) -> None:
    for name in VIEWS:
        view(page, name)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea, button, a, summary")]
                .filter((each) => each.checkVisibility() && !each.labels?.length
                    && !each.ariaLabel && !each.textContent.trim())
                .map((each) => each.outerHTML)"""
        )
        assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_either_scheme(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.get_by_label("Text", exact=True).fill("Where is it?")
    page.get_by_role("button", name="Pick all").click()
    page.get_by_role("button", name="Classify").click()
    page.locator(".result").nth(1).wait_for()
    pale = of_page(page)
    for name in VIEWS[1:]:
        show_much(page, name)
        pale += of_page(page)
    assert len(pale) > 100
    assert [each for each in pale if each[0] < AA] == []


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_a_phone(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.get_by_label("Text", exact=True).fill("Where is it? " + "w" * 300)
    page.get_by_role("button", name="Pick all").click()
    page.get_by_role("button", name="Classify").click()
    page.locator(".result").nth(1).wait_for()
    for name in VIEWS:
        show_much(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_the_load_is_shown_live(page: Any) -> None:
    figures = page.locator("#live b")
    playwright.expect(figures.first).to_have_text(re.compile(r"\d"))
    assert page.locator("#live dt").all_inner_texts() == [
        "running",
        "waiting",
        "tokens/s",
        "texts/s",
    ]


@pytest.mark.parametrize(
    "text",
    [
        CSV,
        '\ufefftext;label\r\n"a;b";x\r\n\r\nc;y',
        "text\tlabel\na, b\tx\n",
        'text,label\n"say ""so"", twice\nor more",x\n,y\n',
        "\n\ntext,label\na,b",
    ],
)
def test_a_table_is_previewed_as_the_server_reads_it(page: Any, text: str) -> None:
    read = page.evaluate("async (t) => (await import('/page/csv.js')).readCsv(t)", text)
    rows = read_csv_text(text, "it")
    assert read == [[*rows[0]], *[[*row.values()] for row in rows]]


def test_the_examples_are_those_of_the_demo(page: Any, server: Server) -> None:
    inside = view(page, "learn")
    inside.get_by_role("button", name="Use 32 support tickets").click()
    inside.locator(".preview").get_by_text("32 texts").wait_for()
    source = (REPOSITORY / "examples/support-tickets/train.csv").read_text("utf-8")
    given = inside.get_by_label("Paste a table").input_value()
    assert [*csv.reader(io.StringIO(given))] == [*csv.reader(io.StringIO(source))]


def test_a_key_is_asked_for_where_the_server_wants_one(
    browser: Any, adapters: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("good-key-of-a-client: '*'\n")
    base = ("--model", "all-minilm-l6-v2", "--no-train")
    with Server("--adapters", adapters / "served", "--keys", keys, *base) as server:
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(server.url)
        tab.get_by_label("API key").fill("wrong")
        tab.keyboard.press("Enter")
        tab.get_by_label("does not know this key").fill("good-key-of-a-client")
        tab.keyboard.press("Enter")
        tab.get_by_role("checkbox", name="tickets").wait_for(timeout=60_000)
        # No language model is served here.
        tab.get_by_role("link", name="Chat").click()
        tab.get_by_text("No language model is served.").wait_for()
        # Nothing is learned here either.
        tab.get_by_role("link", name="Learn", exact=True).wait_for(state="hidden")
        context.close()
