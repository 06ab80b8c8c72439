"""Compression by a file's first bytes: what unpacks it, piece by piece, and says when it was cut."""

import io
import lzma
import mmap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard


class Codec(NamedTuple):
    """How a compressed file is unpacked: its members (gzip), frames (zstd, lz4) or streams (xz) one after another."""

    name: str
    magic: bytes
    start: Callable[[], Any]
    """A fresh object with decompress(bytes), eof and unused_data, for one member."""
    block: int
    """Bytes handed to it at once. What comes out is bounded by it alone: zstd makes 128 KiB of 4 bytes."""


def _lz4() -> Any:
    import lz4.frame  # an extra: archives.py says so before anything runs

    return lz4.frame.LZ4FrameDecompressor()


CODECS = (
    Codec("gzip", b"\x1f\x8b\x08", lambda: zlib.decompressobj(wbits=31), 1 << 16),
    Codec("zstd", b"\x28\xb5\x2f\xfd", lambda: zstandard.ZstdDecompressor().decompressobj(), 1 << 10),
    Codec("xz", b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), 1 << 12),
    Codec("lz4", b"\x04\x22\x4d\x18", _lz4, 1 << 16),
)
# What the codecs raise at bytes that are not theirs; lz4 raises RuntimeError.
BROKEN = (zlib.error, lzma.LZMAError, zstandard.ZstdError, RuntimeError)
SUFFIXES = (".gz", ".zst", ".xz", ".lz4")


_DICTIONARY = b"\x5d\x2a\x4d\x18"
LARGEST_DICTIONARY = 1 << 26


def find_dictionary(data: bytes | mmap.mmap) -> tuple[Codec, int] | None:
    """(codec, where its first frame starts) of a .warc.zst that begins with the dictionary of its frames, else None.

    As the IIPC's "WARC zstd compression 1.0" has it: in a frame that others skip, itself packed or not. BROKEN if the
    dictionary cannot be had.
    """
    if data[: len(_DICTIONARY)] != _DICTIONARY:
        return None
    end = 8 + int.from_bytes(data[4:8], "little")
    content = bytes(data[8 : min(end, 8 + LARGEST_DICTIONARY)])
    if len(content) != end - 8:
        raise zstandard.ZstdError("it is cut short or longer than 64 MiB")
    if content.startswith(b"\x28\xb5\x2f\xfd"):
        reader = zstandard.ZstdDecompressor().stream_reader(content)
        content = reader.read(LARGEST_DICTIONARY)
    dictionary = zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_FULLDICT)
    unpacker = zstandard.ZstdDecompressor(dict_data=dictionary)
    return Codec("zstd", b"\x28\xb5\x2f\xfd", unpacker.decompressobj, 1 << 10), end


def find_codec(head: bytes) -> Codec | None:
    """The codec of a file that begins with these bytes, None if it is not compressed."""
    return next((codec for codec in CODECS if head.startswith(codec.magic)), None)


class _Unpacked(io.RawIOBase):
    """The content of a compressed file; EOFError where it ends too early, one of BROKEN where it is damaged."""

    def __init__(self, file: IO[bytes], codec: Codec):
        self.file, self.codec = file, codec
        self.member: Any = None
        self.packed, self.ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            self.packed = self.packed or self.file.read(self.codec.block)
            if not self.packed:
                if self.member:
                    raise EOFError(f"the {self.codec.name} file ends too early: it is cut short")
                return 0
            self.member = self.member or self.codec.start()
            self.ready, self.packed = self.member.decompress(self.packed), b""
            if self.member.eof:
                self.packed, self.member = self.member.unused_data or b"", None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def open_unpacked(path: str | Path) -> tuple[IO[bytes], Callable[[], int]]:
    """(the file's content, how many of its own bytes are read), whatever it is compressed with."""
    file = Path(path).open("rb")  # noqa: SIM115
    codec = find_codec(file.read(8))
    file.seek(0)
    return (io.BufferedReader(_Unpacked(file, codec), 1 << 16) if codec else file), file.tell
