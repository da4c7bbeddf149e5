"""Draw the pages of a PDF as images, for pages that are scanned."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from pathlib import Path

from aiflux.converters.cells import BadRowError
from aiflux.util.extras import need

TEXT, IMAGES = "text", "images"
MAX_PIXELS = 1 << 20  # larger images cost more tokens and show hardly more
_QUALITY = 85


def page_images(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of pages and an image of each page, as a data URL.

    Raises:
        BadRowError: the PDF is damaged or encrypted.
        ConfigError: pypdfium2 or Pillow is not installed.
    """
    library = need("pypdfium2", "documents", f"drawing the pages of {path.name!r}")
    need("PIL", "documents", f"drawing the pages of {path.name!r}")
    try:
        with library.PdfDocument(path) as document:
            for page in document:
                width, height = page.get_size()
                scale = math.sqrt(MAX_PIXELS / max(1.0, width * height))
                file = io.BytesIO()
                picture = page.render(scale=scale).to_pil().convert("RGB")
                picture.save(file, "JPEG", quality=_QUALITY)
                yield (
                    len(document),
                    f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}",
                )
                page.close()
    except (library.PdfiumError, OSError) as error:
        raise BadRowError(
            f"the PDF is damaged or encrypted ({error}); save a copy without a password"
        ) from None
