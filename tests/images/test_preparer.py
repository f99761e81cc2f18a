"""Images: the processor's arithmetic, what is refused and how it is named, the cache."""

import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from luspo_jax.images.pixels import Patching
from luspo_jax.images.preparer import ImagePreparer, ImageRefusal, PreparedImage
from luspo_jax.images.record import REASONS, ImageError, StoredImage
from luspo_jax.images.settings import ImageSettings, read_settings
from tests.images.image_cases import SETTINGS, WHOLE, encoded, gradient, png_header, stored


@pytest.fixture(scope="module")
def preparer():
    with ImagePreparer(SETTINGS, workers=2) as ready:
        yield ready


def fnv1a64(values):
    """FNV-1a of bytes, 64 bits."""
    found = 0xCBF29CE484222325
    for byte in values:
        found = ((found ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{found:016x}"


def golden_cases():
    return [
        ("qwen2_vl", 37, 23),
        ("qwen2_vl", 259, 194),
        ("qwen3_vl", 37, 23),
        ("qwen3_vl", 259, 194),
    ]


@pytest.mark.parametrize("case", golden_cases())
def test_fingerprints(case, shared_data):
    path = shared_data / "qwen" / "image_preprocess_golden" / "qwen_preprocess_fingerprints.json"
    (golden,) = [
        entry
        for entry in json.loads(path.read_text())["cases"]
        if (entry["model"], entry["width"], entry["height"]) == case
    ]
    patching = {
        "qwen2_vl": Patching(min_pixels=200_704, max_pixels=1_003_520),
        "qwen3_vl": Patching(patch_size=16, min_pixels=65_536, max_pixels=16_777_216),
    }[case[0]]
    settings = ImageSettings(patching, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    with ImagePreparer(settings, workers=1) as unnormalized:
        (image,) = unnormalized.prepare([stored(encoded(gradient(*case[1:])))])
    patches = image.patches()
    assert list(patches.shape) == golden["shape"]
    assert list(image.grid_thw) == golden["grid_thw"]
    values = np.rint(255 * patches).astype(np.uint8)
    assert fnv1a64(values.tobytes()) == golden["fnv1a_patch_u8"]


def transformers_processor(folder):
    """The class that works without torchvision, under its name of the day."""
    try:
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as module

        return module.Qwen2VLImageProcessorPil.from_pretrained(folder)
    except ImportError:
        from transformers.models.qwen2_vl import image_processing_qwen2_vl as module

        return module.Qwen2VLImageProcessor.from_pretrained(folder)


SIZES = [
    (56, 56),
    (64, 64),
    (13, 2000),
    (5, 990),
    (600, 300),
    (301, 97),
    (28, 28),
    (1, 150),
    (1200, 900),
]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("limits", [{}, {"min_pixels": 50_176, "max_pixels": 200_704}], ids=str)
def test_patches_are_those_of_transformers_bit_for_bit(size, limits, shared_data):
    folder = shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct"
    reference = transformers_processor(folder)
    if limits:
        reference.size = {"shortest_edge": 50_176, "longest_edge": 200_704}
    settings = read_settings(folder, **limits)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    theirs = reference(images=PIL.Image.fromarray(pixels), return_tensors="np")
    (ours,) = ImagePreparer(settings).prepare([stored(pixels)])
    assert ours.grid_thw == tuple(theirs["image_grid_thw"][0].tolist())
    assert ours.num_tokens == theirs["image_grid_thw"].prod() // 4
    np.testing.assert_array_equal(ours.patches(), theirs["pixel_values"])
    assert ours.patches().dtype == np.float32


@pytest.mark.parametrize(
    "name", ["grayscale", "odd_dims", "small", "tiny", "very_tall", "very_wide"]
)
def test_real_files_are_those_of_transformers(name, shared_data, preparer):
    file = shared_data / "qwen" / "image_preprocess_golden" / "images" / f"{name}.jpg"
    theirs = transformers_processor(shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct")(
        images=PIL.Image.open(file), return_tensors="np"
    )
    (ours,) = preparer.prepare([stored(file.read_bytes())])
    # This preparer allows fewer pixels than the file's settings; these images stay below.
    np.testing.assert_array_equal(ours.patches(), theirs["pixel_values"])


MODES = ["1", "L", "LA", "P", "RGB", "CMYK", "YCbCr"]


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_converted_as_by_transformers(mode, shared_data, preparer):
    form = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    data = encoded(PIL.Image.fromarray(gradient(70, 90)).convert(mode), form)
    theirs = transformers_processor(shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct")(
        images=PIL.Image.open(io.BytesIO(data)), return_tensors="np"
    )
    (ours,) = preparer.prepare([stored(data)])
    np.testing.assert_array_equal(ours.patches(), theirs["pixel_values"])


def test_rgba_is_laid_on_white(preparer):
    image = PIL.Image.new("RGBA", (56, 56), (200, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    (found,) = preparer.prepare([stored(encoded(image))])
    assert found.pixels[0, :, 0, 0].tolist() == [200, 0, 0]
    assert found.pixels[0, :, 0, 1].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled(preparer):
    values = np.linspace(0, 65_535, 56 * 56).reshape(56, 56).astype(np.uint16)
    (found,) = preparer.prepare([stored(encoded(PIL.Image.fromarray(values)))])
    assert found.pixels.min() == 0
    assert found.pixels.max() == 255
    assert found.pixels.mean() == pytest.approx(127.5, abs=1)


def test_orientation_is_not_applied(preparer):
    image = PIL.Image.fromarray(gradient(84, 56))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    plain, turned = encoded(image), encoded(image, exif=exif)
    assert PIL.Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    first, second = preparer.prepare([stored(plain), stored(turned)])
    assert second.grid_thw == (1, 4, 6)
    np.testing.assert_array_equal(first.pixels, second.pixels)


def animation(form):
    frames = [PIL.Image.new("RGB", (60, 60), color) for color in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, form, save_all=True, append_images=frames[1:])
    return stream.getvalue()


REFUSED = [
    ("empty", b"", "no bytes"),
    ("empty", png_header(0, 5), "0 × 5 pixels"),
    ("not_an_image", b"no image at all", "15 bytes"),
    ("not_an_image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known"),
    ("not_an_image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known"),
    ("corrupt", WHOLE[: len(WHOLE) // 2], "truncated"),
    ("corrupt", WHOLE[:-60] + bytes(60), ""),
    ("corrupt", encoded(gradient(80, 60), "JPEG")[:700], "truncated"),
    ("huge", png_header(50_000, 50_000), "2,500,000,000 pixels"),
    ("huge", png_header(11_000, 11_000), "121,000,000 pixels, more than max_source_pixels"),
    ("huge", png_header(2**31 - 1, 2**31 - 1), "pixels"),
    ("animated", animation("GIF"), "GIF with 2 frames"),
    ("animated", animation("PNG"), "PNG with 2 frames"),
    ("animated", animation("WEBP"), "WEBP with 2 frames"),
    ("animated", animation("TIFF"), "TIFF with 2 frames"),
    ("video", b"\0\0\0\x20ftypisom" + bytes(40), "single images"),
    ("video", b"RIFF\0\0\0\0AVI LIST" + bytes(40), "single images"),
    ("video", b"\x1a\x45\xdf\xa3" + bytes(40), "single images"),
    ("aspect_ratio", encoded(np.zeros((4, 804, 3), np.uint8)), "804 × 4 pixels.* 201 times"),
    ("mode", encoded(PIL.Image.new("F", (60, 60)), "TIFF"), "floating-point"),
    ("mode", encoded(PIL.Image.new("I", (60, 60), 70_000), "TIFF"), "70000"),
]


def test_every_bad_file_is_refused_by_name_and_the_rest_prepared(preparer):
    before = preparer.refused.copy()
    good = stored(WHOLE)
    rows = [stored(data, f"data.parquet, row {row}") for row, (_, data, _) in enumerate(REFUSED)]
    found = preparer.prepare([good, *rows, good])
    assert isinstance(found[0], PreparedImage)
    assert isinstance(found[-1], PreparedImage)
    for row, ((reason, _, detail), refusal) in enumerate(zip(REFUSED, found[1:-1], strict=True)):
        assert isinstance(refusal, ImageRefusal)
        assert (refusal.reason, refusal.place) == (reason, f"data.parquet, row {row}")
        assert reason in REASONS
        assert f"row {row}: image refused as {reason}" in str(refusal)
        assert re.search(detail, refusal.detail), refusal
    counted = preparer.refused - before
    assert counted.total() == len(REFUSED)
    assert counted["corrupt"] == 3


def test_a_missing_file_is_refused(preparer):
    def read():
        raise ImageError("missing", "x.png is missing")

    (found,) = preparer.prepare([StoredImage("d.jsonl, row 4", read)])
    assert str(found) == "d.jsonl, row 4: image refused as missing (x.png is missing)"


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3), np.float32), np.zeros((9, 0, 3), np.uint8)],
)
def test_arrays_that_are_no_images(pixels, preparer):
    (found,) = preparer.prepare([stored(pixels)])
    assert found.reason in ("mode", "empty")


def test_the_cache_knows_content_and_settings_and_is_bounded():
    preparer = ImagePreparer(SETTINGS, workers=1, cache_bytes=100_000)
    pixels = [np.full((56, 56, 3), shade, np.uint8) for shade in range(20)]
    first = preparer.prepare([stored(p) for p in pixels])
    assert len({image.sha for image in first}) == 20
    again = preparer.prepare([stored(pixels[-1].copy(), "elsewhere")])[0]
    assert again.pixels is first[-1].pixels
    assert preparer.prepare([stored(pixels[0])])[0].pixels is not first[0].pixels  # went out
    assert preparer._cache._bytes <= 100_000
    other = ImageSettings(Patching(min_pixels=4 * 56 * 56))
    (larger,) = ImagePreparer(other).prepare([stored(pixels[0])])
    assert larger.sha != first[0].sha
    assert len({SETTINGS.hash, other.hash, ImageSettings(text_blank=(56, 56)).hash}) == 3


def test_a_blanked_image_is_white_and_as_large():
    blanked = ImageSettings(Patching(blank=True))
    data = [stored(encoded(gradient(120, 60))), stored(b"no image")]
    with ImagePreparer(blanked, workers=1) as preparer, ImagePreparer(SETTINGS, workers=1) as sees:
        (white, refused), (seen, _) = preparer.prepare(data), sees.prepare(data)
    assert white.grid_thw == seen.grid_thw
    assert (white.pixels == 255).all()
    assert white.sha != seen.sha
    assert refused.reason == "not_an_image"  # the same problems are asked with and without sight


def test_problems_without_images_get_a_white_one_where_asked(preparer):
    whole = [stored(WHOLE)]
    assert preparer.of_problems([[], whole])[0] == ()
    white = ImagePreparer(ImageSettings(text_blank=(56, 112)), workers=1)
    (blank,), (own,) = white.of_problems([[], whole])
    assert (blank.grid_thw, own.grid_thw) == ((1, 4, 8), (1, 4, 6))
    assert (blank.pixels == 255).all()
    white.close()


def test_a_problem_with_one_bad_image_is_refused(preparer):
    bad = stored(b"x", "d, row 2")
    found = preparer.of_problems([[stored(WHOLE), bad], [stored(WHOLE)] * 2])
    assert str(found[0]).startswith("d, row 2: image refused as not_an_image")
    assert [image.grid_thw for image in found[1]] == [(1, 4, 6)] * 2
