"""How far a long piece of work is, for people who watch."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def bars(console: Console, **options: Any) -> Progress:
    """Bars with their counts and the time that is left; `options` are those of rich's Progress."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, **options)
