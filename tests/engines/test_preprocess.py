"""Preprocessing: the pixels of Hugging Face's processor, and entropy by its definition."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vflow.engines import EngineError
from vflow.engines.preprocess import ImageError, ImageProcessorConfig, load_image, patch_entropy, preprocess_image, smart_resize

ORIENTATION = 0x0112  # EXIF tag
SIZES = [(28, 28), (56, 84), (97, 61), (300, 201), (13, 40), (1500, 900)]  # width, height


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A gradient with noise: neither flat nor white noise, so that resizing shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    return Image.fromarray((ramp + rng.integers(0, 16, (height, width, 3))).astype(np.uint8))


def huggingface(image: Image.Image, **limits: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = ImageProcessorConfig(**limits)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels})
    output = processor(images=[image], return_tensors="np")
    return output["pixel_values"], tuple(int(v) for v in output["image_grid_thw"][0])


def assert_same(image: Image.Image, expected: Image.Image, **limits: Any) -> None:
    patches = preprocess_image(load_image(image), ImageProcessorConfig(**limits))
    pixel_values, grid = huggingface(expected, **limits)
    assert patches.grid_thw == grid
    np.testing.assert_allclose(patches.pixel_values, pixel_values, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixel_values_are_hugging_faces(width: int, height: int) -> None:
    image = picture(width, height)
    assert_same(image, image, max_pixels=28 * 28 * 100)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_are_converted_as_hugging_face_does(mode: str) -> None:
    image = picture(70, 50).convert(mode)
    assert_same(image, image)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path: Path, kind: str, order: str) -> None:
    """Pillow's own conversion clips at 255 of 65,535."""
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise
    Image.fromarray((grey * 257).astype(order)).save(tmp_path / "x", kind, exif=exif)
    expected = np.rot90(grey, -1)[:, :, None].repeat(3, 2)
    np.testing.assert_array_equal(load_image(tmp_path / "x"), expected)
    if kind == "PNG":
        np.testing.assert_array_equal(load_image((tmp_path / "x").read_bytes()), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(tmp_path: Path, dtype: Any) -> None:
    image = Image.fromarray(np.ones((8, 8), dtype))
    image.save(tmp_path / "x.tiff")
    for source in (image, tmp_path / "x.tiff"):
        with pytest.raises(ImageError, match=r"32 bits a pixel.* convert it to 8 bits first"):
            load_image(source)


@pytest.mark.parametrize("shape", [(0, 10, 3), (10, 0, 3)])
def test_empty_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="not empty"):
        load_image(np.zeros(shape, np.uint8))


def test_arrays_are_no_way_around_the_limit_of_pixels() -> None:
    with pytest.raises(ImageError, match="decompression bomb"):
        load_image(np.broadcast_to(np.uint8(0), (10_000, 10_000, 3)))


def test_pixels_in_float16_are_those_in_float32_rounded_and_entropy_is_left_out_where_nobody_asks() -> None:
    image = load_image(picture(90, 130))
    single, half = preprocess_image(image, ImageProcessorConfig()), preprocess_image(image, ImageProcessorConfig(), dtype=np.float16, entropy=False)
    assert half.pixel_values.dtype == np.float16
    np.testing.assert_array_equal(half.pixel_values, single.pixel_values.astype(np.float16))
    assert (single.entropy.size, half.entropy.size) == (single.pixel_values.shape[0], 0)


def test_transparency_shows_white() -> None:
    image = picture(60, 60).convert("RGBA")
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 60).astype(np.uint8), (60, 1)))
    image.putalpha(alpha)
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    # Within one grey level of 255: Pillow's paste and alpha_composite round differently.
    np.testing.assert_allclose(load_image(image).astype(int), np.asarray(white).astype(int), atol=1)
    assert (load_image(image)[:, 0] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    image = picture(80, 40)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert upright.size == ((40, 80) if orientation >= 5 else (80, 40))
    np.testing.assert_array_equal(load_image(path), np.asarray(upright))


@pytest.mark.parametrize("limits", [{"min_pixels": 3136, "max_pixels": 50_000}, {"min_pixels": 100_000, "max_pixels": 1_000_000}])
def test_sizes_are_hugging_faces(limits: dict[str, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    rng = np.random.default_rng(3)
    for height, width in rng.integers(1, 900, (300, 2)).tolist():
        if max(height, width) <= 200 * min(height, width):
            assert smart_resize(height, width, factor=28, **limits) == reference(height, width, factor=28, **limits)


def test_entropy_is_that_of_a_plain_loop() -> None:
    image = np.asarray(picture(56, 84)).copy()
    image[:28, :28] = 7  # a flat token: entropy 0
    expected = []
    for top in range(0, 84, 28):
        for left in range(0, 56, 28):
            for y, x in ((0, 0), (0, 14), (14, 0), (14, 14)):
                patch = image[top + y : top + y + 14, left + x : left + x + 14].astype(int)
                counts = Counter((patch.sum(axis=2) // 3).ravel().tolist())
                expected.append(-sum(n / 196 * log2(n / 196) for n in counts.values()))
    entropy = patch_entropy(image, patch_size=14, merge_size=2)
    assert entropy.dtype == np.float32
    np.testing.assert_allclose(entropy, expected, atol=1e-5)
    assert (entropy[:4] == 0).all() and (entropy >= 0).all()


def test_entropy_of_all_grey_levels_is_the_highest() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_allclose(patch_entropy(np.repeat(levels[..., None], 3, axis=2), patch_size=16, merge_size=1), [8.0], atol=1e-6)


def test_what_is_not_an_image_is_refused_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    whole = tmp_path / "whole.png"
    picture(64, 64).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:2000])
    for source, message in ((tmp_path / "none.png", "no such file"), (tmp_path, "is a folder"), (text, "not an image"), (cut, "damaged")):
        with pytest.raises(ImageError, match=message) as caught:
            load_image(source)
        assert "\n" not in str(caught.value) and isinstance(caught.value, EngineError)


def test_bytes_are_the_contents_of_a_file_of_the_webs_formats(tmp_path: Path) -> None:
    picture(30, 20).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_image((tmp_path / "a.png").read_bytes()), load_image(tmp_path / "a.png"))
    for name in ("a.eps", "a.tiff"):  # Pillow gives the one to Ghostscript
        picture(30, 20).save(tmp_path / name)
        with pytest.raises(ImageError, match=r"^image: not an image"):
            load_image((tmp_path / name).read_bytes())


def test_arrays_of_another_shape_and_strips_are_refused() -> None:
    with pytest.raises(ImageError, match=r"uint8 \[height, width, 3\]"):
        load_image(np.zeros((4, 4), np.uint8))
    with pytest.raises(ImageError, match="aspect ratio"):
        preprocess_image(np.zeros((1, 300, 3), np.uint8), ImageProcessorConfig())


def test_preprocessor_config_in_both_spellings() -> None:
    assert ImageProcessorConfig.from_dict({"min_pixels": 1000, "max_pixels": 2000}).max_pixels == 2000
    assert ImageProcessorConfig.from_dict({"size": {"shortest_edge": 1000, "longest_edge": 3000}}).max_pixels == 3000


def test_reading_in_threads_leaves_the_warnings_of_the_process_alone() -> None:
    """``warnings.catch_warnings`` is not for threads: it had left a filter behind that made Pillow raise in the host's own code."""
    before = list(warnings.filters)
    file = io.BytesIO()
    picture(300, 300).save(file, "PNG")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load_image, [file.getvalue()] * 60))
    assert warnings.filters == before


def test_palettes_with_transparency_show_white() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putdata([(0, 255), (0, 0)])
    assert load_image(image).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_16_bits_are_rounded_to_the_nearest_of_8() -> None:
    grey = Image.fromarray(np.array([[0, 128, 129, 257, 65535]], np.uint16))
    assert load_image(grey)[0, :, 0].tolist() == [0, 0, 1, 1, 255]


def test_a_strip_of_200_to_1_is_the_longest() -> None:
    smart_resize(4000, 20, factor=28, min_pixels=784, max_pixels=784000)
    with pytest.raises(ImageError, match="aspect ratio must be at most 200"):
        smart_resize(4001, 20, factor=28, min_pixels=784, max_pixels=784000)
