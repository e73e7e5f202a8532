"""The default engine: transformers modules under continuous batching.

``engine`` is the step loop and its queue, ``cache`` the preallocated keys and values, ``attention`` how rows read
them, ``adapters`` which LoRA adapters are in memory, ``sampling`` how the next token is chosen.
"""

from serving.engine.native.engine import NativeEngine

__all__ = ["NativeEngine"]
