"""Layouts: notation, the rule, the derived plan, its cost and its explanation. Pure thought: no tensors."""

from shardgrad.layout.batch_axis import BatchAxis as BatchAxis
from shardgrad.layout.cost import Collective as Collective
from shardgrad.layout.layout import Layout as Layout
from shardgrad.layout.notation import Dim as Dim
from shardgrad.layout.notation import TensorSpec as TensorSpec
from shardgrad.layout.presets import PRESETS as PRESETS
