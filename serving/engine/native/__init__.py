"""The default engine: continuous batching over pages of keys and values, many adapters in one pass.

``engine`` is the thread and its queue; ``scheduler`` decides who computes what, over ``pages`` and in ``turns``;
``executor`` is the seam to what computes (``modules`` or ``fused``, chosen by ``load``); ``sampling`` and ``grammar``
choose tokens; ``residency`` knows where adapters are; ``delivery`` brings deltas to event loops.
"""
