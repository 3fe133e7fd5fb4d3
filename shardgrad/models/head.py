"""A model's output layer with a sharded vocabulary: its loss where labels are given, else whole logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardgrad.comm.adjoint import gather_replicated
from shardgrad.comm.collectives import gather_ints
from shardgrad.comm.mesh import view
from shardgrad.errors import DisagreementError, LayoutError
from shardgrad.models.flow import current
from shardgrad.models.linear import FeatureLinear
from shardgrad.nn.linear_loss import linear_cross_entropy
from shardgrad.nn.loss import vocab_parallel_cross_entropy
from shardgrad.nn.parallel import Parallel


class Head:
    """What happens around a call of a model that takes labels.

    Given labels, the logits stay sharded and the loss is vocabulary parallel; otherwise they are gathered, alike on all
    ranks, so that a loss of the caller's, and `generate`, have what they have on one device.

    Fused, the output layer leaves its product to the loss, which makes it in chunks: then there are no logits.

    Args:
        owner: the module whose forward takes labels.
        layer: its output layer, or the adapters' wrapper around it.
        vocab_size: the global vocabulary.
        fused: the output layer itself, where its product and the loss are to be one.
    """

    def __init__(
        self, owner: Any, layer: nn.Module, vocab_size: int, parallel: Parallel, fused: FeatureLinear | None = None
    ) -> None:
        self.owner, self.parallel = [owner], parallel  # in a list: no module of anything here
        self._fused = [] if fused is None else [fused]
        self._given: tuple[Tensor, Tensor] | None = None  # what the fused layer took, and what it gave
        self.vocab_size = vocab_size
        self.whole = True
        self.inside = _calls_loss_function(owner)  # else the model's forward has its loss written into it
        self._labels: Tensor | None = None
        layer.register_forward_hook(self._logits)
        if self.inside:
            owner.loss_function = self.loss
        if fused is not None:
            fused.forward = partial(self._leave, fused.forward)  # type: ignore[method-assign]

    def before(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the model is called with, for those that the caller gave."""
        labels = given.get("labels")
        self.whole, self._labels = labels is None, None
        if labels is None or self.inside:
            return given
        self._labels = labels
        shift = getattr(self.owner[0], "_shift_right", None)
        if shift is not None and given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None:
            given = {**given, "decoder_input_ids": shift(labels)}
        return {**given, "labels": None}

    def after(self, output: Any) -> Any:
        """What the model gives back, with the loss where its own program would have had it."""
        labels, self._labels, whole, self.whole = self._labels, None, self.whole, True
        if labels is None:
            return output if whole else self._without_logits(output)
        if not hasattr(output, "logits"):
            raise LayoutError(
                "a model with its loss written into its forward needs return_dict=True to give one of sharded logits"
            )
        loss = self._cross_entropy(output.logits, labels, -100, None)
        output = self._without_logits(output)
        return type(output)(**{**output, "loss": loss})  # made anew: the loss comes first, as in the model's own

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """transformers' loss of causal language models, of sharded logits; for 16-bit logits in float32."""
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return self._cross_entropy(logits, shift_labels, ignore_index, num_items_in_batch)

    def _leave(self, product: Callable[..., Tensor], x: Tensor, sequence_size: int | None = None) -> Tensor:
        """In the place of a fused layer's forward: logits of no words, where the loss is to make them."""
        if self.whole:
            return product(x, sequence_size)
        [layer] = self._fused
        entered = layer.entrance(x) if layer.entrance is not None and not layer.entered else x
        wide = torch.promote_types(x.dtype, torch.float32)  # which nobody casts on the way
        self._given = entered, x.new_zeros((*x.shape[:-1], 0), dtype=wide)
        return self._given[1]

    def _without_logits(self, output: Any) -> Any:
        """What the model gives back, where there are no logits: with None in their place."""
        self._given = None
        if not self._fused:
            return output
        if not hasattr(output, "logits"):  # a tuple, of which the loss comes first
            return (output[0], None, *output[2:])
        return type(output)(**{**output, "logits": None})

    def _fused_loss(self, logits: Tensor, labels: Tensor, **how: Any) -> Tensor:
        [layer] = self._fused
        given, self._given = self._given, None
        if given is None or given[1] is not logits:
            raise LayoutError(
                f"loss='fused': {type(self.owner[0]).__name__} changes its logits between the output layer and the "
                "loss (a soft cap, a scale), which would not be in it: use loss='sharded'"
            )
        layout, flow = layer.layouts(given[0].dim())[0], current()
        with nullcontext() if flow is None else flow.not_watching():
            loss = linear_cross_entropy(
                given[0],
                layer.weight,
                labels,
                layout,
                self.parallel.mesh,
                layer.bias,
                vocab_size=self.vocab_size,
                grads="forward",
                reduce_dtype=layer.reduce_dtype,
                **how,
            )
        if flow is not None:
            flow.is_replicated(loss)
        return loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor, ignore: int, count: Tensor | int | None) -> Tensor:
        if self._fused:
            reduction = "mean" if count is None else "sum"
            total = self._fused_loss(logits, labels.contiguous(), ignore_index=ignore, reduction=reduction)
            return total if count is None else total / count
        data = self.parallel.data
        total = vocab_parallel_cross_entropy(
            logits,
            labels.contiguous(),
            vocab_size=self.vocab_size,
            mesh=self.parallel.mesh,
            axis=self.parallel.axis,
            token_axes=() if data is None else data.axis,
            ignore_index=ignore,
            reduction="mean" if count is None else "sum",
        )
        return total if count is None else total / count

    def _logits(self, layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        if not self.whole:
            return y
        return gather_replicated(y, self.parallel.mesh, self.parallel.axis, -1, size=self.vocab_size)


def _calls_loss_function(owner: nn.Module) -> bool:
    return "self.loss_function" in inspect.getsource(inspect.unwrap(type(owner).forward))


def same_inputs(given: dict[str, Any], parallel: Parallel) -> None:
    """Compare the tokens of a call without gradients along the axis: in `generate`, ranks may draw different ones.

    Raises:
        DisagreementError: they differ.
    """
    tokens = next((given[name] for name in ("decoder_input_ids", "input_ids") if given.get(name) is not None), None)
    axis = view(parallel.mesh).axis(parallel.axis)
    if tokens is None or axis.size == 1 or tokens.is_meta:
        return
    places = torch.arange(1, tokens.numel() + 1, device=tokens.device).view(tokens.shape)
    mine = [tokens.numel(), int((tokens * places * 2654435761 % 2**31).sum())]
    every = gather_ints(mine, axis, view(parallel.mesh).device, "comparison of tokens")
    if any(row != mine for row in every):
        raise DisagreementError(
            f"the ranks of {axis} call the model with different tokens: ranks of one model must sample alike. Seed "
            "them alike (torch.manual_seed) before generate, and give them the same prompt"
        )
