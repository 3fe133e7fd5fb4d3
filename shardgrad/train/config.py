"""A training run's configuration: the keys, what each allows, and how they are read from YAML and the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Discriminator, Field, Tag

from shardgrad import settings
from shardgrad.settings import ConfigError as ConfigError
from shardgrad.settings import Number
from shardgrad.settings import Section as _Section


class Run(_Section):
    dir: str = Field(
        default="runs/run",
        min_length=1,
        description="folder for what the run leaves; a number is added if it exists, unless run.resume=auto",
    )
    resume: str | None = Field(
        default=None,
        min_length=1,
        description="auto: go on in run.dir from its newest checkpoint, or begin there; a path: begin a new folder "
        "from that checkpoint, or that run's newest; null: begin anew. Restarts by torchrun always go on",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of initial values, batches and the sample")
    tensorboard: bool = Field(default=False, description="write the curves for TensorBoard too, besides the rest")
    check: bool = Field(
        default=True, description="whether to compare the first step with one device, which holds it in float64"
    )


class Mesh(_Section):
    dp: int | None = Field(default=1, ge=1, description="ranks of the data parallel axis; null: all that tp leaves")
    tp: int | None = Field(
        default=None, ge=1, description="ranks of the tensor parallel axis; null: all that dp leaves"
    )
    grid: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        min_length=3,
        max_length=3,
        description="ranks of the axes z, x, y of a 3D layout, instead of dp and tp: batch, features, heads and hidden",
    )
    fully_sharded: bool = Field(default=False, description="whether weights are sharded over dp as well")
    balanced: bool = Field(
        default=False, description="shard 9 heads over 4 ranks as 3, 2, 2, 2, not as torch.chunk does: 3, 3, 3, 0"
    )
    sequence_parallel: bool = Field(
        default=True,
        description="whether a built-in decoder's activations are sharded over tp along the sequence, between products",
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where tensors live")
    timeout_s: Number = Field(
        default=120.0, ge=1, le=10**6, description="seconds after which a collective that waits is an error"
    )
    start_s: Number = Field(
        default=20.0, gt=0, description="seconds, from when the last rank came, that ranks wait for the next to start"
    )


class Data(_Section):
    files: list[str] = Field(default=[], description="text files; none: the language reference that CPython carries")
    tokens: str | None = Field(
        default=None, min_length=1, description="instead of text: a file of token ids, .npy or nothing but ids"
    )
    tokens_dtype: Literal["uint16", "uint32"] = Field(
        default="uint16", description="of the ids of data.tokens, little-endian, unless it is .npy"
    )
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="bytes; bpe: byte pairs, found in the training part; or a JSON file of the tokenizers library; "
        "null: bytes for text, none for data.tokens",
    )
    vocab: int | None = Field(
        default=None, ge=2, le=2**32, description="token ids: of data.tokens; at most so many for data.tokenizer=bpe"
    )
    held_out: Number = Field(default=0.1, gt=0, lt=1, description="last part of the text, never trained on")


class Model(_Section):
    kind: Literal["gpt", "llama"] = Field(
        default="gpt",
        description="GPT-2's block (LayerNorm, learned positions, GELU) or Llama's (RMSNorm, rotary, SwiGLU)",
    )
    layers: int = Field(ge=1, description="transformer blocks")
    heads: int = Field(ge=1, description="attention heads; need not divide by the ranks")
    kv_heads: int | None = Field(
        default=None, ge=1, description="heads of keys and values, which must divide model.heads; null: as many"
    )
    d_model: int = Field(ge=1, description="width of the residual stream, a multiple of model.heads")
    d_ff: int | None = Field(
        default=None,
        ge=1,
        description="hidden features of the feed-forward block; null: 4 d_model, of llama 8/3",
    )
    seq_len: int = Field(ge=1, description="tokens of a sequence")
    tied: bool = Field(default=False, description="whether the head multiplies by the embedding's table")
    dropout: Number = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="part of the elements that training zeroes, of the embedded tokens and of what each layer adds",
    )
    norm_eps: Number = Field(default=1e-5, gt=0, le=1, description="added to the variance in norms")
    rope_theta: Number = Field(default=10000.0, ge=1, le=1e30, description="base of llama's rotary frequencies")


class Lora(_Section):
    rank: int = Field(default=8, ge=1, description="features between an adapter's two matrices")
    alpha: Number = Field(default=16.0, gt=0, le=1e6, description="what an adapter adds is multiplied by alpha / rank")
    targets: list[str] | None = Field(
        default=None, min_length=1, description="names of the linear layers with adapters; null: peft's choice"
    )
    dropout: Number = Field(default=0.0, ge=0, le=0, description="none: a sharded model drops nothing of its adapters")


class TransformersModel(_Section):
    """A causal language model of transformers, which says its sizes itself."""

    pretrained: str | None = Field(
        default=None, min_length=1, description="instead of a decoder of sizes: a folder in Hugging Face's format"
    )
    config: str | None = Field(
        default=None,
        min_length=1,
        description="instead of a decoder of sizes: a config.json of transformers; random weights",
    )
    made_by: str | None = Field(
        default=None,
        min_length=1,
        description="a configuration that is run first where model.pretrained does not exist, and leaves it",
    )
    lora: Lora | None = Field(
        default=None, description="train adapters alone, model.pretrained stays as it is; null: all"
    )
    sequence: bool = Field(
        default=True, description="whether activations of a model of transformers are sharded along the sequence"
    )
    seq_len: int = Field(ge=1, description="tokens of a sequence")


_DECODER, _TRANSFORMERS = (f"[{word} model.pretrained or model.config]" for word in ("without", "with"))


def _kind_of_model(given: Any) -> str:
    if isinstance(given, dict):
        return _TRANSFORMERS if "pretrained" in given or "config" in given else _DECODER
    return _TRANSFORMERS if isinstance(given, TransformersModel) else _DECODER


class Train(_Section):
    steps: int = Field(ge=1, description="optimizer steps")
    batch: int = Field(ge=1, description="sequences of a step, over all ranks and micro-batches")
    accumulate: int = Field(default=1, ge=1, description="micro-batches of a step, whose gradients add up")
    lr: Number = Field(gt=0, le=1000, description="highest learning rate")
    warmup: int = Field(default=0, ge=0, description="steps over which lr rises, before it falls by a cosine")
    min_lr: Number = Field(default=0.1, ge=0, le=1, description="what the cosine falls to, as a part of lr")
    weight_decay: Number = Field(default=0.1, ge=0, le=1000, description="AdamW's, on matrices alone")
    clip: Number | None = Field(
        default=None, gt=0, le=1e30, description="largest norm of all gradients together; null: any"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of products and activations; parameters and moments are float32"
    )
    reduce_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="in which partial sums of products are reduced; null: in train.dtype"
    )
    recompute: Literal["none", "full", "attention"] = Field(
        default="none", description="what backward computes again instead of keeping: whole blocks, or attention layers"
    )
    loss: Literal["fused", "sharded"] | None = Field(
        default=None,
        description="fused: the head's product and the loss in one, in chunks of tokens, gradients made in forward; "
        "sharded: of all logits; null: fused for a decoder whose logits on a rank make several chunks",
    )
    exact: Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        description="the same bits on every number of ranks that divides this: of all axes, or by axis, "
        "{dp: 4, tp: 8}; with mesh.grid, {z: 2, x: 4, y: 4}",
    )
    log_every: int = Field(default=10, ge=1, description="steps between training losses written down")
    eval_every: int = Field(default=100, ge=1, description="steps between held-out losses")
    eval_batches: int | None = Field(
        default=100, ge=1, description="batches of the held-out part that such a loss is the mean of; null: all of it"
    )
    save_every: int = Field(default=100, ge=1, description="steps between checkpoints; the last step has one too")
    keep: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    check_every: int = Field(default=0, ge=0, description="steps between checks of replicas and for NaN; 0: never")


class Sample(_Section):
    prompt: str = Field(default="The ", min_length=1, description="what the sample of generated text begins with")
    tokens: int = Field(default=400, ge=0, description="tokens to generate; 0: none")
    temperature: Number = Field(
        default=0.7, ge=0, le=1e30, description="of the sampling; 0: always the likeliest token"
    )
    top_k: int | None = Field(default=None, ge=1, description="draw among so many likeliest tokens; null: among all")


class Config(_Section):
    """A whole configuration; keys are written `section.key`."""

    of_others: ClassVar = dict.fromkeys(("matrix", "cells"), "an experiment: start it by shardgrad scale")
    run: Run = Run()
    mesh: Mesh = Mesh()
    data: Data = Data()
    model: Annotated[
        Annotated[Model, Tag(_DECODER)] | Annotated[TransformersModel, Tag(_TRANSFORMERS)],
        Discriminator(_kind_of_model),
    ]
    train: Train
    sample: Sample = Sample()

    def to_yaml(self) -> str:
        """The configuration with every key written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, then `section.key=value` overrides, whose values are YAML too.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; lists all of them, with the nearest key.
    """
    return settings.load(Config, path, overrides, _disagreements, _files)


def _files(values: dict[str, Any]) -> Iterator[str]:
    """Keys of what a run reads. What runs leave (run.dir, a model that model.made_by makes) lies where they start."""
    yield from ("data.files", "data.tokens", "model.config", "model.made_by")
    model, data = values.get("model"), values.get("data")
    if not (isinstance(model, dict) and model.get("made_by")):
        yield "model.pretrained"
    if not (isinstance(data, dict) and data.get("tokenizer") in ("bytes", "bpe")):
        yield "data.tokenizer"


def keys() -> Iterator[tuple[str, Any]]:
    """Every key, as `section.key`, with pydantic's description of it."""
    return settings.keys(Config)


def _disagreements(config: Config) -> Iterator[str]:
    """What no single key shows."""
    if isinstance(config.model, Model):
        yield from _decoder_disagreements(config.model, config.mesh)
    else:
        yield from _transformers_disagreements(config.model, config)
    yield from _data_disagreements(config.data)
    train = config.train
    if train.warmup >= train.steps:
        yield f"train.warmup = {train.warmup} must be less than train.steps = {train.steps}"
    if train.batch % train.accumulate:
        yield f"train.batch = {train.batch} does not divide into train.accumulate = {train.accumulate} micro-batches"
    yield from _exact_disagreements(config)
    if train.loss == "fused" and config.mesh.grid is not None:
        yield "train.loss = fused is not for mesh.grid, whose logits are sums over x: leave it out, or say sharded"
    if train.dtype == "float32" and train.reduce_dtype == "bfloat16":
        yield "train.reduce_dtype = bfloat16 is narrower than train.dtype = float32: sums would lose what is there"


def pieces(config: Config) -> dict[str, int] | None:
    """Into how many pieces `train.exact` cuts each axis; None without it."""
    exact = config.train.exact
    return dict.fromkeys(_axes(config.mesh), exact) if isinstance(exact, int) else exact


def _axes(mesh: Mesh) -> tuple[str, ...]:
    return ("dp", "tp") if mesh.grid is None else ("z", "x", "y")


def _split(config: Config, model: Model) -> Iterator[tuple[str, int | None, tuple[str, ...]]]:
    """Sizes that axes of the mesh split, and which of them; None: to be found."""
    grid = config.mesh.grid is not None
    yield "model.heads", model.heads, ("y", "x") if grid else ("tp",)
    for axis in ("x", "y") if grid else ("tp",):
        yield "model.seq_len", model.seq_len, (axis,)
    if grid:
        yield "model.d_model", model.d_model, ("x", "z")
    yield "model.d_ff", model.d_ff, ("y" if grid else "tp",)
    yield "train.batch", config.train.batch, ("z" if grid else "dp",)


def _exact_disagreements(config: Config) -> Iterator[str]:
    """What cannot be exact; and sizes that the pieces of an axis do not divide."""
    cuts, model, axes = pieces(config), config.model, _axes(config.mesh)
    if cuts is None:
        return
    if not isinstance(model, Model):
        yield "train.exact is for the built-in decoders, not for a model of transformers"
        return
    for axis in cuts:
        if axis not in axes:
            yield f"train.exact names {axis!r}, which is no axis of the mesh: {', '.join(axes)}"
    for name, size, over in _split(config, model):
        count = prod(cuts.get(axis, 1) for axis in over)
        if size is not None and size % count:
            yield (
                f"{name} = {size} does not divide into the {count} pieces that train.exact cuts {' and '.join(over)} "
                "into"
            )


def _decoder_disagreements(model: Model, mesh: Mesh) -> Iterator[str]:
    if model.d_model % model.heads:
        around = range(max(2, model.heads - 999), min(model.d_model, model.heads + 999) + 1)
        fits = [1, *(heads for heads in around if model.d_model % heads == 0)]
        near = sorted(sorted(fits, key=lambda heads: abs(heads - model.heads))[:3])
        yield (
            f"model.d_model = {model.d_model} does not divide by model.heads = {model.heads}; "
            f"heads that would: {', '.join(map(str, near))}"
        )
    if model.kv_heads is not None and model.heads % model.kv_heads:
        yield f"model.kv_heads = {model.kv_heads} must divide model.heads = {model.heads}"
    if mesh.grid is not None:
        if model.kind != "llama" or model.kv_heads not in (None, model.heads) or model.tied:
            yield "mesh.grid is for model.kind = llama, without model.kv_heads and model.tied"
        if mesh.dp not in (None, 1) or mesh.tp is not None or mesh.fully_sharded:
            yield "mesh.grid stands instead of mesh.dp, mesh.tp and mesh.fully_sharded: leave them out"
        if not mesh.sequence_parallel:
            yield "mesh.sequence_parallel = false is for mesh.tp: in a 3D layout the sequence is always sharded"
    if model.kind == "llama" and model.d_model % model.heads == 0 and (model.d_model // model.heads) % 2:
        yield (
            f"model.d_model / model.heads = {model.d_model // model.heads} must be even: rotary positions turn pairs "
            "of a head's features"
        )


def _transformers_disagreements(model: TransformersModel, config: Config) -> Iterator[str]:
    if model.pretrained is None and model.config is None:
        yield "model.pretrained and model.config are both null: name the folder, or the config.json"
    if model.pretrained is not None and model.config is not None:
        yield "model.pretrained and model.config are both given: the folder has a config.json of its own"
    if model.pretrained is None and model.lora is not None:
        yield "model.lora is for model.pretrained: adapters of random weights adapt nothing"
    if model.pretrained is None and model.made_by is not None:
        yield "model.made_by leaves model.pretrained: say where"
    if config.mesh.grid is not None:
        yield "mesh.grid is for model.kind = llama: a model of transformers is sharded over mesh.tp"
    if not config.mesh.sequence_parallel:
        yield "mesh.sequence_parallel is for the built-in decoders: of a model of transformers say model.sequence"
    if config.train.recompute == "attention":
        yield "train.recompute = 'attention' is for the built-in decoders: a model of transformers has 'full' alone"


def _data_disagreements(data: Data) -> Iterator[str]:
    if data.tokens is not None:
        if data.files:
            yield "data.files and data.tokens are both given: train on one of them"
        if data.vocab is None:
            yield f"data.vocab is missing: how many token ids there are in data.tokens = {data.tokens}"
        if data.tokenizer == "bpe":
            yield "data.tokenizer = 'bpe' is found in text: for data.tokens name the JSON file they were made with"
    elif data.tokenizer == "bpe":
        if data.vocab is None or data.vocab <= 256:
            yield f"data.vocab = {data.vocab} must be more than the 256 bytes that data.tokenizer = 'bpe' begins with"
    elif data.vocab is not None and (data.tokenizer not in (None, "bytes") or data.vocab != 256):
        yield f"data.vocab = {data.vocab} is for data.tokens or data.tokenizer=bpe: here the tokenizer says"


def decoder_sizes(config: Config) -> Model:
    """The sizes of a built-in decoder.

    Raises:
        ConfigError: the configuration names a model of transformers.
    """
    if isinstance(config.model, Model):
        return config.model
    raise ConfigError(
        "model.pretrained and model.config are for training alone: here name a decoder's sizes (model.layers, …)"
    )


def default_ranks(mesh: Mesh) -> int:
    """The ranks that a mesh needs: an axis that takes all there are has two, so that something is sharded over it."""
    if mesh.grid is not None:
        return prod(mesh.grid)
    return 2 if mesh.dp is None and mesh.tp is None else (mesh.dp or 2) * (mesh.tp or 2)


def check_ranks(config: Config, ranks: int, *, by_option: bool = False) -> Config:
    """The configuration with `mesh.dp` and `mesh.tp` resolved to the number of ranks.

    by_option: whether a command starts the ranks, as many as its --ranks says, and not torchrun.

    Raises:
        ConfigError: they say another number, or the batch does not divide by the ranks of dp.
    """
    dp, tp, grid = config.mesh.dp, config.mesh.tp, config.mesh.grid
    started = f"{ranks} {'process was' if ranks == 1 else 'processes were'} started"
    start = "start torchrun with --nproc-per-node"
    if by_option:
        started, start = f"--ranks is {ranks}", "give --ranks"
    if grid is not None:
        if prod(grid) != ranks:
            raise ConfigError(f"mesh.grid = {grid} has {prod(grid)} ranks, but {started}: {start} {prod(grid)}")
        _check_batch(config, grid[0], "mesh.grid's z")
        return config
    if dp is None and tp is None:
        dp, tp = 1, ranks
    for name, mine, given in (("tp", tp, dp), ("dp", dp, tp)):
        if mine is None and given is not None and ranks % given:
            other = "dp" if name == "tp" else "tp"
            raise ConfigError(
                f"mesh.{other} = {given} does not divide the ranks: {started}, so mesh.{name} = null leaves no whole "
                f"number of them; {start} {given} or a multiple of it"
            )
    dp = ranks // tp if dp is None and tp is not None else dp
    tp = ranks // dp if tp is None and dp is not None else tp
    assert dp is not None
    assert tp is not None
    if dp * tp != ranks:
        which = f"mesh.tp = {tp}" if dp == 1 else f"mesh.dp * mesh.tp = {dp} * {tp}"
        raise ConfigError(f"{which}, but {started}: {start} {dp * tp}, or set mesh.tp=null for all there are")
    _check_batch(config, dp, "mesh.dp")
    if config.mesh.fully_sharded and dp == 1 and config.train.exact is None:
        raise ConfigError("mesh.fully_sharded shards weights over dp, but mesh.dp = 1: set mesh.dp, or leave it out")
    return config.model_copy(update={"mesh": config.mesh.model_copy(update={"dp": dp, "tp": tp})})


def _check_batch(config: Config, ranks: int, name: str) -> None:
    batch, accumulate = config.train.batch, config.train.accumulate
    if batch // accumulate % ranks:
        raise ConfigError(
            f"train.batch / train.accumulate = {batch} / {accumulate} = {batch // accumulate} sequences do not divide "
            f"by {name} = {ranks}: each of these ranks takes as many of a micro-batch"
        )
