"""Standard output and standard error that work with undecodable file names, closed pipes and full disks."""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO, cast

_HANDLER = "srm-iqa"


class Output:
    """Standard output that remembers the first failed write.

    `stream` is None if standard output was closed before the program started. Every write then fails.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._fault: OSError | None = None

    def write(self, text: str) -> int:
        return self._try(lambda stream: stream.write(text))

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def lost(self) -> str | None:
        """Flush the output, and return the reason for the first failed write, or None if no write failed.

        If a write failed, this method redirects standard output to the null device, so further output is dropped.
        """
        if self._fault is None and self._stream is not None:
            with suppress(OSError):
                self.flush()
        if self._fault is None:
            return None
        with suppress(OSError, AttributeError):  # the stream may have no file descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # otherwise the flush at exit would fail
        return self._fault.strerror or str(self._fault)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, operation: Callable[[TextIO], Any]) -> Any:
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return operation(self._stream)
        except OSError as error:
            self._fault = self._fault or error
            raise


@contextmanager
def prepared() -> Iterator[Output]:
    """Within the `with` block, make standard output and standard error accept any text; yield standard output.

    A file name may contain bytes that cannot be decoded. Standard output writes these bytes unchanged. Standard error
    writes each of these bytes as an escape sequence such as \\udcff. On both streams, a character that the encoding
    cannot represent is written as an escape sequence such as \\u2192.
    """
    _replace_closed()
    output = Output(sys.stdout)
    before = []
    for stream, errors in ((sys.stdout, _HANDLER), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            before.append((stream, stream.errors))
            with suppress(OSError):
                stream.reconfigure(errors=errors)
    try:
        with redirect_stdout(cast(TextIO, output)):
            yield output
    finally:
        for stream, old in before:
            with suppress(OSError):
                stream.reconfigure(errors=old)


def sentence(text: str) -> str:
    """Put a text on one line."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text).strip()


def as_named(path: str | os.PathLike[str]) -> str:
    """Return a path as text. In any locale, standard output encodes this text to the original bytes of the path."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if "/".encode(encoding) != b"/":  # encodings such as UTF-16 cannot represent single bytes
        return os.fspath(path)
    return os.fsencode(path).decode(encoding, "surrogateescape")


def _replace_closed() -> None:
    """Open the null device in place of each standard stream that was closed before the program started.

    Without this step, a file that the program opens later could get file descriptor 0, 1 or 2.
    """
    if sys.stdin is None or sys.stdout is None or sys.stderr is None:
        while os.open(os.devnull, os.O_RDWR) < 3:
            pass
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    if sys.stderr is None:  # print() would write to stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115


def _encode_rest(error: UnicodeError) -> tuple[bytes, int]:
    """Encode the characters that the encoding of standard output cannot represent. This is a codec error handler.

    A surrogate escape stands for a byte that could not be decoded, and is encoded as this byte. Any other character is
    encoded as an escape sequence such as \\u2192.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    rest = error.object[error.start : error.end]
    return b"".join(map(_bytes_of, rest)), error.end


def _bytes_of(character: str) -> bytes:
    try:
        return character.encode("ascii", "surrogateescape")
    except UnicodeEncodeError:
        return character.encode("ascii", "backslashreplace")


codecs.register_error(_HANDLER, _encode_rest)
