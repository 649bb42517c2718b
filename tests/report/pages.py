"""Pages as a parser sees them."""

from html.parser import HTMLParser

VOID = {"meta", "img", "line", "polygon", "polyline"}


class Page(HTMLParser):
    """The elements of a page by name, each with its attributes, the headings of its sections (`titles`), and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.open, self.words, self.wrong, self.titles = {}, [], [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.setdefault(tag, []).append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)

    def points(self, line):
        """(x, y) of the markers of a line of a chart."""
        circles = [circle for circle in self.elements.get("circle", ()) if circle["data-line"] == line]
        return [(float(circle["data-x"]), float(circle["data-y"])) for circle in circles]

    def check(self):
        """Well-formed, without scripts, and nothing in it is loaded from anywhere."""
        assert self.wrong == self.open == []
        assert "script" not in self.elements
        assert "link" not in self.elements
        assert all(image["src"].startswith("data:image/jpeg;base64,") for image in self.elements.get("img", ()))
        assert all(image["alt"] for image in self.elements.get("img", ()))
        policy = next(meta["content"] for meta in self.elements["meta"] if "http-equiv" in meta)
        assert policy.startswith("default-src 'none'; script-src 'none'")
        assert not [
            name for name in self.elements if any(key.startswith("on") for each in self.elements[name] for key in each)
        ]
