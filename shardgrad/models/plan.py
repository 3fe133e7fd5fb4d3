"""A plan laid on a model: which of its modules, parameters and integers each entry means, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from shardgrad.errors import LayoutError
from shardgrad.models.experts import DOWN, UP
from shardgrad.models.features import Features


@dataclass(frozen=True, slots=True)
class Assigned:
    """What a plan says of one place of a model.

    name: of the module, as `named_modules` has it; of an integer, of the module that has it.
    attribute: of an integer, else empty; with a dot (`config.num_heads`) it is one of an attribute.
    plain: the name without what adapters add to it.
    """

    name: str
    module: nn.Module
    features: Features
    pattern: str
    plain: str
    attribute: str = ""


@dataclass(frozen=True, slots=True)
class Laid:
    """A plan on a model. experts: by module, the texts of its two weights."""

    modules: tuple[Assigned, ...]
    integers: tuple[Assigned, ...]
    experts: tuple[tuple[str, nn.Module, dict[str, Features]], ...]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of module names means this one: `*` is one part of it, `**` any number of parts, also none."""
    out = []
    for part in re.split(r"(\*\*\.|\*\*|\*)", pattern):
        out.append({"**.": r"(?:.*\.)?", "**": ".*", "*": r"[^.]+"}.get(part) or re.escape(part))
    return re.fullmatch("".join(out), name) is not None


def plain_name(name: str) -> str:
    """A module's name without what peft adds around a model and its layers."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def lay(model: nn.Module, plan: Mapping[str, str], *, strict: bool) -> Laid:
    """Find what each entry of a plan means.

    strict: whether an entry that means nothing is an error.

    Raises:
        LayoutError: a text is wrong, a pattern means nothing, or two mean one module.
    """
    texts = {pattern: Features.of(text, pattern) for pattern, text in plan.items()}
    names = [(name, plain_name(name), module) for name, module in model.named_modules(remove_duplicate=False)]
    wrapped = {name.removesuffix(".base_layer") for name, _, _ in names if name.endswith(".base_layer")}
    used: set[str] = set()
    modules: dict[int, Assigned] = {}
    experts: dict[str, tuple[str, nn.Module, dict[str, Features]]] = {}
    for name, plain, module in names:
        hits = [pattern for pattern in texts if matches(pattern, plain)] if name not in wrapped else []
        if len(hits) > 1:
            raise LayoutError(f"{plain} is meant by {' and '.join(map(repr, hits))}: one entry for each module")
        for pattern in hits:
            used.add(pattern)
            before = modules.setdefault(id(module), Assigned(name, module, texts[pattern], pattern, plain))
            if before.features.text != texts[pattern].text:
                raise LayoutError(
                    f"{before.plain} and {plain} are one module, which {before.pattern!r} and {pattern!r} store "
                    f"differently: {before.features} and {texts[pattern]}"
                )
        for parameter in (UP, DOWN):
            stands = module._parameters.get(parameter)
            if stands is not None and stands.dim() == 3:
                for pattern in (one for one in texts if matches(one, f"{plain}.{parameter}")):
                    used.add(pattern)
                    experts.setdefault(name, (name, module, {}))[2][parameter] = texts[pattern]
    for name, _, found in experts.values():
        if set(found) != {UP, DOWN}:
            raise LayoutError(f"{name} has {UP} and {DOWN}: the plan says how {', '.join(found)} is stored only")
    integers = []
    for pattern in texts:
        if pattern not in used and not texts[pattern].into:
            found_here = list(_integers(names, pattern, texts[pattern]))
            used |= {pattern} if found_here else set()
            integers += found_here
    missing = [pattern for pattern in texts if pattern not in used]
    if missing and strict:
        near = get_close_matches(missing[0].rpartition(".")[2], {plain.rpartition(".")[2] for _, plain, _ in names}, 1)
        hint = f" (a module is called …{near[0]!r})" if near else ""
        raise LayoutError(f"{missing[0]!r} of the plan means no module, parameter or integer of this model{hint}")
    return Laid(tuple(modules.values()), tuple(integers), tuple(experts.values()))


def _integers(names: list[tuple[str, str, nn.Module]], pattern: str, features: Features) -> Iterator[Assigned]:
    place, _, last = pattern.rpartition(".")
    readings = [(place, last)]
    if place.endswith(".config"):
        readings.append((place.removesuffix(".config"), f"config.{last}"))
    for name, plain, module in names:
        for where, attribute in readings:
            owner = getattr(module, "config", None) if attribute.startswith("config.") else module
            value = getattr(owner, last, None)
            if isinstance(value, int) and not isinstance(value, bool) and matches(where, plain):
                yield Assigned(name, module, features, pattern, plain, attribute)
