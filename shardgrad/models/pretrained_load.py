"""A model filled with a folder of Hugging Face's format; each rank reads its own parts, and none the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardgrad.arguments import told
from shardgrad.comm.mesh import view
from shardgrad.models.adapter_files import CONFIG, FILE, has_adapters, names_in_files, reset_adapters, unwrapped
from shardgrad.models.buffers import rebuild_buffers
from shardgrad.models.lazy_tensor import LazyTensor, same_values
from shardgrad.models.names import CheckpointNames, all_named, is_pretrained
from shardgrad.models.weights_file import opened, opened_file
from shardgrad.nn.init import draw_seed
from shardgrad.nn.sharding import ParamSharding
from shardgrad.nn.shardings import named_shardings

Shardings = dict[int, ParamSharding]


@told
@torch.no_grad()
def load_pretrained(
    model: nn.Module, folder: str | Path, *, device: torch.device | str | None = None, strict: bool = True
) -> list[str]:
    """Fill a model, on any mesh or none, with a folder that transformers or `sg.save_pretrained` has written.

    Every rank reads the slices that it stores, straight into place, and nothing is communicated: beside its own
    parameters a rank holds no more than its part of one tensor. Names and arrangements of the files become the model's
    as in transformers' `from_pretrained` (prefixes, old names, experts stored one by one); values are converted to the
    parameters' dtypes. What is on the meta device becomes real; buffers that files do not hold, such as rotary
    frequencies, are computed as the model itself does. The generation config is read too. The model stays in training
    or evaluation mode (`from_pretrained` leaves it in evaluation).

    A model that peft has wrapped takes the folder of its base, and then gives adapters without values their initial
    ones (alike on any mesh if torch's generators are seeded alike); or a folder with an adapter, as peft and
    `sg.save_pretrained` write it, which is read slice by slice too.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and its files.
        device: where what is on meta goes; by default the mesh's device, or the CPU for a model without one.
        strict: refuse what the folder lacks, and what only the folder has. Else the former keeps its values, which must
            not be on meta, and the latter is not read.

    Returns:
        The names of what the folder lacks: nothing, if strict.

    Raises:
        OSError: the folder or a file of it cannot be read.
        ValueError: tensors are missing, unknown or of another shape: all are listed, and nothing has been changed. Or a
            buffer on meta cannot be computed, or the adapters are none that can be read.
        TypeError, ShapeError, LayoutError: it is not known how a parameter is stored; as `clip_grad_norm_`.
    """
    folder = Path(folder)
    if has_adapters(model):
        return _load_adapted(model, folder, device, strict)
    if getattr(model, "peft_config", None):
        raise ValueError(f"{type(model).__name__} has peft adapters: pass the model that get_peft_model gave back")
    shardings: Shardings = {id(one): sharding for _, one, sharding in named_shardings(model) if sharding is not None}
    named = all_named(model)
    where = _device(device, list(shardings.values()))
    with opened(folder) as stored:
        names = CheckpointNames(model)
        found, wrong = names.of_model(stored, {name for name, _, _ in named})
        groups: dict[int, list[str]] = {}
        for name, tensor, _ in named:
            groups.setdefault(id(tensor), []).append(name)
        tensors = {id(tensor): tensor for _, tensor, _ in named}
        lacking = {key: some for key, some in groups.items() if not any(name in found for name in some)}
        if strict:
            known = {name for name, _, _ in named}
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            wrong += [f"missing: {some[0]}{_hint(some, tied)}" for some in lacking.values()]
            wrong += [f"unknown: {name}" for name in found if name not in known and not names.ignored(name)]
        else:
            wrong += [
                f"missing, and on meta: {some[0]}. Give it values first: module.to_empty(device=…) and torch.nn.init, "
                "alike on every rank"
                for key, some in lacking.items()
                if tensors[key].is_meta
            ]
        sources = {key: [name for name in some if name in found] for key, some in groups.items() if key not in lacking}
        for key, some in sources.items():
            wrong += _misfits(some, tensors[key], shardings.get(key), found)
        if wrong:
            raise ValueError(
                f"{folder} is not of this {type(model).__name__}, which has not been changed:\n  "
                + "\n  ".join(wrong)
                + ("\nTo load what fits and keep the rest: strict=False" if strict else "")
            )
        places = _places(model)
        for key, some in sources.items():
            _fill(tensors[key], shardings.get(key), found[some[0]], places[key], where)
    left = rebuild_buffers(model, where)
    if left:
        raise ValueError(
            f"{', '.join(left)}: on the meta device, in no file, and not computed by the _init_weights of a model of "
            "transformers. Give the module a method reset_buffers() that writes them, or build it on a real device"
        )
    _read_generation_config(model, folder)
    return [some[0] for some in lacking.values()]


def _load_adapted(model: Any, folder: Path, device: torch.device | str | None, strict: bool) -> list[str]:
    """The base of a model with adapters, or its adapters."""
    base = model.get_base_model()
    if not (folder / CONFIG).is_file():
        with unwrapped(base):
            lacking = load_pretrained(base, folder, device=device, strict=strict)
        where = _device(device, [one for _, _, one in named_shardings(model) if one is not None])
        reset_adapters(model, draw_seed(), where, only_meta=True)
        return lacking
    shardings = {name: (one, sharding) for name, one, sharding in named_shardings(model)}
    where = _device(device, [one for _, one in shardings.values() if one is not None])
    places = _places(model)
    with opened_file(folder / FILE) as found:
        names = names_in_files(model)
        wrong = [f"missing: {file_name}" for file_name in names.values() if file_name not in found]
        wrong += [f"unknown: {file_name}" for file_name in found if file_name not in names.values()]
        for name, file_name in names.items():
            if file_name in found:
                tensor, sharding = shardings[name]
                wrong += _misfits([file_name], tensor, sharding, found)
        if wrong:
            raise ValueError(
                f"{folder} holds another adapter than this model has, which has not been changed:\n  "
                + "\n  ".join(wrong)
            )
        for name, file_name in names.items():
            tensor, sharding = shardings[name]
            _fill(tensor, sharding, found[file_name], places[id(tensor)], where)
    return []


def _device(device: torch.device | str | None, shardings: Sequence[ParamSharding]) -> torch.device:
    if device is not None:
        return torch.device(device)
    return view(shardings[0].mesh).device if shardings else torch.device("cpu")


def _hint(names: list[str], tied: Mapping[str, str]) -> str:
    if len(names) > 1:
        return f" (nor is it there as {' or '.join(names[1:])})"
    other = tied.get(names[0])
    return f" (the config ties it to {other}, but here these are two parameters)" if other else ""


def _misfits(
    names: list[str], tensor: Tensor, sharding: ParamSharding | None, found: dict[str, LazyTensor]
) -> list[str]:
    """What is wrong with the stored tensors of one of the model's."""
    shape = tuple(tensor.shape) if sharding is None else sharding.global_shape
    wrong = [
        f"{name}: global shape {shape} in the model, {found[name].shape} in the folder"
        for name in names
        if found[name].shape != shape
    ]
    if wrong:
        return wrong
    return [
        f"{name}: tied to {names[0]} in the model, but the folder has other values there (tie_word_embeddings=False?)"
        for name in names[1:]
        if not same_values(found[names[0]], found[name])
    ]


def _places(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Where each parameter and buffer is held: the dictionaries of modules, and the keys there."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, one in held.items():
                places.setdefault(id(one), []).append((held, key))
    return places


def _fill(
    tensor: Tensor,
    sharding: ParamSharding | None,
    source: LazyTensor,
    places: list[tuple[dict[str, Any], str]],
    device: torch.device,
) -> None:
    """Copy this rank's part into a tensor, or into a real one that takes the place of one on meta."""
    target = tensor
    if tensor.is_meta:
        target = torch.empty_like(tensor, device=device)
        if isinstance(tensor, nn.Parameter):
            target = nn.Parameter(target, requires_grad=tensor.requires_grad)
            target.__dict__.update(tensor.__dict__)
    target.copy_(source.read(source.everything()) if sharding is None else sharding.read(source.read))
    if target is not tensor:
        for held, key in places:
            held[key] = target


def _read_generation_config(model: Any, folder: Path) -> None:
    if not is_pretrained(model) or not model.can_generate() or not (folder / "generation_config.json").is_file():
        return
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
