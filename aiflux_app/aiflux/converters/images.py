"""Convert images to requests that contain them as data URLs, scaled down if needed."""

from __future__ import annotations

import base64
import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.converters.cells import BadRowError
from aiflux.converters.directory import Found, Walk
from aiflux.converters.pdf_pages import MAX_PIXELS
from aiflux.converters.prompt import Prompt, prompt_of
from aiflux.converters.request_form import RequestDraft, make_form, with_image
from aiflux.converters.table import names
from aiflux.converters.template import PromptTemplate
from aiflux.converters.writer import Conversion, Progress, Skipped, Summary, reading
from aiflux.errors import InputError, UsageError
from aiflux.util.compression import PlainFile
from aiflux.util.extras import need

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

TEMPLATE = "Describe this image."
NAMES = ("source_file", "name")
# Formats that engines accept as they are; others are sent as PNG or JPEG.
_SENT_AS_IS = {"JPEG": "image/jpeg", "PNG": "image/png"}
_KNOWN = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".avif")
)
# Modes that every engine accepts; others, such as CMYK, are converted.
_PLAIN_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA"))
# Grayscale with more than 8 bits, as written by microscopes and scanners.
_DEEP_MODES = frozenset(("I", "I;16", "I;16B", "I;16L", "I;16N", "F"))
_WITH_FRAMES = frozenset(("GIF", "PNG", "TIFF", "WEBP"))
_QUALITY = 90


def images_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str | Path | PromptTemplate = TEMPLATE,
    recursive: bool = False,
    patterns: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    **request: Unpack[RequestOptions],
) -> Summary:
    """Convert each image of a directory, or of a list with one path per line, to a request.

    Paths in a list are relative to the list's directory. ``custom_id`` is the path as listed or
    relative to the directory; the metadata has ``source_file``. JPEG and PNG files that are small
    enough are sent unchanged. Other images are rotated upright, resized and sent as JPEG, or as PNG
    if they have transparency. Grayscale with more than 8 bits is stretched from its darkest to its
    brightest value. Only the first frame or page is sent.

    Args:
        template: the question; ``{source_file}`` and ``{name}`` (without suffix) are replaced. Or
            the ``Path`` of a template.
        max_pixels: maximum width times height.
        progress: called with the number of images done and the total.

    The other arguments are the same as for ``directory_to_jsonl``.

    Raises:
        ConfigError: Pillow is not installed.
        InputError: the directory, the list or some images are invalid.
        StorageError: the output cannot be written.
    """
    if max_pixels < 1:
        raise UsageError(f"--max-pixels {max_pixels} is not 1 or more", "--max-pixels 1000000")
    form = make_form(**request)
    prompt = prompt_of(template, form, required=False)
    prompt.check(NAMES, "an image", "name")
    if form.examples:
        raise UsageError("--examples have no images", "remove them")
    if form.endpoint != "chat":
        raise UsageError("images require the chat endpoint", "remove --endpoint")
    source = Path(input_path)
    listed = os.path.isfile(source)
    walk = Walk(source, recursive, names(patterns), names(exclude))
    maker = _ImageRequests(source if listed else walk, prompt, _Reducer(max_pixels), progress)
    job = Conversion(
        source,
        None if output_path is None else Path(output_path),
        form,
        unit="image",
        place="line" if listed else "file",
        skip_bad=skip_bad,
        limit=limit,
        notes=maker.notes,
        nothing=_no_line if listed else walk.nothing,
    )
    return job.run(maker.items())


def _no_line() -> str:
    return "write one image path per line"


@dataclass(frozen=True)
class _ImageRequests:
    """Creates the request for each image."""

    source: Path | Walk
    prompt: Prompt
    reducer: _Reducer
    progress: Progress | None

    def notes(self) -> tuple[str, ...]:
        """Return notes about the images that were read."""
        several = self.reducer.several
        literal = self.prompt.literal_notes(NAMES)
        if not several:
            return literal
        count = "1 image has" if several == 1 else f"{several} images have"
        return (f"{count} several frames or pages; only the first is sent", *literal)

    def items(self) -> Iterator[RequestDraft | Skipped]:
        total = sum(1 for _ in self._files()) if self.progress is not None else 0
        for done, (number, found) in enumerate(self._files(), start=1):
            yield self._of_file(number, found)
            if self.progress is not None:
                self.progress(done, total)

    def _files(self) -> Iterator[tuple[int, Found]]:
        """Yield each image with its line number or position."""
        if isinstance(self.source, Walk):
            yield from enumerate(self.source.files(), start=1)
        else:
            yield from _listed(self.source)

    def _of_file(self, number: int, found: Found) -> RequestDraft | Skipped:
        if found.reason:
            return Skipped(number, found.name, found.reason, bad=False)
        if isinstance(self.source, Walk) and found.path.suffix.lower() not in _KNOWN:
            kinds = ", ".join(sorted(_KNOWN))
            return Skipped(number, found.name, f"not an image file name ({kinds})", bad=False)
        place = found.name if isinstance(self.source, Walk) else f"line {number}: {found.name}"
        try:
            if found.name.startswith(("http://", "https://")):
                raise BadRowError("it is a URL: download the image and give its path")
            url = self.reducer.data_url(found.path)
        except BadRowError as error:
            return Skipped(number, place, str(error))
        name = found.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        values = {"source_file": name, "name": found.path.stem}
        try:
            draft = self.prompt.draft(number, name, values, {"source_file": name})
        except BadRowError as error:
            return Skipped(number, place, str(error))
        return replace(draft, content=with_image(draft.content, url))


def _listed(path: Path) -> Iterator[tuple[int, Found]]:
    with reading(path):
        if path.suffix.lower() in _KNOWN:
            raise InputError(
                f"the input {str(path)!r} is a single image",
                "give its directory (with --pattern) or a text file with one image path per line",
            )
        try:
            with PlainFile(path) as plain, io.TextIOWrapper(plain, "utf-8-sig") as file:
                for number, line in enumerate(file, start=1):
                    name = line.strip()
                    if name and not name.startswith("#"):
                        yield number, Found(path.parent / name, name)
        except UnicodeDecodeError:
            raise InputError(
                f"the list {str(path)!r} is not UTF-8 text", "write one image path per line"
            ) from None


class _Reducer:
    """Converts image files to data URLs.

    Attributes:
        several: number of images with several frames or pages.

    Raises:
        ConfigError: Pillow is not installed.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self.several = 0
        self._pillow = need("PIL.Image", "images", "reading images")
        self._ops = need("PIL.ImageOps", "images", "reading images")

    def data_url(self, path: Path) -> str:
        """Return an image as a data URL.

        Raises:
            BadRowError: the file cannot be read or is not an image.
        """
        try:
            content = path.read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # large images are fine; bombs raise
                kind, sent = self._reduced(content)
        except self._pillow.UnidentifiedImageError:
            raise BadRowError("not an image, or a format that Pillow cannot read") from None
        except self._pillow.DecompressionBombError as error:
            raise BadRowError(f"the image is too large: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - Pillow raises many types for damaged images
            words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise BadRowError(f"the image cannot be read: {words}") from None
        return f"data:{kind};base64,{base64.b64encode(sent).decode()}"

    def _reduced(self, content: bytes) -> tuple[str, bytes]:
        with self._pillow.open(io.BytesIO(content)) as image:
            if image.format in _WITH_FRAMES:
                self.several += getattr(image, "n_frames", 1) > 1
            size = self._size(image.width, image.height)
            kind = _SENT_AS_IS.get(image.format or "") if image.mode in _PLAIN_MODES else None
            if kind is not None and size == image.size and image.getexif().get(0x0112, 1) == 1:
                image.load()  # detects damage after the header
                return kind, content
            image.draft("RGB", size)
            upright = _shallow(self._ops.exif_transpose(image))
            small = upright.resize(self._size(*upright.size), self._pillow.Resampling.LANCZOS)
            return _encoded(small)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        scale = math.sqrt(self._max_pixels / (width * height))
        if scale >= 1:
            return width, height
        return max(1, int(width * scale)), max(1, int(height * scale))


def _shallow(image: Any) -> Any:
    """Convert grayscale with more than 8 bits to 8 bits, using the full range."""
    if image.mode not in _DEEP_MODES:
        return image
    wide = image.convert("F")
    low, high = wide.getextrema()
    scale = 255 / (high - low) if high > low else 0.0
    return wide.point(lambda value: value * scale - low * scale).convert("L")


def _encoded(image: Any) -> tuple[str, bytes]:
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    file = io.BytesIO()
    if transparent:
        image.convert("RGBA").save(file, "PNG")
        return "image/png", file.getvalue()
    image.convert("RGB").save(file, "JPEG", quality=_QUALITY)
    return "image/jpeg", file.getvalue()
