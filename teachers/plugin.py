"""Objects of the user's own code, named `package.module:name` in a recipe."""

import importlib
from typing import Any

from teachers.errors import one_line


def import_plugin(location: str) -> Any:
    """The object that `package.module:name` names.

    Raises:
        ImportError: in one line, if the name is malformed, or the module cannot be imported or does not have the object.
    """
    module_name, _, attribute = location.partition(":")
    if not module_name or module_name.startswith(".") or not attribute:
        raise ImportError(f"{location} is not of the form package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        reason = one_line(error)
        raise ImportError(
            f"{location} cannot be imported ({reason}); run in its folder, put it on PYTHONPATH, or install it"
        ) from error
    if not hasattr(module, attribute):
        raise ImportError(f"module {module_name} has no {attribute}")
    return getattr(module, attribute)
