"""`parallelize`: shard a model that somebody else wrote, in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import told
from shardgrad.comm import shim
from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError
from shardgrad.layout.batch_axis import BatchAxis
from shardgrad.models import ties
from shardgrad.models.adapters import with_adapters
from shardgrad.models.architectures import KNOWN, Architecture, architecture_of
from shardgrad.models.build import Builder, fill
from shardgrad.models.draft import draft
from shardgrad.models.features import Features
from shardgrad.models.head import Head
from shardgrad.models.linear import FeatureLinear
from shardgrad.models.plan import Laid, lay, matches, plain_name
from shardgrad.models.root import Root, refuse_dropout, sum_over_data
from shardgrad.models.sequence import Action, Hook, Stream
from shardgrad.models.styles import from_styles
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel

M = TypeVar("M", bound=nn.Module)
NONE = Features("", (), ())


@told
def parallelize(
    model: M,
    mesh: DeviceMesh,
    plan: Mapping[str, str] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    axis: str = "tp",
    sequence: bool | Mapping[str, str] = False,
    data: BatchAxis | None = None,
    reduce_dtype: torch.dtype | None = None,
    loss: Literal["sharded", "fused"] = "sharded",
) -> M:
    """Shard a model over an axis of a mesh, in place: a module of transformers, or one of your own.

        sg.parallelize(model, mesh)                                                    # an architecture that is known
        sg.parallelize(model, mesh, {"blocks.*.up": "d -> f/tp", "blocks.*.down": "f/tp -> d"})

    Layers that the plan names are exchanged for sharded ones, which take over this rank's part of their values, and
    keep names, shapes and ties. The rest of the model runs as it is written. All ranks call this with the same model:
    on the meta device (`sg.load_pretrained` fills it), or with the same values. docs/models.md shows a whole program.

    Args:
        plan: how features are stored, by patterns of module names (`*` is one part of a name, `**` any number); see
            docs/write-a-plan.md. Integers that a forward reads, such as `num_heads`, have an entry too. Names of
            transformers' styles (`colwise`, `rowwise`) are taken where they can mean one thing only. None: the plan
            that is known for the model's architecture.
        sizes: of the letters that plans use, where a layer's features do not give them: h query heads, g KV heads, k
            features of a head.
        axis: of the mesh; the plan's texts name it.
        sequence: whether activations are sharded along the sequence between the layers; or where, by module names, as
            in `shardgrad.models.sequence`.
        data: an axis over which the batch is sharded: gradients are then summed over it as well, and the loss is the
            mean over the tokens of all. (Or leave it out, and use DistributedDataParallel or FSDP2 over that axis.)
        reduce_dtype: as of `sg.Parallel`.
        loss: "fused" has the output layer's product and the loss of given labels in one (`sg.linear_cross_entropy`,
            gradients made in forward): `outputs.logits` is then None.

    Derived: which layers share an input, whose gradient is then summed once; parameters between sharded layers whose
    gradients are sums (watched in the first call of each kind); KV heads that ranks share; ranks without heads.

    With a known output layer, the loss of given labels is vocabulary parallel and the logits stay sharded; without
    labels (as in `generate`) logits are gathered.

    Returns:
        The model.

    Raises:
        LayoutError: the architecture is not known and no plan given (the message has a draft of one); or a plan that
            does not fit: nothing has been changed then.
        MeshError: the mesh lacks an axis.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a module, not {type(model).__name__}")
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        raise LayoutError(f"this {type(model).__name__} has shardgrad layers already: parallelize a model once")
    if getattr(model, "hf_device_map", None):
        raise LayoutError("this model was spread over devices by device_map: load it without, or on the meta device")
    view(mesh).require([axis], "parallelize")
    if data is not None and data.accumulate:
        raise LayoutError("data: accumulate=True is for models of shardgrad's layers: call backward once for each step")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    parallel = Parallel(mesh, axis, data=data, reduce_dtype=reduce_dtype)
    architecture = architecture_of(base, axis)
    texts, letters = _plan(base, architecture, plan, sizes, axis)
    laid = with_adapters(model, lay(model, texts, strict=plan is not None), axis)
    if not laid.modules and not laid.experts:
        raise LayoutError(f"the plan means nothing of this {type(base).__name__}")
    streams = _streams(sequence, architecture, base, axis)
    if model.training:
        refuse_dropout(model)
    theirs: Mapping[str, str] = architecture.plan if architecture is not None and plan is not None else {}
    known = lay(model, theirs, strict=False)  # what a plan of the user's must agree with
    _check_integers(laid, known, axis)
    builder = Builder(laid, letters, parallel, bool(streams), {id(one.module): one.features for one in known.modules})
    builder.build()
    numbers = [(one, builder.number(one)) for one in laid.integers]
    instead = {id(one.module): one.name for one in laid.modules} | {id(m): name for name, m, _ in laid.experts}
    every = list(model.named_modules(remove_duplicate=False))
    made = {path: builder.made[instead[id(old)]] for path, old in every if id(old) in instead}
    groups = ties.tied(model)
    ties.check(groups, made, model)
    hooks = _hooks(model, streams, parallel, strict=not isinstance(sequence, bool))
    _check_loss(loss, base, made)
    # Nothing has been changed so far.
    for new, old in {id(made[path]): (made[path], old) for path, old in every if path in made}.values():
        fill(new, old)
        shim.move_hooks(old, new)
        new.train(old.training)
    for path, new in made.items():  # one of several names under each of them
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    ties.join(groups, made, model)
    for one, number in numbers:
        _set_number(one.module, one.attribute, number)
    _share_kv_heads(model, made, builder)
    head = _head(base, parallel, loss == "fused")
    Root(model, [model] if base is model else [model, base], parallel, head)
    for module, hook in hooks:
        hook.register(module)
    if data is not None:
        sum_over_data(model, parallel)
    if hasattr(model, "save_pretrained"):  # which would write this rank's shards
        model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[assignment]
    return model


def _save_pretrained(model: nn.Module, save_directory: str, **options: Any) -> None:
    """`sg.save_pretrained` in the place of the model's own.

    Raises:
        TypeError: an option that only the model's own has.
    """
    from shardgrad.models.pretrained_save import save_pretrained

    unknown = [name for name in options if name != "max_shard_size"]
    if unknown:
        raise TypeError(
            f"save_pretrained of a parallelized model is sg.save_pretrained(model, folder), which knows no "
            f"{unknown[0]}: the model's own would write each rank's shards"
        )
    save_pretrained(model, save_directory, **options)


def _plan(
    base: Any,
    known: Architecture | None,
    plan: Mapping[str, str] | None,
    sizes: Mapping[str, int] | None,
    axis: str,
) -> tuple[Mapping[str, str], dict[str, int]]:
    """The texts of a plan, and the sizes of its letters."""
    own: Mapping[str, int] = {} if known is None else known.sizes
    if plan is not None:
        texts, styled = from_styles(plan, base, axis)
        return texts, {**own, **styled, **(sizes or {})}
    if known is None:
        kind = getattr(getattr(base, "config", None), "model_type", None)
        of = f"the architecture {kind!r} ({type(base).__name__})" if kind else type(base).__name__
        raise LayoutError(
            f"no plan is known for {of}; known are {', '.join(sorted(KNOWN))}. Give one, as plan=…; a draft to "
            f"edit, with guesses (docs/write-a-plan.md):\n{draft(base, axis)}"
        )
    return known.plan, {**own, **(sizes or {})}


def _check_integers(laid: Laid, known: Laid, axis: str) -> None:
    """Refuse a plan that shards layers of which a known program counts features by an integer that it lacks: some
    programs then take other features, of a shape that fits."""
    given = {(one.name, one.attribute) for one in laid.integers}
    for one in known.integers:
        inside = [each for each in laid.modules if each.plain.startswith(f"{one.plain}.")]
        sharded = next((each for each in inside if each.features.kind(axis) != "replicated"), None)
        if sharded is not None and (one.name, one.attribute) not in given:
            raise LayoutError(
                f"{one.plain}.{one.attribute} counts features of {sharded.plain}, which are sharded "
                f"({sharded.features}): the plan lacks it, as {str(one.features)!r}"
            )


def _streams(sequence: bool | Mapping[str, str], known: Architecture | None, base: Any, axis: str) -> Mapping[str, str]:
    if not isinstance(sequence, bool):
        return sequence
    if not sequence:
        return {}
    if known is None:
        raise LayoutError(
            f"no sequence plan is known for {type(base).__name__}: say where, "
            f"sequence={{'layers.0': 's -> s/{axis}', …}}"
        )
    if isinstance(known.sequence, str):
        raise LayoutError(f"sequence=True: {known.sequence}")
    return known.sequence


def _hooks(
    model: nn.Module, texts: Mapping[str, str], parallel: Parallel, *, strict: bool
) -> list[tuple[nn.Module, Hook]]:
    """What happens to the sequence at which modules, and in which stream."""
    axis, found = parallel.axis, []
    for pattern, text in texts.items():
        action = Action.of(text, axis, pattern)
        hits = [
            (plain_name(name), module) for name, module in model.named_modules() if matches(pattern, plain_name(name))
        ]
        if strict and not hits:
            raise LayoutError(f"sequence: {pattern!r} means no module of this model")
        found += [(module, name, action) for name, module in hits]
    streams = [
        Stream(name if a.wraps else name.rpartition(".")[0].rpartition(".")[0]) for _, name, a in found if a.starts
    ]
    if texts and not streams:
        raise LayoutError("sequence: no module starts the stream, 's -> s/" + axis + "'")

    def stream_of(name: str) -> Stream:
        inside = [one for one in streams if not one.prefix or f"{name}.".startswith(f"{one.prefix}.")]
        if not inside:
            raise LayoutError(
                f"sequence: {name} is in none of the streams, which begin in {[s.prefix for s in streams]}"
            )
        return max(inside, key=lambda one: len(one.prefix))

    return [(module, Hook(name, action, stream_of(name), parallel)) for module, name, action in found]


def _set_number(module: Any, attribute: str, number: int) -> None:
    if attribute.startswith("config."):
        module.config = copy.copy(module.config)  # of this module alone
        module = module.config
    setattr(module, attribute.removeprefix("config."), number)


def _check_loss(loss: str, base: Any, made: Mapping[str, ShardedModule]) -> None:
    """Refuse a fused loss of an output layer whose logits it could not make.

    Raises:
        ValueError: an unknown one.
        LayoutError: the output layer's vocabulary is not sharded, or it has adapters or a transposed weight.
    """
    if loss not in ("sharded", "fused"):
        raise ValueError(f"loss must be 'sharded' or 'fused', not {loss!r}")
    if loss == "sharded":
        return
    outer: Any = getattr(base, "get_output_embeddings", lambda: None)()
    path = next((name for name, module in base.named_modules() if module is outer), None)
    ours = [one for name, one in made.items() if path is not None and name.endswith(path)]
    if not ours or not isinstance(ours[0], FeatureLinear) or ours[0].transposed or ours[0].kind != "column":
        raise LayoutError(
            f"loss='fused': the output layer of this {type(base).__name__} is no plain linear layer with a sharded "
            "vocabulary (without adapters): use loss='sharded'"
        )


def _head(base: Any, parallel: Parallel, fused: bool) -> Head | None:
    """What minds the labels and logits of a model whose output layer leaves a sharded vocabulary."""
    outer: Any = getattr(base, "get_output_embeddings", lambda: None)()
    inner = getattr(outer, "base_layer", outer)
    if not isinstance(inner, FeatureLinear) or inner.kind != "column" or inner.features.gathered:
        return None
    return Head(base, outer, inner.out_features, parallel, inner if fused else None)


def _share_kv_heads(model: nn.Module, made: Mapping[str, ShardedModule], builder: Builder) -> None:
    """Where a rank has one KV head for each query head, or none at all, say so to those who repeat them."""
    if builder.heads is None or (builder.heads.aligned and builder.heads.count):
        return
    for path, new in made.items():
        letters = {dim.letter for part in getattr(new, "features", NONE).parts for dim in part}
        owner: Any = model.get_submodule(_owner(path))
        if "g" in letters and isinstance(getattr(owner, "num_key_value_groups", None), int):
            owner.num_key_value_groups = 1


def _owner(path: str) -> str:
    """The name of the module that calls a layer, also one in an adapter's wrapper."""
    return path.removesuffix(".base_layer").rpartition(".")[0]
