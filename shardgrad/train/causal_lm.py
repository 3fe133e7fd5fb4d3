"""A causal language model of transformers on a mesh, as training takes it; and the same on one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.comm.mesh import view
from shardgrad.layout.batch_axis import BatchAxis
from shardgrad.models.adapter_files import reset_adapters
from shardgrad.models.parallelize import parallelize
from shardgrad.models.pretrained_load import load_pretrained
from shardgrad.train import lora
from shardgrad.train.config import Config, TransformersModel
from shardgrad.train.foreign import Foreign, describe
from shardgrad.train.language_model import LanguageModel

_IGNORED = -100  # a target that does not count


class CausalLM(LanguageModel):
    """A model of transformers that `sg.parallelize` has sharded.

    Args:
        lm: the model, with adapters around it or not.
        about: what is known of where it comes from.
        seq_len, vocab, compute_dtype: as of `LanguageModel`.
    """

    def __init__(
        self,
        lm: nn.Module,
        about: Foreign,
        mesh: DeviceMesh,
        data: BatchAxis | None,
        seq_len: int,
        vocab: int,
        compute_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.lm: Any = lm
        self.about, self.mesh, self.axis, self.data = about, mesh, "tp", data
        self.seq_len, self.vocab, self.compute_dtype = seq_len, vocab, compute_dtype

    @property
    def adapted(self) -> bool:
        """Whether it has adapters, which alone are trained."""
        return hasattr(self.lm, "peft_config")

    def loss(self, ids: Tensor, targets: Tensor, batch: int | None = None) -> Tensor:
        if not len(ids):  # of a last batch with fewer sequences than ranks of dp: models do not take none
            ids = ids.new_zeros(1, ids.shape[1])
            targets = torch.full_like(ids, _IGNORED)
        with torch.autocast(ids.device.type, self.compute_dtype, enabled=self.compute_dtype is not None):
            return self.lm(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss

    def next_logits(self, ids: Tensor, at: int) -> Tensor:
        with torch.autocast(ids.device.type, self.compute_dtype, enabled=self.compute_dtype is not None):
            kept = torch.tensor([at], device=ids.device)
            logits: Tensor = self.lm(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
        return logits[0, -1, : self.vocab]


class OneDevice(nn.Module):
    """The same model on one device, in plain transformers, with any values; its parameters have the same names."""

    def __init__(self, section: TransformersModel) -> None:
        super().__init__()
        about = describe(section)
        self.lm: Any = about.make("cpu")
        if section.lora is not None:
            self.lm = lora.wrap(self.lm, section.lora)
        self.lm.train()

    def loss(self, ids: Tensor, targets: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
        """As of `LanguageModel`, of the whole batch."""
        with torch.autocast(ids.device.type, compute_dtype, enabled=compute_dtype is not None):
            logits = self.lm(input_ids=ids, use_cache=False).logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, 1), targets.flatten())


def build_causal_lm(
    config: Config,
    vocab: int,
    mesh: DeviceMesh,
    data: BatchAxis | None,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
) -> CausalLM:
    """The configured model of transformers on a mesh; parameters are float32.

    A pretrained one is built on the meta device, sharded, and filled by each rank with its own parts of the folder.
    Random weights are those of transformers after torch.manual_seed(run.seed), made whole on every rank and then
    sharded: the same on any mesh, for models that fit into the memory of one rank.

    Raises:
        ConfigError: the model cannot be used; as `describe`.
        LayoutError, ValueError, OSError: as `sg.parallelize`, `sg.load_pretrained`.
    """
    section = config.model
    assert isinstance(section, TransformersModel)
    about = describe(section)
    device = view(mesh).device
    torch.manual_seed(config.run.seed)
    base: Any = about.make("cpu" if about.folder is None else "meta")
    lm = base if section.lora is None else lora.wrap(base, section.lora)
    loss = config.train.loss or "sharded"
    parallelize(lm, mesh, sequence=section.sequence, data=data, reduce_dtype=reduce_dtype, loss=loss)
    if about.folder is None:
        lm.to(device)
    else:
        load_pretrained(lm, about.folder)
    if section.lora is not None:
        reset_adapters(lm, config.run.seed, device)
    if config.train.recompute == "full":
        named = "activation_checkpointing_enable"  # by its newer name, if transformers has it
        enable = getattr(base, named, None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    lm.train()
    return CausalLM(lm, about, mesh, data, section.seq_len, vocab, compute_dtype)
