"""Whether the zip archive that torch writes is whole: each part, and what the directory at its end says of it."""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from typing import IO

__all__ = ["archive_damage"]

_DIRECTORY = 0x10  # MS-DOS's flag, for which torch skips a part
_SIZES_FOLLOW = 0x8  # the flag of a part whose checksum and sizes come after it
_IN_EXTRA = 0xFFFFFFFF  # in place of a size that needs 64 bits
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def archive_damage(stream: IO[bytes]) -> str:
    """What is wrong with a zip archive, in words; empty if nothing is."""
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            names = Counter(member.filename for member in members)
            for member in members:
                if names[member.filename] > 1:
                    return f"its part {member.filename!r} is there twice"
                if member.is_dir() or member.external_attr & _DIRECTORY:
                    return f"its part {member.filename!r} is marked as a folder"
                if not _headers_agree(stream, member):
                    return f"its part {member.filename!r} is not the one that its directory lists"
            if not any(member.CRC for member in members):  # torch was told to write no checksums
                return ""
            damaged = archive.testzip()
    except Exception:  # damage to the headers raises nearly any class
        return "it is cut off or overwritten"
    return f"its part {damaged!r} does not match its checksum" if damaged else ""


def _headers_agree(stream: IO[bytes], member: zipfile.ZipInfo) -> bool:
    """Whether the header before a part says the same of it as the directory at the end of the archive."""
    stream.seek(member.header_offset)
    header = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    _, _, flags, method, _, _, crc, compressed, size, length, _ = header
    if (flags, method) != (member.flag_bits, member.compress_type):
        return False
    numbers = ((crc, member.CRC), (compressed, member.compress_size), (size, member.file_size))
    if not all(local in (listed, _IN_EXTRA, 0 if flags & _SIZES_FOLLOW else listed) for local, listed in numbers):
        return False
    return stream.read(length).decode("utf-8" if flags & 0x800 else "cp437") == member.orig_filename
