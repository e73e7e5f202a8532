"""transformers and PEFT as arms of ``benchmarks.generation``: ``generate`` on a static batch, ``generate_batch``, ``adapter_names``.

With adapters, ``generate`` runs PEFT's model: one adapter as the active one, several by ``adapter_names``, a name a row.
``generate_batch`` is transformers' continuous batching, which knows no adapters. Runs in our environment.
"""

from __future__ import annotations

from generation_turns import Case, aside, serve, task, timed

answers = aside()

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402


def main() -> None:
    asked: Case = task()
    torch.set_num_threads(asked["threads"])
    dtype = getattr(torch, asked["dtype"])
    base = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype, **asked["options"]).eval()
    model = base
    for number, directory in enumerate(asked["adapters"]):
        if number == 0:
            model = PeftModel.from_pretrained(base, directory, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.load_adapter(directory, adapter_name=str(number), autocast_adapter_dtype=False)

    def static(prompts: list[list[int]], whose: list[int | None], new: int) -> list[list[int]]:
        more = {"adapter_names": [str(each) for each in whose]} if len(set(whose)) > 1 else {}
        if whose[0] is not None and not more:
            model.set_adapter(str(whose[0]))
        ids = torch.tensor(prompts)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0),
            **more,
        )
        made: list[list[int]] = out[:, len(prompts[0]) :].tolist()
        return made

    def continuous(prompts: list[list[int]], whose: list[int | None], new: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = base.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        return [
            outputs[name].generated_tokens for name in sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))
        ]

    run = continuous if asked["continuous"] else static
    serve(answers, lambda case: timed(case, run))


if __name__ == "__main__":
    main()
