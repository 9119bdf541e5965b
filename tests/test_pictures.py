"""Videos and pictures that are not stored as they are shown: converted, or refused by name."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfwm.data import Replay
from mfwm.data.import_lerobot import import_lerobot
from mfwm.data.import_videos import import_videos
from mfwm.data.pictures import decoded, display, picture
from PIL import Image

av = pytest.importorskip("av")

# Four colours that say where is what: top left red, top right green, bottom left blue, bottom right white.
CORNERS = np.zeros((48, 64, 3), np.uint8)
CORNERS[:24, :32], CORNERS[:24, 32:], CORNERS[24:, :32], CORNERS[24:] = (
    (250, 0, 0),
    (0, 250, 0),
    (0, 0, 250),
    CORNERS[24:],
)
CORNERS[24:, 32:] = 250


def write_video(
    path: Path, images: list[np.ndarray], codec: str = "libx264", pix_fmt: str = "yuv420p", *,
    options: dict[str, str] | None = None, context: dict[str, Any] | None = None, frame: dict[str, Any] | None = None,
    to: dict[str, Any] | None = None, header_first: bool = False,
) -> Path:  # fmt: skip
    """context, frame: attributes set on the encoder and on frames; to: how RGB becomes pix_fmt."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if header_first else {}) as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pix_fmt
        for name, value in (context or {}).items():
            setattr(stream.codec_context, name, value)
        for img in images:
            made = av.VideoFrame.from_ndarray(img, format="rgba" if img.shape[-1] == 4 else "rgb24")
            made = made.reformat(format=pix_fmt, **(to or {}))
            for name, value in (frame or {}).items():
                setattr(made, name, value)
            container.mux(stream.encode(made))
        container.mux(stream.encode())
    return path


def set_matrix(path: Path, *matrix: float) -> None:
    """a, b, c, d of the track's display matrix."""
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd")
    place += 4 + (52 if content[place + 4] == 1 else 40)
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def images(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    return np.stack([img for _, img in decoded(path, size)])


def near(found: np.ndarray, wanted: np.ndarray, within: int = 6) -> bool:
    """But for the borders between colours, which chroma blurs."""
    same = np.abs(found.astype(int) - wanted).max(axis=-1) <= within
    return found.shape == wanted.shape and bool(same.mean() > 0.85)


UPRIGHT: dict[tuple[float, ...], Callable[[np.ndarray], np.ndarray]] = {
    (1, 0, 0, 1): lambda img: img,
    (0, 1, -1, 0): lambda img: np.rot90(img, -1),  # clockwise, as a phone held upright
    (-1, 0, 0, -1): lambda img: np.rot90(img, 2),
    (0, -1, 1, 0): lambda img: np.rot90(img, 1),
    (-1, 0, 0, 1): lambda img: img[:, ::-1],
    (1, 0, 0, -1): lambda img: img[::-1],
    (0, 1, 1, 0): lambda img: img.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda img: img[::-1, ::-1].transpose(1, 0, 2),
}  # fmt: skip


@pytest.mark.parametrize("matrix", UPRIGHT)
def test_videos_are_turned_as_they_are_shown(tmp_path: Path, matrix: tuple[float, ...]) -> None:
    path = write_video(tmp_path / "a.mp4", [CORNERS] * 3)
    set_matrix(path, *matrix)
    assert near(images(path)[0], UPRIGHT[matrix](CORNERS))
    # Where x and y of a pixel go, by the rule itself.
    a, b, c, d = matrix
    turns, mirrored = display(np.array([a, b, 0, c, d, 0, 0, 0, 0]) * (1 << 16))
    at = np.argwhere(np.ones((3, 3)))[:, ::-1] - 1
    shown = np.rot90(at.reshape(3, 3, 2)[:, ::-1] if mirrored else at.reshape(3, 3, 2), turns).reshape(9, 2)
    assert np.array_equal(shown @ np.array([[a, b], [c, d]]), at)
    # A size is of the picture as it is shown.
    assert near(images(path, (20, 36))[0], np.asarray(Image.fromarray(UPRIGHT[matrix](CORNERS)).resize((36, 20))), 30)


def test_a_phones_video_is_imported_upright(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    set_matrix(write_video(tmp_path / "in/a.mp4", [CORNERS] * 4), 0, 1, -1, 0)
    (tmp_path / "in/actions.csv").write_text("video,frame,action\n" + "".join(f"a.mp4,{t},0\n" for t in range(4)))
    import_videos(tmp_path / "in", tmp_path / "out", progress=False)
    assert near(Replay(tmp_path / "out").video[3], np.rot90(CORNERS, -1))


@pytest.mark.parametrize("matrix", [(0.7071, 0.7071, -0.7071, 0.7071), (2, 0, 0, 1), (0.5, 0, 0, 0.5)])
def test_a_slanted_video_is_refused(matrix: tuple[float, ...]) -> None:
    a, b, c, d = matrix
    with pytest.raises(
        ValueError, match="it must be shown unscaled and turned by right angles, but its display matrix is"
    ):
        display(np.array([a, b, 0, c, d, 0, 0, 0, 0]) * (1 << 16))


def test_pixels_become_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [CORNERS] * 3, context={"sample_aspect_ratio": Fraction(3, 2)})
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio * 2 == 3
    wide = np.asarray(Image.fromarray(CORNERS).resize((96, 48)))
    assert near(images(path)[0], wide, 20)
    assert images(path, (24, 24)).shape == (3, 24, 24, 3)
    set_matrix(path, 0, 1, -1, 0)
    assert near(images(path)[0], np.rot90(wide, -1), 20)


COLOUR = np.zeros((32, 32, 3), np.uint8)
COLOUR[:], COLOUR[:8], COLOUR[8:16] = (200, 40, 90), 0, 255
NOISE = np.random.default_rng(0).integers(256, size=(32, 32, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "tags", "to"),
    [
        ("libx264", "yuv420p", {}, {}),
        ("libx264", "yuvj420p", {}, {"dst_color_range": 2}),
        ("libx264", "yuv444p", {"colorspace": 1}, {"dst_colorspace": 1}),
        ("libx264", "yuv444p", {"colorspace": 1, "color_range": 2}, {"dst_colorspace": 1, "dst_color_range": 2}),
        ("libx264", "yuv420p10le", {}, {}),
        ("ffv1", "bgr0", {}, {}),
        ("ffv1", "bgra", {}, {}),
        ("ffv1", "yuva420p", {}, {}),
    ],
)  # fmt: skip
def test_colours_are_those_of_the_video(
    tmp_path: Path, codec: str, pix_fmt: str, tags: dict[str, Any], to: dict[str, Any]
) -> None:
    path = write_video(tmp_path / "a.mkv", [COLOUR] * 3, codec, pix_fmt, context=tags, frame=tags, to=to)
    found = images(path)[1].astype(int)
    for row in (3, 11, 24):
        assert np.abs(found[row, 16] - COLOUR[row, 16]).max() <= 10, (row, found[row, 16])


def test_what_has_no_one_meaning_as_frames_is_refused(tmp_path: Path) -> None:
    clear = np.dstack([COLOUR, np.full((32, 32), 255, np.uint8)])
    clear[4, 5, 3] = 254
    odd = [COLOUR] * 3
    cases = {
        "must be opaque, but its alpha goes down to 254": write_video(tmp_path / "a.mkv", [clear], "ffv1", "bgra"),
        r"its colours are HDR \(PQ\)": write_video(
            tmp_path / "d.mkv", odd, "libx264", "yuv420p10le", context={"color_trc": 16}, frame={"color_trc": 16}
        ),
        r"its colours are HDR \(HLG\)": write_video(
            tmp_path / "e.mkv", odd, "libx264", "yuv420p10le", context={"color_trc": 18}, frame={"color_trc": 18}
        ),
        "it is interlaced": write_video(tmp_path / "f.mkv", odd, options={"x264-params": "tff=1"}),
    }
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message) as raised:
            images(path)
        assert str(path) in str(raised.value)
    # 8 bits of gray are a picture.
    assert (images(write_video(tmp_path / "g.mkv", odd, "ffv1", "gray"))[0, 11] > 250).all()


@pytest.mark.parametrize(
    ("pix_fmt", "what"),
    [
        ("gray16le", "gray with 16 bits"), ("gray10le", "gray with 10 bits"), ("rgb48le", "RGB with 16 bits"),
        ("rgba64le", "RGB with 16 bits"), ("gbrp16le", "RGB with 16 bits"), ("gbrp10le", "RGB with 10 bits"),
    ],
)  # fmt: skip
def test_videos_of_more_bits_are_refused(tmp_path: Path, pix_fmt: str, what: str) -> None:
    path = write_video(tmp_path / "a.mkv", [COLOUR] * 3, "ffv1", pix_fmt)
    with pytest.raises(ValueError, match=rf"a.mkv, frame 0: it is {what} per channel, but frames have 8"):
        images(path)


def test_a_file_of_two_videos_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=10) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for stream in streams:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(COLOUR, format="rgb24")))
            container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"a.mp4, frame 0: it must have one video stream, got 2"):
        images(tmp_path / "a.mp4")


def test_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", [COLOUR]).rename(tmp_path / "run:1.mp4")
    assert len(images(Path("run:1.mp4"))) == 1


LISTS = {
    "concat.mp4": "ffconcat version 1.0\nfile frame1.mp4\n",
    "playlist.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nframe1.mp4\n#EXT-X-ENDLIST\n",
    "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "frame%d.png": None,
    "frame1.png": None,
}


@pytest.mark.parametrize("name", LISTS)
def test_a_video_opens_no_other_file(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / "frame1.mp4", [COLOUR])
    Image.fromarray(COLOUR).save(tmp_path / "frame1.png")
    if (text := LISTS[name]) is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(
        ValueError, match=rf"{name}, frame 0: it must be a single video file of one of mov, .* not a list of files"
    ):
        images(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mov", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.ts", "libx264"),
        ("a.mpg", "mpeg1video"), ("a.flv", "libx264"), ("a.nut", "ffv1"), ("a.asf", "mpeg4"),
    ],
)  # fmt: skip
def test_containers_are_read(tmp_path: Path, name: str, codec: str) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(NOISE, format="rgb24")))
        container.mux(stream.encode())
    assert len(images(tmp_path / name)) == 3


def trim(path: Path, begin: int, frames: int) -> None:
    """What `ffmpeg -ss -c copy`, phones and editors do: the samples stay, an edit list says which are shown."""
    content = bytearray(path.read_bytes())

    def number(box: bytes) -> int:
        place = content.find(box) + 16
        return int(struct.unpack(">I", content[place : place + 4])[0])

    place = content.find(b"elst") + 12
    _, start = struct.unpack(">Ii", content[place : place + 8])
    length = frames * number(b"mvhd") // 10
    content[place : place + 8] = struct.pack(">Ii", length, start + begin * number(b"mdhd") // 10)
    path.write_bytes(content)


def ramp(count: int) -> list[np.ndarray]:
    return [np.full((32, 32, 3), 4 * t, np.uint8) for t in range(count)]


@pytest.mark.parametrize(("begin", "frames"), [(40, 20), (0, 60), (5, 30), (0, 25), (59, 1), (33, 27)])
@pytest.mark.parametrize("options", [{}, {"g": "12"}, {"g": "12", "bf": "0"}])
def test_a_trimmed_video_is_whole(tmp_path: Path, begin: int, frames: int, options: dict[str, str]) -> None:
    path = write_video(tmp_path / "a.mp4", ramp(60), options=options)
    trim(path, begin, frames)
    found = images(path)
    assert (found.mean(axis=(1, 2, 3)) / 4).round().astype(int).tolist() == list(range(begin, begin + frames))
    times = [time for time, _ in decoded(path, None)]
    assert times == pytest.approx(np.arange(frames) / 10, abs=2e-3)


def test_a_trimmed_video_that_was_cut_off_is_not(tmp_path: Path) -> None:
    # The header first, as for the web, so that a file that was cut off opens.
    path = write_video(tmp_path / "a.mp4", ramp(60), options={"bf": "0"}, header_first=True)
    trim(path, 40, 20)
    assert len(images(path)) == 20
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    # Within a frame, and between two, where nothing is broken and the end only comes early.
    for size in (path.stat().st_size - 40, places[-1], places[-10]):
        with open(path, "r+b") as file:
            file.truncate(size)
        with pytest.raises(ValueError, match=r"a.mp4 (cannot be decoded|gives)"):
            images(path)


# ---- pictures


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_16_bits(colour_type: int) -> bytes:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    rows = b"".join(b"\0" + np.full((4, channels), 1000, ">u2").tobytes() for _ in range(4))

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def by_ffmpeg(codec: str, pix_fmt: str, container: str = "image2pipe", curve: int = 1) -> bytes:
    """A picture of kinds that Pillow does not write. curve: its transfer function."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=1)
        stream.height, stream.width, stream.pix_fmt = 64, 64, pix_fmt
        stream.codec_context.color_trc = curve
        made = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24").reformat(format=pix_fmt)
        made.color_trc = curve
        output.mux(stream.encode(made))
        output.mux(stream.encode())
    return file.getvalue()


def ppm(kind: str, largest: int) -> bytes:
    head = f"{kind} 2 2 {largest}\n".encode()
    return head + (b"7 " * 12 if kind in ("P2", "P3") else bytes(12 if largest < 256 else 24))


def png_with_curve(curve: int) -> bytes:
    """BT.2020 of this transfer function, as a chunk cICP says."""
    content = encoded(Image.fromarray(CORNERS))
    chunk = b"cICP" + bytes((9, curve, 0, 1))
    return content[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


def planar_tiff_of_16_bits() -> bytes:
    """2 x 2 pixels, a strip for each of three channels."""
    entries = (
        (256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, 140),
        (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 3, 152), (284, 3, 1, 2),
    )  # fmt: skip
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)
    tail = struct.pack("<3H", 16, 16, 16) + struct.pack("<3I", 164, 172, 180) + struct.pack("<3I", 8, 8, 8)
    assert len(head) == 134
    return head + tail + bytes(24)


def bmp_of_16_bits(*masks: int) -> bytes:
    """2 x 2 white pixels: 5, 5 and 5 bits of a channel, or as the masks say."""
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3 if masks else 0, 8, 0, 0, 0, 0)
    start = header + struct.pack(f"<{len(masks)}I", *masks)
    return b"BM" + struct.pack("<IHHI", 14 + len(start) + 8, 0, 0, 14 + len(start)) + start + b"\xff" * 8


RGB = Image.fromarray(CORNERS)
MANY = {"save_all": True, "append_images": [Image.fromarray(255 - CORNERS)]}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_are_turned_as_they_are_shown(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    matrices = [
        (1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1),
        (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0), (0, -1, 1, 0),
    ]  # fmt: skip
    wanted = UPRIGHT[matrices[orientation - 1]](CORNERS)
    assert near(picture(encoded(RGB, kind, exif=exif), None), wanted)
    assert picture(encoded(RGB, kind, exif=exif), (10, 30)).shape == (10, 30, 3)


@pytest.mark.parametrize(
    "content",
    [
        encoded(RGB), encoded(RGB, "WEBP", lossless=True), encoded(RGB.quantize()), encoded(RGB.convert("RGBA")),
        encoded(RGB, transparency=(1, 2, 3)), encoded(RGB, "BMP"), encoded(RGB.quantize(), "GIF"),
        encoded(RGB, "TIFF"), encoded(RGB, "PPM"), encoded(RGB, "JPEG2000"),
    ],
    ids=[
        "RGB", "WebP", "palette", "opaque", "an unused colour to see through", "BMP", "GIF", "TIFF", "PPM", "JPEG2000",
    ],
)  # fmt: skip
def test_pictures_keep_their_colours(content: bytes) -> None:
    assert np.array_equal(picture(content, None), CORNERS)


def test_gray_pictures_are_gray() -> None:
    gray = RGB.convert("L")
    assert np.array_equal(picture(encoded(gray), None), np.asarray(gray)[..., None].repeat(3, 2))
    bits = RGB.convert("1")
    assert np.array_equal(picture(encoded(bits), None)[..., 0], 255 * np.asarray(bits))


@pytest.mark.parametrize(
    "content",
    [
        bmp_of_16_bits(), bmp_of_16_bits(0xF800, 0x7E0, 0x1F), bmp_of_16_bits(0x7C00, 0x3E0, 0x1F),
        png_with_curve(13), ppm("P6", 15), ppm("P6", 255), ppm("P5", 100), ppm("P3", 100),
        by_ffmpeg("jpeg2000", "rgb24"), by_ffmpeg("tiff", "rgb24"), by_ffmpeg("libsvtav1", "yuv420p", "avif"),
    ],
    ids=[
        "BMP 555", "BMP 565", "BMP masks 555", "PNG of SDR", "P6 of 15", "P6 of 255", "P5", "P3", "JPEG2000", "TIFF",
        "AVIF",
    ],
)  # fmt: skip
def test_pictures_of_up_to_8_bits_are_taken(content: bytes) -> None:
    assert picture(content, None).ndim == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((ppm(kind, n), r"from \d+ bits\) must be gray") for kind in ("P3", "P6") for n in (256, 1000, 65535)),
        *((ppm(kind, n), r"must be gray or RGB of 8 bits") for kind in ("P2", "P5") for n in (256, 65535)),
        *((by_ffmpeg(kind, "rgb48le"), r"RGB, from 16 bits\) must be gray or RGB") for kind in ("jpeg2000", "tiff")),
        (planar_tiff_of_16_bits(), r"RGB, from 16 bits\) must be gray or RGB"),
        (by_ffmpeg("libsvtav1", "yuv420p10le", "avif"), r"RGB, from 10 bits\) must be gray or RGB"),
        (by_ffmpeg("libsvtav1", "yuv420p", "avif", curve=18), r"colours are HDR \(HLG\)"),
        (png_with_curve(16), r"colours are HDR \(PQ\)"), (png_with_curve(18), r"colours are HDR \(HLG\)"),
        *((png_of_16_bits(kind), r"must be gray or RGB of 8 bits") for kind in (0, 2, 4, 6)),
        (encoded(Image.fromarray(CORNERS[..., 0].astype("f4")), "TIFF"), r"mode F, from 32 bits\) must be gray"),
        (encoded(Image.fromarray(CORNERS[..., 0].astype("i4")), "TIFF"), r"mode I, from 32 bits\) must be gray"),
        (encoded(RGB.convert("CMYK"), "JPEG"), r"mode CMYK\) must be gray or RGB of 8 bits"),
        (encoded(RGB.convert("LAB"), "TIFF"), r"mode LAB\) must be gray or RGB of 8 bits"),
        (encoded(Image.fromarray(np.zeros((4, 4, 4), np.uint8))), r"must be opaque, but its alpha goes down to 0"),
        (encoded(RGB, transparency=(250, 0, 0)), r"must be opaque, but its alpha goes down to 0"),
        (encoded(RGB.quantize(), transparency=0), r"must be opaque, but its alpha goes down to 0"),
        (encoded(RGB, "GIF", **MANY), r"the file must hold one picture, got 2"),
        (encoded(RGB, "PNG", **MANY), r"the file must hold one picture, got 2"),
        (encoded(Image.fromarray(NOISE))[:900], r"cannot be decoded"),
        *((encoded(RGB, kind), r"must be one of PNG, .* begin with") for kind in ("EPS", "TGA", "SGI", "PCX", "ICO")),
        (b"", r"cannot be decoded"), (b"no picture", r"cannot be decoded"), (None, r"must be the bytes of a file"),
        ("a.png", r"must be the bytes of a file"), ({"path": "a.png"}, r"must be the bytes of a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "picture",
)  # fmt: skip
def test_pictures_without_one_meaning_are_refused(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        picture(content, None)


def test_a_picture_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)
    with pytest.raises(ValueError, match=r"begin with b'%!PS-Adobe"):
        picture(encoded(RGB, "EPS"), None)


def test_lerobot_names_the_picture(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder, camera = tmp_path / "in", "observation.images.depth"
    (folder / "meta").mkdir(parents=True)
    info = {
        "codebase_version": "v2.1", "fps": 10, "total_episodes": 2, "total_frames": 6,
        "data_path": "{episode_index}.parquet",
        "features": {camera: {"dtype": "image", "shape": [48, 64, 3]}, "action": {"dtype": "float32", "shape": [1]}},
    }  # fmt: skip
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/episodes.jsonl").write_text("".join(f'{{"episode_index": {e}, "length": 3}}\n' for e in (0, 1)))
    for e, content in enumerate((png_of_16_bits(0), encoded(RGB))):
        columns = {"episode_index": [e] * 3, "frame_index": [0, 1, 2], "action": [[0.0]] * 3}
        pq.write_table(pa.table({**columns, camera: [{"bytes": content}] * 3}), folder / f"{e}.parquet")
    with pytest.raises(ValueError, match=r"0.parquet: frame 0 of observation.images.depth of episode 0 .*8 bits"):
        import_lerobot(folder, tmp_path / "out", progress=False)
    assert len(import_lerobot(folder, tmp_path / "out", skip_damaged=True, progress=False)) == 1
    assert np.array_equal(Replay(tmp_path / "out").video[2], CORNERS)
