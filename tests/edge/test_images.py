"""Folders and pictures as users have them: modes, rotation, names; and what is refused in one sentence."""

import numpy as np
import pytest
from PIL import Image

from telltale.edge.images import image_files, read_folder, read_image
from telltale.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
SIZE = (40, 60)


@pytest.mark.parametrize(
    ("mode", "ending"), [("P", "png"), ("CMYK", "tif"), ("RGBA", "png"), ("RGB", "bmp"), ("RGB", "GIF")]
)
def test_colours_survive_every_mode(mode, ending, tmp_path):
    smooth = Image.fromarray(np.repeat(PIXELS[:1, :1], 40, 0).repeat(60, 1))
    (smooth.quantize(8) if mode == "P" else smooth.convert(mode)).save(tmp_path / f"x.{ending}")
    assert np.abs(read_image(tmp_path / f"x.{ending}", SIZE).astype(int) - np.asarray(smooth)).max() <= 3


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = PIXELS[..., 0].astype(np.uint16) * 257
    for name in ("x.png", "x.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        assert (read_image(tmp_path / name, SIZE)[..., 1] == PIXELS[..., 0]).all()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match="F pixels"):
        read_image(tmp_path / "f.tif", SIZE)


def test_pictures_are_upright_and_transparency_hides(tmp_path):
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=turned)
    upright = np.asarray(Image.fromarray(PIXELS).rotate(-90, expand=True))
    assert (read_image(tmp_path / "x.png", (60, 40)) == upright).all()
    Image.fromarray(np.dstack([PIXELS, np.zeros(SIZE, np.uint8)])).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", SIZE).max() == 0


def test_one_pixel_is_an_image_and_half_a_file_is_none(tmp_path):
    Image.fromarray(PIXELS[:1, :1]).save(tmp_path / "1.png")
    read = read_image(tmp_path / "1.png", SIZE)
    assert (read == PIXELS[0, 0]).all()
    assert read.flags.writeable
    Image.fromarray(PIXELS).save(tmp_path / "x.jpg")
    for name, data in (("half.jpg", (tmp_path / "x.jpg").read_bytes()[:400]), ("none.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name, SIZE)


def folder_of(root, *classes):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        Image.fromarray(PIXELS).save(root / name / f"bild {number} ü.PNG")
    return root


def test_class_folders_by_name_in_any_unicode_form_and_by_number(tmp_path):
    labels = ("cat", "gr\u00f6\u00dfe", "crane", "crane", "empty")
    root = folder_of(tmp_path / "a", "gro\u0308\u00dfe", "cat", "3")
    (root / "empty").mkdir()
    (root / "cat" / ".hidden.png").write_bytes(b"no picture")
    (root / "cat" / "notes.txt").write_text("nothing")
    read = read_folder(root, SIZE, labels)
    assert {file.parent.name: label for file, label in zip(read.files, read.labels, strict=True)} == {
        "gro\u0308\u00dfe": 1,
        "cat": 0,
        "3": 3,
    }
    with pytest.raises(DataError, match=r"labels \[2, 3\] alike"):
        read_folder(folder_of(tmp_path / "b", "crane"), SIZE, labels)
    for name in ("dog", "5", "\u00b2"):
        with pytest.raises(DataError, match="none of the model's labels"):
            read_folder(folder_of(tmp_path / name, name), SIZE, labels)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_is_told_and_images_deep_in_a_class_count(tmp_path):
    tags = Image.Exif()
    tags[0x112], tags[0x8825] = 6, {1: "N", 2: (1.0, 2.0, 3.0)}
    damaged = bytearray(tags.tobytes())
    damaged[39] = 2  # the type of a GPS entry: Pillow raises a TypeError
    Image.fromarray(PIXELS).save(tmp_path / "x.jpg", exif=bytes(damaged))
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(tmp_path / "x.jpg", SIZE)
    folder_of(tmp_path / "a" / "dog", "2024", "2025")
    folder_of(tmp_path / "a", "cat")
    assert sorted(read_folder(tmp_path / "a", SIZE, ("cat", "dog")).labels) == [0, 1, 1]


def test_what_is_sent_needs_no_classes(tmp_path):
    root = folder_of(tmp_path / "cam", "2026-11-30", "anything")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(b"no picture")
    assert [file.parent.name for file in image_files(root)] == ["2026-11-30", "anything"]
    with pytest.raises(DataError, match="holds no images"):
        image_files(tmp_path / "cam" / ".cache" / "nothing")
