"""What nvidia-smi, rocm-smi and amd-smi report about GPUs: names, memory, load and power."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

_TIMEOUT = 60
_MIB = 2**20


@dataclass(frozen=True)
class GpuReading:
    """A GPU, or a slice of one (MIG), at one moment. None is unknown.

    Attributes:
        name: its model; of a slice also the profile, such as ``1g.10gb``.
        total, used, free: bytes of memory.
        utilization: percent of the time in which a kernel ran; never known of a slice.
    """

    name: str = ""
    total: int | None = None
    used: int | None = None
    free: int | None = None
    utilization: float | None = None


UNKNOWN = GpuReading()


@dataclass(frozen=True)
class PowerReading:
    """The energy and the power of a GPU at one moment. None is unknown; of a slice, both are.

    Attributes:
        joules: the driver's counter, which starts at any value.
        watts: the power.
    """

    joules: float | None = None
    watts: float | None = None


# --- NVIDIA -----------------------------------------------------------------------------------

# "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-9c73eb7b-...)", then its slices, if it has any:
# "  MIG 1g.10gb     Device  0: (UUID: MIG-a686709d-...)".
_CARD = re.compile(r"GPU (\d+): (.*) \(UUID: (GPU-[^)]+)\)")
_SLICE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-[^)]+)\)")
_QUERY = "--query-gpu=index,utilization.gpu,memory.total,memory.used,memory.free"


@dataclass(frozen=True)
class _Slice:
    """A slice of a card, which ``card`` names by its UUID; ``number`` counts those of the card."""

    card: str
    number: str
    name: str
    uuid: str


@dataclass(frozen=True)
class _Card:
    index: str
    name: str
    uuid: str
    slices: tuple[_Slice, ...] = ()


def nvidia_devices() -> tuple[str, ...]:
    """Return every GPU as CUDA_VISIBLE_DEVICES can name it: slices by their UUIDs.

    CUDA numbers the cards only, and uses one slice of a card that it gets by number
    (https://docs.nvidia.com/datacenter/tesla/mig-user-guide/, CUDA_VISIBLE_DEVICES).
    """
    return tuple(
        name for card in _cards() for name in ([part.uuid for part in card.slices] or [card.index])
    )


def nvidia_readings(devices: Sequence[str]) -> tuple[GpuReading, ...]:
    """Return a reading of each device, which is an index or a UUID."""
    cards = _cards()
    found = [_find(device, cards) for device in devices]
    whole = _card_readings([place for place in found if isinstance(place, _Card)])
    memory = _slice_memory() if any(isinstance(place, _Slice) for place in found) else {}

    def reading(place: _Card | _Slice | None) -> GpuReading:
        if place is None:
            return UNKNOWN
        if isinstance(place, _Card):
            return whole.get(place.index, GpuReading(place.name))
        return GpuReading(place.name, *memory.get((place.card, place.number), ()))

    return tuple(map(reading, found))


def nvidia_uuids(devices: Sequence[str]) -> tuple[str | None, ...]:
    """Return the UUID of each device that is a whole card; a slice's energy is not measured."""
    cards = _cards()
    found = (_find(device, cards) for device in devices)
    return tuple(place.uuid if isinstance(place, _Card) else None for place in found)


def nvidia_watts(uuids: Sequence[str]) -> dict[str, float]:
    """Return the power of cards by their UUID, where it is known."""
    if not uuids:
        return {}
    options = [f"--id={','.join(uuids)}", "--query-gpu=uuid,power.draw"]
    printed = output_of("nvidia-smi", *options, "--format=csv,noheader,nounits") or ""
    rows = (line.partition(",") for line in printed.splitlines())
    known = ((uuid.strip(), _number(watts.strip())) for uuid, _, watts in rows)
    return {uuid: watts for uuid, watts in known if uuid in uuids and watts is not None}


def _cards() -> list[_Card]:
    cards: list[_Card] = []
    for line in (output_of("nvidia-smi", "-L") or "").splitlines():
        card, part = _CARD.match(line), _SLICE.match(line)
        if card:
            cards.append(_Card(card[1], card[2], card[3]))
        elif part and cards:
            last = cards.pop()
            new = _Slice(last.uuid, part[2], f"{last.name} MIG {part[1]}", part[3])
            cards.append(_Card(last.index, last.name, last.uuid, (*last.slices, new)))
    return cards


def _find(device: str, cards: Sequence[_Card]) -> _Card | _Slice | None:
    """Return a device; of a card with slices, its first. UUIDs may be abbreviated."""
    if device.startswith("MIG-"):
        slices = (part for card in cards for part in card.slices)
        return next((part for part in slices if part.uuid.startswith(device)), None)
    by_uuid = device.startswith("GPU-")
    for card in cards:
        if device == card.index or (by_uuid and card.uuid.startswith(device)):
            return card.slices[0] if card.slices else card
    return None


def _card_readings(cards: Sequence[_Card]) -> dict[str, GpuReading]:
    """Return the readings of whole cards by index."""
    if not cards:
        return {}
    names = {card.index: card.name for card in cards}
    options = [f"--id={','.join(names)}", _QUERY, "--format=csv,noheader,nounits"]
    found = {}
    for line in (output_of("nvidia-smi", *options) or "").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 5 and cells[0] in names:
            total, used, free = (int(c) * _MIB if c.isdigit() else None for c in cells[2:])
            utilization = _number(cells[1])
            found[cells[0]] = GpuReading(names[cells[0]], total, used, free, utilization)
    return found


def _slice_memory() -> dict[tuple[str, str], tuple[int | None, ...]]:
    """Return the total, used and free bytes of slices by the card's UUID and the slice's number.

    Only the XML has them; it lacks the slices' own UUIDs.
    """
    try:
        log = ElementTree.fromstring(output_of("nvidia-smi", "-q", "-x") or "")  # noqa: S314
    except ElementTree.ParseError:
        return {}
    return {
        (card.findtext("uuid", ""), part.findtext("index", "")): tuple(
            _mebibytes(part, name) for name in ("total", "used", "free")
        )
        for card in log.iter("gpu")
        for part in card.iter("mig_device")
    }


def _mebibytes(part: ElementTree.Element, name: str) -> int | None:
    number, _, unit = part.findtext(f"fb_memory_usage/{name}", "").partition(" ")
    return int(number) * _MIB if number.isdigit() and unit == "MiB" else None


# --- AMD --------------------------------------------------------------------------------------


def amd_readings(devices: Sequence[str]) -> tuple[GpuReading, ...]:
    """Return a reading of each device, which is an index or a UUID (``GPU-`` and its unique id)."""
    cards = dict(_amd_cards())
    return tuple(cards.get(_amd_key(device), UNKNOWN) for device in devices)


def amd_power(devices: Sequence[str]) -> tuple[PowerReading, ...]:
    """Return the energy and the power of each device."""
    cards = dict(_amd_power())
    return tuple(cards.get(_amd_key(device), PowerReading()) for device in devices)


def _amd_power() -> Iterator[tuple[str, PowerReading]]:
    """Yield the energy and the power of cards by number and by unique id."""
    options = ("--showuniqueid", "--showpower", "--showenergycounter")
    log = _json_of("rocm-smi", *options, "--json")
    if log is None:
        log = _json_of("amd-smi", "metric", "--power", "--energy", "--json")
        for row in _rows(log):
            joules = _number(_figure(row, "energy", "total_energy_consumption", "value"))
            watts = _number(_figure(row, "power", "socket_power", "value"))
            yield str(row.get("gpu")), PowerReading(joules or None, watts)
        return
    for key, values in log.items() if isinstance(log, dict) else ():
        if re.fullmatch(r"card\d+", key) and isinstance(values, dict):
            card = {str(name).lower(): value for name, value in values.items()}
            microjoules = _number(card.get("accumulated energy (uj)"))
            # "Average Graphics Package Power (W)", or "Current Socket ..." on newer GPUs
            named = (value for name, value in card.items() if name.endswith("package power (w)"))
            reading = PowerReading(
                microjoules / 1e6 if microjoules else None, _number(next(named, None))
            )
            yield key.removeprefix("card"), reading
            if card.get("unique id"):
                yield _unique_id(str(card["unique id"])), reading


def _amd_key(device: str) -> str:
    return _unique_id(device.removeprefix("GPU-")) if device.startswith("GPU-") else device


def _unique_id(text: str) -> str:
    """Return the form in which ids are compared: rocm-smi writes 0x before them."""
    return "id-" + text.lower().removeprefix("0x").lstrip("0")


def _amd_cards() -> Iterator[tuple[str, GpuReading]]:
    """Yield the cards by number and by unique id.

    The keys of rocm-smi's JSON differ between versions in case ("Card series", "Card Series").
    ROCm replaces rocm-smi by amd-smi, which is only run where the former is missing.
    """
    options = ["--showproductname", "--showuniqueid", "--showuse", "--showmeminfo", "vram"]
    log = _json_of("rocm-smi", *options, "--json")
    if log is None:
        yield from _amd_smi_cards()
        return
    for key, card in log.items() if isinstance(log, dict) else ():
        if re.fullmatch(r"card\d+", key) and isinstance(card, dict):
            reading = _amd_reading({str(name).lower(): value for name, value in card.items()})
            yield key.removeprefix("card"), reading
            if card.get("Unique ID"):
                yield _unique_id(str(card["Unique ID"])), reading


def _amd_smi_cards() -> Iterator[tuple[str, GpuReading]]:
    """Yield the cards by number, as amd-smi reports them; figures are ``{"value", "unit"}``."""
    static = _rows(_json_of("amd-smi", "static", "--asic", "--json"))
    names = {str(row.get("gpu")): _figure(row, "asic", "market_name") for row in static}
    for row in _rows(_json_of("amd-smi", "metric", "--usage", "--mem-usage", "--json")):
        total, used = (
            _figure(row, "mem_usage", f"{name}_vram", "value") for name in ("total", "used")
        )
        in_mib = _figure(row, "mem_usage", "total_vram", "unit") == "MB"
        card = {
            "card series": names.get(str(row.get("gpu"))),
            "vram total memory (b)": total * _MIB if in_mib and isinstance(total, int) else None,
            "vram total used memory (b)": used * _MIB if in_mib and isinstance(used, int) else None,
            "gpu use (%)": _figure(row, "usage", "gfx_activity", "value"),
        }
        yield str(row.get("gpu")), _amd_reading(card)


def _rows(log: Any) -> list[dict[str, Any]]:
    """Return the GPUs in amd-smi's JSON: a list, or below ``gpu_data`` in newer versions."""
    found = log.get("gpu_data") if isinstance(log, dict) else log
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _figure(row: Any, *path: str) -> Any:
    """Return a value in nested objects; None if one of them is absent, or "N/A"."""
    for name in path:
        row = row.get(name) if isinstance(row, dict) else None
    return row


def _json_of(name: str, *arguments: str) -> Any:
    """Return the JSON that a program prints; None if there is none."""
    printed = output_of(name, *arguments) or ""
    start = re.search(r"[\[{]", printed)  # warnings can precede it
    try:
        return json.loads(printed[start.start() :]) if start else None
    except (ValueError, RecursionError):
        return None


def _amd_reading(card: dict[str, Any]) -> GpuReading:
    name = str(card.get("card series") or card.get("device name") or "AMD GPU")
    total = _number(card.get("vram total memory (b)"))
    used = _number(card.get("vram total used memory (b)"))
    utilization = _number(card.get("gpu use (%)"))
    if total is None or used is None:
        return GpuReading(name, utilization=utilization)
    return GpuReading(name, int(total), int(used), int(total - used), utilization)


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None  # "N/A", "[N/A]", or absent


def output_of(name: str, *arguments: str) -> str | None:
    """Return a program's output; None if it is missing, hangs or fails."""
    program = shutil.which(name)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
