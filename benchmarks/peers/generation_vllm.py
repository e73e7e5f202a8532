"""vLLM as an arm of ``benchmarks.generation``: its offline ``LLM`` with prefix caching; run by the interpreter of its environment.

The offline class is the fastest way in: no streaming, no event loop. Adapters are loaded before the first case.
"""

from __future__ import annotations

from generation_turns import Case, aside, serve, task, timed

answers = aside()

from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402


def main() -> None:
    asked: Case = task()
    adapters = asked["adapters"]
    with_adapters = (
        {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": asked["rank"]} if adapters else {}
    )
    llm = LLM(
        asked["model"],
        dtype=asked["dtype"],
        max_model_len=asked["context"],
        max_num_seqs=asked["batch"],
        kv_cache_memory_bytes=asked["cache_bytes"],
        enable_prefix_caching=True,
        **asked["options"],
        **with_adapters,
    )
    loras = [LoRARequest(f"adapter-{n}", n + 1, directory) for n, directory in enumerate(adapters)]
    for lora in loras:
        llm.llm_engine.add_lora(lora)

    def run(prompts: list[list[int]], whose: list[int | None], new: int) -> list[list[int]]:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False),
            lora_request=[None if adapter is None else loras[adapter] for adapter in whose] if loras else None,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    serve(answers, lambda case: timed(case, run))


if __name__ == "__main__":
    main()
