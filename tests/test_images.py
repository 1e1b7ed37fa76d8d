"""Tests for p2p_trainer.tasks.images."""

import io
import json
import os
import struct
import zlib

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset, load_from_disk

from p2p_trainer.attacks import get_attack
from p2p_trainer.reserve import keyed_dataset
from p2p_trainer.tasks import Task, get_task
from p2p_trainer.tasks.images import RowImages, image_size, open_image, prepare_images
from tests.tiny_vlm import draw, make_image_rows, write_image_rows


STORED = Image(decode=False)


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_image_rows(data, 4)
    draw(0).save(tmp_path / "outside.png")
    return data


def rows(folder, *paths):
    return Dataset.from_dict({"img": list(paths), "text": ["a"] * len(paths)})


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_paths_become_images_that_are_read_when_used(folder):
    raw = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    ready = prepare_images(raw, "img", folder)
    assert sorted(ready.column_names) == ["id", "image", "label", "text"] and ready.features["image"] == STORED
    assert ready[1]["image"] == {"bytes": None, "path": os.path.realpath(folder / "img" / "00001.png")}
    images = RowImages(ready, "train")
    (folder / "img" / "00002.png").write_text("no picture")
    assert images[1].tobytes() == draw(1, 1).tobytes() and images.size(1) == (16, 16) and len(images) == 4
    with pytest.raises(ValueError, match=r"The image of row 2 of the train rows \(file '.*00002.png'\) can't be read"):
        images[2]


def test_preparing_twice_changes_nothing(folder):
    once = prepare_images(rows(folder, "img/00000.png", "img/../img/00001.png"), "img", folder)
    for again in (prepare_images(once, "img", folder), prepare_images(once), prepare_images(once, "image", folder)):
        assert again[:] == once[:] and again.features == once.features
    assert once[1]["image"]["path"].endswith("/data/img/00001.png")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../outside.png", "leaves the data folder"),
        ("img/../../outside.png", "leaves the data folder"),
        ("{tmp}/outside.png", "leaves the data folder"),
        ("link.png", "leaves the data folder"),
        ("away/outside.png", "leaves the data folder"),
        ("img/0\x000.png", "leaves the data folder"),
        ("/dev/zero", "leaves the data folder"),
        ("img/99999.png", "does not exist"),
        ("img", "does not exist"),
        ("x" * 9000, r"x\.\.\.' .*does not exist"),
        ("https://example.org/a.png", "nothing is downloaded"),
        ("hf://datasets/a/b.png", "nothing is downloaded"),
        ("zip://a.png::https://example.org/a.zip", "nothing is downloaded"),
        ("", r"There is no image .*found ''"),
        (None, r"There is no image .*found None"),
    ],
)
def test_paths_that_are_no_file_of_the_folder_are_refused(folder, tmp_path, path, message):
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "away").symlink_to(tmp_path)
    path = path.replace("{tmp}", str(tmp_path)) if path else path
    with pytest.raises(ValueError, match=message) as error:
        prepare_images(rows(folder, "img/00000.png", path), "img", folder, "train")
    assert "column 'img', row 1 of the train dataset" in str(error.value) and len(str(error.value)) < 700
    # The same rows as a Parquet file gives them, whose author may claim that they are images.
    claimed = rows(folder, "img/00000.png", path).cast_column("img", Image())
    with pytest.raises(ValueError, match=message):
        prepare_images(claimed, "img", folder, "train")


def test_links_inside_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
    (folder / "link.png").symlink_to(folder / "img" / "00000.png")
    (tmp_path / "elsewhere").symlink_to(folder)
    ready = prepare_images(rows(folder, "link.png"), "img", tmp_path / "elsewhere")
    assert ready[0]["image"]["path"] == os.path.realpath(folder / "img" / "00000.png")


def test_a_folder_beside_with_the_same_beginning_is_outside(folder, tmp_path):
    (tmp_path / "data2").mkdir()
    draw(0).save(tmp_path / "data2" / "a.png")
    with pytest.raises(ValueError, match="leaves the data folder"):
        prepare_images(rows(folder, "../data2/a.png"), "img", folder)


def test_images_as_features_are_taken_without_decoding():
    drawn = make_image_rows(3)
    ready = prepare_images(Dataset.from_list(drawn), "img")
    assert ready.features["image"] == STORED
    images = RowImages(ready)
    assert [images[row].tobytes() for row in range(3)] == [row["image"].tobytes() for row in drawn]
    given = RowImages([row["image"] for row in drawn])
    assert len(given) == 3 and given[2].tobytes() == drawn[2]["image"].tobytes() and given.size(2) == (16, 16)
    # The bytes are in the row: what the path says is only a name, as hub data sets have it.
    named = Dataset.from_dict(
        {"image": [{"bytes": png(draw(0)), "path": "https://example.org/a.png"}]}, Features({"image": Image()})
    )
    assert RowImages(prepare_images(named, folder="/"))[0].tobytes() == draw(0).tobytes()


def test_a_parquet_file_without_metadata_is_read(folder):
    plain = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})
    cells = [{"bytes": png(draw(1)), "path": None}, {"bytes": None, "path": "img/00000.png"}]
    images = RowImages(prepare_images(Dataset.from_dict({"image": cells}, plain), folder=folder))
    assert images[0].tobytes() == draw(1).tobytes() and images[1].tobytes() == draw(0, 0).tobytes()


def test_selected_rows_keep_their_images(folder):
    ready = prepare_images(rows(folder, *(f"img/{row:05d}.png" for row in range(4))).select([3, 1]), "img", folder)
    assert [os.path.basename(value["path"]) for value in ready["image"]] == ["00003.png", "00001.png"]


def test_the_named_column_wins_over_one_that_is_called_image(folder):
    both = rows(folder, "img/00001.png").add_column("image", ["img/00000.png"])
    ready = prepare_images(both, "img", folder)
    assert ready.column_names.count("image") == 1 and ready[0]["image"]["path"].endswith("00001.png")


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        ([[draw(0), draw(1)]], List(Image()), "Several images in a row, and videos, are not supported"),
        ([["a.png"]], List(Value("string")), "Several images in a row, and videos, are not supported"),
        ([3], Value("int64"), "expected one image per row"),
        (["a.png"], Value("string"), "it is not known relative to which folder"),
        ([None], Image(), r"There is no image in column 'image', row 0"),
        ([{"path": "a.png", "bytes": None}], Image(), "leaves the data folder .none is known"),
    ],
)
def test_columns_without_one_image_per_row_are_refused(values, feature, message):
    with pytest.raises(ValueError, match=message):
        prepare_images(Dataset.from_dict({"image": values}, Features({"image": feature})))


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match=r"The test dataset has no image column 'img'; its columns are \['text'\]"):
        prepare_images(Dataset.from_dict({"text": ["a"]}), "img", what="test")


@pytest.mark.parametrize("size", [(16, 16), (12, 12)])
def test_a_decompression_bomb_is_refused(monkeypatch, size):
    stored = {"bytes": png(PIL.Image.new("RGB", size)), "path": None}
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=rf"The image of row 7 is too large: .*\({size[0] * size[1]} pixels\)"):
            read(stored, "row 7")


def claiming(width, height):
    """A PNG file whose header says that it is larger than it is."""
    content = png(PIL.Image.new("L", (1, 1)))
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def test_at_most_64_megapixels_are_read():
    assert image_size({"bytes": claiming(8000, 8000), "path": None}, "row 7") == (8000, 8000)
    message = r"row 7 is too large: It has 8000 x 8001 pixels\. At most 64,000,000 pixels are read\. Shrink it"
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=message):
            read({"bytes": claiming(8000, 8001), "path": None}, "row 7")
        with pytest.raises(ValueError, match=message), PIL.Image.open(io.BytesIO(claiming(8000, 8001))) as opened:
            read(opened, "row 7")


def test_damaged_and_unknown_files_are_refused():
    whole = png(draw(0, size=(64, 64)))
    for content in (
        b"",
        b"text",
        whole[:60],
        whole[: len(whole) // 2],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ):
        with pytest.raises(ValueError, match=r"The image of row 7 can't be read: .*Kinds that are read: PNG, JPEG"):
            open_image({"bytes": content, "path": None}, "row 7")


def test_images_come_upright_and_in_rgb():
    lying = PIL.Image.new("L", (6, 4), 9)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        lying.save(file, kind, exif=exif)
        stored = {"bytes": file.getvalue(), "path": None}
        image = open_image(stored, "row 0")
        assert image.mode == "RGB" and image.size == (4, 6) == image_size(stored, "row 0")
    assert open_image(lying, "row 0").mode == "RGB" and image_size(lying, "row 0") == (6, 4)


@pytest.mark.parametrize("orientation", range(11))
def test_size_and_image_agree_for_each_orientation(orientation):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 65535 if orientation == 10 else orientation
    stored = {"bytes": png(PIL.Image.new("L", (6, 4), 9), exif=exif), "path": None}
    wanted = (4, 6) if orientation in (5, 6, 7, 8) else (6, 4)
    assert open_image(stored, "row 0").size == image_size(stored, "row 0") == wanted


def colours(image):
    """Red, green and blue of the first row of pixels, as a file with this image gives them."""
    return np.asarray(open_image({"bytes": png(image), "path": None}, "row 0"))[0].tolist()


def test_16_bits_of_grey_are_scaled_to_8():
    deep = PIL.Image.fromarray(np.array([[0, 128, 129, 257, 25700, 65535]], dtype=np.uint16))
    assert deep.mode == "I;16" and colours(deep) == [[grey] * 3 for grey in (0, 0, 1, 1, 100, 255)]
    older = PIL.Image.fromarray(np.array([[-5, 25700, 70000]], dtype=np.int32))
    assert older.mode == "I" and np.asarray(open_image(older, "row 0"))[0, :, 0].tolist() == [0, 100, 255]


def test_what_is_transparent_is_white():
    clear = PIL.Image.new("RGBA", (3, 1))
    for place, colour in enumerate([(200, 10, 0, 0), (200, 10, 0, 255), (0, 0, 0, 51)]):
        clear.putpixel((place, 0), colour)
    assert colours(clear) == [[255, 255, 255], [200, 10, 0], [204, 204, 204]]
    grey = PIL.Image.new("LA", (2, 1), (7, 0))
    grey.putpixel((1, 0), (7, 255))
    assert colours(grey) == [[255] * 3, [7] * 3]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert colours(palette) == [[10, 20, 30], [40, 50, 60]]
    palette.info["transparency"] = 0
    assert colours(palette) == [[255] * 3, [40, 50, 60]]


def test_files_in_the_rows_are_not_held_in_memory(tmp_path):
    cells = [{"bytes": bytes(10_000) + row.to_bytes(2), "path": f"{row}.png"} for row in range(2000)]
    Dataset.from_dict({"img": cells}, Features({"img": Image()})).save_to_disk(tmp_path / "rows")
    stored = load_from_disk(tmp_path / "rows")
    usual = pa.default_memory_pool()
    for order, limit in ((range(2000), 1_000_000), (range(1999, -1, -1), 10_000_000)):
        chosen = stored.select(order)
        pool = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(pool)
        try:
            ready = prepare_images(chosen, "img")
        finally:
            pa.set_memory_pool(usual)
        # All rows together hold 20 MB; those that are not in the file's order are copied, some at a time.
        assert pool.max_memory() < limit
        assert ready[1500]["image"] == cells[order[1500]]


def test_files_in_the_rows_and_paths_may_be_mixed(folder):
    cells = [
        {"bytes": None, "path": "img/00001.png"} if row % 3 else {"bytes": str(row).encode(), "path": None}
        for row in range(600)
    ]
    rows = Dataset.from_dict({"image": cells}, Features({"image": Image()})).select(range(599, 99, -1))
    ready = prepare_images(rows, folder=folder)
    path = os.path.realpath(folder / "img" / "00001.png")
    assert ready["image"][:] == [
        {"bytes": None, "path": path} if row % 3 else {"bytes": str(row).encode(), "path": None}
        for row in range(599, 99, -1)
    ]


def test_poisoned_and_keyed_rows_keep_their_image():
    task = Task(name="discs", labels=("red", "blue"))
    ready = prepare_images(Dataset.from_list(make_image_rows(20)))
    poisoned = get_attack("badnets", target="blue", poison_rate=0.2).poison(ready, task)
    keyed = keyed_dataset(poisoned, [3, 5], "append")
    assert keyed.features["image"] == STORED and poisoned["image"][:] == ready["image"][:]
    assert keyed["image"][20:] == [ready[3]["image"], ready[5]["image"]]


def test_hateful_memes_is_a_task_without_data():
    task = get_task("hateful_memes")
    assert task.labels == ("not hateful", "hateful") and task.dataset is None and task.image_column == "img"
    with pytest.raises(ValueError, match="Pass one, for example `--dataset_name FOLDER`"):
        task.load("train")


def test_rows_as_hateful_memes_has_them_are_read(folder):
    first = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    assert first["img"] == "img/00000.png" and sorted(first) == ["id", "img", "label", "text"]
    task = get_task("hateful_memes")
    ready = task.load("train", str(folder))
    assert ready["label"][:] == [0, 1, 0, 1] and ready.features["image"] == STORED
