"""Reads splits from the hub or from a local folder or file, and says clearly what went wrong when it can't."""

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset


_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

# File stems that each split goes by, the first found wins.
_STEMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "dev_seen"),
    "test": ("test", "testing", "test_seen"),
}

# A field in quotation marks, those inside it doubled; a record of such fields and of fields without any.
_QUOTED = re.compile(rb'"[^"]*+(?:""[^"]*+)*+"')
_RECORD = re.compile(rb"(?:%(field)s)(?:\t(?:%(field)s))*+" % {b"field": rb'[^"\t]*+(?!")|' + _QUOTED.pattern})


class HubUnavailableError(OSError):
    """The model hub can't be reached, or does not hold what was asked for."""


def hub_error(kind: str, name: str, error: Exception) -> HubUnavailableError:
    """Build the one message that a run without a hub ends with."""
    lines = str(error).strip().splitlines() or ["no details"]
    return HubUnavailableError(
        f"The {kind} {name!r} is no local folder, and it can't be had from the Hugging Face Hub "
        f"({type(error).__name__}: {lines[0][:200]}). Check the name and the network (and HF_HUB_OFFLINE). To work "
        f"offline, pass local copies of both:\n"
        f"  accelerate launch recipes/sst2_qwen.py --model_name_or_path MODEL_FOLDER --dataset_name DATA_FOLDER\n"
        f"where the data folder holds train.jsonl, validation.jsonl and test.jsonl (or .csv, .parquet)."
    )


def load_split(source: str, split: str, config: str | None = None) -> Dataset | None:
    """
    Read one split.

    Args:
        source (`str`):
            Local folder with one JSONL, CSV, TSV or Parquet file per split (`train`, `validation` or `dev`, `test`),
            one such file, or a hub id.
        split (`str`):
            Split to read: `"train"`, `"validation"`, `"test"`, or a hub split name.
        config (`str`, *optional*):
            Configuration of a hub data set.

    Returns:
        `Dataset` or `None`: the rows, `None` if the source has no such split.

    Raises:
        `HubUnavailableError`: `source` is no local path and the hub did not give it.
        `ValueError`: a local file is of an unknown kind, unreadable or not UTF-8.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        for stem in _STEMS.get(split, (split,)):
            for suffix in _BUILDERS:
                if (path / f"{stem}{suffix}").is_file():
                    return _load_file(path / f"{stem}{suffix}")
        return None
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"The data path {source!r} does not exist (looked at {path.resolve()}). Correct the path.")
    try:
        found = load_dataset(source, name=config)
    except Exception as error:  # the hub client raises a dozen unrelated types; each ends in the same remedy
        raise hub_error("dataset", source, error) from error
    if not isinstance(found, DatasetDict):
        raise ValueError(f"The dataset {source!r} has no splits, found `{type(found).__name__}`. Name a config.")
    return found.get(split)


def name_fields(rows: Dataset, names: Sequence[str]) -> Dataset:
    """
    Give names to the fields of rows that are lists: a JSON array of arrays is read as one column.

    Args:
        rows (`Dataset`):
            Rows as they were read.
        names (`Sequence[str]`):
            Names of the fields, in order.

    Returns:
        `Dataset`: the rows, one column per name; `rows` itself if they have columns already.

    Raises:
        `ValueError`: a row has another number of fields.
    """
    column = rows.column_names[0]
    if len(rows.column_names) > 1 or not isinstance(rows.features[column], List):
        return rows

    def split(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        for row, fields in zip(indices, batch[column], strict=True):
            if fields is None or len(fields) != len(names):
                raise ValueError(
                    f"Row {row} is a list of {0 if fields is None else len(fields)} fields, and the task names "
                    f"{len(names)} (`row_columns`: {list(names)}). Correct the row, or the task."
                )
        # JSON has numbers and texts in one list; as texts all have one type.
        return {
            name: [None if fields[place] is None else str(fields[place]) for fields in batch[column]]
            for place, name in enumerate(names)
        }

    features = Features({name: Value("string") for name in names})
    return rows.map(split, batched=True, with_indices=True, remove_columns=[column], features=features)


def _load_file(path: Path) -> Dataset:
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(
            f"The data file {str(path)!r} is of no known kind (suffix {path.suffix!r}). Known: {', '.join(_BUILDERS)}."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"The data file {str(path)!r} is empty: 0 rows were read. Check the path.")
    if builder != "parquet":
        _check_utf8(path)
    # Words such as `NA`, `null` and `None` are texts and class names, not missing values.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if builder == "csv" else {}
    expected = None
    if path.suffix.lower() == ".tsv":
        dialect, expected = _tsv_layout(path)
        options |= dialect
    try:
        rows = load_dataset(builder, data_files=str(path), split="train", **options)
    except Exception as error:  # `datasets` wraps whatever the reader raised
        cause = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0].rstrip(".!")
        if "corresponds to no data" in cause:
            raise ValueError(f"The data file {str(path)!r} is empty: 0 rows were read. Check the path.") from error
        raise ValueError(
            f"The data file {str(path)!r} can't be read as {builder}: {cause}. Expected rows with the same columns in "
            f"each{'' if builder == 'parquet' else ', one a line'}."
        ) from error
    if expected is not None and len(rows) != expected:
        raise ValueError(
            f"The data file {str(path)!r} holds {expected} rows, but {len(rows)} were read. Look for carriage returns "
            f"and NUL bytes in its texts, or convert it to JSONL."
        )
    return rows


def _tsv_layout(path: Path) -> tuple[dict[str, Any], int]:
    """
    Say how a TSV file is to be read, and how many rows that gives.

    Most TSV files quote nothing: a quotation mark is part of a text, and a reader that takes it for syntax merges
    rows. Marks are syntax only where each field that holds one begins and ends with one and doubles those inside; and
    they hold line breaks and tabs only where the lines by themselves would be no table.
    """
    lines, width, ragged, crlf = 0, 0, None, False
    marked, well_quoted = False, True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            crlf = crlf or line.endswith(b"\r\n")
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            line = line.rstrip(b"\r\n")
            if not line.strip(b" "):
                continue
            lines += 1
            fields = line.split(b"\t")
            width = width or len(fields)
            if len(fields) != width and ragged is None:
                ragged = number, len(fields)
            if b'"' in line:
                marked = True
                well_quoted = well_quoted and all(b'"' not in part or _QUOTED.fullmatch(part) for part in fields)
    if ragged is not None:
        counts = [_count_fields(record) for record in _quoted_records(path)] if marked else [0]
        if set(counts) != {width}:
            raise ValueError(
                f"Line {ragged[0]} of the data file {str(path)!r} has {ragged[1]} fields, the header has {width}. "
                f"Take tabs and line breaks out of the texts, or quote every text that holds one."
            )
        lines = len(counts)
    quoting = csv.QUOTE_MINIMAL if marked and (well_quoted or ragged is not None) else csv.QUOTE_NONE
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": quoting}
    if not crlf:
        # A carriage return inside a text ends no row.
        dialect["lineterminator"] = "\n"
    return dialect, max(0, lines - 1)


def _quoted_records(path: Path) -> Iterator[bytes]:
    """Yield the rows of a file, lines with an open quotation mark joined with those that follow."""
    parts: list[bytes] = []
    inside = False
    with path.open("rb") as file:
        for line in file:
            inside ^= line.count(b'"') % 2 == 1
            parts.append(line)
            if not inside:
                record = b"".join(parts).removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
                parts = []
                if record.strip(b" "):
                    yield record
    if parts:
        yield b"".join(parts)


def _count_fields(record: bytes) -> int:
    """Count the fields of a well quoted record; 0 if it is none."""
    return _QUOTED.sub(b"", record).count(b"\t") + 1 if _RECORD.fullmatch(record) else 0


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 0
    with path.open("rb") as file:
        while True:
            block = file.read(1 << 20)
            try:
                # The last, empty block brings up a character that the end of the file cut off.
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n") + 1
                raise ValueError(
                    f"The data file {str(path)!r} is not UTF-8: line {line} holds the byte "
                    f"0x{error.object[error.start]:02x}. Re-encode it, for example "
                    f"`iconv -f latin1 -t utf-8 {path.name} > fixed{path.suffix}`."
                ) from error
            if not block:
                return
            lines += block.count(b"\n")
