"""A progress bar for what takes long, where stderr is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int | None, doing: str) -> Iterator[Callable[[str], None]]:
    """Shows steps done, the time left, and a word on the last step; yields what is called after each, with that word.

    Args:
        total: steps, where that is known.
        doing: what the bar is called.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # imported late: only a terminal needs it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total, last="")
        yield lambda last: bar.update(task, advance=1, last=last)
