"""Where weights will live and how the picture will be decoded, from sizes and the room there is: needs no torch.

On an NVIDIA GPU the weights' room is what is free, or the cap that was asked for, less the working memory of the widest
stage and a reserve. In this order:

    direct   everything fits into the room: all of it is put there
    mmgp     a profile (../offload.py); the choice as long as the streamer is not predicted to be clearly quicker
    stream   ../streamer/ with the room as its budget: what fits stays, only the rest is copied for each step

The prediction of a step is stream_schedule.simulate's: the blocks' computing time, from their products and the card's
rate, against the time of their copies. mmgp copies every block of a streamed model for each step. Rates are assumed
(`assumed_rates`), and only their order matters for the choice.

Rooms: asked.py (what the user wants), engines.py (what each of these would do), placing.py (the decision), result.py
(the plan), relief.py (what to try when memory ran out all the same).
"""

from shared.app.memory_plan.asked import Asked, parse_size
from shared.app.memory_plan.placing import plan_memory, unknown_sizes
from shared.app.memory_plan.relief import Relief, next_relief
from shared.app.memory_plan.result import MemoryPlan

__all__ = ["Asked", "MemoryPlan", "Relief", "next_relief", "parse_size", "plan_memory", "unknown_sizes"]
