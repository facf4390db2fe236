"""Documents of nested JSON values with one of them replaced by another."""

import copy

from hypothesis import strategies as st

OTHER = st.sampled_from(
    [
        *(None, True, -1, 10**18, 10**30, 2.5, float("nan"), float("-inf"), "text", "12", ""),
        *("\x1b[2J", "\u202e", "\ud800", [], [None], [[["deep"]]], {}, {"a": None}, {"\x07": 1}),
    ]
)


def places(value, at=()):
    """Every place in nested JSON values, the value itself included."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def replaced(document, at, value):
    document = copy.deepcopy(document)
    if not at:
        return value
    parent = document
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = value
    return document


def with_another_value(data, document):
    """The document with one of its values replaced."""
    return replaced(document, data.draw(st.sampled_from(list(places(document)))), data.draw(OTHER))
