"""Formats text for terminals and logs: durations, aligned tables, long lists, and values without control characters."""

from collections.abc import Container, Sequence


def format_duration(seconds: float) -> str:
    """Formats a duration in its two largest units: `12 min 5 s`, `3 h 40 min`, and from two days on `2 d 3 h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_table(rows: Sequence[Sequence[str]], left: Container[int] = ()) -> str:
    """Formats rows of cells, the header first, as aligned columns, two blanks apart.

    The columns numbered in `left` are aligned left, the others right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in cells).rstrip())
    return "\n".join(lines)


def printable(text: str) -> str:
    """Escapes line breaks and control characters, which could forge lines of a log or change a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def join_first(names: Sequence[str], separator: str = ", ") -> str:
    """Joins the first five names and the count of the rest, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return separator.join(names[:5]) + more
