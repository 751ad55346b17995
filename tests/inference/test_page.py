"""The page in a real Chromium (Debian's `chromium`), driven by playwright."""

import base64
import shutil
import time

import pytest
from tiny_vlm import TOKENS_PER_IMAGE, draw_png

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
PHONE = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(server, browser, request):
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1000, "height": 800}}))
    page, wrong = context.new_page(), []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda message: wrong.append(message.text) if message.type == "error" and "400" not in message.text else None,
    )
    page.goto(f"http://127.0.0.1:{server.port}/")
    wait_until(page, "document.getElementById('model').textContent.includes('tiny')")
    yield page
    context.close()
    assert wrong == [], "nothing fails in the console"


def wait_until(page, expression: str) -> None:
    """Polls from outside: the page's own policy allows no evaluation inside it."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(30)


def picture(seed: int) -> dict:
    return {"name": f"picture-{seed}.png", "mimeType": "image/png", "buffer": draw_png(seed)}


def wait_for_answer(page, count: int = 1) -> None:
    wait_until(page, f"document.querySelectorAll('.turn.assistant:not(.running)').length === {count}")


# A DataTransfer with a PNG, as a file manager or the clipboard gives it.
TRANSFER = """(data) => { const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer(); transfer.items.add(new File([bytes], "given.png", {type: "image/png"}));
  return transfer; }"""


def test_images_are_chosen_dropped_and_pasted_and_an_answer_streams_with_its_cost(page):
    page.set_input_files("#files", [picture(1)])
    transfer = page.evaluate_handle(TRANSFER, base64.b64encode(draw_png(2)).decode())
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    assert page.is_visible("#drop")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    page.evaluate(
        f"(data) => document.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: ({TRANSFER})(data)}}))",
        base64.b64encode(draw_png(3)).decode(),
    )
    wait_until(page, "document.querySelectorAll('#waiting img').length === 3")
    assert page.is_hidden("#drop")
    page.set_input_files("#files", [picture(4)])
    assert "At most 3 images" in page.inner_text("#notice")
    page.click("#waiting li:first-child button")
    assert page.locator("#waiting img").count() == 2
    page.evaluate("document.getElementById('max').value = 9")
    page.fill("#text", "which digit")
    page.press("#text", "Enter")
    wait_for_answer(page)
    assert page.locator(".user .pictures img").count() == 2 and page.locator("#waiting img").count() == 0
    cost = page.inner_text(".tools .cost")
    assert f"{2 * TOKENS_PER_IMAGE} image tokens" in cost and "tokens/s" in cost and "first token" in cost
    page.fill("#text", "and then")
    page.click("#send")
    wait_for_answer(page, 2)
    assert "reused" in page.locator(".tools .cost").last.inner_text()


def test_a_long_chat_goes_on_without_its_oldest_images_and_says_so(page):
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.evaluate("document.getElementById('max').value = 3")
    for number, seeds in enumerate(((1, 2), (3, 4), ()), start=1):
        page.set_input_files("#files", [picture(seed) for seed in seeds])
        page.fill("#text", "digit")
        page.click("#send")
        wait_for_answer(page, number)
        dropped = [image.get_attribute("class") == "dropped" for image in page.locator(".pictures img").all()]
        if number == 1:
            assert dropped == [False, False] and page.inner_text("#notice") == ""
        else:
            assert dropped == [True, False, False, False]
            assert "the last 3 images of a chat; 1 older is left out" in page.inner_text("#notice")
            assert "no longer shown" in page.locator(".pictures img").first.get_attribute("alt")
    assert page.locator(".wrong").count() == 0
    urls = [
        base64.b64decode(part["image_url"]["url"].split(",")[1])
        for message in sent[-1]["messages"]
        if message["role"] == "user"
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    assert urls == [draw_png(seed) for seed in (2, 3, 4)]
    page.locator(".look").last.click()
    page.wait_for_selector(".regions canvas")
    names = [canvas.get_attribute("aria-label") for canvas in page.locator(".regions canvas").all()]
    assert [name.split(":")[0] for name in names] == ["Image 2", "Image 3", "Image 4"]
    page.keyboard.press("Alt+N")
    assert page.inner_text("#notice") == ""


def test_an_answer_is_stopped_retried_and_forgotten_by_keyboard_alone(page):
    page.keyboard.press("Tab")  # the message has the focus from the start
    page.locator("#text").focus()
    page.keyboard.type("which digit")
    page.evaluate("document.getElementById('max').value = 150")
    page.keyboard.press("Enter")
    wait_until(page, "(document.querySelector('.turn.assistant .bubble') || {}).textContent")
    page.keyboard.press("Escape")
    wait_for_answer(page)
    assert "stopped" in page.inner_text(".turn.assistant") and page.is_visible("#send")
    page.evaluate("document.getElementById('max').value = 5")
    page.keyboard.press("Alt+R")
    page.wait_for_selector(".tools .cost")
    assert page.locator(".turn.assistant").count() == 1 and "5 tokens" in page.inner_text(".tools .cost")
    page.keyboard.press("Alt+N")
    assert page.locator(".turn").count() == 0 and page.is_visible("#hint")


def test_whoever_goes_from_button_to_button_by_keyboard_keeps_a_place_on_the_page(page):
    focused = lambda: page.evaluate("document.activeElement.id || document.activeElement.className")
    page.fill("#text", "which digit")
    page.evaluate("document.getElementById('max').value = 150")
    page.focus("#send")
    page.keyboard.press("Enter")
    wait_until(page, "(document.querySelector('.turn.assistant .bubble') || {}).textContent")
    assert focused() == "stop"
    page.keyboard.press("Space")
    wait_for_answer(page)
    assert "stopped" in page.inner_text(".turn.assistant") and focused() == "send"
    page.evaluate("document.getElementById('max').value = 5")
    page.set_input_files("#files", [picture(1)])
    page.fill("#text", "which digit")
    page.keyboard.press("Enter")
    wait_for_answer(page, 2)
    assert focused() == "text"
    page.focus(".look")
    page.keyboard.press("Enter")
    page.wait_for_selector(".regions canvas")
    assert focused() == "look"
    page.focus(".retry")
    page.keyboard.press("Enter")
    page.wait_for_selector(".retry")
    assert focused() == "send"


def test_the_system_prompt_and_the_temperature_reach_the_server(page):
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.click("#settings summary")
    page.fill("#system", "the word")
    page.fill("#temperature", "0.5")
    page.fill("#max", "3")
    page.keyboard.press("Escape")
    assert page.is_hidden(".panel")
    page.fill("#text", "digit")
    page.click("#send")
    wait_for_answer(page)
    assert sent[0]["messages"] == [
        {"role": "system", "content": "the word"},
        {"role": "user", "content": [{"type": "text", "text": "digit"}]},
    ]
    assert sent[0]["temperature"] == 0.5 and sent[0]["max_tokens"] == 3


def test_the_regions_an_answer_looked_at_are_shown_token_by_token(page):
    page.set_input_files("#files", [picture(1), picture(2)])
    page.fill("#text", "which digit")
    page.click("#send")
    wait_for_answer(page)
    page.click(".look")
    page.wait_for_selector(".regions canvas")
    assert page.locator(".regions canvas").count() == 2
    pixels = "document.querySelector('.regions canvas').toDataURL()"
    wait_until(page, "document.querySelector('.regions figcaption').textContent.includes('looked')")
    before = page.evaluate(pixels)
    page.locator(".regions input").first.focus()
    page.keyboard.press("ArrowRight")
    assert f"visual token 1 of {TOKENS_PER_IMAGE}" in page.inner_text(".regions figcaption >> nth=0")
    assert page.evaluate(pixels) != before


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_on_a_phone_nothing_leaves_the_screen_and_fingers_hit(page):
    page.set_input_files("#files", [picture(1)])
    page.fill("#text", "a question that is rather long for so narrow a screen as this one")
    page.tap("#send")
    wait_for_answer(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for control in ("#send", "#choose", "#clear", "#settings summary"):
        box = page.locator(control).bounding_box()
        assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 360, control


def test_what_the_server_refuses_is_said_and_the_page_goes_on(page):
    page.fill("#text", "digit " * 400)
    page.click("#send")
    wait_for_answer(page)
    assert "this server reads" in page.inner_text(".wrong")
    page.fill("#text", "digit")
    page.click("#send")
    wait_for_answer(page, 2)
    assert page.locator(".wrong").count() == 1


def test_the_images_of_a_question_without_an_answer_wait_for_the_next_one(page):
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.set_input_files("#files", [picture(1), picture(2)])
    page.fill("#text", "digit " * 400)
    page.click("#send")
    wait_for_answer(page)
    assert page.locator(".wrong").count() == 1 and page.locator("#waiting img").count() == 2
    page.click(".retry")  # the same question has them already
    wait_until(
        page, "document.querySelectorAll('.wrong').length === 1 && document.querySelector('.turn.running') === null"
    )
    assert page.locator("#waiting img").count() == 2
    page.click("#waiting li:first-child button")
    page.fill("#text", "which digit")
    page.click("#send")
    wait_for_answer(page, 2)
    asked = [[part["type"] for part in request["messages"][-1]["content"]] for request in sent]
    assert asked == [["image_url", "image_url", "text"]] * 2 + [["image_url", "text"]]
    assert (
        sent[-1]["messages"][0]["content"][0] == sent[0]["messages"][0]["content"][1] and len(sent[-1]["messages"]) == 1
    )
    assert page.locator("#waiting img").count() == 0
