"""Labels as a CSV table of zeros and ones: a picture's name, then one column per class.

Must never guess: a cell that is neither 0 nor 1, a short line or a name given twice is refused with its line.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmpt_core.data.manifest_rows import Problems
from fedmpt_core.data.public.folder_checks import inside

_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def read_table(
    path: Path, where: str, order: Callable[[Sequence[str]], Sequence[str] | None], problems: Problems
) -> list[tuple[str, tuple[str, ...], str]]:
    """The lines of a table.

    Args:
        path: the file.
        where: what to call it in messages.
        order: from the header's columns behind the first to the label of each; None once it has added a problem.
        problems: what is wrong is added here.

    Returns:
        (name, labels in the table's order, origin) of every line that can be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.add(where, f"cannot be read ({error}): unpack the data set again")
        return []
    reader = csv.reader(text.splitlines(), strict=True)
    found: list[tuple[str, tuple[str, ...], str]] = []
    seen: set[str] = set()
    labels: Sequence[str] | None = None
    try:
        for cells in reader:
            origin = f"{where} line {reader.line_num}"
            if labels is None:
                labels = order([cell.strip() for cell in cells[1:]])
                if labels is None:
                    return []
                continue
            if not any(cells):
                continue
            values = [_VALUES.get(cell.strip()) for cell in cells[1:]]
            if len(values) != len(labels):
                problems.add(origin, f"has {len(values)} labels, the header has {len(labels)}")
            elif None in values:
                c = values.index(None)
                problems.add(origin, f"{labels[c]!r} is {cells[c + 1]!r}, neither 0 nor 1")
            elif (name := inside(cells[0], origin, problems)) is None:
                continue
            elif name in seen:
                problems.add(origin, f"picture {name!r} is listed more than once")
            else:
                seen.add(name)
                found.append((name, tuple(n for n, v in zip(labels, values, strict=True) if v), origin))
    except csv.Error as error:
        problems.add(f"{where} line {reader.line_num}", f"is not valid CSV ({error})")
    if not found and not problems:
        problems.add(where, "lists no picture")
    return found
