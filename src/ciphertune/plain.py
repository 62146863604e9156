"""Plain values (from YAML or JSON) -> frozen dataclasses, with errors that name the key."""

from __future__ import annotations

import typing
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from ciphertune.errors import SettingsError

T = TypeVar("T")


def build(kind: type[T], values: Any, where: str = "") -> T:
    """A dataclass filled from nested plain values; `where` is the dotted path so far.

    Raises SettingsError naming an unknown key, with the nearest valid one, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise SettingsError(f"{where or 'settings'}={values!r}: want keys and values")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else "."
            raise SettingsError(f"unknown setting {where}{key}{hint} Valid here: {', '.join(hints)}")
    return kind(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return build(typing.cast(type, hint), value, f"{where}.")
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise SettingsError(f"{where}={value!r}: want a list, e.g. {where}=[...]")
        return tuple(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # YAML reads a label or a name such as 0 as a number
    if type(value) is not hint:
        raise SettingsError(f"{where}={value!r} is of the wrong type: want {hint.__name__}")
    return value
