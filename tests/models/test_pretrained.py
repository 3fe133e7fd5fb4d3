"""Folders of Hugging Face's format, into models on any mesh and out of them, to the bits of plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from folders import assert_same, line, saved, tensors
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import MODELS, on_meta, plain, spread_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardgrad as sg
from shardgrad.comm.shim import TorchDispatchMode, storage_number
from shardgrad.models import weights_file
from shardgrad.testing import distributed


@pytest.mark.parametrize("name", MODELS)
@distributed(world_size=[1, 3])
def test_from_transformers_and_back(world_size: int, name: str, tmp_path: Path) -> None:
    several = len(name) % 2 == 0
    how = {"max_shard_size": "10KB"} if several else {}
    expected = saved(name, tmp_path / "theirs", **how)
    model = spread_model(on_meta(name), line(world_size))
    assert any(sharding is not None for _, _, sharding in sg.named_shardings(model))
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    assert sg.load_pretrained(model, tmp_path / "theirs") == []
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert_same(model, expected)
    sg.save_pretrained(model, tmp_path / "ours", **how)
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert (tmp_path / "ours/model.safetensors.index.json").exists() == several
    assert others(tmp_path / "ours") == others(tmp_path / "theirs")
    assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "theirs/config.json").read_text()
    assert not model.config.architectures  # not changed by saving
    if dist.get_rank() == 0:
        assert_same(type(expected).from_pretrained(tmp_path / "ours"), expected)


def others(folder: Path) -> set[str]:
    """The files of a folder that hold no tensors."""
    return {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}


PARALLEL = ["llama tied", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "bert", "mixtral"]


@pytest.mark.parametrize("name", PARALLEL)
@distributed(world_size=2)
def test_a_parallelized_model_on_meta_loads_computes_and_saves(world_size: int, name: str, tmp_path: Path) -> None:
    """From meta, a rank has no way to the values but the folder; a buffer that is off shows in the logits."""
    expected = saved(name, tmp_path / "theirs")
    model = on_meta(name)
    if name == "mixtral":  # the grouped product takes no sizes as uneven as these
        for one in (expected, model):
            one.set_experts_implementation("eager")
    sg.parallelize(model, line(world_size))
    sg.load_pretrained(model, tmp_path / "theirs")
    assert_same(model, expected)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits, wanted = model(input_ids=ids).logits, expected(input_ids=ids).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    sg.save_pretrained(model, tmp_path / "ours")
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "theirs/config.json").read_text()


@distributed(world_size=[2, 3])
def test_into_what_is_there_and_other_dtypes(world_size: int, tmp_path: Path) -> None:
    expected = saved("llama tied", tmp_path / "theirs")
    model = spread_model(plain("llama tied", seed=1), line(world_size)).to(torch.bfloat16)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sg.load_pretrained(model, str(tmp_path / "theirs"))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in sg.state_dict(model).items():
        assert torch.equal(tensor, expected.state_dict()[name].bfloat16())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    half = spread_model(on_meta("llama tied"), line(world_size))
    for module in half.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype == torch.float32:
                module._parameters[key] = nn.Parameter(parameter.to(torch.float64))
    half.lm_head._parameters["weight"] = half.model.embed_tokens.weight
    sg.load_pretrained(half, tmp_path / "theirs", device="cpu")
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert torch.equal(sg.state_dict(half)["lm_head.weight"], expected.lm_head.weight.double())


@distributed(world_size=2)
def test_prefixes_old_names_and_what_transformers_passes_over(world_size: int, tmp_path: Path) -> None:
    model = plain("bert")
    state = {key: one.contiguous() for key, one in model.state_dict().items() if not key.startswith("cls.pred")}
    heads = {key: one for key, one in model.state_dict().items() if key.startswith("cls.pred") and "decoder" not in key}
    old = {}
    for key, one in state.items():
        norm = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[norm.removeprefix("bert.")] = one
    if dist.get_rank() == 0:
        for folder in ("old", "base"):
            (tmp_path / folder).mkdir()
        extra = {"embeddings.position_ids": torch.arange(9)[None]}
        save_file({**old, **heads, **extra}, tmp_path / "old/model.safetensors")
        save_file(state, tmp_path / "base/model.safetensors")
    dist.barrier()
    mesh = line(world_size)
    found = spread_model(on_meta("bert"), mesh)
    sg.load_pretrained(found, tmp_path / "old")
    assert_same(found, model)
    base = spread_model(on_meta("bert").bert, mesh)  # its files have a prefix that it has not
    sg.load_pretrained(base, tmp_path / "base")
    assert_same(base, model.bert)


@distributed(world_size=2)
def test_the_generation_config_and_both_names_of_a_tied_tensor(world_size: int, tmp_path: Path) -> None:
    expected = plain("llama tied")
    expected.generation_config.max_new_tokens = 77
    if dist.get_rank() == 0:
        expected.save_pretrained(tmp_path / "theirs")
        state = tensors(tmp_path / "theirs")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, tmp_path / "theirs/model.safetensors", {"format": "pt"})
    dist.barrier()
    model = spread_model(on_meta("llama tied"), line(world_size))
    sg.load_pretrained(model, tmp_path / "theirs")
    assert_same(model, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.max_new_tokens == 77
    sg.save_pretrained(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/generation_config.json").read_text())["max_new_tokens"] == 77
    assert "lm_head.weight" not in tensors(tmp_path / "ours")


@distributed(world_size=2)
def test_a_model_without_transformers(world_size: int, tmp_path: Path) -> None:
    mesh = line(world_size)
    model = nn.Sequential(
        sg.ColumnParallelLinear(5, 7, mesh=mesh), nn.BatchNorm1d(7), sg.RowParallelLinear(7, 5, mesh=mesh)
    )
    sg.save_pretrained(model, tmp_path / "saved", max_shard_size=100)
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert files[0] == "model-00001-of-00005.safetensors"
    assert files[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 111, "total_size": 4 * 110 + 8}
    with torch.device("meta"):
        one = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))
    sg.load_pretrained(one, tmp_path / "saved")
    assert_same(model, one)
    assert one[1].num_batches_tracked.item() == 0


@distributed(world_size=2)
def test_saved_from_shards_of_fsdp2(world_size: int, tmp_path: Path) -> None:
    """Five heads are parts of different sizes on the two ranks of dp."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    model, expected = plain("llama"), plain("llama")
    fully_shard(sg.parallelize(model, mesh), mesh=mesh["dp"])
    sg.save_pretrained(model, tmp_path / "ours")
    if dist.get_rank() == 0:
        assert_same(type(expected).from_pretrained(tmp_path / "ours"), expected)


@distributed(world_size=2)
def test_saved_by_one_mesh_of_several(world_size: int, tmp_path: Path) -> None:
    """Replicas that each have a mesh of their own: one rank of all writes."""
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("dp", "tp"))["tp"]
    model = spread_model(plain("gpt2"), mesh)
    sg.save_pretrained(model, tmp_path / "saved")
    assert_same(plain("gpt2"), sg_loaded := on_meta_loaded("gpt2", tmp_path / "saved"))
    alone = tmp_path / f"alone{dist.get_rank()}"
    sg.save_pretrained(model, alone, mesh=mesh)
    assert_same(sg_loaded, on_meta_loaded("gpt2", alone))


def on_meta_loaded(name: str, folder: Path) -> Any:
    model = on_meta(name)
    sg.load_pretrained(model, folder)
    return model


class _Counting:
    """A safetensors file that counts the bytes of what is read from it."""

    total = 0

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _Counting:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)

    def keys(self) -> list[str]:
        return self._file.keys()

    def get_slice(self, name: str) -> Any:
        source = self._file.get_slice(name)

        class Slice:
            get_shape = source.get_shape

            def __getitem__(self, at: Any) -> torch.Tensor:
                read = source[at]
                _Counting.total += read.numel() * read.element_size()
                return read

        return Slice()


@pytest.mark.parametrize("name", ["llama tied", "phi3", "mixtral", "qwen3_moe"])
@distributed(world_size=[2, 3])
def test_a_rank_reads_its_own_parts_alone(world_size: int, name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "theirs")
    model = spread_model(on_meta(name), line(world_size))
    _Counting.total = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_file, "safe_open", lambda *given: _Counting(safe_open(*given)))
        sg.load_pretrained(model, tmp_path / "theirs")
    assert _Counting.total == sum(p.numel() * p.element_size() for p in model.parameters())


class Live(TorchDispatchMode):
    """The most bytes of new tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = func(*args, **(kwargs or {}))
        given = {storage_number(one) for one in torch.utils._pytree.tree_leaves((args, kwargs)) if tensor_(one)}
        for one in torch.utils._pytree.tree_leaves(out):
            if not tensor_(one) or one.is_meta or storage_number(one) in given or storage_number(one) in self._seen:
                continue
            storage = one.untyped_storage()
            number, size = storage_number(one), storage.nbytes()
            self._seen[number] = size
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, number)
        return out

    def _gone(self, number: int) -> None:
        self.now -= self._seen.pop(number)


def tensor_(one: Any) -> bool:
    return isinstance(one, torch.Tensor)


@pytest.mark.parametrize("name", ["mixtral", "phi3"])
@distributed(world_size=[1, 2, 3])
def test_beside_its_parts_a_rank_holds_one_tensor(world_size: int, name: str, tmp_path: Path) -> None:
    """Loading: at most a part of one tensor (of experts, the part in the making); saving: one whole tensor, and what
    gathers it."""
    saved(name, tmp_path / "theirs")
    model = spread_model(on_meta(name), line(world_size))
    with Live() as live:
        sg.load_pretrained(model, tmp_path / "theirs")
    sizes = [one.numel() * one.element_size() for one in model.parameters()]
    buffers = sum(4 * one.numel() for one in model.buffers())
    assert sum(sizes) <= live.most <= sum(sizes) + 2 * buffers + 1.6 * max(sizes), (live.most, sum(sizes), max(sizes))
    whole = max(4 * one.numel() for one in sg.state_dict(model).values())
    with Live() as live:
        sg.save_pretrained(model, tmp_path / "ours")
    # What is gathered, padded to equal parts (six fifths of five experts), the whole put together, and a copy of it.
    assert live.most <= 3.2 * whole + 2000, (live.most, whole)
