"""Is a sharded model right? It is held against the same model on one device, tensor by tensor.

The room is not called `verify` because `sg.verify` is the function: importing a module `shardgrad.verify` would put the
module in the function's place.
"""
