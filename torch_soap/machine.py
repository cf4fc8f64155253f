"""Machine: devices, hosts and links (csrc/machine/machine.h has the fields and their units); presets, and machines as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_soap import _C

FORMAT = 8
# Fields that came later: with which format, and what files of earlier ones have instead.
ADDED: dict[str, tuple[int, Any]] = {
    "step_overhead_ns": (2, 0.0),
    "segment_overhead_ns": (2, 0.0),
    "busy_speed": (2, []),
    "update": (2, []),
    "curves": (3, {}),
    "launch": (4, {}),
    "jitter": (4, 0.0),
    "cold_ns": (4, 0.0),
    "piece_ns": (4, 0.0),
    "packs": (5, True),
    "update_speed": (5, []),
    "cores_of": (6, []),
    "send_ns_per_byte": (7, 0.0),
    "receive_ns_per_byte": (7, 0.0),
    "turn_ns": (8, 0.0),
}


class Machine(_C.Machine):
    """What a plan is priced for: measured here, a preset, a file, or written by hand.

    `Machine(num_devices, num_hosts)` is a modest server; set fields to describe another. docs/machines.md has the fields.
    """

    @classmethod
    def preset(cls, name: str, hosts: int = 1, devices_per_host: int = 1) -> Machine:
        """A machine from published figures.

        Raises:
            ValueError: there is no such preset; lists those there are.
        """
        return cls(_C.machine_preset(name, hosts, devices_per_host))

    @classmethod
    def load(cls, path: str | Path) -> Machine:
        """The machine that `save` wrote, equal bit for bit.

        Raises:
            ValueError: a field is missing, unknown, of the wrong type or out of range; names it.
        """
        try:
            return from_json(json.loads(Path(path).read_text()))
        except ValueError as error:
            raise ValueError(f"[machine] {path}: {str(error).removeprefix('[machine] ')}") from None

    def save(self, path: str | Path) -> None:
        _C.check_machine(self)
        Path(path).write_text(json.dumps(to_json(self), indent=1, allow_nan=False) + "\n")


Reader = Callable[[Any, str], Any]  # the value and its field's name; raises ValueError


def expected(value: Any, field: str, what: str) -> ValueError:
    return ValueError(f"{field} must be {what}, not {json.dumps(value)[:60]}")


def scalar(what: str, types: type | tuple[type, ...]) -> Reader:
    def read(value: Any, field: str) -> Any:
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise expected(value, field, what)
        return value

    return read


def integer(bits: int) -> Reader:
    read = scalar(f"an integer of {bits} bits", int)

    def bounded(value: Any, field: str) -> Any:
        if isinstance(value, int) and abs(value) >= 1 << (bits - 1):
            raise expected(value, field, f"an integer of {bits} bits")
        return read(value, field)

    return bounded


TEXT, FLAG, NUMBER = scalar("a text", str), scalar("true or false", bool), scalar("a number", (int, float))
COUNT, INTEGER = integer(32), integer(64)


def array(item: Reader) -> Reader:
    def read(value: Any, field: str) -> list[Any]:
        if not isinstance(value, list):
            raise expected(value, field, "a list")
        return [item(v, f"{field}[{i}]") for i, v in enumerate(value)]

    return read


def by_name(item: Reader) -> Reader:
    def read(value: Any, field: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise expected(value, field, "an object")
        return {k: item(v, f"{field}[{k}]") for k, v in value.items()}

    return read


def point(value: Any, field: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise expected(value, field, "a pair [bytes, ns]")
    return INTEGER(value[0], field), INTEGER(value[1], field)


def curve_point(value: Any, field: str) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise expected(value, field, "[size, forward, backward]")
    return NUMBER(value[0], field), NUMBER(value[1], field), NUMBER(value[2], field)


def both_ways(value: Any, field: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise expected(value, field, "a pair [forward ns, backward ns]")
    return NUMBER(value[0], field), NUMBER(value[1], field)


def fields(value: Any, readers: dict[str, Reader], prefix: str = "") -> dict[str, Any]:
    """The fields of an object, each read by its reader; all of them must be there, and no other."""
    if not isinstance(value, dict):
        raise expected(value, prefix or "the file", "an object")
    for name in value:
        if name not in readers:
            raise ValueError(f"there is no field {prefix}{name}; the fields are {', '.join(readers)}")
    for name in readers:
        if name not in value:
            raise ValueError(f"the field {prefix}{name} is missing")
    return {name: read(value[name], prefix + name) for name, read in readers.items()}


LINK: dict[str, Reader] = {"latency_ns": NUMBER, "bytes_per_s": NUMBER, "per_host": COUNT}


def link(value: Any, field: str) -> _C.Link:
    return _C.Link(**fields(value, LINK, field + "."))


FIELDS: dict[str, Reader] = {
    "name": TEXT,
    "host_of": array(COUNT),
    "cores_of": array(COUNT),
    "speed": array(NUMBER),
    "flops_per_s": NUMBER,
    "flops_by_dtype": by_name(NUMBER),
    "tf32": FLAG,
    "memory_bytes_per_s": NUMBER,
    "op_overhead_ns": NUMBER,
    "efficiency": by_name(NUMBER),
    "curves": by_name(array(curve_point)),
    "launch": by_name(both_ways),
    "memory_bytes": INTEGER,
    "overlap": FLAG,
    "step_overhead_ns": NUMBER,
    "segment_overhead_ns": NUMBER,
    "busy_speed": array(NUMBER),
    "update_speed": array(NUMBER),
    "jitter": NUMBER,
    "cold_ns": NUMBER,
    "turn_ns": NUMBER,
    "piece_ns": NUMBER,
    "send_ns_per_byte": NUMBER,
    "receive_ns_per_byte": NUMBER,
    "packs": FLAG,
    "update": array(point),
    "intra": link,
    "inter": link,
    "tables": by_name(array(point)),
}


def to_json(machine: _C.Machine) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return {name: getattr(value, name) for name in LINK} if isinstance(value, _C.Link) else value

    return {"format": FORMAT, **{name: plain(getattr(machine, name)) for name in FIELDS}}


def from_json(data: Any) -> Machine:
    """The inverse of `to_json`."""
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError("the field format is missing: this is not a machine's file")
    if data["format"] not in range(1, FORMAT + 1):
        raise ValueError(f"the file has format {data['format']}, this version reads 1 to {FORMAT}")
    data = {name: absent for name, (since, absent) in ADDED.items() if since > data["format"]} | data
    machine = Machine(1)
    for name, value in fields({k: v for k, v in data.items() if k != "format"}, FIELDS).items():
        setattr(machine, name, value)
    _C.check_machine(machine)
    return machine


def named(text: str) -> Machine:
    """The machine of a command line: `preset:h100:8x8` (hosts x devices of each) or the path of a file."""
    if not text.startswith("preset:"):
        return Machine.load(text)
    parts = text.split(":")
    sizes = parts[2].split("x") if len(parts) == 3 else []
    if len(sizes) != 2 or not all(s.isdigit() for s in sizes):
        raise ValueError(f'[machine] "{text}" is not preset:<name>:<hosts>x<devices per host>, such as preset:h100:8x8')
    return Machine.preset(parts[1], int(sizes[0]), int(sizes[1]))
