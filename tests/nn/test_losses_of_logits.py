"""The losses of docs/sharded-logits.md, as they stand there, against float64 on whole logits; and that no tensor of the
size of whole logits is made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import randn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import shardgrad as sg
from shardgrad.layout.notation import parse_tensor
from shardgrad.testing import distributed

PAGE = Path(__file__).parents[2] / "docs" / "sharded-logits.md"
V, TOKENS = 101, 6


def of_the_page() -> dict[str, Any]:
    """What the page's block of losses defines."""
    [block] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


def cross(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


class Case:
    """Logits and what the losses ask for, of 6 tokens, of which some do not count."""

    def __init__(self) -> None:
        self.logits = [2 * randn(TOKENS, V, seed=seed) for seed in (1, 2)]
        self.tokens = torch.tensor([100, 3, -100, 50, 51, 0])
        self.advantage = randn(TOKENS, seed=3)
        self.old = -cross(self.logits[0], self.tokens) + 0.3 * randn(TOKENS, seed=4)

    def whole(self, name: str, logits: Tensor, other: Tensor) -> Tensor:
        """The mean over the tokens that count, written with torch's own functions."""
        counts = self.tokens != -100
        log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
        nll, q_nll = cross(logits, self.tokens), cross(other, self.tokens)
        ratio = (-nll - self.old).exp()
        surrogate = torch.min(ratio * self.advantage, ratio.clamp(0.8, 1.2) * self.advantage)
        entropy = -(log_p.exp() * log_p).sum(-1)
        far = nll - q_nll
        softer, soft = (other / 3).log_softmax(-1), (logits / 3).log_softmax(-1)
        each = {
            "grpo": -surrogate + 0.1 * (far.exp() - far - 1),
            "ppo": -surrogate - 0.2 * entropy + 0.3 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
            "distillation": 9 * F.kl_div(soft, softer, log_target=True, reduction="none").sum(-1),
            "smoothed": 0.9 * nll - 0.1 * log_p.mean(-1),
            "likeliest": F.kl_div(
                log_p.gather(-1, other.topk(3).indices),
                other.topk(3).values.log_softmax(-1),
                log_target=True,
                reduction="none",
            ).sum(-1),
            "z-loss": nll + 1e-2 * logits.exp().sum(-1).log().square(),
        }[name]
        return each[counts].mean()

    def sharded(self, name: str, parts: list[Tensor], rows: Any, mesh: DeviceMesh) -> Tensor:
        """The page's. rows: takes this rank's tokens."""
        page, over = of_the_page(), {"mesh": mesh, "token_axes": ["dp"]}
        tokens, old, advantage = (rows(x) for x in (self.tokens, self.old, self.advantage))
        made = {"vocab_size": V, "mesh": mesh}
        if name == "distillation":
            teacher, student = (
                sg.VocabParallelLogits(x, **made, temperature=3.0) for x in (parts[1].detach(), parts[0])
            )
            return page["distillation_loss"](teacher, student, tokens != -100, **over)  # type: ignore[no-any-return]
        policy, reference = (sg.VocabParallelLogits(x, **made) for x in (parts[0], parts[1].detach()))
        if name == "z-loss":
            return page["language_model_loss"](policy, tokens, z_loss=1e-2, **over)  # type: ignore[no-any-return]
        if name == "smoothed":
            found = policy.statistics(tokens, mean_log_prob=True)
            each = -0.9 * found.log_prob - 0.1 * found.mean_log_prob  # type: ignore[operator]
            return page["mean_of_tokens"](each, tokens != -100, **over)  # type: ignore[no-any-return]
        if name == "likeliest":
            best = reference.topk(3)
            log_q = best.values.log_softmax(-1)
            each = (log_q.exp() * (log_q - policy.log_prob(best.ids))).sum(-1)
            return page["mean_of_tokens"](each, tokens != -100, **over)  # type: ignore[no-any-return]
        if name == "grpo":
            more = {"reference": reference.log_prob(tokens), "kl": 0.1}
        else:
            more = {"exact_kl": reference, "kl": 0.3, "bonus": 0.2}
        return page["policy_loss"](policy, tokens, old, advantage, **more, **over)  # type: ignore[no-any-return]


@distributed(world_size=[2, 3, 4])
@pytest.mark.parametrize("name", ["grpo", "ppo", "distillation", "likeliest", "z-loss", "smoothed"])
def test_losses_of_the_page(world_size: int, name: str) -> None:
    data = 2 if world_size == 4 else 1
    mesh = init_device_mesh("cpu", (data, world_size // data), mesh_dim_names=("dp", "tp"))
    case, spec, rows = Case(), parse_tensor("L[n/dp,v/tp]"), parse_tensor("N[n/dp]")
    full = case.logits[0].requires_grad_()
    expected = case.whole(name, full, case.logits[1])
    expected.backward()
    parts = [sg.shard(x.detach(), spec, mesh).requires_grad_() for x in case.logits]
    with LargestTensor() as largest:
        loss = case.sharded(name, parts, lambda x: sg.shard(x, rows, mesh), mesh)
        loss.backward()
    assert 0 < largest.elements <= TOKENS // data * -(-V // (world_size // data))
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-13)
    assert parts[0].grad is not None
    assert full.grad is not None
    torch.testing.assert_close(sg.unshard(parts[0].grad, spec, mesh), full.grad, rtol=1e-10, atol=1e-14)
    assert parts[1].grad is None


@distributed(world_size=[2, 3])
def test_no_tensor_is_larger_than_a_part_of_the_logits(world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    full = randn(TOKENS, V, seed=1)
    part = sg.shard(full, parse_tensor("L[n,v/tp]"), mesh).bfloat16().requires_grad_()
    with LargestTensor() as largest:
        logits = sg.VocabParallelLogits(part, vocab_size=V, mesh=mesh, temperature=0.8, soft_cap=20.0)
        tokens = [logits.sample(seed=1, **how) for how in ({}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.9})]  # type: ignore[arg-type]
        found = logits.statistics(torch.stack([*tokens, logits.argmax()], -1), entropy=True, logsumexp=True)
        assert found.log_prob is not None
        assert found.entropy is not None
        (found.log_prob.sum() + found.entropy.sum() + logits.log_softmax().sum()).backward()
    assert largest.elements == part.numel()
    with LargestTensor() as largest:  # that it would be seen
        sg.gather_replicated(part, mesh, "tp", 1, size=V)
    assert largest.elements >= TOKENS * V
