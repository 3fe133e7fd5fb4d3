"""Configurations in YAML: one reading for every program, with overrides, and errors that name the nearest key."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from shardgrad import shipped
from shardgrad.errors import shorten

# What a configuration may hold; far more than any has, and little enough to be read and told about in a second.
MOST_BYTES = 2**18
MOST_VALUES = 10_000  # aliases written out
MOST_DEPTH = 20
MOST_TEXT = 500
MOST_PROBLEMS = 20
_LEAST_INT, _MOST_INT = -(2**63), 2**63 - 1
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_NO_FILES = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))


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
    of_others: keys that tell a file of another kind, and what that is.
    """

    of_others: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


M = TypeVar("M", bound=Section)


def load(
    model: type[M],
    path: str | Path,
    overrides: Sequence[str] = (),
    disagreements: Callable[[M], Iterable[str]] = lambda _: (),
    files: Callable[[dict[str, Any]], Iterable[str]] = lambda _: (),
) -> M:
    """Read a YAML file, then `section.key=value` overrides, whose values are YAML too.

    Args:
        path: of the file, or the name of a shipped one (`shardgrad.shipped`).
        disagreements: what no single key shows, checked once every key is right.
        files: the keys, of the values in the file, that name files to read: relative to the file that they stand in
            (`cells.*.train`: of each of a list). Overrides are relative to where the program was started.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; lists all of them, with the nearest key.
    """
    where = shorten(str(path))
    try:
        found = shipped.find(path)
        check_regular(found)
        with open(found, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = f"{reason}{shipped.hint(path)}" if isinstance(error, FileNotFoundError) else reason
        raise ConfigError(f"cannot read the configuration {where}: {reason}") from None
    if len(raw) > MOST_BYTES:
        raise ConfigError(f"cannot read the configuration {where}: it has more than the {MOST_BYTES:,} bytes of one")
    values = _yaml(text, where)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold sections ({', '.join(model.model_fields)}), not {shorten(values)}")
    for key in model.of_others.keys() & values.keys():
        raise ConfigError(f"{where} is {model.of_others[key]}")
    for key in files(values):
        _from(found.resolve().parent, values, key.split("."))
    for override in overrides:
        _override(model, values, override)
    config = None
    problems: Iterator[str]
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        problems = format_errors(model, error.errors())
    else:
        problems = iter(disagreements(config))
    told = list(islice(problems, MOST_PROBLEMS))
    if not told and config is not None:
        return config
    more = [f"and more: the first {MOST_PROBLEMS} are told"] if next(problems, None) is not None else []
    where += " with overrides" if overrides else ""
    raise ConfigError("\n".join([f"the configuration {where} cannot be used:", *(f"  {p}" for p in [*told, *more])]))


def check_regular(path: str | Path) -> None:
    """Refuse what is no regular file, nor a link to one: reading it might never end.

    Raises:
        OSError: there is no such file, or it is something else; `strerror` says what.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL in it
        raise OSError(22, str(error), str(path)) from None
    if not stat.S_ISREG(mode):
        kind = next((words for is_one, words in _NO_FILES if is_one(mode)), "a device")
        raise OSError(22, f"it is {kind}, not a regular file", str(path))


def format_errors(model: type[Section], errors: Iterable[ErrorDetails]) -> Iterator[str]:
    """pydantic's errors in words."""
    for detail in errors:
        yield _problem(model, detail)


class _Loader(yaml.SafeLoader):
    """YAML of texts, numbers, lists and sections, of which each key may stand once, and all of it within limits."""

    # Dates are text, and so is a lone `=`.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in those if tag in _TAGS]
        for first, those in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.counts: dict[yaml.Node, int] = {}  # the values of each node, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise self.refused(self.peek_event(), f"is nested more than {MOST_DEPTH} deep")
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and node not in self.counts:
            raise self.refused(node, "stands in itself")
        if node is not None and node not in self.counts:
            inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
            self.counts[node] = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(self.counts[one] for one in inner)
            if self.counts[node] > MOST_VALUES or len(self.counts) > MOST_VALUES:
                raise self.refused(node, f"has more than {MOST_VALUES:,} values")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _TAGS:
            raise self.refused(node, f"has the tag {shorten(node.tag, 60)}, which says nothing here")
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MOST_TEXT:
            raise self.refused(node, f"is a text of {len(node.value):,} characters, more than {MOST_TEXT}")
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            kind = node.tag.rpartition(":")[2]
            raise self.refused(node, f"{shorten(node.value, 60)} cannot be read as {kind}") from None
        if isinstance(value, int) and not _LEAST_INT <= value <= _MOST_INT:
            raise self.refused(node, f"{shorten(node.value, 60)} is a number beyond 64 bits")
        if isinstance(value, str) and _unwritable(value):
            raise self.refused(node, "a text has a NUL or half of a surrogate pair, which no file or screen has")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(names) < len(node.value):
                raise self.refused(node, "a list or a section stands as a key")
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            if twice:
                raise self.refused(node, f"{shorten(', '.join(twice))} stands twice")
        return super().construct_mapping(node, deep)

    def refused(self, where: Any, why: str) -> yaml.YAMLError:
        return yaml.YAMLError(f"line {where.start_mark.line + 1}: {why}")


def _unwritable(text: str) -> bool:
    return "\0" in text or any("\ud800" <= char <= "\udfff" for char in text)


def _yaml(text: str, what: str) -> Any:
    try:
        if len(text) > MOST_BYTES:
            raise yaml.YAMLError(f"it has more than {MOST_BYTES:,} characters")
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape that is no character is a ValueError
        raise ConfigError(f"cannot read {what} as YAML: {shorten(' '.join(str(error).split()), 500)}") from None


def _override(model: type[Section], values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path) or len(path) > MOST_DEPTH:
        raise ConfigError(
            f"cannot read the override {shorten(repr(override))}: write section.key=value, as in train.steps=100"
        )
    section = values
    for name in path[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"cannot override {shorten(key)}: {shorten(name)} is not a section{nearest(model, key)}")
    section[path[-1]] = _yaml(text, f"the value of {shorten(key)}")


def _from(folder: Path, values: Any, key: Sequence[str]) -> None:
    """Make relative paths under a key, one or a list of them, those from a folder."""
    for name in key[:-1]:
        if name == "*" and isinstance(values, list):
            for one in values:
                _from(folder, one, key[key.index(name) + 1 :])
            return
        values = values.get(name) if isinstance(values, dict) else None
    if not isinstance(values, dict):
        return
    value = values.get(key[-1])
    if isinstance(value, str) and value:
        values[key[-1]] = os.path.normpath(folder / value)
    elif isinstance(value, list):
        values[key[-1]] = [os.path.normpath(folder / one) if isinstance(one, str) and one else one for one in value]


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
    key = key[:100]
    known = [name for name, _ in keys(model)]
    sections = list(model.model_fields)
    by_last = {name.rpartition(".")[2]: name for name in known}
    found = get_close_matches(key, [*known, *sections], n=1)
    found = found or [by_last[last] for last in get_close_matches(key.rpartition(".")[2], by_last, n=1)]
    if found:
        return f"; the nearest key is {found[0]}"
    return f"; the keys are {', '.join(known)}" if "." in key else f"; the sections and keys are {', '.join(sections)}"


def _problem(model: type[Section], detail: ErrorDetails) -> str:
    parts = [shorten(str(part), 100) for part in detail["loc"]]
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
        return f"{key} = {shorten(repr(detail['input']))} must be a section with keys of its own"
    return f"{key} = {shorten(repr(detail['input']))} {detail['msg'].replace('Input should', 'should')}"
