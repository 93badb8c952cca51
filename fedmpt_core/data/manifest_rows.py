"""The manifest as a file: rows read from and written to CSV or Parquet, and the list of what is wrong.

Only the table is checked here: columns, types, encoding, quoting. What the rows say is checked by `manifest`.
Must never guess: an unknown column may be a misspelt `group`, so it is refused. Every problem is named with
its line (CSV, counted from 1 with the header) or row (Parquet, counted from 1).
"""

import csv
import difflib
import io
import itertools
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedmpt_core.common.files import whole_file

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "labels", "split", "group", "unknown")
LISTED = 20
"""Problems that are spelt out; the others are counted (chosen)."""
ALIKE = 3
"""Most that one mistake may be named by line after line; from the next on it is one line with a count (chosen)."""

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REQUIRED = COLUMNS[:3]
_LISTS = ("labels", "unknown")
PICTURE_COLUMNS = (
    *("path", "file", "filename", "filepath", "image", "imagepath", "imagefile", "imagename", "imageindex", "imageid"),
    *("img", "imgpath", "picture", "picturepath", "photo", "name", "id"),
)
LABEL_COLUMNS = (
    *("labels", "label", "tags", "tag", "classes", "class", "classname", "findings", "findinglabels", "finding"),
    *("categories", "category", "diagnosis", "diagnoses"),
)
"""What people call them, without blanks and underscores, likeliest first."""
_PIECE = 20_000  # rows that are written at once; what a reader holds at once too (chosen)


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One line of a manifest.

    Attributes:
        path: picture file, absolute or relative to the manifest's folder or root.
        labels: labels of the picture, possibly none; order and repetition mean nothing.
        split: `train`, `val` or `test`.
        group: what records belong together, or empty.
        unknown: labels of which nobody says whether the picture shows them; training leaves them out.
        origin: where the row comes from, for messages.
    """

    path: str
    labels: tuple[str, ...]
    split: str
    group: str = ""
    origin: str = ""
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Something wrong, and where: `manifest.csv line 17`; and where else the same is."""

    where: str
    message: str
    others: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if len(self.others) < ALIKE:  # each has a line of its own
            return f"{self.where}: {self.message}"
        file = self.where.partition(" ")[0]
        few = " and ".join(other.removeprefix(f"{file} ") for other in self.others[:2])
        return f"{self.where} (and {len(self.others)} more, such as {few}): {self.message}"


class Problems:
    """What is wrong with a source of records: the first `LISTED` problems and the number of all of them.

    Attributes:
        source: what was checked, for messages.
        listed: the first problems, in the order found.
        count: all of them.
    """

    def __init__(self, source: str) -> None:
        """Starts without problems."""
        self.source = source
        self.count = 0
        self.listed: list[Problem] = []
        self._alike: dict[str, list[Problem]] = {}  # by kind, those that have a line of their own

    def add(self, where: str, message: str | Callable[[], str], kind: str = "") -> None:
        """Count a problem.

        Args:
            where: it is.
            message: what it is; one that costs something to write is called only when it is listed.
            kind: what many rows may have in common, such as one misspelt word; empty where each is another matter.
        """
        self.count += 1
        alike = self._alike.setdefault(kind, []) if kind else []
        if alike:
            alike[0].others.append(where)
            if len(alike[0].others) == ALIKE:  # from here on the first speaks for all
                self.listed = [p for p in self.listed if not any(p is other for other in alike[1:])]
        if len(self.listed) < LISTED and not (alike and len(alike[0].others) >= ALIKE):
            self.listed.append(Problem(where, message if isinstance(message, str) else message()))
            alike.append(self.listed[-1])

    def refuse_any(self) -> None:
        """Raises ManifestError when there is a problem."""
        if self.count:
            raise ManifestError(self)


class ManifestError(ValueError):
    """A source of records that cannot be used; the message has one line per listed problem."""

    def __init__(self, problems: Problems) -> None:
        """Keeps `problems` for whoever shows them in another way."""
        self.problems = problems
        noun = "1 problem" if problems.count == 1 else f"{problems.count} problems"
        lines = [f"{problems.source} cannot be used, {noun}:", *(f"  {p}" for p in problems.listed)]
        named = sum(1 + (len(p.others) if len(p.others) >= ALIKE else 0) for p in problems.listed)
        if problems.count > named:
            lines.append(f"  and {problems.count - named} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[Problems]]:
        return type(self), (self.problems,)


def write_manifest(rows: Iterable[ManifestRow], path: str | Path, *, unknown: bool = False) -> None:
    """Write rows to a `.csv` or `.parquet` manifest, readable for its owner only, whole or not at all.

    Args:
        rows: at least one, taken one after the other; their `origin` is not written.
        path: the file, replaced when it exists. Relative paths in `rows` will start at its folder.
        unknown: whether the column `unknown` is written.

    Raises:
        ValueError: a row could not be read back as it is, or the file has another suffix or cannot be written.
    """
    path = Path(path)
    writers = {".csv": _write_csv, ".parquet": _write_parquet}
    write = writers.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"path={str(path)!r} ends in {path.suffix!r}: a manifest is a .csv or a .parquet file")
    checked = _writable(rows)
    first = next(checked, None)
    if first is None:
        raise ValueError("rows is empty: a manifest needs at least one picture")
    columns = [*_REQUIRED, *["group"] * bool(first.group), *["unknown"] * unknown]
    with whole_file(path) as file:
        write(itertools.chain((first,), checked), columns, file)


def _write_csv(rows: Iterable[ManifestRow], columns: Sequence[str], file: IO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = {"path": row.path, "split": row.split, "group": row.group}
        cells |= {"labels": "|".join(row.labels), "unknown": "|".join(row.unknown)}
        writer.writerow([cells[name] for name in columns])
    text.flush()
    text.detach()


def _write_parquet(rows: Iterable[ManifestRow], columns: Sequence[str], file: IO) -> None:
    schema = pa.schema([(name, pa.list_(pa.string()) if name in _LISTS else pa.string()) for name in columns])
    with pq.ParquetWriter(file, schema) as writer:
        rows = iter(rows)
        while piece := list(itertools.islice(rows, _PIECE)):
            writer.write_table(
                pa.table({name: [getattr(row, name) for row in piece] for name in columns}, schema=schema)
            )


def _writable(rows: Iterable[ManifestRow]) -> Iterator[ManifestRow]:
    """The rows, each once it is sure that it will be read back as it is."""
    seen: set[str] = set()
    grouped: bool | None = None
    for row in rows:
        named = (*row.labels, *row.unknown)
        cells = (row.path, *named, row.group)
        if not row.path or any(c != c.strip() or CONTROL.search(c) for c in cells):
            raise ValueError(f"path={row.path!r}: a cell is empty, starts or ends blank, or holds a control character")
        if any(not label or "|" in label or ";" in label for label in named):
            raise ValueError(f"path={row.path!r}: labels={list(named)} holds an empty label, or one with '|' or ';'")
        if row.split not in SPLITS:
            raise ValueError(f"path={row.path!r}: split={row.split!r} is not one of {', '.join(SPLITS)}")
        if row.path in seen:
            raise ValueError(f"path={row.path!r} is given twice: list every picture once")
        seen.add(row.path)
        if bool(row.group) != (bool(row.group) if grouped is None else grouped):
            raise ValueError(f"path={row.path!r}: group is given for some rows only; give it for all or for none")
        grouped = bool(row.group)
        yield row


def parse(path: Path, problems: Problems) -> list[ManifestRow]:
    """The lines that can be read; what cannot is added to `problems`."""
    before = problems.count
    rows: list[ManifestRow] = []
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            problems.add(path.name, "is not a regular file")
        elif path.suffix.lower() == ".csv":
            rows = _read_csv(path, problems)
        elif path.suffix.lower() == ".parquet":
            rows = _read_parquet(path, problems)
        else:
            problems.add(path.name, f"ends in {path.suffix!r}: a manifest is a .csv or a .parquet file")
    except FileNotFoundError:
        problems.add(str(path), "does not exist")
    except (OSError, pa.ArrowException) as error:
        problems.add(path.name, f"cannot be read ({error})")
    if not rows and problems.count == before:
        problems.add(path.name, "lists no picture: add one line per picture below the header")
    return rows


def _read_csv(path: Path, problems: Problems) -> list[ManifestRow]:
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        problems.add(path.name, "is UTF-16: save it as UTF-8")
        return []
    if not raw.strip():
        problems.add(path.name, f"is empty: it needs a header with the columns {', '.join(_REQUIRED)}")
        return []
    rows: list[ManifestRow] = []
    header: list[str] | None = None
    for where, cells in _csv_lines(raw, path.name, problems):
        if header is None:
            header = cells
            if not cells or not _check_header(cells, where, path, problems):
                return []
        elif len(cells) == len(header):
            row = dict(zip(header, cells, strict=True))
            labels, unknown = (_listed(row.get(name, "")) for name in _LISTS)
            rows.append(ManifestRow(row["path"], labels, row["split"], row.get("group", ""), where, unknown))
        elif cells:
            problems.add(
                where,
                f"has {len(cells)} cells, the header has {len(header)}: put a cell with a comma in quotes",
            )
    return rows


def _listed(cell: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in re.split(r"[|;]", cell)) if cell else ()


def _csv_lines(raw: bytes, name: str, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """(where, cells) of every line that is not blank; no cells once its problem was added."""
    # Bytes that are not UTF-8 become lone surrogates, so that each line with one can be named.
    text = raw.decode("utf-8-sig", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    while True:
        where, problem = f"{name} line {reader.line_num + 1}", ""
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            cells, problem = [], f"is not valid CSV ({error}): is a quote missing?"
        if any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
            problem = "is not UTF-8: save the file as UTF-8"
        elif any("\n" in cell or "\r" in cell for cell in cells):
            problem = "has a cell of several lines: is a quote missing?"
        if problem:
            problems.add(where, problem)
            yield where, []
        elif any(cells):
            yield where, cells


def _read_parquet(path: Path, problems: Problems) -> list[ManifestRow]:
    rows: list[ManifestRow] = []
    number = 0
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if not _check_header(schema.names, path.name, path, problems) or not _check_types(schema, path.name, problems):
            return []
        for batch in file.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                where = f"{path.name} row {number}"
                labels, unknown = row["labels"], row.get("unknown") or []
                if labels is None or None in (*labels, *unknown):
                    problems.add(where, "has a null in labels: use an empty list for a picture without labels")
                    continue
                text = [(row.get(name) or "").strip() for name in ("path", "split", "group")]
                labels, unknown = (tuple(x.strip() for x in words) for words in (labels, unknown))
                rows.append(ManifestRow(text[0], labels, text[1], text[2], where, unknown))
    return rows


def guessed(header: Sequence[str], names: Sequence[str]) -> str:
    """The column that is called like one of these names, whatever its case, blanks and underscores; or nothing."""
    plain = {re.sub(r"[\W_]", "", column.casefold()): column for column in header}
    return next((plain[name] for name in names if name in plain), "")


def _converter(header: Sequence[str], path: Path) -> str:
    """The command that makes a manifest of a table with other columns."""
    picture, labels = guessed(header, PICTURE_COLUMNS), guessed(header, LABEL_COLUMNS)
    words = ["fedmpt", "prepare", "table", str(path), "--path-column", picture or "COLUMN"]
    words += ["--labels-column", labels] if labels else []
    return f"`{shlex.join([*words, '--out', str(path.with_name('manifest.csv'))])}` makes a manifest of it"


def _check_header(header: Sequence[str], where: str, path: Path, problems: Problems) -> bool:
    before = problems.count
    missing = [name for name in _REQUIRED if name not in header]
    if missing and len(header) == 1 and re.search(r"[;\t]", header[0]):
        columns = [column.strip() for column in re.split(r"[;\t]", header[0])]
        problems.add(
            where,
            "does not separate columns by commas: save the file with ',' between columns; or "
            f"{_converter(columns, path)}",
        )
        return False
    for name in missing:
        way_out = f"; {_converter(header, path)}" if name == missing[-1] else ""
        problems.add(where, f"column '{name}' is missing: the header needs {', '.join(_REQUIRED)}{way_out}")
    for name in sorted({n for n in header if n not in COLUMNS}):
        near = nearest(name, COLUMNS)
        read = name in (guessed(header, PICTURE_COLUMNS), guessed(header, LABEL_COLUMNS))
        hint = f": that command {'reads it' if read else 'leaves it out'}" if missing else ": remove it"
        problems.add(where, f"column {name!r} is not known{near or hint}")
    for name in sorted({n for n in header if n in COLUMNS and list(header).count(n) > 1}):
        problems.add(where, f"column '{name}' is there more than once")
    return problems.count == before


def _check_types(schema: pa.Schema, where: str, problems: Problems) -> bool:
    before = problems.count
    for column in schema:
        kind, inner = column.type, "a string"
        if column.name in _LISTS:
            inner = "a list of strings"
            listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            fits = listed and (_is_text(kind.value_type) or pa.types.is_null(kind.value_type))
        else:
            fits = _is_text(kind) or (column.name == "group" and pa.types.is_null(kind))
        if not fits:
            problems.add(where, f"column '{column.name}' has type {kind}: store {inner}")
    return problems.count == before


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def nearest(word: str, words: Sequence[str]) -> str:
    """`: did you mean 'x'?` for the entry of `words` that is spelt most like `word`, or nothing."""
    folded = {w.casefold(): w for w in words}
    close = difflib.get_close_matches(word.casefold(), folded, n=1)
    return f": did you mean {folded[close[0]]!r}?" if close else ""
