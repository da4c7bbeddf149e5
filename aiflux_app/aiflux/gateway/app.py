"""The routes: OpenAI's Files, Batches and Models."""

from __future__ import annotations

import hmac
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any, ParamSpec, TypeVar, cast
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from aiflux.core.batch.request import not_json, parse_json
from aiflux.errors import AifluxError, StorageError
from aiflux.gateway.batch_status import batch_objects
from aiflux.gateway.objects import (
    AUTHENTICATION,
    SERVER,
    ApiError,
    BatchRequest,
    file_object,
    model_object,
    one_page,
    wrong,
)
from aiflux.gateway.service import Gateway
from aiflux.gateway.store import BatchFiles, GatewayStore, Key, StoredFile, id_key, no_file
from aiflux.gateway.upload import UploadForm
from aiflux.util.files import open_regular
from aiflux.util.process_limits import require_thread_memory
from aiflux.util.streams import FULL
from aiflux.util.text import is_whole

_LARGEST_BODY = 1 << 20
_BLOCK = 1 << 18
_MOST_FILES, _MOST_BATCHES, _USUAL_BATCHES = 10_000, 100, 20
_ORDERS = ("asc", "desc")
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def make_app(gateway: Gateway, key: str) -> Starlette:
    """Return the application.

    Args:
        key: what clients have to send as bearer token.
    """
    routes = _Routes(gateway)
    app = Starlette(
        routes=[
            Route("/v1/files", routes.create_file, methods=["POST"]),
            Route("/v1/files", routes.list_files, methods=["GET"]),
            Route("/v1/files/{id}", routes.retrieve_file, methods=["GET"]),
            Route("/v1/files/{id}", routes.delete_file, methods=["DELETE"]),
            Route("/v1/files/{id}/content", routes.file_content, methods=["GET"]),
            Route("/v1/batches", routes.create_batch, methods=["POST"]),
            Route("/v1/batches", routes.list_batches, methods=["GET"]),
            Route("/v1/batches/{id}", routes.retrieve_batch, methods=["GET"]),
            Route("/v1/batches/{id}/cancel", routes.cancel_batch, methods=["POST"]),
            Route("/v1/models", routes.list_models, methods=["GET"]),
            Route("/v1/models/{id:path}", routes.retrieve_model, methods=["GET"]),
        ],
        middleware=[Middleware(_KeyCheck, key=key)],
        exception_handlers={
            ApiError: _on_api_error,
            AifluxError: _on_own_error,
            HTTPException: _on_http_error,
            Exception: _on_bug,
        },
    )
    app.router.redirect_slashes = False  # a path with a slash at its end is unknown, too
    return app


class _KeyCheck:
    """Refuses every request without the key, before anything of it is read."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._knows_key(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "Incorrect API key provided: it is in the file that aiflux gateway names at its start.",
            code="invalid_api_key",
            kind=AUTHENTICATION,
        )
        await _answer(error)(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        # compare_digest takes the same time for every wrong key.
        return hmac.compare_digest(token.strip(), self._key) and scheme.lower() == b"bearer"


def _answer(error: ApiError) -> Response:
    # Clients repeat requests after a conflict or a server error, which cannot help here.
    return JSONResponse(error.to_json(), error.status, headers={"x-should-retry": "false"})


async def _on_api_error(_: Request, error: Exception) -> Response:
    return _answer(cast(ApiError, error))


async def _on_own_error(_: Request, error: Exception) -> Response:
    cause = error.__cause__
    full = isinstance(error, StorageError) and isinstance(cause, OSError) and cause.errno in FULL
    status, code = (507, "insufficient_storage") if full else (500, None)
    return _answer(ApiError(status, str(error), code=code, kind=SERVER))


async def _on_http_error(request: Request, raised: Exception) -> Response:
    error = cast(HTTPException, raised)
    what = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return _answer(ApiError(404, f"Invalid URL ({what})", code="unknown_url"))
    if error.status_code == 405:
        return _answer(ApiError(405, f"Not allowed method ({what})", code="method_not_supported"))
    return _answer(ApiError(error.status_code, str(error.detail)))


async def _on_bug(_: Request, error: Exception) -> Response:
    return _answer(
        ApiError(
            500, f"This is a bug in AI-Flux: {type(error).__name__}; see its log.", kind=SERVER
        )
    )


class _Routes:
    """The functions of the routes. What reads or writes files works in a thread."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    @property
    def _store(self) -> GatewayStore:
        return self._gateway.store

    async def create_file(self, request: Request) -> Response:
        upload = await _in_thread(self._store.begin_upload)
        try:
            form = UploadForm(request.headers.get("content-type", ""), upload)
            async for data in request.stream():
                if data:
                    await _in_thread(form.feed, data)
            return JSONResponse(_file(await _in_thread(form.finish)))
        except ClientDisconnect:
            raise ApiError(400, "The upload broke off.") from None
        finally:
            upload.discard()

    async def list_files(self, request: Request) -> Response:
        page = _Page.of(request, _MOST_FILES, _MOST_FILES)

        def listed() -> dict[str, Any]:
            keys = self._store.file_keys(request.query_params.get("purpose"))
            ids, more = page.choose(keys, self._store.place)
            return one_page([*self._present(ids)], more=more)

        return JSONResponse(await _in_thread(listed))

    def _present(self, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        for id_ in ids:
            with suppress(ApiError):  # deleted since it was listed
                yield _file(self._store.file(id_))

    async def retrieve_file(self, request: Request) -> Response:
        return JSONResponse(_file(await _in_thread(self._store.file, request.path_params["id"])))

    async def delete_file(self, request: Request) -> Response:
        id_ = request.path_params["id"]
        await _in_thread(self._store.delete, id_, self._gateway.needs_input)
        return JSONResponse({"id": id_, "object": "file", "deleted": True})

    async def file_content(self, request: Request) -> Response:
        id_ = request.path_params["id"]
        stored, file = await _in_thread(self._opened, id_)
        name = quote(stored.filename, safe="")
        return StreamingResponse(
            _blocks(file, stored.bytes),
            media_type="application/octet-stream",
            headers={
                "content-length": str(stored.bytes),
                "content-disposition": f"attachment; filename*=UTF-8''{name}",
            },
        )

    def _opened(self, id_: str) -> tuple[StoredFile, IO[bytes]]:
        stored = self._store.file(id_)
        try:
            # Once it is open, it is sent whole, even if it is deleted in the meantime.
            return stored, open(stored.path, "rb", buffering=0, opener=open_regular)
        except FileNotFoundError:
            raise no_file(id_) from None

    async def create_batch(self, request: Request) -> Response:
        asked = BatchRequest.read(await _json_body(request))
        return await self._batch(lambda: self._gateway.create(asked))

    async def retrieve_batch(self, request: Request) -> Response:
        return await self._batch(lambda: self._store.batch(request.path_params["id"]))

    async def cancel_batch(self, request: Request) -> Response:
        return await self._batch(lambda: self._gateway.cancel(request.path_params["id"]))

    async def _batch(self, find: Callable[[], BatchFiles]) -> Response:
        def described() -> dict[str, Any]:
            (content,) = batch_objects([find()], self._gateway.watch)
            return content

        return JSONResponse(await _in_thread(described))

    async def list_batches(self, request: Request) -> Response:
        page = _Page.of(request, _MOST_BATCHES, _USUAL_BATCHES)

        def listed() -> dict[str, Any]:
            ids, more = page.choose([id_key(id_) for id_ in self._store.batch_ids()], id_key)
            batches = [self._store.batch(id_) for id_ in ids]
            return one_page(batch_objects(batches, self._gateway.watch), more=more)

        return JSONResponse(await _in_thread(listed))

    async def list_models(self, _: Request) -> Response:
        names = await _in_thread(self._gateway.models)
        return JSONResponse({"object": "list", "data": [model_object(name) for name in names]})

    async def retrieve_model(self, request: Request) -> Response:
        name = request.path_params["id"]
        if name not in await _in_thread(self._gateway.models):
            raise ApiError(
                404, f"The model '{name}' does not exist.", param="model", code="model_not_found"
            )
        return JSONResponse(model_object(name))


def _file(stored: StoredFile) -> dict[str, Any]:
    return file_object(
        stored.id,
        size=stored.bytes,
        created_at=stored.created_at,
        filename=stored.filename,
        purpose=stored.purpose,
    )


async def _in_thread(
    work: Callable[_Given, _Result], *args: _Given.args, **kwargs: _Given.kwargs
) -> _Result:
    """Do work that reads or writes files in a thread.

    Raises:
        StoppedError: too little memory is left to start one.
    """
    require_thread_memory()
    return await run_in_threadpool(work, *args, **kwargs)


async def _blocks(file: IO[bytes], size: int) -> AsyncIterator[bytes]:
    """Yield the content in blocks; each is read in a thread."""
    with file:
        while size > 0 and (block := await _in_thread(file.read, min(_BLOCK, size))):
            size -= len(block)
            yield block


async def _json_body(request: Request) -> Any:
    """Return the body of a request.

    Raises:
        ApiError: it is too large, or is not JSON.
    """
    body = b""
    try:
        async for data in request.stream():
            body += data
            if len(body) > _LARGEST_BODY:
                raise ApiError(413, f"The body has more than {_LARGEST_BODY} bytes.")
        value = parse_json(body.decode())
    except ClientDisconnect:
        raise ApiError(400, "The request broke off.") from None
    except ValueError as error:
        raise ApiError(
            400, f"We could not parse the JSON body of your request: {not_json(error)}."
        ) from None
    if not is_whole(json.dumps(value, ensure_ascii=False)):
        raise ApiError(400, "The body contains half a surrogate pair.")
    return value


class _Page:
    """The part of a list that a request asks for."""

    def __init__(self, limit: int, after: str | None, *, newest_first: bool) -> None:
        self._limit = limit
        self._after = after
        self._newest_first = newest_first

    @classmethod
    def of(cls, request: Request, most: int, usual: int) -> _Page:
        query = request.query_params
        order = query.get("order", "desc")
        if order not in _ORDERS:
            raise wrong("order", "order must be 'asc' or 'desc'.", "invalid_value")
        text = query.get("limit", str(usual))
        if not (text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) <= most):
            raise wrong("limit", f"limit must be a number from 1 to {most}.", "invalid_value")
        return cls(int(text), query.get("after"), newest_first=order == "desc")

    def choose(self, keys: Sequence[Key], place: Callable[[str], Key]) -> tuple[list[str], bool]:
        """Return the ids of this page, and whether there are more after it.

        Args:
            keys: of the whole list, in the order of creation.
            place: returns the key of an id, also of one that was deleted since the last page.

        Raises:
            ApiError: ``after`` is not an id of this list.
        """
        first, step = 0, -1 if self._newest_first else 1
        listed = list(keys[::step])
        if self._after is not None:
            last = place(self._after)
            first = next(
                (at for at, key in enumerate(listed) if (key > last) == (step > 0) and key != last),
                len(listed),
            )
        ids = [id_ for _, id_ in listed[first : first + self._limit]]
        return ids, len(listed) > first + self._limit
