"""Frozen dataclasses from nested tables (TOML, a manifest, overrides of a command line), and back to TOML: types and names are checked.

Below zaya/config.py, whose keys these are. Knows no key of a recipe, and the standard library only. Every ValueError is one line that names
the key.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any


def build_section(cls: type, name: str, table: Any) -> Any:
    """The dataclass of one section. ValueError for unknown, missing or mistyped keys."""
    if not isinstance(table, dict):
        raise ValueError(f"{name} = {table!r} is not a section; write [{name}]")
    wanted = hints(cls)
    for key in table:
        check_known(f"{name}.{key}", [f"{name}.{k}" for k in wanted], "recipe key")
    missing = [f.name for f in fields(cls) if f.name not in table and f.default is dataclasses.MISSING
               and f.default_factory is dataclasses.MISSING]
    if missing:
        raise ValueError(f"recipe lacks {', '.join(f'{name}.{key}' for key in missing)}")
    return cls(**{key: _typed(f"{name}.{key}", value, wanted[key]) for key, value in table.items()})


def _typed(key: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key} = {value!r} must be a list of {item.__name__}")
        return tuple(_typed(f"{key}[{index}]", v, item) for index, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1023 else math.inf  # which is refused below
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{key} = {value!r} must be {_a(hint.__name__)}, not {_a(type(value).__name__)}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{key} = {value} is not finite")
    return value


def apply_override(tables: dict[str, Any], override: str, sections: Mapping[str, type]) -> None:
    """Set what `--section.key=value` says; a value is TOML, but strings need no quotes (unless they hold a comma in a list) and lists no
    brackets."""
    name, equals, text = override.removeprefix("--").partition("=")
    section, dot, key = name.partition(".")
    if not (override.startswith("--") and equals and dot and key):
        raise ValueError(f"argument {override!r} is not of the form --section.key=value")
    check_known(section, sections, "section")
    wanted = hints(sections[section])
    check_known(name, [f"{section}.{k}" for k in wanted], "recipe key")
    if wanted[key] is str:
        value: Any = _unquoted(text)
    elif typing.get_origin(wanted[key]) is tuple:
        value = _listed(name, text, typing.get_args(wanted[key])[0])
    else:
        value = _toml_value(text, text)
    tables.setdefault(section, {})
    if isinstance(tables[section], dict):
        tables[section][key] = value


def _listed(name: str, text: str, item: type) -> Any:
    if text.startswith("[") != text.endswith("]"):
        raise ValueError(f"{name} = {text!r} has a bracket too few")
    inner = text[1:-1] if text.startswith("[") else text
    value = _toml_value(f"[{inner}]")
    if value is None or (item is str and not all(isinstance(each, str) for each in value)):
        return [_unquoted(part.strip()) for row in csv.reader([inner], skipinitialspace=True) for part in row]
    return value


def _toml_value(text: str, otherwise: str | None = None) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, more digits than Python reads, brackets without end
        return otherwise
    return table["value"] if len(table) == 1 else otherwise  # more: it is several lines


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def check_known(name: str, known: Iterable[str], what: str) -> None:
    """ValueError: `name` is none of them; with the nearest one that is."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(f"unknown {what} {name!r}; did you mean {near[0]!r}?" if near else f"unknown {what} {name!r}")


def hints(cls: type) -> dict[str, Any]:
    """Field -> type, in order."""
    found = typing.get_type_hints(cls)
    assert not any(isinstance(hint, types.UnionType) for hint in found.values()), "recipe fields have one type each"
    return {f.name: found[f.name] for f in fields(cls)}


def to_toml(sections: Any) -> str:
    """A dataclass of dataclasses, a section each."""
    lines = []
    for field in fields(sections):
        section = getattr(sections, field.name)
        lines += [f"[{field.name}]", *(f"{f.name} = {_toml(getattr(section, f.name))}" for f in fields(section)), ""]
    return "\n".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for one character
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
