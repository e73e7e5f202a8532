"""LLaMA-Factory's supervised fine-tuning, asked for what a worker of ours does; run by the interpreter of its environment.

``python llamafactory_script.py TASK.json``. TASK.json holds ``model`` (a directory), ``rows`` (JSONL with ``messages``
in OpenAI's form, the answer last), ``out`` (where step times go), ``scratch`` and the hyperparameters. Its own
``trainer_log.jsonl`` counts whole seconds, so step times are taken with the callback that also TRL's script uses.

It imports torchaudio even for text, and no build of that loads beside PyTorch for the CPU here: an empty module stands
in for it (``environment.UNLOADABLE``).
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path

torchaudio = types.ModuleType("torchaudio")
torchaudio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = torchaudio

from clock import Clock  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402

task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
scratch = Path(task["scratch"])
rows = [json.loads(line) for line in Path(task["rows"]).read_text(encoding="utf-8").splitlines()]
(scratch / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
tags = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
about = {
    "rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
}
(scratch / "dataset_info.json").write_text(json.dumps(about), encoding="utf-8")
run_exp(
    {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": task["model"],
        "template": task["template"],
        "dataset": "rows",
        "dataset_dir": str(scratch),
        "output_dir": str(scratch / "out"),
        "finetuning_type": "lora",
        "lora_rank": task["rank"],
        "lora_alpha": task["alpha"],
        "lora_dropout": 0.0,
        "lora_target": "all",
        "flash_attn": "disabled",
        "disable_gradient_checkpointing": True,
        "cutoff_len": task["max_tokens"],
        "per_device_train_batch_size": task["batch_size"],
        "num_train_epochs": task["epochs"],
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": task["scheduler"],
        "warmup_steps": task["warmup_ratio"],
        "max_grad_norm": task["gradient_clipping"],
        "train_sampling_strategy": "group_by_length",
        "bf16": True,
        "use_cpu": True,
        "include_num_input_tokens_seen": "non_padding",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": task["seed"],
        "data_seed": task["seed"],
    },
    callbacks=[Clock(Path(task["out"]))],
)
