"""Untrusted words in Markdown: they read as they are and do nothing else, as a CommonMark parser sees it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from prune_opd_hf.hub.markdown import Markdown, clean_line, code, fence, link, table, text

parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = [
    "a\n# b",
    "---\nlicense: mit\n---",
    "[x](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "*b* _i_ ~~s~~ `c` **b**",
    "| a | b |\n| --- | --- |",
    "1. one",
    "- item",
    "+ item",
    "> quote",
    "```\ncode\n```",
    "\\",
    "\\*a\\*",
    "&lt;b&gt; &amp;",
    "🙂 👩‍👩‍👧 emoji",
    "\u202egnp.exe",
    "{{ 7 * 7 }} {% raw %}",
    "$x$ $$y$$",
    "http://evil.example www.evil.example me@evil.example",
    "\x1b[31mred\x00",
    "    indented code",
    "[ref]: http://evil",
    "=====",
    "\ud800",
]
lines = st.one_of(
    st.sampled_from(HOSTILE), st.text(max_size=40), st.text(alphabet="\\`*_[]()<>#+-=|~&$!{}:/. \n19a", max_size=20)
)


def leaves(tokens: list[Token]) -> list[Token]:
    return [leaf for token in tokens for leaf in (leaves(token.children) if token.children else [token])]


def plain(markdown: str) -> tuple[set[str], str]:
    """The kinds of blocks and spans that a parser sees, and the words in them."""
    tokens = parser.parse(markdown)
    kinds = {token.type for token in tokens if token.type not in {"paragraph_open", "paragraph_close", "inline"}}
    spans = [token for token in leaves(tokens) if token.type in {"text", "text_special", "code_inline", "softbreak"}]
    others = {token.type for token in leaves(tokens)} - {
        "text",
        "text_special",
        "code_inline",
        "paragraph_open",
        "paragraph_close",
        "inline",
    }
    return kinds | others, "".join(token.content for token in spans)


@settings(max_examples=300)
@given(lines)
def test_plain_words_stay_plain_words(value):
    kinds, words = plain(text(value))
    assert kinds == set()
    assert words == clean_line(value)


@settings(max_examples=300)
@given(lines)
def test_plain_words_stay_in_their_sentence(value):
    kinds, words = plain(f"before {text(value)} after")
    assert kinds == set()
    assert words.split() == f"before {clean_line(value)} after".split()


@settings(max_examples=300)
@given(lines)
@example("a`b``c")
@example("a|`b")
def test_a_code_span_holds_the_words_and_nothing_but_them(value):
    shown = str(code(value))
    kinds, words = plain(f"x {shown} y")
    assert kinds <= {"html_inline"}  # the tags of <code>, where a table needs them
    if "html_inline" in kinds:
        assert shown.startswith("<code>")
        assert shown.endswith("</code>")
        assert "<" not in shown.removeprefix("<code>").removesuffix("</code>")
    assert " ".join(words.split()) == " ".join(f"x {clean_line(value)} y".split())


@settings(max_examples=200)
@given(lines, lines)
def test_a_cell_cannot_leave_its_cell(first, second):
    tokens = parser.parse(table(["a", "b"], [[first, code(second)], ["x", "y"]]))
    assert [token.type for token in tokens].count("td_open") == 4
    assert [token.type for token in tokens].count("table_open") == 1
    assert tokens[-1].type == "table_close"


@settings(max_examples=200)
@given(st.text(alphabet="`~ab\n ", max_size=60))
def test_nothing_inside_a_fence_closes_it(value):
    tokens = parser.parse(f"{fence(value, 'python')}\n\nafter")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content.rstrip() == value.replace("\r", "\n").rstrip()


@settings(max_examples=200)
@given(lines)
def test_one_line_has_no_line_breaks_and_no_reordering(value):
    line = clean_line(value)
    assert len(line.splitlines()) <= 1
    assert not any(mark in line for mark in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\x00\x1b")
    line.encode("utf-8")


def test_joined_emoji_survive():
    assert clean_line("👩‍👩‍👧") == "👩‍👩‍👧"


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "data:text/html,x", "ftp://x", 'https://a"b', "https://a>b", "file:///etc"]
)
def test_only_web_addresses_become_links(url):
    kinds, _ = plain(str(link("label", url)))
    assert kinds == set()


def test_a_web_address_becomes_a_link():
    tokens = leaves(parser.parse(link("a [b]", "https://example.org/x(y) z")))
    assert [token.attrs["href"] for token in tokens if token.type == "link_open"] == ["https://example.org/x(y)%20z"]


def test_markdown_is_left_as_it_is():
    assert code(Markdown("*a*")) == "`*a*`"
    assert table([Markdown("**a**")], []) == "| **a** |\n| --- |"
