"""shardgrad: sharded matrix products whose backward is derived from how the tensors are stored.

Names are imported when first used: every pytest run loads the plugin, and need not import torch for it.
"""

import sys
from importlib import import_module

# The public names by the module that they are in; `__init__.pyi` lists the same for type checkers.
_NAMES = {
    "comm.adjoint": "all_gather all_reduce all_to_all all_to_all_rows gather_replicated reduce_scatter replicate "
    "slice_replicated",
    "comm.agree": "check_every_call",
    "comm.balanced": "set_balanced",
    "comm.timer": "comm_timer",
    "comm.trace": "trace_collectives",
    "errors": "CollectiveError DisagreementError LayoutError MeshError ShapeError VerificationError",
    "layout.batch_axis": "BatchAxis",
    "layout.cost": "Collective",
    "layout.layout": "Layout",
    "layout.notation": "TensorSpec",
    "layout.presets": "PRESETS",
    "layout.sizes": "Balanced",
    "models.parallelize": "parallelize",
    "models.pretrained_load": "load_pretrained",
    "models.pretrained_save": "save_pretrained",
    "nn.attention": "Attention",
    "nn.by_layout": "Linear",
    "nn.conv": "Conv1d Conv2d",
    "nn.dropout": "Dropout",
    "nn.embedding": "VocabParallelEmbedding",
    "nn.global_ops": "clip_grad_norm_ num_parameters",
    "nn.group_norm": "GroupNorm",
    "nn.linear": "ColumnParallelLinear RowParallelLinear",
    "nn.linear_loss": "linear_cross_entropy linear_statistics",
    "nn.logits": "VocabParallelLogits",
    "nn.loss": "vocab_parallel_cross_entropy",
    "nn.mlp": "MLP SwiGLU",
    "nn.moe": "MoE",
    "nn.norm": "LayerNorm RMSNorm",
    "nn.parallel": "Parallel",
    "nn.parallel_block": "ParallelBlock",
    "nn.partial_grads": "all_reduce_partial_grads_",
    "nn.positions": "LearnedPositions",
    "nn.rotary": "Rotary",
    "nn.sharding": "ParamSharding",
    "nn.shardings": "named_shardings",
    "nn.state": "load_state_dict state_dict",
    "ops.convolve": "convolve",
    "ops.deferred": "defer_weight_grads",
    "ops.exact": "set_exact",
    "ops.main_grad": "use_main_grads",
    "ops.matmul": "matmul",
    "ops.micro_batches": "micro_batches",
    "ops.measured_costs": "measure_costs",
    "ops.overlap": "overlap_decisions set_overlap",
    "ops.pieces": "per_piece",
    "ops.shard": "shard unshard",
    "verification.bounds": "within_bound",
    "verification.diagnose": "Diagnosis",
    "verification.exact_report": "ExactReport",
    "verification.finite": "check_finite",
    "verification.product": "ProductCheck check_product",
    "verification.replicas": "check_replicas",
    "verification.report": "Report",
    "verification.same_bits": "verify_exact",
    "verification.verify": "verify",
}
_HOME = {name: f"shardgrad.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("shardgrad")
    if name not in _HOME:
        near = "" if name.startswith("_") else _nearest(name)
        raise AttributeError(f"module 'shardgrad' has no attribute {name!r}{near}", name=name)
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, __all__, n=3)
    return f"; the nearest are {', '.join(near)}" if near else ""


def __dir__() -> list[str]:
    return __all__


if "torch" in sys.modules:  # else `import torch` does it, or shardgrad.comm: see shardgrad/comm/shm/register.py
    import_module("shardgrad.comm.shm.register").autoload()
