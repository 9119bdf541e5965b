"""Progress of a command: a bar on a terminal, and in a file or pipe a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
Item = TypeVar("Item")


class Progress:
    """Counts `unit`s of the work `name` up to `total`, on standard error. Use it in a `with` statement.

    If standard error is closed, or its reader is gone, nothing is printed and the work continues.

    done: units that an earlier run finished. shown: False prints nothing.
    """

    def __init__(self, name: str, total: int, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.first, self.began, self.figures = done, time.monotonic(), ""
        self.last_line = self.began
        self.bar: Any = None
        self.lines = shown and sys.stderr is not None
        with self._printing():
            if self.lines and hasattr(sys.stderr, "isatty") and sys.stderr.isatty():
                self.lines = False
                self.bar = tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def update(self, count: int = 1, **figures: str) -> None:
        """Count `count` more units as done; `figures` are shown beside the count."""
        self.done += count
        if self.bar is not None:
            if figures:
                self.bar.set_postfix(figures, refresh=False)
            with self._printing():
                self.bar.update(count)
        elif self.lines:
            self.figures = "".join(f", {name} {value}" for name, value in figures.items())
            if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
                self._line()

    def over(self, items: Iterable[Item], size: Callable[[Item], int] = lambda _: 1) -> Iterator[Item]:
        """Yield the items; each counts for size(item) units when the next one is taken."""
        with self:
            for item in items:
                yield item
                self.update(size(item))

    def say(self, text: str) -> None:
        """Print a separate line above the bar."""
        with self._printing():
            if self.bar is not None:
                self.bar.write(text, file=sys.stderr)
            elif self.lines:
                print(text, file=sys.stderr, flush=True)

    def _line(self) -> None:
        now = time.monotonic()
        self.last_line = now
        seconds, new = now - self.began, self.done - self.first
        left = f", {clock(seconds * (self.total - self.done) / new)} left" if new and self.done < self.total else ""
        with self._printing():
            print(
                f"{self.name}: {self.done} of {self.total} {self.unit}s{self.figures}, {clock(seconds)}{left}",
                file=sys.stderr,
                flush=True,
            )

    @contextmanager
    def _printing(self) -> Iterator[None]:
        """If printing fails, stop printing and continue the work."""
        try:
            yield
        except (OSError, ValueError):  # A closed file raises ValueError.
            if self.bar is not None:
                self.bar.disable = True  # tqdm would otherwise print when the bar is deleted.
            self.bar, self.lines = None, False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            with self._printing():
                self.bar.close()
        elif self.lines and error is None:
            self._line()


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
