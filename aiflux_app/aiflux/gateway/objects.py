"""OpenAI's objects as JSON, its form of errors, and what the body of a new batch may contain.

Source of the forms: the types of the package ``openai`` (``openai/types/batch.py``,
``file_object.py``, ``batch_error.py``) and https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiflux.core.config.declaration import Setting, known_setting, parse_setting, refuse_two_names
from aiflux.core.config.settings import BY_NAME, SETTINGS
from aiflux.errors import ConfigError
from aiflux.models.endpoints import ENDPOINTS
from aiflux.util import value_parsers
from aiflux.util.text import joined

URLS = tuple(each.url for each in ENDPOINTS.values())
INVALID, AUTHENTICATION, SERVER = "invalid_request_error", "authentication_error", "server_error"
SETTINGS_FIELD = "aiflux"
_WINDOW = re.compile(r"([1-9]\d{0,4})([mhd])")
_WINDOW_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_BATCH_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata", SETTINGS_FIELD)
_REQUIRED = ("input_file_id", "endpoint", "completion_window")
_MOST_PAIRS, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512


class ApiError(Exception):
    """An answer with an error in OpenAI's form.

    Args:
        status: of the HTTP response.
        param: the parameter that is wrong.
        code: for programs.
        kind: ``type`` of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = (
            status, message, param, code, kind,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """Return the error of a wrong parameter."""
    return ApiError(400, message, param=param, code=code)


def one_page(data: Sequence[Mapping[str, Any]], *, more: bool) -> dict[str, Any]:
    """Return a page of a list.

    Args:
        more: whether there are further objects after it.
    """
    return {
        "object": "list",
        "data": list(data),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": more,
    }


def file_object(
    id_: str, *, size: int, created_at: int, filename: str, purpose: str
) -> dict[str, Any]:
    """Return a file; those of the gateway are complete and never expire."""
    return {
        "id": id_,
        "object": "file",
        "bytes": size,
        "created_at": created_at,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }


def model_object(name: str) -> dict[str, Any]:
    """Return a model; when it was created is not known."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "aiflux"}


@dataclass(frozen=True)
class BatchError:
    """An error that ended a batch; ``line`` is the number of a line of its input."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


# How the problems of a line begin (core.batch.request), and OpenAI's codes for them.
_LINE_CODES: Sequence[tuple[str, str]] = (
    (r"custom_id .* is already used", "duplicate_custom_id"),
    (r"url is not that of the batch", "url_mismatch"),
    (r"(custom_id|method|url|body(\.\w+)?) is (missing|empty)", "missing_required_parameter"),
    (r"method ", "invalid_method"),
    (r"url ", "invalid_url"),
    (r"body\.model is .* but the run's model is", "model_mismatch"),
    (r"(custom_id|body(\.\w+)?|metadata) ", "invalid_value"),
)
_LINE_PARAM = re.compile(r"(custom_id|method|url|body(?:\.\w+)?|metadata)\b")


def line_error(line: int, problem: str) -> BatchError:
    """Return the error of a line for the problem that the check of the input found."""
    code = next((code for form, code in _LINE_CODES if re.match(form, problem)), None)
    param = _LINE_PARAM.match(problem)
    return BatchError(
        code or "invalid_json_line", problem, line, param[1] if code and param else None
    )


def window_seconds(window: str) -> int:
    """Return the length of a completion window, such as ``24h``.

    Raises:
        ApiError: it is not of that form.
    """
    found = _WINDOW.fullmatch(window)
    if found is None:
        raise wrong(
            "completion_window",
            f"Invalid value: {window!r}. completion_window must be a time such as '24h' or '7d'.",
            "invalid_value",
        )
    return int(found[1]) * _WINDOW_SECONDS[found[2]]


@dataclass(frozen=True)
class BatchRequest:
    """What the body of a new batch asks for.

    Attributes:
        settings: of the run, as the body has them.
    """

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None
    settings: dict[str, Any]

    @classmethod
    def read(cls, body: Any) -> BatchRequest:
        """Check a body.

        Raises:
            ApiError: it is wrong; names the parameter.
        """
        if not isinstance(body, dict):
            raise ApiError(400, "The body must be a JSON object.")
        for name in body:
            if name not in _BATCH_FIELDS:
                raise _unknown(name)
        for name in _REQUIRED:
            value = body.get(name)
            if value is None:
                raise wrong(
                    name, f"Missing required parameter: '{name}'.", "missing_required_parameter"
                )
            if not isinstance(value, str):
                raise _wrong_type(name, "a string", value)
        window_seconds(body["completion_window"])
        if body["endpoint"] not in URLS:
            listed = joined([f"'{url}'" for url in URLS])
            raise wrong(
                "endpoint",
                f"Invalid value: {body['endpoint']!r}. Supported values are: {listed}.",
                "invalid_value",
            )
        return cls(
            body["input_file_id"],
            body["endpoint"],
            body["completion_window"],
            _metadata(body.get("metadata")),
            _settings(body.get(SETTINGS_FIELD)),
        )


def _unknown(name: str) -> ApiError:
    if name == "output_expires_after":
        return wrong(
            name,
            f"{name} is not supported: the gateway keeps files until they are deleted.",
            "unsupported_parameter",
        )
    return wrong(name, f"Unknown parameter: '{name}'.", "unknown_parameter")


_JSON_WORDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}


def _wrong_type(param: str, wanted: str, value: Any) -> ApiError:
    seen = "null" if value is None else _JSON_WORDS.get(type(value), "a number")
    return wrong(
        param,
        f"Invalid type for '{param}': expected {wanted}, but got {seen} instead.",
        "invalid_type",
    )


def _metadata(given: Any) -> dict[str, str] | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise _wrong_type("metadata", "an object", given)
    if len(given) > _MOST_PAIRS:
        raise wrong("metadata", f"metadata has more than {_MOST_PAIRS} pairs.", "invalid_value")
    for name, value in given.items():
        if not isinstance(value, str):
            raise _wrong_type(f"metadata.{name}", "a string", value)
        if len(name) > _LONGEST_KEY or len(value) > _LONGEST_VALUE:
            raise wrong(
                "metadata",
                f"A key of metadata can have {_LONGEST_KEY} characters, a value {_LONGEST_VALUE}.",
                "string_above_max_length",
            )
    return given


def _settings(given: Any) -> dict[str, Any]:
    """Return the settings of a run that a request gives, checked."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise _wrong_type(SETTINGS_FIELD, "an object", given)
    try:
        refuse_two_names(given, lambda _: SETTINGS_FIELD, BY_NAME)
    except ConfigError as error:
        raise wrong(SETTINGS_FIELD, str(error), "invalid_value") from None
    return {
        setting.name: value
        for setting, value in ((_allowed(name), value) for name, value in given.items())
        if value is not None and _fits(setting, value)
    }


_OF_PATHS = (value_parsers.path, value_parsers.named_paths)


def _may_be_requested(setting: Setting) -> bool:
    # Whoever has the key must not become the user by it: no setting that decides where prompts go
    # or what runs (decisive), and none that reads or writes files of its own.
    elsewhere = setting.section in ("paths", "accounting")
    return not (setting.decisive or elsewhere or setting.parse in _OF_PATHS)


REQUESTABLE = tuple(item.name for item in SETTINGS if item.offered and _may_be_requested(item))
"""The settings that a request can give; the others are only those of the gateway itself."""


def _allowed(name: str) -> Setting:
    try:
        setting = known_setting(name, "", BY_NAME)
    except ConfigError as error:
        raise wrong(f"{SETTINGS_FIELD}.{name}", str(error), "unknown_parameter") from None
    if setting.name not in REQUESTABLE:
        raise wrong(
            f"{SETTINGS_FIELD}.{name}",
            f"{name} cannot be set by a request, because it decides where data goes or what runs: "
            f"set it in aiflux.yaml, or start the gateway with {setting.option}.",
            "unsupported_parameter",
        )
    return setting


def _fits(setting: Setting, value: Any) -> bool:
    try:
        parse_setting(setting, value, SETTINGS_FIELD)
    except ConfigError as error:
        raise wrong(f"{SETTINGS_FIELD}.{setting.name}", str(error), "invalid_value") from None
    return True


def as_errors(errors: Iterable[BatchError]) -> dict[str, Any]:
    """Return the errors of a batch."""
    data = [
        {"code": each.code, "line": each.line, "message": each.message, "param": each.param}
        for each in errors
    ]
    return {"object": "list", "data": data}
