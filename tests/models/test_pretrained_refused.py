"""Folders and models that cannot be read or written: every rank is told what is wrong, and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from folders import assert_same, line, saved, tensors
from safetensors.torch import save_file
from small_models import on_meta, plain, spread_model
from torch import nn

import shardgrad as sg
from shardgrad.models import weights_file
from shardgrad.testing import distributed


def _load_anew(folder: Path) -> Any:
    model = spread_model(on_meta("llama"), line(dist.get_world_size()))
    sg.load_pretrained(model, folder)
    return model


@distributed(world_size=2)
def test_wrong_tensors_are_all_listed_and_nothing_is_changed(world_size: int, tmp_path: Path) -> None:
    expected = saved("llama tied", tmp_path / "theirs", max_shard_size="1GB")
    state = tensors(tmp_path / "theirs")
    dist.barrier()  # both have read it
    del state["model.norm.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(27, 19)
    state["score.weight"] = torch.ones(2, 20)
    state["lm_head.weight"] = torch.ones(53, 20)
    if dist.get_rank() == 0:
        save_file(state, tmp_path / "theirs/model.safetensors")
    dist.barrier()
    for meta in (True, False):
        model = spread_model(on_meta("llama tied") if meta else plain("llama tied"), line(world_size))
        with pytest.raises(ValueError) as caught:
            sg.load_pretrained(model, tmp_path / "theirs")
        assert str(caught.value).splitlines() == [
            f"{tmp_path}/theirs is not of this LlamaForCausalLM, which has not been changed:",
            "  missing: model.norm.weight",
            "  unknown: score.weight",
            "  lm_head.weight: tied to model.embed_tokens.weight in the model, but the folder has other values there "
            "(tie_word_embeddings=False?)",
            "  model.layers.1.mlp.up_proj.weight: global shape (27, 20) in the model, (27, 19) in the folder",
            "To load what fits and keep the rest: strict=False",
        ]
        if meta:
            assert all(one.is_meta for one in [*model.parameters(), *model.buffers()])
        else:
            assert_same(model, expected)


@distributed(world_size=2)
def test_a_new_head_is_loaded_around(world_size: int, tmp_path: Path) -> None:
    import transformers

    expected = saved("llama", tmp_path / "theirs")
    mesh = line(world_size)
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(expected.config)
    spread_model(model, mesh)
    with pytest.raises(ValueError, match=r"missing: score.weight\n  unknown: lm_head.weight\nTo load what fits"):
        sg.load_pretrained(model, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"missing, and on meta: score.weight. Give it values first: module.to_empty"):
        sg.load_pretrained(model, tmp_path / "theirs", strict=False)
    model.score.to_empty(device="cpu")
    nn.init.constant_(model.score.weight, 7)
    assert sg.load_pretrained(model, tmp_path / "theirs", strict=False) == ["score.weight"]
    assert_same(model.model, expected.model)
    assert (model.score.weight == 7).all()


@distributed(world_size=2)
def test_a_buffer_that_nothing_computes_is_named(world_size: int, tmp_path: Path) -> None:
    saved("llama", tmp_path / "theirs")
    model = spread_model(on_meta("llama"), line(world_size))
    model.model.register_buffer("odd", torch.ones(2, device="meta"), persistent=False)
    with pytest.raises(ValueError, match=r"^model.odd: on the meta device, in no file, and not computed by"):
        sg.load_pretrained(model, tmp_path / "theirs")
    layer = nn.Linear(3, 2, device="meta")
    layer.register_buffer("odd", torch.ones(2, device="meta"), persistent=False)
    if dist.get_rank() == 0:
        (tmp_path / "plain").mkdir()
        save_file(nn.Linear(3, 2).state_dict(), tmp_path / "plain/model.safetensors")
    dist.barrier()
    with pytest.raises(ValueError, match=r"^odd: on the meta device"):
        sg.load_pretrained(layer, tmp_path / "plain")


@distributed(world_size=2)
def test_folders_that_cannot_be_read(world_size: int, tmp_path: Path) -> None:
    first = dist.get_rank() == 0

    def refused(folder: str, message: str) -> None:
        dist.barrier()
        with pytest.raises(OSError, match=message):
            _load_anew(tmp_path / folder)
        dist.barrier()

    saved("llama", tmp_path / "many", max_shard_size="10KB")
    saved("llama", tmp_path / "one")
    names = sorted(path.name for path in (tmp_path / "many").glob("model-*"))
    refused("none", r"none is not a folder here: download the model first")
    if first:
        for folder, name in (("empty", ""), ("pickled", "pytorch_model.bin"), ("adapter", "adapter_model.safetensors")):
            (tmp_path / folder).mkdir()
            if name:
                (tmp_path / folder / name).touch()
    refused("empty", r"has neither model.safetensors nor model.safetensors.index.json: it has nothing")
    refused("pickled", r"but pytorch_model.bin, whose pickles could run any code.*Convert once.*save_pretrained")
    refused("adapter", r"it holds a peft adapter. Load the base model's folder")
    if first:
        with open(tmp_path / "one/model.safetensors", "r+b") as file:
            file.truncate(9000)
    refused("one", r"one/model.safetensors cannot be read .*missing or cut short\? Download or save it again")
    if first:
        (tmp_path / "one/model.safetensors").write_bytes(b"\xff" * 300)
    refused("one", r"one/model.safetensors cannot be read")
    if first:
        (tmp_path / "many" / names[1]).rename(tmp_path / "elsewhere")
    refused("many", rf"many/{names[1]} cannot be read")
    if first:
        (tmp_path / "many" / names[1]).symlink_to(tmp_path / "many" / names[0])
    refused("many", rf"many/{names[1]} lacks .*, which model.safetensors.index.json says it holds")
    index = tmp_path / "many/model.safetensors.index.json"
    text = index.read_text()
    for wrong in ("{", "[]", '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": 3}}'):
        dist.barrier()
        if first:
            index.write_text(wrong)
        refused("many", r"many/model.safetensors.index.json is not an index of safetensors files")
    if first:
        index.write_text(text)
        (tmp_path / "many" / names[1]).unlink()
        (tmp_path / "elsewhere").rename(tmp_path / "many" / names[1])
    dist.barrier()
    assert_same(_load_anew(tmp_path / "many"), plain("llama"))


@distributed(world_size=[1, 2])
def test_a_folder_that_cannot_be_written_is_told_on_every_rank(world_size: int, tmp_path: Path) -> None:
    model = spread_model(plain("gpt2"), line(world_size))
    first = dist.get_rank() == 0
    sg.save_pretrained(model, tmp_path / "there")
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    if first:
        (tmp_path / "file").touch()
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "empty")
    dist.barrier()
    for name, message in (
        ("there", "there: it exists already. Name a folder that does not, or empty it"),
        ("file", "file: it exists already"),
        ("link", "link is a symbolic link to "),
        ("/", "/: it exists already"),
        ("file/below", "below: .*Not a directory"),
    ):
        with pytest.raises(OSError, match=f"^cannot write the model to .*{message}"):
            sg.save_pretrained(model, tmp_path / name)
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before
    sg.save_pretrained(model, tmp_path / "empty")
    with pytest.MonkeyPatch.context() as patch:
        if first:  # the disk is full in the middle
            write = weights_file.WeightsWriter.write

            def full(self: Any, name: str, tensor: torch.Tensor) -> None:
                if "h.1" in name:
                    raise OSError(28, "No space left on device")
                write(self, name, tensor)

            patch.setattr(weights_file.WeightsWriter, "write", full)
        with pytest.raises(OSError, match=r"^cannot write the model to .*full: .*No space left on device"):
            sg.save_pretrained(model, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link", "there"]


@distributed(world_size=2)
def test_models_that_cannot_be_saved(world_size: int, tmp_path: Path) -> None:
    mesh = line(world_size)
    with pytest.raises(
        ValueError, match=r"transformer.wte.weight, .* on the meta device: sg.load_pretrained or to_empty"
    ):
        sg.save_pretrained(spread_model(on_meta("gpt2"), mesh), tmp_path / "saved")
    model = spread_model(plain("gpt2"), mesh)
    for size in ("5", "5 apples", "-1GB"):
        with pytest.raises(ValueError, match='max_shard_size is a number of bytes or a text such as "5GB"'):
            sg.save_pretrained(model, tmp_path / "saved", max_shard_size=size)
    model.peft_config = {"default": None}
    with pytest.raises(ValueError, match=r"has peft adapters: pass the model that get_peft_model"):
        sg.save_pretrained(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has peft adapters: pass the model that get_peft_model"):
        sg.load_pretrained(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
