"""Read the text of an e-mail (.eml): its header, its body, and the names of its attachments."""

from __future__ import annotations

from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import cast

from aiflux.converters.cells import BadRowError
from aiflux.converters.pandoc import pandoc_text

_SHOWN = ("From", "To", "Cc", "Date", "Subject")


def email_text(content: bytes) -> str:
    """Return the text of an e-mail.

    The body is the plain text if there is one, else the text of the HTML.

    Raises:
        BadRowError: it is not an e-mail, or its body cannot be decoded.
        ConfigError: it has only HTML, and pandoc is not installed.
    """
    message = message_from_bytes(content, policy=default)
    if not message.keys():
        raise BadRowError("not an e-mail: it has no header")
    lines = [f"{name}: {message[name]}" for name in _SHOWN if message[name]]
    body = message.get_body(("plain", "html"))
    if body is not None:
        lines += ["", _body(cast(EmailMessage, body))]
    names = [part.get_filename() or part.get_content_type() for part in message.iter_attachments()]
    if names:
        lines += ["", f"Attachments: {', '.join(names)}"]
    return "\n".join(lines)


def _body(part: EmailMessage) -> str:
    try:
        text = part.get_content()
    except (LookupError, ValueError, AssertionError) as error:
        raise BadRowError(f"its body cannot be decoded: {error}") from None
    if part.get_content_subtype() != "html":
        return str(text).strip()
    return pandoc_text(str(text).encode("utf-8", "replace"), "html").strip()
