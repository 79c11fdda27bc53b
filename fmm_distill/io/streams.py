"""Standard streams that don't end a run: not on a full disk, not on a closed pipe, not on a narrow encoding."""

from __future__ import annotations

import contextlib
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Lossy", "lossy_streams"]


class Lossy:
    """A text stream that drops output that can't be written.

    It has no attribute ``buffer``, so that writers of bytes can't bypass it.

    Args:
        last: the process prints nothing after this stream, so that buffered output is dropped after an error as well.

    Attributes:
        lost: the first error; None: everything was written.
    """

    def __init__(self, stream: TextIO, *, last: bool = False) -> None:
        self.stream, self.last = stream, last
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text; letters that the encoding of the stream lacks become escapes."""
        with self._losing():
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self.stream, "encoding", None) or "ascii"
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._losing():
            self.stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error
            if not self.last:
                return
            # The stream's buffer would fail again when Python closes it at exit.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 the stream's own
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self.stream, name)


@contextmanager
def lossy_streams(*, last: bool = False) -> Iterator[tuple[Lossy, Lossy]]:
    """Replace standard output and error by ``Lossy`` streams until the end of the context."""
    out, err = Lossy(sys.stdout, last=last), Lossy(sys.stderr, last=last)
    with redirect_stdout(cast("TextIO", out)), redirect_stderr(cast("TextIO", err)):
        yield out, err
