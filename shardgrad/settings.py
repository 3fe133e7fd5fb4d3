"""Configurations in YAML: one reading for every program, with overrides, and errors that name the nearest key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem by its key."""


def _number(value: object) -> object:
    """YAML 1.1 reads 3e-3, without a point, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]


class Section(BaseModel):
    """Keys that belong together; others are refused.

    Where one of several sections may stand (a tagged union), a tag is in brackets and says when: "[with model.config]".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


M = TypeVar("M", bound=Section)


def load(
    model: type[M],
    path: str | Path,
    overrides: Sequence[str] = (),
    disagreements: Callable[[M], Iterable[str]] = lambda _: (),
) -> M:
    """Read a YAML file, then `section.key=value` overrides, whose values are YAML too.

    disagreements: what no single key shows, checked once every key is right.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; lists all of them, with the nearest key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    values = _yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections ({', '.join(model.model_fields)}), not {values!r}")
    for override in overrides:
        _override(model, values, override)
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        problems = list(format_errors(model, error.errors()))
    else:
        problems = list(disagreements(config))
        if not problems:
            return config
    where = f"{path}{' with overrides' if overrides else ''}"
    raise ConfigError("\n".join([f"the configuration {where} cannot be used:", *(f"  {p}" for p in problems)]))


def format_errors(model: type[Section], errors: Iterable[ErrorDetails]) -> Iterator[str]:
    """pydantic's errors in words."""
    for detail in errors:
        yield _problem(model, detail)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(sorted(twice))} stands twice")
        return super().construct_mapping(node, deep)


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read {what} as YAML: {' '.join(str(error).split())}") from None


def _override(model: type[Section], values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise ConfigError(f"cannot read the override {override!r}: write section.key=value, as in train.steps=100")
    section = values
    for name in path[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"cannot override {key}: {name} is not a section{nearest(model, key)}")
    section[path[-1]] = _yaml(text, f"the value of {key}")


def keys(model: type[Section]) -> Iterator[tuple[str, Any]]:
    """Every key, as `section.key`, with pydantic's description of it; `key` where it stands in no section. Of sections
    that stand for each other, those of each, once."""
    seen: set[str] = set()
    for section, field in model.model_fields.items():
        inner = list(_sections(field.annotation))
        found = [(f"{section}.{name}", one) for some in inner for name, one in keys(some)] or [(section, field)]
        for name, one in found:
            if name not in seen:
                seen.add(name)
                yield name, one


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a field may be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for one in get_args(annotation):
            yield from _sections(one)


def nearest(model: type[Section], key: str) -> str:
    """What was probably meant by a key that is none."""
    known = [name for name, _ in keys(model)]
    by_last = {name.rpartition(".")[2]: name for name in known}
    found = get_close_matches(key, [*known, *model.model_fields], n=1)
    found = found or [by_last[last] for last in get_close_matches(key.rpartition(".")[2], by_last, n=1)]
    return f"; the nearest key is {found[0]}" if found else f"; the keys are {', '.join(known)}"


def _problem(model: type[Section], detail: ErrorDetails) -> str:
    parts = [str(part) for part in detail["loc"]]
    key = ".".join(part for part in parts if not part.startswith("["))
    if detail["type"] == "extra_forbidden":
        among = [part.strip("[]") for part in parts if part.startswith("[")]
        if among and any(f"{known}.".startswith(f"{key}.") for known, _ in keys(model)):
            return f"{key} is no key {among[0]}"
        return f"{key} is no key{nearest(model, key)}"
    if detail["type"] == "missing":
        described: Mapping[str, Any] = dict(keys(model))
        return f"{key} is missing" + (f": {described[key].description}" if key in described else "")
    if detail["type"] == "model_type":
        return f"{key} = {detail['input']!r} must be a section with keys of its own"
    return f"{key} = {detail['input']!r} {detail['msg'].replace('Input should', 'should')}"
