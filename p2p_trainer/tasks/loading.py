"""Reads splits from the hub or from a local folder or file, and says clearly what went wrong when it can't."""

import codecs
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset


_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

# File stems that each split goes by, the first found wins.
_STEMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


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
    options = {"keep_default_na": False, "na_values": [""]} if builder == "csv" else {}
    if path.suffix.lower() == ".tsv":
        options["delimiter"] = "\t"
    try:
        return load_dataset(builder, data_files=str(path), split="train", **options)
    except Exception as error:  # `datasets` wraps whatever the reader raised
        cause = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".!")
        if "corresponds to no data" in cause:
            raise ValueError(f"The data file {str(path)!r} is empty: 0 rows were read. Check the path.") from error
        raise ValueError(
            f"The data file {str(path)!r} can't be read as {builder}: {cause}. Expected rows with the same columns in "
            f"each{'' if builder == 'parquet' else ', one a line'}."
        ) from error


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
