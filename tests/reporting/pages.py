"""Reads the HTML pages of reports."""

import base64
from html.parser import HTMLParser

HOSTILE = '<script>alert("1")</script> & {x}'


class Page(HTMLParser):
    """Tags, attributes and visible text; checks that tags close in order."""

    VOID = ("meta", "img", "wbr")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.visible = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.visible += data

    @property
    def images(self):
        """What is embedded."""
        prefix = "data:image/png;base64,"
        return [base64.b64decode(link.removeprefix(prefix)) for link in self.links]


def read_page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))
