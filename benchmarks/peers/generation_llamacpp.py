"""llama.cpp as an arm of ``benchmarks.generation``: one stream through llama-cpp-python, run by the interpreter of its environment.

``model`` is a GGUF file. Prompts come one after another whatever the case says.
"""

from __future__ import annotations

from generation_turns import Case, aside, serve, task, timed

answers = aside()

from itertools import islice  # noqa: E402

from llama_cpp import Llama  # noqa: E402


def main() -> None:
    asked: Case = task()
    llama = Llama(
        asked["model"],
        n_ctx=asked["context"],
        n_threads=asked["threads"],
        n_threads_batch=asked["threads"],
        n_batch=asked["context"],
        verbose=False,
    )

    def run(prompts: list[list[int]], whose: list[int | None], new: int) -> list[list[int]]:
        made = []
        for prompt in prompts:
            llama.reset()  # it would keep what two prompts have in common
            made.append(list(islice(llama.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True), new)))
        return made

    serve(answers, lambda case: timed(case, run))


if __name__ == "__main__":
    main()
