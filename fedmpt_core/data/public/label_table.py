"""Labels as a CSV table of zeros and ones: a picture's name, then one column per class.

Must never guess: a cell that is neither 0 nor 1, a short line or a name given twice is refused with its line.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmpt_core.data.manifest_rows import Problems
from fedmpt_core.data.public.folder import inside

Line = tuple[str, tuple[str, ...], str]
"""Name of a picture, its labels in the table's order, and where it stands."""

_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def read_table(
    path: Path, where: str, order: Callable[[Sequence[str]], Sequence[str] | None], problems: Problems
) -> list[Line]:
    """The lines of a table.

    Args:
        path: the file.
        where: what to call it in messages.
        order: from the header's columns behind the first to the label of each; None once it has added a problem.
        problems: what is wrong is added here.

    Returns:
        Every line that can be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.add(where, f"cannot be read ({error}): unpack the data set again")
        return []
    reader = csv.reader(text.splitlines(), strict=True)
    lines: dict[str, Line] = {}
    try:
        header = next(reader, None)
        labels = order([cell.strip() for cell in header[1:]]) if header is not None else ()
        if labels is None:
            return []
        for cells in reader:
            origin = f"{where} line {reader.line_num}"
            line = _line(cells, labels, origin, problems) if any(cells) else None
            if line and line[0] in lines:
                problems.add(origin, f"picture {line[0]!r} is listed more than once")
            elif line:
                lines[line[0]] = line
    except csv.Error as error:
        problems.add(f"{where} line {reader.line_num}", f"is not valid CSV ({error})")
    if not lines and not problems.count:
        problems.add(where, "lists no picture")
    return list(lines.values())


def _line(cells: Sequence[str], labels: Sequence[str], origin: str, problems: Problems) -> Line | None:
    """One line; None once its problem was added."""
    values = [_VALUES.get(cell.strip()) for cell in cells[1:]]
    if len(values) != len(labels):
        problems.add(origin, f"has {len(values)} labels, the header has {len(labels)}")
        return None
    if None in values:
        c = values.index(None)
        problems.add(origin, f"{labels[c]!r} is {cells[c + 1]!r}, neither 0 nor 1")
        return None
    name = inside(cells[0], origin, problems)
    return None if name is None else (name, tuple(n for n, v in zip(labels, values, strict=True) if v), origin)
