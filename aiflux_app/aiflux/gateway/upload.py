"""Read the form of an upload as it arrives: the file goes to disk, the fields stay in memory."""

from __future__ import annotations

import re

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from aiflux.gateway.objects import ApiError, wrong
from aiflux.gateway.store import BATCH, PendingUpload, StoredFile

_LONGEST_FIELD = 1024
_LONGEST_NAME = 255
_MOST_PARTS = 16
_UNWANTED = re.compile(r"[\x00-\x1f\x7f]")


class UploadForm:
    """The form of one upload, fed with the parts of a request's body.

    Args:
        content_type: the request's header, which names the boundary.

    Raises:
        ApiError: the request is not a form.
    """

    def __init__(self, content_type: str, upload: PendingUpload) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind.lower() != b"multipart/form-data" or not boundary:
            raise ApiError(400, "The request must be multipart/form-data: a file and a purpose.")
        self._upload = upload
        self._parts = 0
        self._header = [b"", b""]
        self._disposition = b""
        self._name = ""
        self._filename: str | None = None
        self._purpose = b""
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _not_a_form(error) from None

    def feed(self, data: bytes) -> None:
        """Take the next part of the body.

        Raises:
            ApiError: the form is wrong.
            StorageError: the file cannot be written.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _not_a_form(error) from None

    def finish(self) -> StoredFile:
        """Make the file visible, if the form is complete.

        Raises:
            ApiError: it is not.
            StorageError: the file cannot be written.
        """
        if not self._ended:
            raise ApiError(400, "The upload ended before the form was complete.")
        if self._filename is None:
            raise wrong("file", "Missing required parameter: 'file'.", "missing_required_parameter")
        purpose = self._purpose.decode("utf-8", "replace")
        if not purpose:
            raise wrong(
                "purpose", "Missing required parameter: 'purpose'.", "missing_required_parameter"
            )
        if purpose != BATCH:
            raise wrong(
                "purpose",
                f"Invalid value: {purpose!r}. This gateway stores files of the purpose '{BATCH}'.",
                "invalid_value",
            )
        return self._upload.publish(self._filename, purpose)

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise ApiError(400, f"The form has more than {_MOST_PARTS} parts.")
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == "file":
            if self._filename is not None:
                raise wrong("file", "The form has several files.", "invalid_value")
            self._filename = _plain_name(options.get(b"filename", b""))
        elif self._name.startswith("expires_after"):
            raise wrong(
                "expires_after",
                "expires_after is not supported: the gateway keeps files until they are deleted.",
                "unsupported_parameter",
            )
        elif self._name != "purpose":
            raise wrong(self._name, f"Unknown parameter: '{self._name}'.", "unknown_parameter")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._upload.write(data[start:end])
            return
        self._purpose += data[start:end]
        if len(self._purpose) > _LONGEST_FIELD:
            raise wrong("purpose", "The purpose is too long.", "string_above_max_length")

    def _end(self) -> None:
        self._ended = True


def _plain_name(name: bytes) -> str:
    """Return the last part of a client's file name, for display only."""
    text = _UNWANTED.sub("", name.decode("utf-8", "replace"))
    return text.rpartition("/")[2][-_LONGEST_NAME:] or "upload"


def _not_a_form(error: FormParserError) -> ApiError:
    return ApiError(400, f"The body is not a valid form: {error}.")
