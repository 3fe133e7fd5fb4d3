"""Right programs of released layers: shardgrad's, DTensor's, and models of transformers that are parallelized."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from shardgrad.models.parallelize import parallelize
from shardgrad.mutants.mutant import Program
from shardgrad.mutants.right.kind import FULL, HALVES, Kind, fill, randint, randn
from shardgrad.nn.conv import Conv2d
from shardgrad.nn.embedding import VocabParallelEmbedding
from shardgrad.nn.linear import ColumnParallelLinear, RowParallelLinear
from shardgrad.nn.loss import vocab_parallel_cross_entropy
from shardgrad.nn.mlp import MLP
from shardgrad.nn.norm import LayerNorm, RMSNorm
from shardgrad.nn.parallel import Parallel
from shardgrad.nn.state import load_state_dict

D, M, ROWS, VOCAB = 10, 23, 12, 31


def _program(
    mesh: DeviceMesh, dtype: torch.dtype, parallel: nn.Module, single: nn.Module, batch: Any, **given: Any
) -> Program:
    """Shardgrad's layers, which take one device's values, in the precision."""
    fill(single)
    single.to(dtype)
    parallel.to(dtype)

    def load(source: nn.Module) -> None:
        load_state_dict(parallel, source.state_dict())

    load(single)
    cast = [t.to(dtype) if t.is_floating_point() else t for t in batch]
    return Program(parallel, single, cast, mesh, load, lambda _: 1.0, **given)


class _Block(nn.Module):
    def __init__(self, norm: nn.Module, up: nn.Module, down: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.act = norm, up, down, act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def _plain(act: Callable[[Tensor], Tensor] = F.gelu, m: int = M) -> _Block:
    return _Block(nn.LayerNorm(D), nn.Linear(D, m), nn.Linear(m, D), act)


def _block(act: Callable[[Tensor], Tensor]) -> Any:
    def make(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
        up, down = ColumnParallelLinear(D, M, mesh=mesh), RowParallelLinear(M, D, mesh=mesh)
        return _program(mesh, dtype, _Block(LayerNorm(D, mesh=mesh), up, down, act), _plain(act), [randn(ROWS, D)])

    return make


def _sequence(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    """The sequence is sharded around the block; uneven, if the ranks are not two."""
    where = Parallel(mesh, sequence_dim=1)
    up, down = ColumnParallelLinear(D, M, parallel=where), RowParallelLinear(M, D, parallel=where)
    x = randn(3, 10, D)
    own = x.to(dtype).tensor_split(mesh.size(), 1)[mesh.get_local_rank()]
    if 10 % mesh.size():
        sizes = [len(part) for part in torch.arange(10).chunk(mesh.size())]
        own = x.to(dtype).split(sizes, 1)[mesh.get_local_rank()]
    parallel = _Block(LayerNorm(D, parallel=where), up, down, F.gelu)
    return _program(mesh, dtype, parallel, _plain(), [x], parallel_batch=[own])


def _mlp(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, M), nn.Linear(M, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    return _program(mesh, dtype, MLP(D, M, mesh=mesh), Plain(), [randn(ROWS, D)])


class _Words(nn.Module):
    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.mesh = mesh
        if mesh is None:
            self.words: nn.Module = nn.Embedding(VOCAB, D)
            self.norm: nn.Module = nn.RMSNorm(D, eps=1e-6)
            self.head: nn.Module = nn.Linear(D, VOCAB, bias=False)
        else:
            self.words, self.norm = VocabParallelEmbedding(VOCAB, D, mesh=mesh), RMSNorm(D, eps=1e-6, mesh=mesh)
            self.head = ColumnParallelLinear(D, VOCAB, bias=False, mesh=mesh)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(self.words(ids)))
        if self.mesh is None:
            return F.cross_entropy(logits.float(), targets, label_smoothing=0.1)
        return vocab_parallel_cross_entropy(
            logits, targets, vocab_size=VOCAB, mesh=self.mesh, label_smoothing=0.1
        )  # fmt: skip


def _words(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    return _program(
        mesh, dtype, _Words(mesh), _Words(None), [randint(VOCAB, ROWS), randint(VOCAB, ROWS, seed=6)]
    )  # fmt: skip


def _images(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    ours = nn.Sequential(
        Conv2d(3, 7, 3, padding=1, mesh=mesh), nn.ReLU(), Conv2d(7, 5, 3, shard_dim="in", mesh=mesh)
    )  # fmt: skip
    theirs = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 5, 3))
    return _program(mesh, dtype, ours, theirs, [randn(2, 3, 6, 6)])


def _compiled(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    made = _block(F.gelu)(mesh, dtype)
    made.parallel.compile(backend="aot_eager")
    return made


def _dtensors(plan: Callable[[], Mapping[str, Any]], rows: bool, act: Callable[[Tensor], Tensor] = F.gelu) -> Any:
    def make(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
        parallel, single, x = _plain(act, 24).to(dtype), _plain(act, 24).to(dtype), randn(ROWS, D).to(dtype)
        fill(single)
        parallel.load_state_dict(single.state_dict())
        parallelize_module(parallel, mesh, dict(plan()))
        own = x.chunk(mesh.size())[mesh.get_local_rank()] if rows else x
        return Program(parallel, single, [x], mesh, lambda _: None, lambda _: 1.0, parallel_batch=[own])

    return make


def _two() -> Mapping[str, Any]:
    return {"up": ColwiseParallel(), "down": RowwiseParallel()}


def _rows() -> Mapping[str, Any]:
    return {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
    }


def _by_hand(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
    """Parameters are made DTensors one by one, and the plain program runs on them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.zeros(24, D)), nn.Parameter(torch.zeros(D, 24))

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.up, DTensor):
                x = DTensor.from_local(x, mesh, run_check=False)
            return F.silu(x @ self.up.T) @ self.down.T

    parallel, single = Model().to(dtype), Model().to(dtype)
    fill(single)
    for name, dim in (("up", 0), ("down", 1)):
        value = distribute_tensor(getattr(single, name).detach(), mesh, [Shard(dim)])
        setattr(parallel, name, nn.Parameter(value))
    return Program(
        parallel, single, [randn(ROWS, D).to(dtype)], mesh, lambda _: None, lambda _: 1.0,
        parallel_loss=lambda model, x: model(x).full_tensor(),
    )  # fmt: skip


_DECODER: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_STILL = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "Llama, one KV head": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "num_key_value_heads": 1}),
    "Llama, tied": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 8, "sliding_window": 4}),
    "Phi3": ("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, "original_max_position_embeddings": 32}),
    "Mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {**_DECODER, **_STILL}),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _DECODER),
    "OPT": (
        "OPTConfig", "OPTForCausalLM", {**_DECODER, "ffn_dim": 20, "word_embed_proj_dim": 24, "dropout": 0.0}
    ),
    "BERT": ("BertConfig", "BertForMaskedLM", _DECODER),
}  # fmt: skip


def _transformer(name: str, sequence: bool = False, adapted: bool = False) -> Any:
    def make(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers as hf  # here: it costs seconds

        hf.utils.logging.set_verbosity_error()
        config, kind, settings = _MODELS[name]
        models = []
        for _ in range(2):
            torch.manual_seed(3)
            model: Any = getattr(hf, kind)(getattr(hf, config)(**settings)).eval()
            if adapted:
                from peft import LoraConfig, get_peft_model

                targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
                model = get_peft_model(model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False)).eval()
            _spread(model)
            models.append(model.to(dtype))
        parallel, single = models
        parallelize(parallel, mesh, sequence=sequence)
        ids = randint(31, 2, 6)
        return Program(
            parallel, single, {"input_ids": ids, "labels": ids}, mesh, lambda _: None, lambda _: 1.0,
        )  # fmt: skip

    return make


_EVEN: dict[str, Any] = {
    "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 4, "vocab_size": 36, "intermediate_size": 24
}  # fmt: skip


def _own_plan(name: str, **more: Any) -> Any:
    """Sharded by transformers itself, as its plan says, while the model is read."""

    def make(mesh: DeviceMesh, dtype: torch.dtype) -> Program:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers as hf

        hf.utils.logging.set_verbosity_error()
        hf.utils.logging.disable_progress_bar()
        config, kind, settings = _MODELS[name]
        torch.manual_seed(3)
        made = getattr(hf, config)(**{**settings, **_EVEN, **more})
        single: Any = getattr(hf, kind)(made).eval()
        _spread(single)
        single.to(dtype)
        values = {name: value.clone() for name, value in single.state_dict().items()}
        parallel = type(single).from_pretrained(
            None, config=made, state_dict=values, tp_plan="auto", device_mesh=mesh, dtype=dtype, **more
        ).eval()  # fmt: skip
        ids = randint(36, 2, 6)
        return Program(
            parallel, single, {"input_ids": ids, "labels": ids}, mesh, lambda _: None, lambda _: 1.0,
        )  # fmt: skip

    return make


def _spread(model: nn.Module) -> None:
    """Values that are not as small as transformers' own, which make attention uniform."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + noise / 4)


def _transformers() -> list[Kind]:
    if not find_spec("transformers"):
        return []
    found = [Kind(f"parallelized {name}", _transformer(name), HALVES) for name in _MODELS]
    found.append(Kind("parallelized Llama, sharded sequence", _transformer("Llama", sequence=True)))
    found.append(Kind("parallelized GPT-2, sharded sequence", _transformer("GPT-2", sequence=True)))
    found += [Kind(f"transformers' own plan, {name}", _own_plan(name)) for name in ("Llama", "Qwen3", "Gemma2")]
    found.append(Kind("transformers' own plan, Mixtral", _own_plan("Mixtral", experts_implementation="eager")))
    if find_spec("peft"):
        found.append(Kind("parallelized Llama with LoRA", _transformer("Llama", adapted=True)))
    return found


KINDS = [
    Kind("shardgrad: block", _block(F.gelu)),
    Kind("shardgrad: block, ReLU", _block(F.relu)),
    Kind("shardgrad: MLP", _mlp),
    Kind("shardgrad: sharded sequence", _sequence),
    Kind("shardgrad: words and loss", _words),
    Kind("shardgrad: convolutions", _images, (torch.float32, torch.bfloat16)),
    Kind("shardgrad: compiled", _compiled, FULL),
    Kind("DTensor: column and row", _dtensors(_two, False)),
    Kind("DTensor: ReLU", _dtensors(_two, False, F.relu)),
    Kind("DTensor: sharded rows", _dtensors(_rows, True)),
    Kind("DTensor: parameter by parameter", _by_hand),
    *_transformers(),
]
