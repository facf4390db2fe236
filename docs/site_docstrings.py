"""An extension of Griffe: examples in docstrings become blocks of code, and not the quotations that `>>>` is in Markdown."""

import re
from typing import Any

from griffe import Extension

EXAMPLE = re.compile(r"^([ \t]*)>>> .*\n(?:\1\S.*(?:\n|\Z)|\1[ \t]+\S.*(?:\n|\Z))*", re.MULTILINE)


def fenced(text: str) -> str:
    """The same docstring with each example as a block of code of its own."""
    return EXAMPLE.sub(lambda at: f"\n```pycon\n{re.sub(rf'(?m)^{at[1]}', '', at[0]).rstrip()}\n```\n", text)


class FencedExamples(Extension):
    """Applies `fenced` to every docstring that is read."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Change the docstring in place."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
