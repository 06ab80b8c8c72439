"""xlscale: from web archives to a multilingual encoder on the Hub."""

from importlib import import_module
from typing import Any

__all__ = ["__version__", "load_pretrained", "save_pretrained"]
__version__ = "0.1.0"

# torch takes seconds to import, which the command line and the data side do without: imported when asked for.
_FROM = {"load_pretrained": "xlscale.checkpoint.pretrained", "save_pretrained": "xlscale.checkpoint.pretrained"}


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(import_module(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
