"""Mask: nobody's e-mail or IP address stands in the shards."""

import ipaddress
import re

from datatrove.data import Document

from data_pipelines.config import MaskConfig
from data_pipelines.steps.document import DocumentStep

_LETTER = "A-Za-z\u00c0-\u024f\u0370-\u04ff"  # not those of scripts that write on without a space
_EMAIL = re.compile(
    f"(?<![{_LETTER}0-9])[{_LETTER}0-9][{_LETTER}0-9._%+'-]{{0,63}}"
    f"@((?:[{_LETTER}0-9][{_LETTER}0-9-]{{0,62}}\\.){{1,8}}[{_LETTER}]{{2,24}})(?![{_LETTER}0-9@-])"
)
_RESERVED = re.compile(
    r"(?:^|\.)(?:example\.(?:com|net|org)|example|test|invalid|localhost)$", re.IGNORECASE
)  # RFC 2606
_IP4 = re.compile(r"(?<![A-Za-z0-9_.-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![A-Za-z0-9_]|[.-][0-9])")
# The largest of an address's four numbers, at least: sections ("8.2.4.1") and most versions have smaller ones, and
# 0.15 % of all addresses.
MIN_PART = 50
# What has been given out begins with 2 or 3.
_IP6 = re.compile(
    r"(?<![A-Za-z0-9:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?<!(?<!:):)(?![A-Za-z0-9])"
)
# What stands in their place: names and addresses that are reserved for examples (RFC 2606, 5737, 3849).
EMAIL, IP4, IP6 = "email@example.com", "192.0.2.1", "2001:db8::1"


class MaskAddresses(DocumentStep):
    """Sets metadata["emails"] and ["ip_addresses"]: how many were masked."""

    name = "mask"

    def __init__(self, config: MaskConfig):
        super().__init__()
        self.config = config

    def process(self, document: Document) -> None:
        if self.config.emails:
            document.text, document.metadata["emails"] = mask_emails(document.text)
        if self.config.ip_addresses:
            document.text, document.metadata["ip_addresses"] = mask_ip_addresses(document.text)


def mask_emails(text: str) -> tuple[str, int]:
    """(text, e-mail addresses masked); those of the names reserved for examples stay."""
    masked = 0

    def mask(found: re.Match[str]) -> str:
        nonlocal masked
        if _RESERVED.search(found[1]):
            return found[0]
        masked += 1
        return EMAIL

    return (_EMAIL.sub(mask, text), masked) if "@" in text else (text, 0)


def mask_ip_addresses(text: str) -> tuple[str, int]:
    """(text, IP addresses masked): public ones; four small numbers are a section or a version."""
    masked = 0

    def mask(found: re.Match[str]) -> str:
        nonlocal masked
        try:
            address = ipaddress.ip_address(found[0])
        except ValueError:
            return found[0]
        section = address.version == 4 and max(address.packed) < MIN_PART
        if section or not address.is_global or address.is_multicast:
            return found[0]
        masked += 1
        return IP4 if address.version == 4 else IP6

    return _IP6.sub(mask, _IP4.sub(mask, text)), masked
