"""xlscale: from web archives to a multilingual encoder on the Hub."""

__version__ = "0.1.0"
