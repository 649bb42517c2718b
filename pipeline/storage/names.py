"""Names that are safe in any folder or object store."""

import re


def folder_name(name: str) -> str:
    """A name made safe as a folder: letters, digits, dot, underscore and dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"
