"""Checks the image of each row and gives its column the name `image`; pixels are read when they are used."""

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value
from datasets import Image as ImageFeature

from .rows import IMAGE


_T = TypeVar("_T")

# Name of the column while it is being built.
_NEW = "p2p_image"

# Kinds of files that are read. Pillow knows more, and hands some of them to other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# Pillow's own limit is higher, and a file of some kilobytes can reach it.
_MAX_PIXELS = 64_000_000

# Kept undecoded: `datasets` would follow a URL, and decode where a row is merely looked at.
_STORED = ImageFeature(decode=False)

# Rows that are checked at once; they may hold the bytes of whole files.
_BATCH_ROWS = 256

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def prepare_images(
    dataset: Dataset, column: str = IMAGE, folder: str | Path | None = None, what: str = "input"
) -> Dataset:
    """
    Give a dataset the column `image`, and check that each row has one image; no pixel is read yet.

    Args:
        dataset (`Dataset`):
            Rows as they came.
        column (`str`, *optional*, defaults to `"image"`):
            Column that holds the image: a path relative to `folder` (str), or a `datasets.Image`. A column `image`
            does as well.
        folder (`str` or `Path`, *optional*):
            Folder of the data file. No path may leave it. `None`: the rows come from the caller's own code, and hold
            images, or their absolute paths, as `datasets.Image`.
        what (`str`, *optional*, defaults to `"input"`):
            What the rows are, for the messages.

    Returns:
        `Dataset`: the rows, with `image` as `datasets.Image(decode=False)`; see [`open_image`].

    Raises:
        `ValueError`: the column is missing or holds something else, or a row has no image, an address on the network,
        a path that leaves the folder, or one where there is no file.
    """
    found = column if column in dataset.column_names else IMAGE
    if found not in dataset.column_names:
        raise ValueError(
            f"The {what} dataset has no image column {column!r}; its columns are {dataset.column_names}. Rename the "
            f"column to 'image', or name yours with `image_column` in the task's YAML."
        )
    feature = dataset.features[found]
    if not _is_image(feature):
        raise ValueError(
            f"Column {found!r} of the {what} dataset holds {feature}, expected one image per row: a path (str) or a "
            f"`datasets.Image`. Several images in a row, and videos, are not supported. Convert the column."
        )
    root = None if folder is None else os.path.realpath(folder)
    if isinstance(feature, Value) and root is None:
        raise ValueError(
            f"Column {found!r} of the {what} dataset holds paths, and it is not known relative to which folder. Load "
            f"the rows with `Task.load`, or make them absolute and `cast_column({found!r}, datasets.Image())`."
        )
    checked: list[str | None] = []
    rewritten = isinstance(feature, Value)
    for contents, paths in _stored(dataset, found):
        resolved = [
            path if content else _checked(path, f"column {found!r}, row {row} of the {what} dataset", root)
            for row, (path, content) in enumerate(
                zip(paths, contents.is_valid().to_pylist(), strict=True), start=len(checked)
            )
        ]
        rewritten |= resolved != paths
        checked += resolved
    if rewritten:
        # Added before the old column goes: a table without columns has no rows.
        dataset = dataset.add_column(_NEW, _with_paths(dataset, found, checked), feature=_STORED)
        dataset = dataset.remove_columns(found)
        found = _NEW
    elif feature != _STORED:
        dataset = dataset.cast_column(found, _STORED)
    if found == IMAGE:
        return dataset
    dataset = dataset.remove_columns(IMAGE) if IMAGE in dataset.column_names else dataset
    return dataset.rename_column(found, IMAGE)


def open_image(stored: Mapping[str, Any] | PIL.Image.Image, where: str) -> PIL.Image.Image:
    """
    Read an image; its first frame, upright and in RGB, on white where it is transparent.

    Args:
        stored (`Mapping[str, Any]` or `PIL.Image.Image`):
            What a row of [`prepare_images`] holds: `path` and `bytes`. An image that is already open does as well.
        where (`str`):
            Which row it belongs to, for the message.

    Returns:
        `PIL.Image.Image`: the image.

    Raises:
        `ValueError`: it can't be read, is of an unknown kind, or has more than 64 million pixels.
    """
    return _read(stored, where, _upright)


def image_size(stored: Mapping[str, Any] | PIL.Image.Image, where: str) -> tuple[int, int]:
    """
    Read width and height of an image from its header, as [`open_image`] would give them.

    Args:
        stored (`Mapping[str, Any]` or `PIL.Image.Image`):
            As for [`open_image`].
        where (`str`):
            Which row it belongs to, for the message.

    Returns:
        `tuple[int, int]`: width and height in pixels.
    """
    return _read(stored, where, _upright_size)


class RowImages:
    """
    The images of some rows, each read when it is asked for.

    Args:
        rows (`Dataset` or `Sequence[Mapping[str, Any] | PIL.Image.Image]`):
            Rows of [`prepare_images`], or images as [`open_image`] takes them.
        what (`str`, *optional*, defaults to `"evaluation"`):
            What the rows are, for the messages.
    """

    def __init__(
        self, rows: Dataset | Sequence[Mapping[str, Any] | PIL.Image.Image], what: str = "evaluation"
    ) -> None:
        # The column of a data set is read row by row too.
        self._stored = rows.select_columns([IMAGE])[IMAGE] if isinstance(rows, Dataset) else rows
        self._what = what
        self._sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, row: int) -> PIL.Image.Image:
        return open_image(self._stored[row], self._name(row))

    def size(self, row: int) -> tuple[int, int]:
        """
        Say how large an image is.

        Args:
            row (`int`):
                Row.

        Returns:
            `tuple[int, int]`: width and height in pixels.
        """
        if row not in self._sizes:
            self._sizes[row] = image_size(self._stored[row], self._name(row))
        return self._sizes[row]

    def _name(self, row: int) -> str:
        return f"row {row} of the {self._what} rows"


def _is_image(feature: Any) -> bool:
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string")
    if isinstance(feature, dict):
        # What a Parquet file without the metadata of `datasets` holds.
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, ImageFeature)


def _stored(dataset: Dataset, column: str) -> Iterator[tuple[pa.Array, list[str | None]]]:
    """Yield the files' contents, null where there is only a path, and the paths; contents are not copied."""
    for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=_BATCH_ROWS):
        for values in batch[column].chunks:
            if isinstance(dataset.features[column], Value):
                yield pa.nulls(len(values), pa.binary()), values.to_pylist()
            else:
                # Not `field`: what lies below a row that is null is anything.
                yield pc.struct_field(values, "bytes"), pc.struct_field(values, "path").to_pylist()


def _with_paths(dataset: Dataset, column: str, paths: list[str | None]) -> pa.ChunkedArray:
    parts, row = [], 0
    for contents, _ in _stored(dataset, column):
        own = pa.array(paths[row : row + len(contents)], pa.string())
        parts.append(pa.StructArray.from_arrays([contents, own], ["bytes", "path"]))
        row += len(contents)
    return pa.chunked_array(parts)


def _checked(path: str | None, where: str, root: str | None) -> str:
    if not path:
        raise ValueError(f"There is no image in {where} (found {path!r}). Add one, or remove the row.")
    shown = repr(path if len(path) <= 200 else f"{path[:200]}...")
    if _URL.match(path):
        raise ValueError(
            f"The image in {where} is the address {shown}: nothing is downloaded. Store the files beside the rows, "
            f"and name them by their path."
        )
    if root is None:
        resolved = path if os.path.isabs(path) else None
    else:
        resolved = _inside(root, path)
    if resolved is None:
        raise ValueError(
            f"The path {shown} in {where} leaves the data folder {root or '(none is known)'}. Images lie in the "
            f"folder of the data file or below it; correct the path, or remove the row."
        )
    if not os.path.isfile(resolved):
        raise ValueError(f"The image {shown} in {where} does not exist. Put the file there, or remove the row.")
    return resolved


def _inside(root: str, path: str) -> str | None:
    """Resolve a path, links included; `None` if it leads out of the folder."""
    try:
        # One that was resolved before is absolute, and still inside.
        resolved = os.path.realpath(os.path.join(root, path))
    except (OSError, ValueError):  # a NUL byte, say
        return None
    return resolved if resolved.startswith(os.path.join(root, "")) else None


def _read(stored: Mapping[str, Any] | PIL.Image.Image, where: str, use: Callable[[PIL.Image.Image], _T]) -> _T:
    file = "" if isinstance(stored, PIL.Image.Image) or not stored["path"] else f" (file {stored['path']!r})"
    try:
        if isinstance(stored, PIL.Image.Image):
            return use(_limited(stored))
        source = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        with warnings.catch_warnings():
            # Pillow refuses twice its limit, and only warns below.
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(source, formats=_FORMATS) as image:
                return use(_limited(image))
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"The image of {where}{file} is too large: {error} At most {_MAX_PIXELS:,} pixels are read. Shrink it, or "
            f"remove the row."
        ) from error
    except Exception as error:  # damaged files make Pillow raise a dozen unrelated types
        raise ValueError(
            f"The image of {where}{file} can't be read: {str(error) or type(error).__name__}. Kinds that are read: "
            f"{', '.join(_FORMATS)}. Replace the file, or remove the row."
        ) from error


def _limited(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.width * image.height > _MAX_PIXELS:
        raise PIL.Image.DecompressionBombError(f"It has {image.width} x {image.height} pixels.")
    return image


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    return _in_rgb(PIL.ImageOps.exif_transpose(image) if _orientation(image) != 1 else image)


def _upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    # These lie on their side; numbers above 8 mean nothing.
    return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else image.size


def _in_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey, as in radiology, which Pillow would cut off at 255 instead of scaling.
        grey = np.rint(np.asarray(image).clip(0, 65_535) / 257).astype(np.uint8)
        return PIL.Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Below transparent pixels lies any colour, often black: under black letters nothing would be left to read.
    visible = image.convert("RGBA")
    page = PIL.Image.new("RGB", image.size, "white")
    page.paste(visible, mask=visible)
    return page


def _orientation(image: PIL.Image.Image) -> int:
    # In a PNG, Pillow would look behind the pixels too, and decode them for that.
    known = image.format != "PNG" or "exif" in image.info
    return image.getexif().get(PIL.ExifTags.Base.Orientation, 1) if known else 1
