"""What a model's tensors are called, and how they lie, in files of Hugging Face's format.

transformers says, for each architecture, which names of its files become which of the model, and what is stacked,
concatenated or split on the way. Its tables are read here; its operations are done on parts of tensors, which its own
functions cannot.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from shardgrad.comm import shim
from shardgrad.models.lazy_tensor import LazyTensor, chunk, concatenate, stack, transpose

Collected = dict[str, list[LazyTensor]]


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, which need not be installed to ask."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )


class CheckpointNames:
    """The names of one model's tensors in files; of a model that transformers does not know, the model's own."""

    def __init__(self, model: Any) -> None:
        self._prefix: str | None = None
        self._saved: list[Any] = []
        self._loaded: list[Any] = []
        self._unexpected: list[str] = []
        if not is_pretrained(model):
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        self._prefix = getattr(model, "base_model_prefix", None)
        self._loaded = get_model_conversion_mapping(model)
        saved = getattr(model, "_weight_conversions", None)  # those by which from_pretrained has loaded it
        if saved is None:
            saved = get_model_conversion_mapping(model, add_legacy=False)
            saved = [one for one in saved if not isinstance(one, PrefixChange)]
        self._saved = [one.reverse_transform() for one in reversed(saved)]
        if not all(_reversible(one) for one in self._saved):
            self._saved = []  # transformers loads a model's own names as well
        self._unexpected = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
        self._unexpected += [r"rotary_emb\.inv_freq"] * ("inv_freq" in buffers)  # of old files, as transformers has it
        self._unexpected += [r"(^|\.)position_ids$"] * ("position_ids" in buffers)

    def of_model(
        self, stored: Mapping[str, LazyTensor], wanted: Collection[str]
    ) -> tuple[dict[str, LazyTensor], list[str]]:
        """Stored tensors by the model's names, and what is wrong with them, a line each.

        Args:
            wanted: the names that the model has. Of the result, those that it lacks are not among them.
        """
        found: dict[str, LazyTensor] = {}
        origin: dict[str, str] = {}
        wrong: list[str] = []
        converted: dict[str, tuple[Any, Collected]] = {}
        state = dict.fromkeys(wanted, True)
        for name in self._sorted(stored):
            target, converter, pattern = self._renamed(name, state)
            if converter is not None:
                converted.setdefault(target, (converter, {}))[1].setdefault(pattern, []).append(stored[name])
            elif target in found:
                wrong.append(f"{name} and {origin[target]} are both {target} in the model")
            else:
                found[target], origin[target] = stored[name], name
        for target, (converter, collected) in converted.items():
            try:
                found |= _converted(target, converter, collected)
            except ValueError as error:
                wrong.append(f"{target}: {error}")
        return found, wrong

    def ignored(self, name: str) -> bool:
        """Whether a tensor of a file that the model lacks is one that transformers passes over."""
        return any(re.search(pattern, name) for pattern in self._unexpected)

    def of_file(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A whole tensor of the model as its files hold it: views of it by their names there."""
        if not self._saved:
            return {name: tensor}
        pieces = {name: tensor}
        for converter in self._saved:
            renamed, pattern = converter.rename_source_key(name) if _converts(converter) else (name, None)
            if pattern is not None:  # one at most
                pieces = _divided(renamed, converter, tensor)
                break
        for renaming in self._saved:
            if not _converts(renaming):
                pieces = {renaming.rename_source_key(key)[0]: piece for key, piece in pieces.items()}
        return pieces

    def _sorted(self, stored: Iterable[str]) -> list[str]:
        if not self._loaded:
            return list(stored)
        from transformers.core_model_loading import dot_natural_key

        return sorted(stored, key=dot_natural_key)  # experts are stacked in the order of their numbers

    def _renamed(self, name: str, state: dict[str, bool]) -> tuple[str, Any, str]:
        """A stored name as the model's, and the converter that takes it, by which of its patterns."""
        if self._prefix is None:
            return name, None, ""
        from transformers.core_model_loading import rename_source_key

        renamings = [one for one in self._loaded if not _converts(one)]
        converters = [one for one in self._loaded if _converts(one)]
        renamed, pattern = rename_source_key(name, renamings, converters, self._prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], self._prefix, state)
        if pattern is None:
            return renamed, None, ""
        return renamed, next(one for one in converters if pattern in one.source_patterns), pattern


def _converted(name: str, converter: Any, collected: Collected) -> dict[str, LazyTensor]:
    """What a converter makes of stored tensors, by whole names."""
    for operation in converter.operations:
        kind = type(operation).__name__
        targets = converter.target_patterns
        if kind == "MergeModulelist":
            alone = targets[0] if len(collected) == 1 else None
            merged = {alone or key: [stack(some, operation.dim)] for key, some in collected.items()}
            collected = merged
        elif kind == "Concatenate" and operation.num_shards_attribute is None:
            missing = [key for key in converter.source_patterns if key not in collected]
            if missing:
                raise ValueError(f"the files lack {', '.join(missing)}, of which it is made")
            parts = [one for key in converter.source_patterns for one in collected[key]]
            collected = {targets[0]: [concatenate(parts, operation.dim)]}
        elif kind == "Chunk" and operation.num_shards_attribute is None:
            ((one,),) = collected.values()
            collected = {key: [part] for key, part in zip(targets, chunk(one, len(targets), operation.dim))}
        elif kind == "Transpose" and not operation.check_dims:
            ((key, (one,)),) = collected.items()
            key = targets[0] if len(targets) == 1 else key
            collected = {key: [transpose(one, operation.dim0, operation.dim1)]}
        else:
            raise ValueError(
                f"it is made by {operation} of transformers, which cannot be done on parts. Save the folder anew with "
                "transformers: from_pretrained(folder).save_pretrained(another, save_original_format=False)"
            )
    prefix, suffix = _around(name, converter)
    return {prefix + key + suffix: one for key, (one,) in collected.items()}


def _divided(name: str, converter: Any, tensor: Tensor) -> dict[str, Tensor]:
    """The views that a converter makes of a whole tensor to save it, by whole names."""
    prefix, suffix = _around(name, converter)
    pieces = {converter.source_patterns[0]: tensor}
    for operation in converter.operations:
        if type(operation).__name__ == "Chunk":
            ((_, one),) = pieces.items()
            targets = converter.target_patterns
            pieces = dict(zip(targets, one.chunk(len(targets), operation.dim)))
        else:  # SplitModulelist
            keys = converter.target_patterns if len(pieces) == 1 else list(pieces)
            pieces = {
                key.replace("*", str(at)): part
                for key, one in zip(keys, pieces.values())
                for at, part in enumerate(one.unbind(operation.dim))
            }
    return {prefix + key + suffix: part for key, part in pieces.items()}


def _around(name: str, converter: Any) -> tuple[str, str]:
    """What stands before and behind a converter's first target in a name."""
    prefix, _, suffix = name.partition(converter.target_patterns[0])
    return prefix, suffix


def _reversible(transform: Any) -> bool:
    """Whether a reversed transform takes one whole tensor at a time, by operations that give views of it."""
    if not _converts(transform):
        return True
    return len(transform.source_patterns) == 1 and all(
        type(operation).__name__ == "SplitModulelist"
        or (type(operation).__name__ == "Chunk" and operation.num_shards_attribute is None)
        for operation in transform.operations
    )


def _converts(transform: Any) -> bool:
    """Whether a transform does something to tensors, beyond their names."""
    return hasattr(transform, "operations")


def written_names(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Name, tensor and whether it is a parameter of all that files hold of a model, each once.

    Of the names of a tied parameter, those stand here that transformers does not tie again as it loads the model.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    named = all_named(model)
    names: dict[int, set[str]] = {}
    for name, tensor, _ in named:
        names.setdefault(id(tensor), set()).add(name)
    return [
        (name, tensor, is_parameter)
        for name, tensor, is_parameter in named
        if name not in ignored and tied.get(name) not in names[id(tensor)]
    ]


def all_named(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Name, tensor and whether it is a parameter of all that files can hold of a model, under each of its names."""
    found: list[tuple[str, Tensor, bool]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        found += [(prefix + key, one, True) for key, one in module._parameters.items() if one is not None]
        found += [
            (prefix + key, one, False)
            for key, one in module._buffers.items()
            if one is not None and shim.is_persistent(module, key)
        ]
    return found
