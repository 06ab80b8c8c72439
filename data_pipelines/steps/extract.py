"""Extract: a page's bytes to its main text, by Resiliparse or Trafilatura, in a process with limits of time and
memory.
"""

import os
import re
import resource
from collections.abc import Callable

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.extractors.base import ExtractorSandbox
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

from data_pipelines.children import die_with_parent
from data_pipelines.config import ExtractConfig
from data_pipelines.steps.clean import normalise
from data_pipelines.steps.document import drop, dropped

_META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]+)", re.IGNORECASE)


class ExtractText(PipelineStep):
    """Replaces metadata["payload"] by text, and metadata["charset"] by the charset that was used.

    Text that came without a payload (WET, corpora) is normalised.
    """

    type, name = "xlscale", "extract"

    def __init__(self, config: ExtractConfig):
        super().__init__()
        self.config = config

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        limit, limited = _Limited(self.config.method, self.config.memory_mib), ("", "")
        with ExtractorSandbox(timeout=self.config.timeout_seconds, warmup_text=limited) as sandbox:
            for document in data:
                payload = document.metadata.pop("payload", None)
                if not dropped(document) and payload is None:
                    document.text = normalise(document.text)
                    if not document.text:
                        drop(document, "empty")
                elif not dropped(document):
                    with self.track_time():
                        self.extract(document, payload, sandbox, limit)
                yield document

    def extract(self, document: Document, payload: bytes, sandbox: ExtractorSandbox, limit: "_Limited") -> None:
        """One page, in the sandbox; what goes wrong there drops it."""
        try:
            text, charset = sandbox.process_document((payload, document.metadata["charset"]), limit)
        except TimeoutError:
            drop(document, "extract_timeout")
        except Exception:  # the sandbox hands on whatever the extractor raised, and EOFError if it died
            drop(document, "extract_crashed")
        else:
            document.text, document.metadata["charset"] = text, charset
            if not text:
                drop(document, "empty")


class _Limited:
    """extract() for the sandbox: limits the memory of the process it is first called in, returns errors."""

    def __init__(self, method: str, memory_mib: int):
        self.method, self.memory_mib, self.limited = method, memory_mib, False

    def __call__(self, payload: bytes | str, declared: str) -> tuple[str, str] | Exception:
        if not self.limited:
            self.limited = True
            die_with_parent()
            METHODS[self.method]("<p>Its imports take time and memory that no page is charged for.</p>")
            with open("/proc/self/statm") as file:  # noqa: PTH123
                size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + self.memory_mib * 2**20,) * 2)
        if not payload:
            return "", ""
        assert isinstance(payload, bytes)
        try:
            return extract(payload, declared, self.method)
        except Exception as error:
            return error


def extract(payload: bytes, declared: str = "", method: str = "resiliparse") -> tuple[str, str]:
    """(main text, charset) of a page's bytes; `declared` is the charset of the HTTP header."""
    charset = find_charset(payload, declared)
    return normalise(METHODS[method](bytes_to_str(payload, charset)), c1=True), charset


def _resiliparse(html: str) -> str:
    return extract_plain_text(html, main_content=True, alt_texts=False) or ""


def _trafilatura(html: str) -> str:
    import trafilatura  # an extra: config_load.py says so before anything runs

    return trafilatura.extract(html, include_comments=False) or ""


METHODS: dict[str, Callable[[str], str]] = {"resiliparse": _resiliparse, "trafilatura": _trafilatura}


def find_charset(payload: bytes, declared: str = "") -> str:
    """UTF-8 if it is valid, else what the server or the page declares if it fits, else by its looks."""
    # An escape: ISO-2022-JP is ASCII to the letter, and so it is UTF-8.
    fits = [] if b"\x1b" in payload else ["utf-8"]
    meta = _META_CHARSET.search(payload[:4096])
    for name in (declared, meta.group(1).decode("ascii") if meta else ""):
        if name and (mapped := map_encoding_to_html5(name, fallback_utf8=False)):
            fits.append(mapped)
    for charset in fits:
        try:
            payload.decode(charset)
        except (UnicodeDecodeError, LookupError):
            continue
        return charset
    return detect_encoding(payload) or "utf-8"
