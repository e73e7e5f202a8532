"""``tiny:KIND``: random models of a few hundred kilobytes, the same on every machine, for tests.

They have everything a real model directory has (safetensors, a byte-level tokenizer, ChatML template, for ``bert``
the sentence-transformers layout), so the code under test is the code that runs. They know nothing: a test that asks
for sense needs a real model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.materialize import save_model

KINDS = ("llama", "qwen2", "gpt_neox", "bert")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
POSITIONS = 2048
SEED = 17


def make(kind: str, out: Path) -> None:
    """Write the model `kind` (of :data:`KINDS`) to the directory `out`."""
    tokenizer = _tokenizer("[CLS]", "[SEP]", "[PAD]") if kind == "bert" else _tokenizer(*SPECIAL)
    save_model(_model(kind, len(tokenizer)), out)
    if kind == "bert":
        _as_embedder(out)
    else:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(out)


def _tokenizer(*special: str) -> Any:
    """A BPE tokenizer without merges: one token a byte, and `special`, ids first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate((*special, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if special == SPECIAL:
        names = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[2], "unk_token": special[0]}
    else:
        first, last, pad = special
        names = {"cls_token": first, "sep_token": last, "pad_token": pad, "unk_token": pad}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B {last}",
            special_tokens=[(first, vocab[first]), (last, vocab[last])],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **names)


def _model(kind: str, vocab: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    shape: dict[str, Any] = {"vocab_size": vocab, "num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
    if kind == "bert":
        shape |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "pad_token_id": 2}
    else:
        # Wide initial weights: the next token then wins by a margin that survives another order of summation.
        shape |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": 0.2}
        shape |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": kind == "qwen2"}
    if kind in ("llama", "qwen2"):
        shape["num_key_value_heads"] = 2
    config = AutoConfig.for_model(kind, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    return model


def _as_embedder(out: Path) -> None:
    """The files that make a directory a sentence-transformers model: mean pooling, cut at 256 tokens."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (out / "modules.json").write_text(json.dumps(modules))
    (out / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))
    (out / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (out / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
