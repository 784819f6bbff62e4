"""The page of token links: what it stores, and that it works in a browser without a network."""

import base64
import json
import re
import zlib

import pytest
import torch

from browser import CHROMIUM, Browser
from fastattn import viz
from fastattn.viz.packing import pack

MIB = 2**20
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def probabilities(*shape, sharpness=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(sharpness).softmax(-1)


def unpack(packed):
    """The stored weights as a dense tensor, read as the page reads them."""
    layers, heads, rows, keys = packed.shape
    stream = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(packed.data))), dtype=torch.uint8).long()
    count = layers * heads * rows
    low, high, rest = stream.split([count, count, len(stream) - 2 * count])
    counts = low + 256 * high
    low, high, codes = rest.chunk(3)
    dense = torch.zeros(count, keys)
    for row, (gaps, values) in enumerate(
        zip((low + 256 * high).split(counts.tolist()), codes.split(counts.tolist()), strict=True)
    ):
        dense[row, gaps.cumsum(0)] = (values / 255.0) ** 2
    return dense.view(packed.shape)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 3, 400)])
def test_all_weights_are_stored_where_they_fit(shape):
    weights = probabilities(*shape)
    packed = pack(weights, MIB)
    assert packed.kept == shape[-1] and packed.shape == shape
    found = unpack(packed)
    assert (found - weights).abs().max() <= packed.error + 1e-6 < 0.0041
    # The error is half a step of the square root: small weights are stored finely.
    assert (found.sqrt() - weights.sqrt()).abs().max() <= 0.5 / 255 + 1e-6


def test_the_largest_weights_of_each_row_are_stored_where_all_do_not_fit():
    weights = probabilities(3, 2, 60, 60)
    limit = 12_000
    packed = pack(iter(weights), limit)
    assert 0.8 * limit < len(packed.data) <= limit and 1 <= packed.kept < 60
    found, (top, _) = unpack(packed), weights.topk(packed.kept, dim=-1)
    assert ((found > 0).sum(-1) <= packed.kept).all()
    torch.testing.assert_close(found.sort(dim=-1, descending=True).values[..., : packed.kept], top, rtol=0, atol=0.0041)


def test_zeros_of_a_mask_are_not_stored():
    weights = probabilities(1, 1, 300, 300).tril()
    found = unpack(pack(weights, MIB))
    assert (found[weights < 1e-6] == 0).all() and (found - weights).abs().max() < 0.0041


@pytest.mark.parametrize(
    "call, error",
    [
        (
            lambda: viz.links(torch.ones(2, 2), ["a", "b"]),
            r"weights has shape \(2, 2\); it must be \[layers, heads, rows",
        ),
        (lambda: viz.links([], []), "weights has no layers"),
        (lambda: viz.links([probabilities(1, 2, 2), probabilities(1, 3, 3)], ["a", "b"]), "layers must be alike"),
        (lambda: viz.links(probabilities(1, 1, 2, 2), ["a"]), r"rows has 1 labels, but weights.shape\[-2\] has 2"),
        (lambda: viz.links(probabilities(1, 1, 2, 3), ["a", "b"]), "keys .None: the rows. has 2 labels"),
        (lambda: viz.links(probabilities(9, 9, 99, 99), ["a"] * 99, limit=20_000), "a single weight a row takes"),
        (lambda: viz.links(probabilities(1, 1, 1, 1), ["a"], title=3), "title=3 must be a string"),
        (lambda: viz.links(probabilities(1, 1, 1, 1), ["a"], limit=0), "limit=0 must be >= 1"),
    ],
)
def test_links_refuses(call, error):
    with pytest.raises((TypeError, ValueError), match=error):
        call()


def test_page_is_one_file_within_its_limit():
    page = viz.links(probabilities(2, 2, 30, 30), ["</script>", "{{weights}}", *map(str, range(28))], limit=30_000)
    assert len(page.encode()) <= 30_000
    assert re.findall(r"\b(?:src|href)=|@import|url\(", page) == [] and "http://" not in page.replace(
        "http://www.w3.org/2000/svg", ""
    )
    about = json.loads(re.search(r'<script type="application/json" id="about">(.*?)</script>', page).group(1))
    assert about["rows"][:2] == ["</script>", "{{weights}}"] and about["shape"] == [2, 2, 30, 30]


# --- in Chromium -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def opened(browser, tmp_path):
    """A function that makes a page of the weights, opens it, and returns the browser."""
    browser.requests.clear()

    def open_page(*args, **kwargs):
        path = tmp_path / "page.html"
        path.write_text(viz.links(*args, **kwargs), encoding="utf-8")
        browser.open(path)
        return browser

    yield open_page
    assert browser.requests == [(tmp_path / "page.html").as_uri()]  # and nothing else was asked for
    assert browser.problems == []


def listed(browser):
    """{token: weight} of the list beside the text."""
    return dict(browser.run("[...document.querySelectorAll('li')].map((e) => [+e.dataset.token, +e.dataset.weight])"))


def shades(browser):
    """How dark each token's background is, 0 ... 1."""
    colours = browser.run(
        "[...document.querySelectorAll('.tokens span')].map((e) => getComputedStyle(e).backgroundColor)"
    )
    return [float(re.findall(r"[\d.]+", colour)[3]) if "rgba" in colour else 1.0 for colour in colours]


def is_list_of(browser, weights):
    """The ten largest, by the weights: two that nearly tie may change places when rounded."""
    found = listed(browser)
    tokens, values = list(found), torch.tensor(list(found.values()))
    torch.testing.assert_close(values, weights[tokens], rtol=0, atol=0.005)
    torch.testing.assert_close(values, weights.topk(min(10, len(weights))).values, rtol=0, atol=0.005)


WORDS = "The animal was too tired to cross it".split()


@in_browser
def test_hover_shows_what_a_token_attends_to(opened):
    weights = probabilities(3, 4, 8, 8)
    browser = opened(weights, WORDS, title="Eight <b>words</b>")
    assert browser.run("document.title") == "Eight <b>words</b>"
    assert browser.run("[...document.querySelectorAll('.tokens span')].map((e) => e.textContent)") == WORDS
    assert listed(browser) == {}
    for token in (7, 2):
        browser.point(".tokens span", token)
        row = weights.mean((0, 1))[token]
        is_list_of(browser, row)
        torch.testing.assert_close(torch.tensor(shades(browser)), 0.75 * row / row.max(), rtol=0, atol=0.02)
        assert browser.run("document.querySelectorAll('.current').length") == 1
        assert browser.run("document.querySelectorAll('#text path').length") == 7  # all but the token itself


@in_browser
def test_layers_and_heads_are_chosen(opened):
    weights = probabilities(3, 4, 8, 8)
    browser = opened(weights, WORDS)
    browser.point(".tokens span", 4)
    browser.point("#layers button", 2, click=True)  # the first button is "all"
    is_list_of(browser, weights[1].mean(0)[4])
    browser.point("#heads button", 4, click=True)
    is_list_of(browser, weights[1, 3, 4])
    browser.point("#heads button", 1, click=True, modifiers=2)
    is_list_of(browser, weights[1][[0, 3], 4].mean(0))
    browser.point("#heads button", 1, click=True, modifiers=2)  # away again
    browser.point("#heads button", 4, click=True, modifiers=2)  # the last one stays
    is_list_of(browser, weights[1, 3, 4])
    pressed = "[...document.querySelectorAll('button[aria-pressed=true]')].map((e) => e.textContent)"
    assert browser.run(pressed) == ["1", "3", "attends to"]
    browser.point("#layers button", 0, click=True)
    is_list_of(browser, weights[:, 3, 4].mean(0))
    browser.point("#direction button", 1, click=True)
    is_list_of(browser, weights[:, 3, :, 4].mean(0))


@in_browser
def test_a_click_holds_a_token(opened):
    weights = probabilities(1, 1, 8, 8)
    browser = opened(weights, WORDS)
    browser.point(".tokens span", 3, click=True)
    browser.point(".tokens span", 5)
    is_list_of(browser, weights[0, 0, 3])
    browser.point(".tokens span", 3, click=True)
    browser.point(".tokens span", 5)
    is_list_of(browser, weights[0, 0, 5])


@in_browser
def test_queries_and_keys_may_be_other_tokens(opened):
    weights = probabilities(2, 1, 3, 30)
    browser = opened(weights, ["ein", "Hund", "\n"], [f"frame{i}" for i in range(30)])
    browser.point(".tokens span", 2)
    is_list_of(browser, weights[:, 0, 2].mean(0))
    browser.point(".tokens span", 3 + 17)  # a key: who attends to it
    is_list_of(browser, weights[:, 0, :, 17].mean(0))
    assert browser.run("document.querySelectorAll('.tokens span')[2].textContent") == "⏎"


@in_browser
@pytest.mark.parametrize("tokens", [8, 512])
def test_page_is_readable(tokens, opened):
    """Each token stands whole on one line within the text, none over another, in letters of 15 pixels or more."""
    weights = probabilities(2, 2, tokens, tokens)
    browser = opened(weights, [WORDS[i % 8] for i in range(tokens)], limit=2 * MIB)
    boxes = browser.run(
        "[...document.querySelectorAll('.tokens span')].map((e) => { const r = e.getBoundingClientRect(); return ["
        "r.left, r.top, r.right, r.bottom, e.getClientRects().length, parseFloat(getComputedStyle(e).fontSize)] })"
    )
    left, top, right, bottom, lines, size = torch.tensor(boxes).T
    assert (lines == 1).all() and (size >= 15).all() and (right <= 900).all() and (left >= 0).all()
    same_line = (top[:-1] - top[1:]).abs() < 1
    assert (same_line | (top[1:] >= bottom[:-1])).all() and (left[1:] >= right[:-1])[same_line].all()
    browser.point(".tokens span", tokens - 1)
    is_list_of(browser, weights.mean((0, 1))[-1])
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


@in_browser
@pytest.mark.slow
def test_page_of_512_tokens_12_layers_12_heads_is_below_8_mib(opened):
    """Of weights as spread as a trained model's, and of such as compress worst: about even over all keys."""
    for sharpness in (3.0, 0.3):
        weights = probabilities(12, 12, 512, 512, sharpness=sharpness)
        browser = opened(weights, [WORDS[i % 8] for i in range(512)])
        assert browser.run("new Blob([document.documentElement.outerHTML]).size") < 8.2 * MIB
        browser.point(".tokens span", 100)
        total = browser.run("+document.querySelector('#what').textContent.match(/([0-9.]+) % of its weight/)[1]")
        assert total > 15.0
        browser.requests.pop()
    browser.requests.append(browser.run("location.href"))
