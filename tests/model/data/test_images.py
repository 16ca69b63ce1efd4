from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from srm_model.data import images
from srm_model.data.images import Picture, fault, find_faults, open_rgb, pixel_limit, to_rgb
from srm_model.training.faults import worker_start


def encoded(pixels: np.ndarray, suffix: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return stream.getvalue()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tiff"])
def test_a_whole_file_has_no_fault_and_a_cut_one_has(tmp_path, photograph, suffix):
    data = encoded(photograph(), suffix)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    assert fault(path, full=True) is None
    assert fault(path, full=False) is None
    for share in (0.0, 0.3, 0.7, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        assert fault(path, full=True), share


def test_a_jpeg_whose_tail_is_zeros_is_a_fault(tmp_path, photograph):
    data = encoded(photograph(), "jpg")
    path = tmp_path / "a.jpg"
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert fault(path, full=True) == "its data end before the image does"


def test_a_jpeg_with_a_tail_after_its_end_is_whole(tmp_path, photograph):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(photograph(), "jpg") + b"\0" * 100 + b"tail")
    assert fault(path, full=True) is None


@pytest.mark.parametrize("full", [True, False])
def test_what_is_no_image_is_a_fault(tmp_path, full):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("text.jpg", "folder.jpg", "absent.jpg"):
        assert fault(tmp_path / name, full=full), name


def test_faults_are_found_at_their_positions(tmp_path, photograph):
    paths = [tmp_path / f"{i}.jpg" for i in range(6)]
    for i, path in enumerate(paths):
        data = encoded(photograph(seed=i), "jpg")
        path.write_bytes(data[:300] if i in (1, 4) else data)
    assert list(find_faults(paths, verify="full")) == [1, 4]


def test_fast_reads_headers_only(tmp_path, photograph):
    path = tmp_path / "a.bmp"
    path.write_bytes(encoded(photograph(), "bmp")[:5000])
    assert find_faults([path], verify="fast") == {}
    assert list(find_faults([path], verify="full")) == [0]
    with pytest.raises(ValueError, match="verify='quick': expected one of 'full', 'fast'"):
        find_faults([path], verify="quick")


def test_a_large_set_is_decoded_once_until_a_file_changes(tmp_path, photograph, monkeypatch):
    monkeypatch.setattr(images, "_REMEMBERED_FROM", 2)
    read = []
    monkeypatch.setattr(images, "fault", lambda path, full: read.append(path) or fault(path, full=full))
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(encoded(photograph(), "png"))
    assert find_faults(paths, verify="full") == {}
    assert find_faults(paths, verify="full") == {}
    assert len(read) == 2
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[:-200] + bytes(200))  # of the same size
    os.utime(paths[1], ns=(0, 1))
    assert list(find_faults(paths, verify="full")) == [1]
    assert list(find_faults(paths, verify="full")) == [1]  # a faulty dataset is checked again on every call
    assert len(read) == 6


def test_a_cache_folder_that_cannot_be_written_does_not_matter(tmp_path, photograph, monkeypatch):
    monkeypatch.setattr(images, "_REMEMBERED_FROM", 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photograph(), "png"))
    assert find_faults([path], verify="full") == {}


@pytest.mark.parametrize("home", [None, "", "/proc/none", "relative"])
def test_without_a_cache_folder_every_call_checks(tmp_path, photograph, monkeypatch, home):
    """Without a usable cache folder, every call checks the files.

    There are four cases of HOME: unset, for a user without a passwd entry; empty; not writable; a relative path.
    """
    monkeypatch.setattr(images, "_REMEMBERED_FROM", 1)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.chdir(tmp_path)
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no entry"])
    else:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(
        images.Path, "mkdir", lambda *_, **__: pytest.fail("made") if home == "relative" else denied()
    )
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photograph(), "png"))
    for _ in range(2):
        assert find_faults([path], verify="full") == {}
    path.write_bytes(b"")
    assert list(find_faults([path, tmp_path / "gone.png"], verify="full")) == [0, 1]


def test_a_cache_folder_that_may_not_be_looked_into(tmp_path, photograph, monkeypatch):
    monkeypatch.setattr(images, "_REMEMBERED_FROM", 1)
    monkeypatch.setattr(images.Path, "is_file", denied)
    monkeypatch.setattr(images.Path, "exists", denied)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photograph(), "png"))
    assert find_faults([path], verify="full") == {}


def denied(*_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_the_bar_is_for_terminals_that_want_it(tmp_path, photograph, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photograph(), "png"))
    shown = []
    monkeypatch.setattr(
        images, "tqdm", lambda answers, **options: shown.append(options["disable"]) or answers
    )
    for progress in (True, False):
        assert find_faults([path], verify="full", progress=progress) == {}
    assert shown == [None, True]  # None: on a terminal only


def test_the_limit_of_pixels(tmp_path, photograph):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photograph(40), "png"))
    with pixel_limit(1598):
        for told in (fault(path, full=True), fault(path, full=False)):
            assert told.startswith("it has more than 1,598 pixels; --max-pixels")
        with pytest.raises(
            ValueError, match=r"a.png: not readable as an image \(it has more than 1,598 pixels"
        ):
            open_rgb(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for enough in (1600, 0, None):
            with pixel_limit(enough):
                assert open_rgb(path).size == (40, 40)


@pytest.mark.parametrize(("width", "height"), [(102, 1), (1, 101), (6, 13)])
def test_the_limit_is_met_to_the_pixel(tmp_path, width, height):
    path = tmp_path / "a.png"
    Image.new("L", (width, height)).save(path)
    with pixel_limit(width * height):
        assert open_rgb(path).size == (width, height)
        assert fault(path, full=True) is None
    with pixel_limit(width * height - 1):
        with pytest.raises(ValueError, match=f"more than {width * height - 1} pixels"):
            open_rgb(path)
        assert fault(path, full=False).startswith(f"it has more than {width * height - 1} pixels")


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
DEEP = ("I;16", "I;16B", "I;16L")


@pytest.mark.parametrize("mode", [*MODES, *DEEP, "P and transparency", "RGB and transparency", "I of PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_parts_are_those_of_the_whole_image(photograph, mode, orientation):
    """`Picture.part` equals a crop of the whole converted and rotated image, bit for bit, in every mode.

    Resizing in bands equals resizing in one step.
    """
    colour = Image.fromarray(np.ascontiguousarray(photograph(40)[:, :29]))
    if mode in DEEP or mode == "I of PNG":
        deep = np.asarray(colour.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(deep) if mode != "I of PNG" else Image.fromarray(deep.astype(np.int32))
        if mode == "I;16B":
            image = Image.frombytes(mode, colour.size, deep.astype(">u2").tobytes())
    elif mode == "P and transparency":
        image = colour.quantize(8)
        image.info["transparency"] = bytes((0, 255, 100, 7))
    elif mode == "RGB and transparency":
        image = colour
        image.info["transparency"] = colour.getpixel((3, 3))
    elif mode in ("LA", "PA", "RGBA", "RGBa"):
        image = colour.convert("RGBA")
        image.putalpha(colour.getchannel("G"))
        for step in ("LA", "PA") if mode == "PA" else (mode,):
            image = image.convert(step)
    elif mode == "LAB":
        image = Image.frombytes("LAB", colour.size, colour.tobytes())
    else:
        image = colour.convert(mode)
    image.format = "PNG"
    image.getexif()[0x0112] = orientation
    whole = images.to_rgb(image)
    if orientation > 1:
        whole = whole.transpose(images._TURNS[orientation])
    picture = Picture(image)
    assert picture.size == whole.size
    np.testing.assert_array_equal(picture.part(0, 0, *picture.size), whole)
    box = 3, 5, picture.size[0] - 1, 21
    np.testing.assert_array_equal(picture.part(*box), whole.crop(box))
    fractional = (2.25, 3.5, 23.75, 25.0)
    for size, area in (((8, 11), None), ((50, 61), None), ((9, 8), fractional), ((43, 40), fractional)):
        expected = whole.resize(size, Image.Resampling.BICUBIC, box=area)
        for band in (1, 100, 10_000):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(images, "_BAND", band)
                np.testing.assert_array_equal(picture.resized(size, area), expected)


MEASURED = """
import re, sys
from pathlib import Path
from PIL import Image
from srm_model.data import load_image
from srm_model.data.images import fault

def peak():  # ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

Image.init()
before = peak()
if sys.argv[2] == "load":
    load_image(sys.argv[1], 64)
else:
    assert fault(Path(sys.argv[1]), full=True) is None
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("work", "mode", "bytes_per_pixel"),
    [("load", "P", 1), ("load", "LA", 4), ("load", "RGB", 4), ("check", "P", 1)],
)
def test_a_large_image_is_not_copied_to_be_converted_or_turned(tmp_path, work, mode, bytes_per_pixel):
    """Peak memory stays close to the size of the decoded image.

    Pillow stores a pixel with two or more channels in four bytes.
    """
    side, path = 5000, tmp_path / "a.png"
    image = Image.new(mode, (side, side))
    exif = image.getexif()
    exif[0x0112] = 6
    options = {"transparency": 0} if mode == "P" else {}
    image.save(path, compress_level=1, exif=exif, **options)
    command = [sys.executable, "-c", MEASURED, str(path), work]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    decoded = side * side * bytes_per_pixel / 1024
    # The allowance covers a band in four copies, the image at its new width and the file's bytes.
    assert int(done.stdout) < decoded + 40 * 1024, f"{int(done.stdout)} KiB for {decoded:.0f} KiB of pixels"


def test_every_mode_becomes_rgb():
    grey = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
    rgb = np.stack([grey, grey // 2, 255 - grey], -1)
    three = np.repeat(grey[..., None], 3, -1)

    def read(image: Image.Image, **options) -> np.ndarray:
        stream = io.BytesIO()
        image.save(stream, "PNG", **options)
        return np.asarray(to_rgb(Image.open(stream)))

    np.testing.assert_array_equal(read(Image.fromarray(rgb)), rgb)
    np.testing.assert_array_equal(read(Image.fromarray(grey)), three)
    np.testing.assert_array_equal(read(Image.fromarray(grey.astype(np.uint16) * 257)), three)
    palette = Image.fromarray(three).quantize(256)
    np.testing.assert_array_equal(read(palette), np.asarray(palette.convert("RGB")))


def test_transparency_lies_over_white():
    colour = np.full((2, 2, 4), (200, 0, 100, 255), np.uint8)
    colour[0, 0, 3] = 0
    colour[0, 1, 3] = 51  # one fifth
    result = np.asarray(to_rgb(Image.fromarray(colour)))
    assert result[0, 0].tolist() == [255, 255, 255]
    assert result[0, 1].tolist() == [244, 204, 224]
    assert result[1, 1].tolist() == [200, 0, 100]
    palette = Image.fromarray(colour[..., :3]).quantize(2)
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    assert np.asarray(to_rgb(palette))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_the_orientation_in_exif_is_applied(tmp_path, suffix):
    """Images stored with each of the eight EXIF orientations, and an invalid one, load as the same upright picture."""
    upright = Image.fromarray(np.zeros((32, 48, 3), np.uint8))
    upright.paste("white", (0, 0, 16, 16))
    stored = {
        1: (upright, 1),
        **{tag: (upright.transpose(turn), tag) for tag, turn in UNDO.items()},
        9: (upright, 9),
    }
    for name, (picture, tag) in stored.items():
        exif = picture.getexif()
        exif[0x0112] = tag
        path = tmp_path / f"{name}.{suffix}"
        picture.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        found = np.asarray(open_rgb(path)).astype(int)
        assert found.shape == (32, 48, 3), tag
        assert found[:12, :12].min() > 200, tag
        assert found[20:].max() < 50, tag
        assert found[:, 20:].max() < 50, tag


UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def test_broken_exif_of_a_whole_image_does_not_matter(tmp_path):
    Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(
        tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"
    )
    assert open_rgb(tmp_path / "a.jpg").size == (9, 4)


def test_pixels_without_a_known_range_are_refused(tmp_path):
    path = tmp_path / "a.tiff"
    Image.fromarray(np.zeros((4, 4), np.float32)).save(path)
    with pytest.raises(ValueError, match=r"a.tiff.*mode 'F'"):
        open_rgb(path)
    assert "mode 'F'" in fault(path, full=True)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.png: no such file; expected an image"):
        open_rgb(tmp_path / "absent.png")
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"bad\.png: not readable as an image"):
        open_rgb(os.fspath(tmp_path / "bad.png"))


def test_workers_that_are_not_forked_take_the_limit_of_pixels(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pixel_limit(50):
        begin = pickle.loads(pickle.dumps(worker_start()))
    assert Image.MAX_IMAGE_PIXELS == 7
    begin(0)
    assert Image.MAX_IMAGE_PIXELS == 25
