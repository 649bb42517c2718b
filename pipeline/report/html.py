"""What all pages share: escaped templates, the style, and the policy that lets a page load nothing."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

PAGE = Path(__file__).with_name("page")


def environment(*folders: Path) -> Environment:
    """Templates of these folders and of the report; what names and tags hold is escaped, and a missing name is an error."""
    loader = FileSystemLoader([*folders, PAGE])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def style(*files: Path) -> Markup:
    """The shared style and that of these files."""
    return Markup("".join(file.read_text(encoding="utf-8") for file in (PAGE / "style.css", *files)))


def policy(scripts: Sequence[str] = ()) -> str:
    """Content security policy that allows only these scripts and no connections."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def to_json(value: Any) -> Markup:
    """JSON without characters that an HTML parser could take for markup."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
