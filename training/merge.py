"""LoRA into its base: whole weights that any server loads, for plain LoRA, rsLoRA and DoRA alike (PEFT does the sums).

The sums are made in float32, so the base is held once at four bytes a weight, and rounded once to the precision that
is written. Not covered: merging on several nodes; the base in four bits (what was learned over a quantized base is
added to the base in full precision, as is usual).
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from cluster.adapter_files import check_adapter_files
from cluster.errors import BadInput
from cluster.models import is_model_file

MADE = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""Files of a model directory that go with the weights; all others are the base's."""


def merge(
    base_directory: Path, adapter_directory: Path, out: Path, dtype: str, *, trust_remote_code: bool = False
) -> None:
    """Write base plus adapter to the directory `out` as safetensors of `dtype`, with the base's tokenizer and template.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        BadInput, Mismatch, NotFound: the adapter is damaged, a pickle, or one of another base.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    check_adapter_files(adapter_directory, base_directory, merging=True)
    base = AutoModelForCausalLM.from_pretrained(
        base_directory, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by its old name.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        adapted = PeftModel.from_pretrained(base, adapter_directory)
    try:
        # safe_merge refuses weights that are not finite instead of writing them.
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise BadInput(f"the adapter in {adapter_directory} cannot be merged: {error}") from error
    merged.to(getattr(torch, dtype)).save_pretrained(out)
    add_base_files(base_directory, out, code=trust_remote_code)


def add_base_files(base_directory: Path, out: Path, *, code: bool = False) -> None:
    """Copy what a model has besides its weights (tokenizer, chat template) from the base, unless it is there.

    Args:
        code: also the model's own Python code.
    """
    for file in sorted(base_directory.iterdir()):
        weights = file.suffix == ".safetensors" or file.name in MADE
        if (
            file.is_file()
            and is_model_file(file.name, code)
            and not (weights or file.name.startswith("."))
            and not (out / file.name).exists()
        ):
            shutil.copyfile(file, out / file.name)
