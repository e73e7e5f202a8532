"""A plain TRL script: one process, LoRA, torch's AdamW, as its documentation has it, on rows that are tokens already.

``python trl_script.py TASK.json``, a process of its own. TASK.json holds ``model`` (a directory), ``rows`` (JSONL with
``input_ids`` and ``completion_mask``), ``out`` (where step times go), ``scratch`` and the hyperparameters. Left as TRL
has it: attention (PyTorch's fused), loss, padding, bf16 autocast, LoRA weights in fp32. Not as TRL has it: no gradient
checkpointing, which would only cost time where memory is no concern.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from clock import Clock
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
set_seed(task["seed"])
rows = [json.loads(line) for line in Path(task["rows"]).read_text(encoding="utf-8").splitlines()]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16),
    args=SFTConfig(
        output_dir=task["scratch"],
        use_cpu=True,
        per_device_train_batch_size=task["batch_size"],
        num_train_epochs=task["epochs"],
        learning_rate=task["learning_rate"],
        lr_scheduler_type=task["scheduler"],
        warmup_steps=task["warmup_ratio"],
        max_grad_norm=task["gradient_clipping"],
        optim="adamw_torch",
        train_sampling_strategy="group_by_length",
        completion_only_loss=True,
        max_length=None,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task["seed"],
        data_seed=task["seed"],
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(task["model"]),
    peft_config=LoraConfig(
        r=task["rank"], lora_alpha=task["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    callbacks=[Clock(Path(task["out"]))],
)
trainer.train()
