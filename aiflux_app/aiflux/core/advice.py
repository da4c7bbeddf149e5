"""What a kind of failure means, and what to do about it: by the code of the error. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_RETRY = "aiflux run ... --retry-failed tries them again"


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
    "http_401": Advice("the engine asks for a key", "set AIFLUX_API_KEY and retry"),
    "http_403": Advice("the engine forbids the request", "look at the key's rights"),
    "http_404": Advice(
        "the engine does not know the model or the address",
        "look at the model's name in the requests and at the endpoint",
    ),
    "http_413": Advice("the request is too large", "shorten the prompt, or cut it into chunks"),
    "http_422": Advice(
        "the engine understood the request and refused it",
        "read the message and correct these requests in the input",
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
        f"see the engine's log in the run directory; {_RETRY}",
    ),
    "engine_crashed": Advice(
        "the engine died each time it had this request",
        "see the engine's log; often memory: a smaller --context-length or fewer --slots, or the "
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
    "error_in_answer": Advice(
        "the engine said that it failed", f"read the message and the engine's log; {_RETRY}"
    ),
}
_SERVER = Advice(
    "the engine failed, again and again", f"see the engine's log in the run directory; {_RETRY}"
)
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
