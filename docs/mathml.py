"""Markdown extension of the site: LaTeX becomes MathML, which browsers draw without a script or a network."""

import html
import re

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.postprocessors import Postprocessor

# What pymdownx.arithmatex leaves of $...$ and $$...$$ with `generic = true`.
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


class _ToMathML(Postprocessor):
    def run(self, text: str) -> str:
        return FORMULA.sub(_converted, text)


def _converted(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    return convert(html.unescape(match["latex"]).strip(), display=display)


class _MathML(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # After raw HTML has been put back, which is at priority 30.
        md.postprocessors.register(_ToMathML(md), "mathml", 5)


def makeExtension(**_: object) -> Extension:
    """What Python-Markdown calls to load `mathml`."""
    return _MathML()
