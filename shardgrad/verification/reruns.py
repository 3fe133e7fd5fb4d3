"""Further steps of one device in float64, each with something changed, so many at most; none is run twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from shardgrad.verification.functions import Change, NotThis, Watch
from shardgrad.verification.pairing import fit
from shardgrad.verification.record import LOSS, WHOLE, Batch, Key, Loss, outputs_told, tensors_in

MOST = 96
"""What further steps may cost, where forward alone is 1: some thirty whole steps, or three times as many forwards."""
_STEP = 3

Step = Callable[[Change, Mapping[str, Tensor], bool, bool], Mapping[Key, Tensor]]
"""`step(change, parameters, in_backward, whole)`: the tensors of one step, by one device's names. Parameters are by
the parallel model's names, and may be others in backward alone; `whole`: with backward."""
NOTHING = Change(lambda model: torch.enable_grad())


class Reruns:
    """Steps of one device in which something is changed.

    Args:
        step: runs one.
        places: for each tensor that is compared, its name on one device, and the shape that is stored.
        kept: the tensors that will be asked for; gradients of parameters are kept as well.
    """

    def __init__(
        self, step: Step, places: Mapping[Key, tuple[Key, tuple[int, ...]]], kept: Collection[Key] | None = None
    ) -> None:
        self.step, self.places, self.kept, self.left = step, places, kept, MOST
        self._found: dict[tuple[Change, bool], dict[Key, Tensor]] = {}
        self._watch: Watch | None = None

    def watch(self) -> Watch:
        """The calls of a forward as it is."""
        if self._watch is None:
            self._watch = Watch()
            self._run(self._watch.change, {}, False, False)
        return self._watch

    def under(self, key: Key, change: Change) -> Tensor | None:
        """What one device computes for a tensor while something is changed; None if it fails, or has run too often."""
        whole = change.deep or key[0] not in ("output", "loss")
        for deep in (True, False)[: 1 if whole else 2]:
            if (change, deep) in self._found:
                return self._found[change, deep].get(key)
        found = self._run(change, {}, False, whole)
        kept = {
            one: fit(found[single], shape)
            for one, (single, shape) in self.places.items()
            if single in found and (self.kept is None or one in self.kept or one == key or one[0] == "gradient")
        }
        self._found[change, whole] = kept
        return kept.get(key)

    def again(self, key: Key, parameters: Mapping[str, Tensor], in_backward: bool) -> Tensor | None:
        """The same, with other values of parameters."""
        single, shape = self.places.get(key, (None, ()))
        found = self._run(NOTHING, parameters, in_backward, key[0] not in ("output", "loss"))
        return fit(found[single], shape) if single in found else None

    def _run(self, change: Change, parameters: Mapping[str, Tensor], in_backward: bool, whole: bool) -> dict:
        cost = _STEP if whole else 1
        if self.left < cost:
            return {}
        self.left -= cost
        try:
            return dict(self.step(change, parameters, in_backward, whole))
        except NotThis:
            self.left += cost
            return {}
        except Exception:
            return {}  # what is changed does not fit the program (a position beyond a table, an assertion of its own)


def forward(model: nn.Module, batch: Batch, loss: Loss) -> dict[Key, Tensor]:
    """Outputs and loss of a step without its backward."""
    found: dict[Key, Tensor] = {}

    def seen(name: str, tensor: Tensor) -> None:
        found["output", name] = tensor.detach().clone()

    with outputs_told(model, seen):
        made = loss(model, **batch) if isinstance(batch, Mapping) else loss(model, *batch)
    for result in (getattr(made, "loss", None), made):
        tensor = next(iter(tensors_in(result)), None)
        if tensor is not None and tensor.dim() == 0:
            found[LOSS] = tensor.detach()
            break
    return found


def earlier(name: str, outputs: Mapping[str, int], right: Sequence[str]) -> int:
    """How many calls had been made when the last output before this one was there that is right."""
    names = list(outputs)
    end = names.index(name) if name in names else len(names)
    return max((outputs[one] for one in names[:end] if one in right and one != WHOLE), default=0)
