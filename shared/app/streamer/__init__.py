"""Streams weights through a GPU smaller than the model, block by block, each copied while the one before it runs.

What is where:

    trunk      what belongs to no block (embedders, the final layer, pad tokens): on the GPU while its model is in use
    resident   as many blocks as the budget has room for: on the GPU while their model is in use
    ring       two buffers, each of the size of the largest other block: these pass through, one computes, one fills
    host       all weights, all the time: a page-locked copy each, or where no RAM is to be locked, as the loader left
               them (mapped from the file) and read through two small page-locked buffers
    embedding  a large table of a model that does not fit stays on the host, where its rows are looked up

A block is a child of a ModuleList that stands in no other. It is one piece of memory on either side, so its copy is one
transfer, and its tensors on the GPU are views made once. Between forwards a streamed block's attributes are the host's
tensors again: whoever reads a weight finds the numbers. What runs next is learned from what ran before, the first block
of the next step after the last of this one included; stream_schedule.py's `simulate` tells what that hides.

The weights of all models together never take more than the budget on the GPU: a model that comes into use takes its
room from the one that was in use, at no cost, for nothing has to be copied back.

Rooms, from the bus upwards: lane.py (copies beside computing), parts.py (what travels together), uploader.py (how a
part gets across), model.py (ring and hooks of one model), offloader.py (the models and their budget).
"""

from shared.app.streamer.lane import CudaLane, Lane
from shared.app.streamer.offloader import StreamOffload

__all__ = ["CudaLane", "Lane", "StreamOffload"]
