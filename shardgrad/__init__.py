"""shardgrad: sharded matrix products whose backward is derived from how the tensors are stored.

Names are imported when first used: every pytest run loads the plugin, and need not import torch for it.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardgrad.comm.adjoint import all_gather as all_gather
    from shardgrad.comm.adjoint import all_reduce as all_reduce
    from shardgrad.comm.adjoint import all_to_all as all_to_all
    from shardgrad.comm.adjoint import all_to_all_rows as all_to_all_rows
    from shardgrad.comm.adjoint import gather_replicated as gather_replicated
    from shardgrad.comm.adjoint import reduce_scatter as reduce_scatter
    from shardgrad.comm.adjoint import replicate as replicate
    from shardgrad.comm.adjoint import slice_replicated as slice_replicated
    from shardgrad.comm.agree import check_every_call as check_every_call
    from shardgrad.comm.timer import comm_timer as comm_timer
    from shardgrad.comm.trace import trace_collectives as trace_collectives
    from shardgrad.errors import CollectiveError as CollectiveError
    from shardgrad.errors import DisagreementError as DisagreementError
    from shardgrad.errors import LayoutError as LayoutError
    from shardgrad.errors import MeshError as MeshError
    from shardgrad.errors import ShapeError as ShapeError
    from shardgrad.errors import VerificationError as VerificationError
    from shardgrad.layout import PRESETS as PRESETS
    from shardgrad.layout import BatchAxis as BatchAxis
    from shardgrad.layout import Collective as Collective
    from shardgrad.layout import Layout as Layout
    from shardgrad.layout import TensorSpec as TensorSpec
    from shardgrad.nn.attention import Attention as Attention
    from shardgrad.nn.by_layout import Linear as Linear
    from shardgrad.nn.conv import Conv1d as Conv1d
    from shardgrad.nn.conv import Conv2d as Conv2d
    from shardgrad.nn.dropout import Dropout as Dropout
    from shardgrad.nn.embedding import VocabParallelEmbedding as VocabParallelEmbedding
    from shardgrad.nn.global_ops import clip_grad_norm_ as clip_grad_norm_
    from shardgrad.nn.global_ops import num_parameters as num_parameters
    from shardgrad.nn.linear import ColumnParallelLinear as ColumnParallelLinear
    from shardgrad.nn.linear import RowParallelLinear as RowParallelLinear
    from shardgrad.nn.loss import vocab_parallel_cross_entropy as vocab_parallel_cross_entropy
    from shardgrad.nn.mlp import MLP as MLP
    from shardgrad.nn.mlp import SwiGLU as SwiGLU
    from shardgrad.nn.module import ParamSharding as ParamSharding
    from shardgrad.nn.moe import MoE as MoE
    from shardgrad.nn.norm import LayerNorm as LayerNorm
    from shardgrad.nn.norm import RMSNorm as RMSNorm
    from shardgrad.nn.parallel import Parallel as Parallel
    from shardgrad.nn.parallel_block import ParallelBlock as ParallelBlock
    from shardgrad.nn.partial_grads import all_reduce_partial_grads_ as all_reduce_partial_grads_
    from shardgrad.nn.positions import LearnedPositions as LearnedPositions
    from shardgrad.nn.rotary import Rotary as Rotary
    from shardgrad.nn.shardings import named_shardings as named_shardings
    from shardgrad.nn.state import load_state_dict as load_state_dict
    from shardgrad.nn.state import state_dict as state_dict
    from shardgrad.ops.convolve import convolve as convolve
    from shardgrad.ops.deferred import defer_weight_grads as defer_weight_grads
    from shardgrad.ops.main_grad import use_main_grads as use_main_grads
    from shardgrad.ops.matmul import matmul as matmul
    from shardgrad.ops.overlap import measure_costs as measure_costs
    from shardgrad.ops.overlap import set_overlap as set_overlap
    from shardgrad.ops.shard import shard as shard
    from shardgrad.ops.shard import unshard as unshard
    from shardgrad.verification.bounds import within_bound as within_bound
    from shardgrad.verification.diagnose import Diagnosis as Diagnosis
    from shardgrad.verification.finite import check_finite as check_finite
    from shardgrad.verification.product import ProductCheck as ProductCheck
    from shardgrad.verification.product import check_product as check_product
    from shardgrad.verification.replicas import check_replicas as check_replicas
    from shardgrad.verification.report import Report as Report
    from shardgrad.verification.verify import verify as verify

_HOME = {
    "all_gather": "shardgrad.comm.adjoint",
    "all_reduce": "shardgrad.comm.adjoint",
    "all_to_all": "shardgrad.comm.adjoint",
    "all_to_all_rows": "shardgrad.comm.adjoint",
    "gather_replicated": "shardgrad.comm.adjoint",
    "reduce_scatter": "shardgrad.comm.adjoint",
    "replicate": "shardgrad.comm.adjoint",
    "slice_replicated": "shardgrad.comm.adjoint",
    "check_every_call": "shardgrad.comm.agree",
    "comm_timer": "shardgrad.comm.timer",
    "trace_collectives": "shardgrad.comm.trace",
    "CollectiveError": "shardgrad.errors",
    "DisagreementError": "shardgrad.errors",
    "LayoutError": "shardgrad.errors",
    "MeshError": "shardgrad.errors",
    "ShapeError": "shardgrad.errors",
    "VerificationError": "shardgrad.errors",
    "PRESETS": "shardgrad.layout",
    "Collective": "shardgrad.layout",
    "BatchAxis": "shardgrad.layout",
    "Layout": "shardgrad.layout",
    "TensorSpec": "shardgrad.layout",
    "Attention": "shardgrad.nn.attention",
    "all_reduce_partial_grads_": "shardgrad.nn.partial_grads",
    "Conv1d": "shardgrad.nn.conv",
    "Conv2d": "shardgrad.nn.conv",
    "Dropout": "shardgrad.nn.dropout",
    "MoE": "shardgrad.nn.moe",
    "VocabParallelEmbedding": "shardgrad.nn.embedding",
    "ColumnParallelLinear": "shardgrad.nn.linear",
    "RowParallelLinear": "shardgrad.nn.linear",
    "vocab_parallel_cross_entropy": "shardgrad.nn.loss",
    "MLP": "shardgrad.nn.mlp",
    "SwiGLU": "shardgrad.nn.mlp",
    "Linear": "shardgrad.nn.by_layout",
    "Parallel": "shardgrad.nn.parallel",
    "ParallelBlock": "shardgrad.nn.parallel_block",
    "LearnedPositions": "shardgrad.nn.positions",
    "Rotary": "shardgrad.nn.rotary",
    "ParamSharding": "shardgrad.nn.module",
    "named_shardings": "shardgrad.nn.shardings",
    "clip_grad_norm_": "shardgrad.nn.global_ops",
    "num_parameters": "shardgrad.nn.global_ops",
    "load_state_dict": "shardgrad.nn.state",
    "state_dict": "shardgrad.nn.state",
    "LayerNorm": "shardgrad.nn.norm",
    "RMSNorm": "shardgrad.nn.norm",
    "convolve": "shardgrad.ops.convolve",
    "defer_weight_grads": "shardgrad.ops.deferred",
    "use_main_grads": "shardgrad.ops.main_grad",
    "matmul": "shardgrad.ops.matmul",
    "measure_costs": "shardgrad.ops.overlap",
    "set_overlap": "shardgrad.ops.overlap",
    "shard": "shardgrad.ops.shard",
    "unshard": "shardgrad.ops.shard",
    "within_bound": "shardgrad.verification.bounds",
    "check_finite": "shardgrad.verification.finite",
    "ProductCheck": "shardgrad.verification.product",
    "check_product": "shardgrad.verification.product",
    "check_replicas": "shardgrad.verification.replicas",
    "Diagnosis": "shardgrad.verification.diagnose",
    "Report": "shardgrad.verification.report",
    "verify": "shardgrad.verification.verify",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'shardgrad' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


if "torch" in sys.modules:  # else `import torch` does it, or shardgrad.comm: see shardgrad/comm/shm/register.py
    import_module("shardgrad.comm.shm.register").autoload()
