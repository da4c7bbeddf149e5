"""When a request is tried again: exponential backoff with full jitter, composed from tenacity."""

from __future__ import annotations

from tenacity import RetryCallState, Retrying, stop_after_attempt, wait_random_exponential

MAX_DELAY = 60.0
MAX_RETRY_AFTER = 600.0


class RetryPolicy:
    """Decides whether and when there is another attempt.

    The pool does the waiting itself (a waiting request holds no slot), so tenacity's stop and wait
    strategies are asked directly, without its loop.

    Args:
        max_retries: further attempts after the first.
        delay: upper bound of the first wait, in seconds; doubles with every attempt, up to 60.
    """

    def __init__(self, max_retries: int, delay: float) -> None:
        self._stop = stop_after_attempt(max_retries + 1)
        self._wait = wait_random_exponential(multiplier=delay, max=MAX_DELAY)
        self._retrying = Retrying(stop=self._stop, wait=self._wait)

    def next_delay(self, attempts: int, retry_after: float | None) -> float | None:
        """Return the seconds to wait before the next attempt; None when there is none.

        Args:
            attempts: attempts made so far.
            retry_after: what the server asked for; the wait is never shorter.
        """
        state = RetryCallState(self._retrying, None, (), {})
        state.attempt_number = attempts
        if self._stop(state):
            return None
        return max(float(self._wait(state)), min(retry_after or 0.0, MAX_RETRY_AFTER))
