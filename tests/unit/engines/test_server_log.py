"""The cause of a failed start in the logs of servers."""

from __future__ import annotations

import pytest

from aiflux.engines.server_log import find_cause

# From the logs of vLLM 0.32.0's CPU build, shortened: the cause is far from the end.
_WORKER = "(Worker pid=22672) ERROR 11-27 00:06:08 [multiproc_executor.py:1063] "
_CORE = "(EngineCore pid=22073) ERROR 11-27 00:06:08 [core.py:1510] "
_NO_ROOM = (
    "Available memory on node 0 (18.41/23.54 GiB) on kv cache allocation is less than requested "
    "memory for kv (100000.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE"
)
_SMALL = (
    "Insufficient space in /dev/shm for shared-memory allocation: 160 MiB required, 64 MiB free. "
    "Increase /dev/shm (e.g. --shm-size or --ipc=host)."
)
_END = """\
Traceback (most recent call last):
  File "vllm/v1/engine/utils.py", line 1431, in wait_for_engine_startup
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): %s
"""


@pytest.mark.parametrize(
    ("log", "line", "remedy"),
    [
        (f"{_WORKER}    raise ValueError(\n{_WORKER}ValueError: {_NO_ROOM}\n"
         f"{_CORE}RuntimeError: Worker failed with error '{_NO_ROOM}'\n"
         + _END % "{'EngineCore': 1}", _NO_ROOM, "--context-length"),
        (f"{_CORE}    raise RuntimeError(\n{_CORE}RuntimeError: {_SMALL}\n"
         + _END % "{'EngineCore': 1}", _SMALL, "enlarge that of the node"),
        (_END % "{'EngineCore': -9}", "Failed core proc(s): {'EngineCore': -9}", "--mem"),
        (f"{_CORE}ValueError: Head size 8 is not supported by CPU_ATTN.\n"
         f"{_CORE}RuntimeError: Worker failed\n" + _END % "{'EngineCore': 1}",
         "ValueError: Head size 8 is not supported by CPU_ATTN.", ""),
        ("ValueError: Free memory on device cuda:0 (3.2/79.1 GiB) on startup is less than desired "
         "GPU memory utilization (0.92, 72.8 GiB).\n",
         "Free memory on device cuda:0 (3.2/79.1 GiB) on startup is less than desired "
         "GPU memory utilization (0.92, 72.8 GiB).", "gpu-memory-utilization"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n",
         "CUDA out of memory. Tried to allocate 2.00 GiB.", "--gpus-per-engine"),
        ("0.01 E ggml_aligned_malloc: insufficient memory (attempted to allocate 489.64 MB)\n"
         "0.01 E srv llama_server: exiting due to model loading error\n",
         "insufficient memory (attempted to allocate 489.64 MB)", "--slots"),
        (f"{_CORE}MemoryError\n", "MemoryError", "--mem"),
    ],
)  # fmt: skip
def test_the_cause_is_found_with_its_remedy(log: str, line: str, remedy: str) -> None:
    cause = find_cause("INFO loading\n" + log)
    assert cause is not None
    assert cause.line == line
    assert remedy in cause.remedy
    assert bool(cause.remedy) == bool(remedy)


def test_an_unknown_cause_is_not_guessed() -> None:
    warning = "(APIServer pid=1) WARNING 11-27 00:07:12 [utils.py:255] errors like `OSError: x`"
    assert find_cause(f"{warning}\n    except MemoryError:\nno such model\n") is None
