"""What a kind of failure means, and what to do about it: by the code of the error. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_RETRY = "aiflux run ... --retry-failed tries them again"
_LOG = "see the engine's log (aiflux logs --engine, of one at --engine-url its own)"


@dataclass(frozen=True)
class Advice:
    """What a code means, and what to do."""

    meaning: str
    remedy: str


_KNOWN = {
    "http_400": Advice(
        "the engine refused the request as malformed",
        "read the message, correct these requests in the input and run the same command again: "
        "only the lines that changed are sent",
    ),
    "http_401": Advice("the engine asks for a key", f"set AIFLUX_API_KEY; {_RETRY}"),
    "http_403": Advice("the engine forbids the request", f"look at the key's rights; {_RETRY}"),
    "http_404": Advice(
        "the engine does not know the model or the address",
        "look at the model's name in the requests and at the endpoint",
    ),
    "http_408": Advice(
        "the engine, or what stands before it, gave up waiting, again and again",
        f"lower --concurrency; {_RETRY}",
    ),
    "http_413": Advice("the request is too large", "shorten the prompt, or cut it into chunks"),
    "http_422": Advice(
        "the engine understood the request and refused it",
        "read the message and correct these requests in the input",
    ),
    "http_425": Advice("the engine asked to try later, again and again", _RETRY),
    "http_501": Advice(
        "the engine cannot do what the request asks for",
        "look at the endpoint and at the fields of these requests",
    ),
    "http_429": Advice(
        "the engine was asked for too much at once, again and again",
        f"lower --concurrency or raise --max-retries; {_RETRY}",
    ),
    "timeout": Advice(
        "no whole answer came in time",
        "set max_tokens, raise --request-timeout, or lower --concurrency",
    ),
    "connection": Advice(
        "the connection to the engine broke, again and again",
        f"{_LOG}; {_RETRY}",
    ),
    "engine_crashed": Advice(
        "the engine died each time it had this request",
        f"{_LOG}; often memory: a smaller --context-length or fewer --slots, or the "
        "request itself (an image, a very long prompt)",
    ),
    "empty_answer": Advice(
        "the engine answered with nothing, again and again",
        f"look at the prompt and at stop words; {_RETRY}",
    ),
    "not_json": Advice(
        "what came back was no answer of an OpenAI API",
        "look at --engine-url, and at what stands between here and the engine",
    ),
    "internal_error": Advice(
        "a bug in AI-Flux stopped the request",
        f"report the trace in the log (aiflux logs); after an update, {_RETRY}",
    ),
    "memory": Advice(
        "there was not enough memory for the answer, again and again",
        f"lower --concurrency, or allow more memory; {_RETRY}",
    ),
    "error_in_answer": Advice(
        "the engine said that it failed", f"read the message and the engine's log; {_RETRY}"
    ),
}
_SERVER = Advice("the engine failed, again and again", f"{_LOG}; {_RETRY}")
_REFUSED = Advice("the engine refused the request", "read the message and correct the requests")
_SCHEMA = Advice(
    "the answer did not fit the schema that the request asks for",
    "raise max_tokens, --revalidate-attempts or the model's size, or simplify the schema",
)
_OTHER = Advice("the request failed", f"read the message; {_RETRY}")


def advice(code: str) -> Advice:
    """Return what a failure's code means and what to do; something general of unknown codes."""
    if code in _KNOWN:
        return _KNOWN[code]
    if code.startswith("http_5"):
        return _SERVER
    if code.startswith("http_"):
        return _REFUSED
    return _SCHEMA if "schema" in code or "unfit" in code else _OTHER
