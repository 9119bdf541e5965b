"""Decodes frames of videos, and pictures in tables, as they are displayed: uint8 RGB, upright, with square pixels.

A file may store its picture differently: rotated or mirrored (a display matrix, an EXIF orientation), with pixels that
are not square, in other colours or with more bits. It is converted if that is unambiguous. Otherwise an error names the
reason: gray or RGB with more than 8 bits, which is depth or other data (10-bit YUV is accepted: it is camera video),
transparent pictures, CMYK, HDR, interlaced video.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# AVColorTransferCharacteristic: the curves of HDR10 and HLG, which would need a choice of tone mapping.
HDR = {16: "PQ", 18: "HLG"}

# FFmpeg's demuxers that read a single video file. Others open files that a file names: lists, playlists, image series.
CONTAINERS = (
    "mov mp4 matroska webm avi mpegts mpeg mpegvideo m4v h264 hevc av1 obu ivf gif apng ogg flv asf mxf nut dv mjpeg "
    "yuv4mpegpipe"
).split()

# Pillow's other plugins start programs (EPS starts Ghostscript), or do not tell how many bits a channel has.
PICTURES = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")


def check_size(size: tuple[int, int] | None) -> None:
    if size is not None and (len(size) != 2 or not all(type(side) is int and 1 <= side < 2**15 for side in size)):
        raise ValueError(f"size must be a height and a width in pixels, in 1..32767, got {size}")


def stacked(place: object, frames: Iterable[np.ndarray]) -> np.ndarray:
    """The frames as one array, uint8 [T, H, W, 3]."""
    images = list(frames)
    if not images:
        raise ValueError(f"{place} has no frames")
    for number, img in enumerate(images):
        if img.shape != images[0].shape:
            raise ValueError(
                f"{place}: frames must all have one size, got {list(images[0].shape[:2])} at frame 0 and "
                f"{list(img.shape[:2])} at frame {number}"
            )
    return np.stack(images)


def decoded(path: Path, size: tuple[int, int] | None) -> Iterator[tuple[float | None, np.ndarray]]:
    """(time in seconds, uint8 [H, W, 3]) of every frame that the video shows; the time is None if it is not stored.

    size: height and width to scale to. ValueError if the file cannot be decoded to the end, or its frames have no
    unambiguous form as RGB.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("reading MP4 files needs the package av: pip install 'mfwm-kernels[data]'") from error

    count = 0
    try:
        check_complete(path)
        with opened(path) as container:
            stream = video_of(container)
            stretch = float(stream.sample_aspect_ratio or 1)
            # Samples that an edit list cuts out are decoded but not shown.
            shown = 0
            for packet in container.demux(stream):
                shown += packet.size > 0 and not packet.is_discard
                for frame in packet.decode():
                    yield frame.time, upright(frame, stretch, stream.codec_context.color_trc, size)
                    count += 1
            promised = stream.frames and shown
    except (av.FFmpegError, OSError, EOFError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded after {count} frames: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, frame {count}: {error}") from error
    if count == 0 or count < promised:
        raise ValueError(f"{path} yields {count} frames, but its header says {promised}")


def opened(path: Path, **options: str) -> Any:
    import av

    # Open it as a file even if its name looks like a URL, and let it open no other file.
    limits = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
    try:
        return av.open(f"file:{path}", options={**limits, **options})
    except av.ArgumentError as error:
        raise ValueError(
            f"it must be a single video file of one of {', '.join(CONTAINERS)}, not a list of files"
        ) from error


def video_of(container: Any) -> Any:
    """The only video stream that is not a cover picture."""
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if len(streams) != 1:
        raise ValueError(f"it must have one video stream, got {len(streams)}")
    return streams[0]


def check_complete(path: Path) -> None:
    """Compare the number of frames with the header's, because the decoder does not notice that a file was cut off."""
    with opened(path, ignore_editlist="1") as container:
        stream = video_of(container)
        if promised := stream.frames:
            held = sum(packet.size > 0 for packet in container.demux(stream))
            if held < promised:
                raise EOFError(f"it holds {held} frames, but its header says {promised}")


def upright(frame: Any, stretch: float, curve: int, size: tuple[int, int] | None) -> np.ndarray:
    """A frame as it is shown, uint8 [H, W, 3]. stretch: width / height of a pixel; curve: the transfer function."""
    components = frame.format.components
    if frame.is_corrupt:
        raise ValueError("it is damaged")
    if frame.interlaced_frame:
        raise ValueError("it is interlaced: deinterlace the video first")
    if curve in HDR:
        raise ValueError(f"its colours are HDR ({HDR[curve]}): convert the video to 8 bits first")
    bits = max(component.bits for component in components)
    if bits > 8 and (frame.format.is_rgb or len(components) < 3):
        kind = "RGB" if frame.format.is_rgb else "gray"
        raise ValueError(f"it is {kind} with {bits} bits per channel, but frames have 8: convert the video first")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    turns, mirrored = display(np.frombuffer(bytes(matrix), np.int32) if matrix else None)
    height, width = size or (frame.height, max(1, round(frame.width * stretch)))
    if size and turns % 2:
        height, width = width, height
    if frame.format.has_palette or any(component.is_alpha for component in components):
        img = opaque(frame.to_ndarray(format="rgba", height=height, width=width))
    else:
        img = frame.to_ndarray(format="rgb24", height=height, width=width)
    if mirrored:
        img = img[:, ::-1]
    return np.ascontiguousarray(np.rot90(img, turns))


def display(matrix: np.ndarray | None) -> tuple[int, bool]:
    """How a display matrix shows a picture: the number of right angles that it is turned left by, and whether it is
    mirrored left to right before that.

    (x, y) of the stored picture is shown at (a x + c y, b x + d y), where x points right and y down.
    """
    if matrix is None:
        return 0, False
    one = 1 << 16
    a, b, c, d = (int(matrix[index]) / one for index in (0, 1, 3, 4))
    kinds: dict[tuple[float, ...], int] = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2, (0, 1, -1, 0): 3}
    if (a, b, c, d) in kinds:
        return kinds[a, b, c, d], False
    # Mirrored: -x in place of x.
    if (-a, -b, c, d) in kinds:
        return kinds[-a, -b, c, d], True
    raise ValueError(f"it must be shown unscaled and turned by right angles, but its display matrix is {[a, b, c, d]}")


def picture(encoded: Any, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [H, W, 3], an encoded picture as it is shown."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not isinstance(encoded, bytes):
        raise ValueError(f"a picture must be the bytes of a file such as PNG, got {str(encoded)[:60]!r}")
    Image.init()
    try:
        stored = Image.open(io.BytesIO(encoded), formats=[kind for kind in PICTURES if kind in Image.OPEN])
        count, kind = getattr(stored, "n_frames", 1), stored.format
        bits, curve = depth(stored, encoded), transfer(stored.format, encoded)
        image = ImageOps.exif_transpose(stored)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"the picture cannot be decoded: it must be one of {', '.join(PICTURES)}, got bytes that begin with "
            f"{encoded[:12]!r}"
        ) from error
    except Exception as error:  # Decoders raise almost anything on damaged bytes.
        raise ValueError(f"the picture cannot be decoded: {error}") from error
    # A phone's MPO also holds a preview.
    if count > 1 and kind != "MPO":
        raise ValueError(f"the file must hold one picture, got {count}")
    if curve in HDR:
        raise ValueError(f"the picture's colours are HDR ({HDR[curve]}): convert it to 8 bits first")
    if image.mode not in ("1", "L", "P", "RGB", "LA", "PA", "RGBA") or bits > 8:
        mode = f"{image.mode}{f', from {bits} bits' if bits > 8 else ''}"
        raise ValueError(f"the picture (Pillow's mode {mode}) must be gray or RGB of 8 bits: convert it first")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = Image.fromarray(opaque(np.asarray(image.convert("RGBA"))))
    image = image.convert("RGB")
    return np.asarray(image.resize(size[::-1], Image.Resampling.BOX) if size else image)


def depth(stored: Any, encoded: bytes) -> int:
    """Bits per channel in the file. Pillow drops the lower bits of RGB, and shows that in its tiles or not at all."""
    kind, argument = stored.format, stored.tile[0][3] if stored.tile else ()
    if kind == "PNG":
        return 16 if ";16" in str(argument) else 8
    if kind == "TIFF":
        return max(stored.tag_v2.get(258, (1,)))
    if kind == "PPM":
        # The argument is a name, or the mode and the largest value.
        return int(argument[1]).bit_length() if isinstance(argument, tuple) else 8
    if kind == "JPEG2000":
        # SIZ, the first segment: the number of components, then a byte for each, its bits minus one.
        start = encoded.index(b"\xff\x4f\xff\x51") + 40
        count = int.from_bytes(encoded[start : start + 2], "big")
        return max(1 + (byte & 0x7F) for byte in encoded[start + 2 : start + 2 + 3 * count : 3])
    if kind == "AVIF":
        # av1C: marker and version, profile and level, then the tier and a bit for more than 8 bits.
        return 10 if encoded[encoded.index(b"av1C") + 6] & 0x40 else 8
    return 8


def transfer(kind: str | None, encoded: bytes) -> int | None:
    """The transfer function that a PNG or an AVIF file names."""
    # It follows the primaries: the second byte of a cICP chunk, the second 16-bit number of a colr box.
    mark, offset, size = {"PNG": (b"\0\0\0\4cICP", 9, 1), "AVIF": (b"colrnclx", 10, 2)}.get(kind or "", (b"", 0, 0))
    at = encoded.find(mark) if mark else -1
    return int.from_bytes(encoded[at + offset : at + offset + size], "big") if at >= 0 else None


def opaque(img: np.ndarray) -> np.ndarray:
    """The RGB of uint8 [H, W, 4], which must be opaque, because no background is defined."""
    if img[..., 3].min(initial=255) < 255:
        raise ValueError(f"the picture must be opaque, but its alpha goes down to {img[..., 3].min()}")
    return np.ascontiguousarray(img[..., :3])
