"""shardgrad: sharded matrix products whose backward is derived from how the tensors are stored."""

from shardgrad.comm.agree import check_every_call as check_every_call
from shardgrad.comm.collectives import communication_clock as communication_clock
from shardgrad.comm.trace import trace as trace
from shardgrad.errors import CollectiveError as CollectiveError
from shardgrad.errors import DisagreementError as DisagreementError
from shardgrad.errors import LayoutError as LayoutError
from shardgrad.errors import MeshError as MeshError
from shardgrad.errors import ShapeError as ShapeError
from shardgrad.layout import PRESETS as PRESETS
from shardgrad.layout import Collective as Collective
from shardgrad.layout import Layout as Layout
from shardgrad.layout import TensorSpec as TensorSpec
from shardgrad.ops.matmul import matmul as matmul
from shardgrad.ops.shard import shard as shard
from shardgrad.ops.shard import unshard as unshard
