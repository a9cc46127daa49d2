import base64
import io

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors

from hf_querydet.image_reading import flatten_pictures, read_picture, turn_upright, upright_size


def colours(picture, **kwargs):
    """Colours of the first pixel as a list of numbers."""
    return read_picture(picture, **kwargs)[:, 0, 0].tolist()


def pil_of(mode, value):
    return PIL.Image.new(mode, (3, 2), value)


# PIL modes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 100, [100, 100, 100]),
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("I;16", 257 * 37, [37, 37, 37]),
        ("I;16", 65535, [255, 255, 255]),
        ("I;16", 200, [1, 1, 1]),  # 200 / 257 = 0.78; this type always spans 0..65535
        ("I", 200, [200, 200, 200]),
        ("I", 1000, [4, 4, 4]),  # 1000 / 257 = 3.89
        ("F", 0.5, [127.5, 127.5, 127.5]),
        ("F", 200.25, [200.25, 200.25, 200.25]),
        # On white: 200 * 51/255 + 255 * 204/255 = 244, and 0 + 204.
        ("RGBA", (200, 100, 0, 51), [244, 224, 204]),
        ("LA", (100, 51), [224, 224, 224]),
        ("La", (20, 51), [224, 224, 224]),  # the same with its grey already multiplied
        ("RGBA", (9, 8, 7, 0), [255, 255, 255]),
    ],
)
def test_pil_mode_is_read_as_rgb(mode, value, expected):
    assert colours(pil_of(mode, value)) == pytest.approx(expected, abs=1e-4)


def palette_picture():
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    return picture


def test_palette_picture_takes_colours_of_its_palette():
    tensor = read_picture(palette_picture())

    assert tensor.permute(1, 2, 0).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_transparent_palette_entry_is_white(transparency):
    picture = palette_picture()
    picture.info["transparency"] = transparency

    assert read_picture(picture).permute(1, 2, 0).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_transparent_colour_of_rgb_picture_is_white():
    picture = PIL.Image.new("RGB", (2, 1), (10, 20, 30))
    picture.putpixel((1, 0), (40, 50, 60))
    picture.info["transparency"] = (10, 20, 30)

    assert read_picture(picture).permute(1, 2, 0).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_without_convert_rgb_channels_stay():
    assert colours(pil_of("LA", (100, 51)), convert_rgb=False) == [100, 51]


# EXIF, files ----------------------------------------------------------------------------------

STORED = [[10, 20, 30], [40, 50, 60]]
UPRIGHT = {  # by EXIF orientation: what a viewer shows of the stored rows
    1: [[10, 20, 30], [40, 50, 60]],
    2: [[30, 20, 10], [60, 50, 40]],
    3: [[60, 50, 40], [30, 20, 10]],
    4: [[40, 50, 60], [10, 20, 30]],
    5: [[10, 40], [20, 50], [30, 60]],
    6: [[40, 10], [50, 20], [60, 30]],
    7: [[60, 30], [50, 20], [40, 10]],
    8: [[30, 60], [20, 50], [10, 40]],
}


def png_with_orientation(path, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(np.array(STORED, dtype=np.uint8)).save(path, exif=exif)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_of_a_file_is_applied(tmp_path, orientation):
    png_with_orientation(tmp_path / "picture.png", orientation)

    assert read_picture(str(tmp_path / "picture.png"))[0].tolist() == UPRIGHT[orientation]


def test_exif_orientation_of_an_open_picture_is_applied(tmp_path):
    png_with_orientation(tmp_path / "picture.png", 6)

    with PIL.Image.open(tmp_path / "picture.png") as picture:
        assert read_picture(picture)[0].tolist() == UPRIGHT[6]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_upright_size_is_known_before_pixels_are_read(tmp_path, suffix, orientation):
    path = tmp_path / f"picture.{suffix}"
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.new("RGB", (7, 5)).save(path, exif=exif)

    with PIL.Image.open(path) as picture:
        assert upright_size(picture) == turn_upright(picture).size


@pytest.mark.parametrize("picture_format", ["png", "webp"])
@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0XX*\0garbage", b"Exif\0\0II", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"],
    ids=["no-byte-order", "no-header", "no-entries"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL's own
def test_pixels_of_a_picture_with_broken_exif_data_are_read(tmp_path, exif, picture_format):
    path = tmp_path / f"picture.{picture_format}"
    stored = PIL.Image.fromarray(np.array(STORED, dtype=np.uint8)).convert("RGB")
    stored.save(path, exif=exif, lossless=True)

    assert read_picture(path)[0].tolist() == STORED


def test_orientation_is_applied_where_other_exif_data_cannot_be_written_again(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    exif[0x0101] = 5  # a height, a whole number of type 4; here it is said to be text, type 2
    block = exif.tobytes().replace(b"\x01\x01\0\x04", b"\x01\x01\0\x02")
    PIL.Image.fromarray(np.array(STORED, dtype=np.uint8)).save(tmp_path / "picture.png", exif=block)

    assert read_picture(tmp_path / "picture.png")[0].tolist() == UPRIGHT[6]


def test_a_picture_is_turned_once(tmp_path):
    png_with_orientation(tmp_path / "picture.png", 6)

    with PIL.Image.open(tmp_path / "picture.png") as picture:
        turned = turn_upright(picture)

    assert read_picture(turned)[0].tolist() == UPRIGHT[6]


def test_path_object_is_a_path(tmp_path):
    png_with_orientation(tmp_path / "picture.png", 6)

    assert read_picture(tmp_path / "picture.png")[0].tolist() == UPRIGHT[6]


def test_file_is_read_like_the_same_pil_picture(tmp_path):
    pil_of("RGBA", (200, 100, 0, 51)).save(tmp_path / "picture.png")

    assert colours(tmp_path / "picture.png") == [244, 224, 204]


def test_16_bit_file_keeps_its_range(tmp_path):
    pil_of("I;16", 257 * 37).save(tmp_path / "picture.png")

    assert colours(tmp_path / "picture.png") == [37, 37, 37]


def test_base64_text_is_a_picture():
    buffer = io.BytesIO()
    pil_of("RGB", (10, 20, 30)).save(buffer, format="png")
    text = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    assert colours(text) == [10, 20, 30]


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")

    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        read_picture(tmp_path / "broken.png")


def test_cut_off_file_is_named(tmp_path):
    rng = np.random.default_rng(0)
    noise = PIL.Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, format="jpeg")
    (tmp_path / "half.jpg").write_bytes(buffer.getvalue()[:2000])

    with pytest.raises(ValueError, match=r"half\.jpg cannot be read"):
        read_picture(tmp_path / "half.jpg")


def test_damaged_png_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).save(buffer, format="png")
    content = bytearray(buffer.getvalue())
    content[content.rindex(b"IDAT")] ^= 255  # PIL raises SyntaxError here
    (tmp_path / "bent.png").write_bytes(content)

    with pytest.raises(ValueError, match=r"bent\.png cannot be read"):
        read_picture(tmp_path / "bent.png")


def test_address_is_fetched_by_transformers(monkeypatch):
    fetched = {"https://example.org/cat.png": pil_of("RGB", (10, 20, 30))}
    monkeypatch.setattr("hf_querydet.image_reading.load_image", fetched.__getitem__)

    assert colours("https://example.org/cat.png") == [10, 20, 30]


def test_missing_file_is_an_error():
    with pytest.raises(ValueError, match=r"The picture no-such\.png does not exist; pass a file"):
        read_picture("no-such.png")


def test_address_that_cannot_be_fetched_is_named(monkeypatch):
    def unreachable(address):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("hf_querydet.image_reading.load_image", unreachable)

    with pytest.raises(ValueError, match=r"https://example\.org/cat\.png cannot be read: no route"):
        read_picture("https://example.org/cat.png")


def test_broken_base64_text_is_shortened():
    with pytest.raises(ValueError, match=r"The picture data:image/png;base64,A+\.\.\. cannot be"):
        read_picture("data:image/png;base64," + 999 * "A")


# Element types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("uint8", 100, 100),
        ("bool", True, 255),
        ("uint16", 257 * 37, 37),
        (">u2", 257 * 37, 37),
        ("uint16", 200, 1),
        ("int16", 200, 200),
        ("int32", 257 * 37, 37),
        ("int64", 100, 100),
        ("int64", 255, 255),
        ("int64", 256, 1),  # 256 / 257, rounded
        ("uint32", 65535, 255),
        ("float32", 0.5, 127.5),
        ("float64", 0.25, 63.75),
        ("float16", 0.5, 127.5),
        ("float32", 1.0, 255),
        ("float32", 1.5, 1.5),
        (">f4", 200.25, 200.25),
        ("longdouble", 0.5, 127.5),
    ],
)
def test_number_type_of_array_decides_how_it_is_read(dtype, value, expected):
    assert colours(np.full((5, 7), value, dtype=dtype)) == [expected] * 3


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (torch.uint8, 100, 100),
        (torch.bool, True, 255),
        (torch.uint16, 257 * 37, 37),
        (torch.int32, 257 * 37, 37),
        (torch.float16, 0.5, 127.5),
        (torch.bfloat16, 0.5, 127.5),
        (torch.float64, 200.25, 200.25),
    ],
)
def test_number_type_of_tensor_decides_how_it_is_read(dtype, value, expected):
    assert colours(torch.full((5, 7), value, dtype=dtype)) == [expected] * 3


def test_floats_stay_as_they_are_without_scaling():
    assert colours(torch.full((5, 7), -1.25), to_8bit_scale=False) == [-1.25] * 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_integers_come_out_as_bytes(dtype):
    assert read_picture(torch.ones(5, 7, dtype=dtype)).dtype == torch.uint8


def test_floats_come_out_as_float32():
    assert read_picture(torch.ones(5, 7, dtype=torch.float64)).dtype == torch.float32


def test_transparent_bytes_are_laid_on_white():
    pixel = np.array([200, 100, 0, 51], dtype=np.uint8)

    assert colours(np.tile(pixel, (5, 7, 1))) == [244, 224, 204]


def test_mixture_with_white_is_rounded():
    pixel = np.array([0, 1, 2, 3], dtype=np.uint8)  # 252 + 0, 0.012 and 0.024

    assert colours(np.tile(pixel, (5, 7, 1))) == [252, 252, 252]
    pixel = np.array([50, 51, 52, 3], dtype=np.uint8)  # 252 + 0.588, 0.6 and 0.612
    assert colours(np.tile(pixel, (5, 7, 1))) == [253, 253, 253]


def test_transparent_16_bit_is_laid_on_white():
    pixel = np.array([200, 100, 0, 51], dtype=np.uint16) * 257

    assert colours(np.tile(pixel, (5, 7, 1))) == [244, 224, 204]


def test_transparent_floats_are_laid_on_white():
    pixel = torch.tensor([0.5, 0.25, 0.0, 0.2])  # 255 * (0.5 * 0.2 + 0.8) = 229.5

    assert colours(pixel[:, None, None].expand(4, 5, 7)) == pytest.approx([229.5, 216.75, 204])


def test_transparent_unscaled_floats_are_laid_on_one():
    pixel = torch.tensor([0.5, 0.25, 0.0, 0.2])
    picture = pixel[:, None, None].expand(4, 5, 7)

    assert colours(picture, to_8bit_scale=False) == pytest.approx([0.9, 0.85, 0.8])


def test_grey_with_opacity_is_laid_on_white():
    pixel = np.array([100, 51], dtype=np.uint8)

    assert colours(np.tile(pixel, (5, 7, 1))) == [224, 224, 224]


def test_read_only_array_is_read():
    array = np.full((5, 7, 3), 100, dtype=np.uint8)
    array.flags.writeable = False

    assert colours(array) == [100, 100, 100]


def test_array_with_reversed_channels_is_read():
    array = np.tile(np.array([1, 2, 3], dtype=np.uint8), (5, 7, 1))

    assert colours(array[..., ::-1]) == [3, 2, 1]


def test_tensor_subclass_becomes_a_plain_tensor():
    class Picture(torch.Tensor):
        pass

    tensor = torch.full((3, 5, 7), 100, dtype=torch.uint8)

    assert type(read_picture(tensor.as_subclass(Picture))) is torch.Tensor
    assert type(read_picture(tv_tensors.Image(tensor))) is torch.Tensor


def test_caller_keeps_the_picture():
    picture = torch.full((3, 5, 7), 0.5)

    read_picture(picture).sum()

    assert picture.unique().tolist() == [0.5]


# Channel axis ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["array", "tensor"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((5, 7), (5, 7)),
        ((5, 7, 3), (5, 7)),
        ((3, 5, 7), (5, 7)),
        ((5, 7, 1), (5, 7)),
        ((1, 5, 7), (5, 7)),
        ((5, 7, 4), (5, 7)),
        ((4, 5, 7), (5, 7)),
        ((5, 7, 2), (5, 7)),
        ((1, 1), (1, 1)),
        ((1, 1, 3), (1, 1)),  # three colours are likelier than one grey row of three
        ((3, 1, 1), (1, 1)),
        ((2, 3, 3), (2, 3)),
        ((3, 2, 1), (2, 1)),
        ((4, 2, 3), (4, 2)),
    ],
)
def test_shape_gives_picture_size(make, shape, size):
    assert read_picture(make(shape)).shape == (3, *size)


def test_ambiguous_array_has_its_channels_last():
    array = np.arange(18, dtype=np.uint8).reshape(3, 2, 3)

    assert colours(array) == [0, 1, 2]


def test_ambiguous_tensor_has_its_channels_first():
    tensor = torch.arange(18, dtype=torch.uint8).reshape(3, 2, 3)

    assert colours(tensor) == [0, 6, 12]


@pytest.mark.parametrize(
    ("data_format", "expected"), [("channels_first", [0, 6, 12]), ("channels_last", [0, 1, 2])]
)
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_input_data_format_settles_the_axis(data_format, expected, kind):
    array = np.arange(18, dtype=np.uint8).reshape(3, 2, 3)
    picture = array if kind == "array" else torch.from_numpy(array)

    assert colours(picture, input_data_format=data_format) == expected


def test_input_data_format_does_not_touch_pil_pictures():
    assert colours(pil_of("RGB", (1, 2, 3)), input_data_format="channels_first") == [1, 2, 3]


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (np.zeros((5, 7, 5)), ValueError, r"1 to 4 channels, got shape \(5, 7, 5\)"),
        (np.zeros(5), ValueError, r"must have shape .* got \(5,\)"),
        (np.zeros((0, 7, 3)), ValueError, r"no side of 0, got \(0, 7, 3\)"),
        (np.full((5, 7), -1), ValueError, "got -1 to -1"),
        (np.full((5, 7), 70000), ValueError, "got 70000 to 70000"),
        (np.full((5, 7), -0.5), ValueError, "got -0.5 to -0.5.*do_rescale=False"),
        (np.full((5, 7), 300.0), ValueError, "got 300 to 300"),
        (np.full((5, 7), np.nan), ValueError, "got nan to nan"),
        (np.zeros((5, 7), dtype=complex), TypeError, "numpy array of complex128"),
        (np.full((5, 7), "a"), TypeError, "numpy array of <U1"),
        (torch.zeros(5, 7, dtype=torch.complex64), TypeError, "torch.complex64"),
    ],
)
def test_what_is_no_picture_is_an_error(picture, error, message):
    with pytest.raises(error, match=message):
        read_picture(picture)


def test_wrong_input_data_format_names_the_shape():
    with pytest.raises(ValueError, match=r"got shape \(5, 7, 3\) with input_data_format"):
        read_picture(np.zeros((5, 7, 3)), input_data_format="channels_first")


# Flattening -----------------------------------------------------------------------------------


def test_one_picture_is_a_list_of_one():
    assert len(flatten_pictures(np.zeros((5, 7, 3)))) == 1


def test_four_dimensions_are_several_pictures():
    pictures = flatten_pictures(torch.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7))

    assert [picture[0, 0, 0].item() for picture in pictures] == [0, 105]


def test_unlike_kinds_can_stand_in_one_list():
    assert len(flatten_pictures([np.zeros((5, 7)), pil_of("L", 3), [torch.zeros(3, 5, 7)]])) == 3


def test_empty_list_is_an_error():
    with pytest.raises(ValueError, match="images is empty"):
        flatten_pictures([])


def test_other_things_are_an_error():
    with pytest.raises(TypeError, match="got NoneType"):
        flatten_pictures([None])
