"""Whether vLLM loads an adapter as it is: by its files alone, without vLLM.

The rules are those of vLLM's loader (``vllm/lora/peft_helper.py``, ``utils.py`` and ``config/lora.py``): which PEFT
settings it refuses or does not look at, how it reads tensor names, and the ranks it makes room for. Not covered: vLLM
itself, and whether it supports LoRA on this architecture.
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster.adapter_files import WEIGHTS_FILE, check_adapter_files, tensors
from cluster.errors import BadInput

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank``."""
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")
OUTER = ("lm_head", "embed_tokens", "embed_out", "wte")
"""Layers outside the blocks; LoRA on them is supported for some models only."""


def vllm_max_lora_rank(directory: Path) -> int:
    """The least ``--max-lora-rank`` that vLLM needs for the adapter in `directory`.

    Raises:
        BadInput: vLLM would refuse it, or apply it otherwise than it was trained.
        Mismatch, NotFound: as :func:`cluster.adapter_files.check_adapter_files`.
    """
    config = check_adapter_files(directory)
    for name in tensors(directory / WEIGHTS_FILE):
        match = NAME.fullmatch(name)
        if match is None:
            raise BadInput(
                f"{directory / WEIGHTS_FILE}: vLLM does not know {name}; load the adapter with PEFT and save it again, which "
                "names tensors base_model.model.….lora_A.weight"
            )
        if match["module"].rpartition(".")[2] in OUTER:
            raise BadInput(f"{directory / WEIGHTS_FILE}: vLLM does not take LoRA on {match['module']} for all models")
    rank = int(config["r"])
    if rank > RANKS[-1]:
        raise BadInput(f"{directory}: rank {rank} is more than vLLM's largest, {RANKS[-1]}; train with a smaller rank")
    return next(most for most in RANKS if rank <= most)
