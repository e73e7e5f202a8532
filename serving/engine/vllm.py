"""vLLM behind the engine's seam: ``AsyncLLM``, and a ``LoRARequest`` for each adapter, named by its digest.

vLLM computes in processes of its own; here is one thread with the event loop that it wants, and callers on any other loop.
An adapter has a number that is never given to another, and vLLM salts its prefix cache with the name and path, so that nothing
made with other weights is ever read. Adapters are checked and read before the first request that uses them gets in: a file
that vLLM cannot read would otherwise end its engine in the middle of a step.

What vLLM 0.32 gets wrong on CPUs is kept from happening there: rows of the base next to rows with adapters take whatever is in the
last slot (vllm#48421), so that one is held empty; a request with a seed whose prompt is computed in chunks ends the engine, so
prompts are computed whole.

Not covered: quantized bases (vLLM has its own ways, and they are other settings), turns between tenants (vLLM serves who came
first), `page_tokens` on GPUs and `prefix_cache` off, several GPUs for one replica. Which adapters are in which tier is what their order of
use says, since vLLM does not tell.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cluster.adapter_files import check_adapter_files, weights
from cluster.config import Config
from cluster.errors import (
    BadInput,
    ConfigError,
    DeadlineExceeded,
    MetierError,
    Mismatch,
    NotFound,
    Overloaded,
    ResourcesShort,
    Unavailable,
)
from cluster.machine import free_memory
from cluster.vllm_files import RANKS, vllm_max_lora_rank
from serving.engine.base import Delta, EngineStats, GenerateRequest, Sampling, TokenLogprob
from serving.engine.limits import check_request
from serving.engine.native.delivery import Inbox, Item

log = logging.getLogger(__name__)
T = TypeVar("T")
OUTPUT_LAYERS = ("o_proj.weight", "down_proj.weight", "attention.dense.weight", "c_proj.weight", "out_proj.weight")
"""Linear layers that vLLM does not pack with others, by architecture."""
GREEDY = 1e-5
"""vLLM's bound: a lower temperature takes the likeliest token."""
ENVIRONMENT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # it would let its processes send each other pickles
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas on one node would all bind to the same cores
}
"""Of the processes that vLLM starts; what is set already stays."""


@dataclass(eq=False)
class Adapter:
    """What is known of one adapter; guarded by the engine's lock."""

    digest: str
    directory: Path
    number: int
    """vLLM's ``lora_int_id``."""
    leases: int = 0
    dropped: bool = False
    loaded: bool = False
    """Whether vLLM has read it once."""


@dataclass(eq=False)
class Call:
    """One request and who asked."""

    request: GenerateRequest
    loop: asyncio.AbstractEventLoop
    adapter: Adapter | None
    left: int
    """Tokens of prompt and answers that are not computed yet."""
    inbox: Inbox = field(default_factory=Inbox)
    begun: set[int] = field(default_factory=set)
    """Answers of which something was handed out."""

    def put(self, items: list[Item]) -> None:
        """Hand `items` over to who asked, in one message."""
        try:
            self.loop.call_soon_threadsafe(self._deliver, items)
        except RuntimeError:  # the caller's event loop is closed: nobody reads on
            return

    def _deliver(self, items: list[Item]) -> None:
        for item in items:
            self.inbox.put(item)


class VllmEngine:
    """See the module's docstring; the seam is :class:`serving.engine.base.Engine`."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config, self.directory = config, directory
        self.settings = config.serving.generator
        if self.settings.quantization != "none":
            raise ConfigError(
                f"the vllm engine serves the base as it is; set serving.generator.quantization to none, or use the native engine for {self.settings.quantization}",
                param="serving.generator.quantization",
            )
        self.lock = threading.Lock()
        # Guarded by `lock`.
        self.adapters: dict[str, Adapter] = {}
        self.recent: OrderedDict[str, Adapter] = OrderedDict()
        """Adapters that vLLM has read, least recently used first."""
        self.pinned: set[str] = set()
        self.numbers = 0
        self.hosted = 0
        """Adapters that vLLM keeps in memory, those in slots among them (``max_cpu_loras``)."""
        self.calls: set[Call] = set()
        self.counts = {"prompt": 0, "cached": 0, "answer": 0, "preemptions": 0, "loads": 0}
        self.load_s = 0.0
        self.usage = 0.0
        """Share of the cache that is held."""
        self.running = 0
        self.heard = 0.0
        """When vLLM last said anything."""
        # Used on the thread's loop only.
        self.door = asyncio.Lock()
        """Who asks for a slot first gets it first."""
        self.slot_left = asyncio.Event()
        self.using: Counter[str] = Counter()
        """Answers that run, or are about to, by adapter."""
        self.loop = asyncio.new_event_loop()
        self.thread: threading.Thread | None = None
        self.stopping = False

    # -- the seam, called from any thread ------------------------------------------------------------------------

    def start(self) -> None:
        for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": str(self.settings.threads or os.cpu_count())}.items():
            os.environ.setdefault(name, value)
        self.thread = threading.Thread(target=self._serve, name="metier-vllm", daemon=True)
        self.thread.start()
        try:
            self.llm = self._wait(self._open())
        except BaseException:
            self._end_thread()
            raise
        self.vocabulary = int(self.llm.model_config.get_vocab_size())
        cache = self.llm.vllm_config.cache_config
        self.pages = int(cache.num_gpu_blocks)
        log.info(
            "engine: vLLM with a cache of %d pages of %d tokens and slots for %d adapters of rank %d",
            self.pages, cache.block_size, self.settings.adapters_resident, self._max_rank(),
        )  # fmt: skip

    def add_adapter(self, digest: str, directory: Path) -> None:
        with self.lock:
            known = self.adapters.get(digest)
            if known is None or known.directory != directory:
                self.numbers += 1
                self.adapters[digest] = Adapter(digest, directory, self.numbers)

    def preload(self, digest: str, pin: bool = False) -> None:
        self._check_open()
        with self.lock:
            adapter = self._known(digest)
            if pin and len(self.pinned | {digest}) >= self.settings.adapters_resident:
                raise ResourcesShort(
                    f"{len(self.pinned)} adapters are pinned, and one slot of {self.settings.adapters_resident} has to stay free for others; "
                    "raise serving.generator.adapters_resident or pin fewer",
                    param="serving.generator.adapters_resident",
                )
        self._wait(self._load(adapter))
        if pin:
            self._wait(self.llm.pin_lora(adapter.number))
            with self.lock:
                self.pinned.add(digest)

    def drop_adapter(self, digest: str) -> None:
        with self.lock:
            adapter = self.adapters.pop(digest, None)
            if adapter is None:
                return
            adapter.dropped = True
            self.pinned.discard(digest)
        self._remove_if_left(adapter)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self._check_open()
        check_request(request, self.settings.limits, self.vocabulary, self.config.base.context_tokens)
        call = self._enter(request)
        work = asyncio.run_coroutine_threadsafe(self._answer(call), self.loop)
        try:
            unfinished = request.sampling.n
            while unfinished:
                delta = await call.inbox.get()
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            work.cancel()
            self._leave(call)

    def stats(self) -> EngineStats:
        with self.lock:
            calls = list(self.calls)
            recent = list(reversed(self.recent))
            counts, load_s = dict(self.counts), self.load_s
        answers = sum(call.request.sampling.n for call in calls)
        running = min(self.running, answers)
        slots = self.settings.adapters_resident
        return EngineStats(
            running=running,
            waiting=answers - running,
            waiting_tokens=sum(call.left for call in calls),
            pages=self.pages,
            # vLLM tells its usage after a step; without requests there is none, and nothing is held
            free_pages=self.pages - round(self.pages * self.usage) if calls else self.pages,
            resident=tuple(recent[:slots]),
            hosted=tuple(recent[slots:]),
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            answer_tokens=counts["answer"],
            preemptions=counts["preemptions"],
            adapter_loads=counts["loads"],
            adapter_load_s=load_s,
        )

    def check_health(self) -> None:
        if self.thread is None or not self.thread.is_alive():
            raise Unavailable("the engine is not running")
        if self.llm.errored:
            raise Unavailable("vLLM's engine has ended; its log says why")
        stuck = self.settings.stuck_s
        if self.calls and time.monotonic() - self.heard > stuck:
            raise Unavailable(f"vLLM has said nothing for over {stuck:g} s")

    def stop(self) -> None:
        self.stopping = True
        if self.thread is None:
            return
        self._wait(self._close())
        self._end_thread()

    # -- callers -------------------------------------------------------------------------------------------------

    def _enter(self, request: GenerateRequest) -> Call:
        sampling = request.sampling
        with self.lock:
            adapter = None if request.adapter is None else self._known(request.adapter)
            held = sum(call.request.sampling.n for call in self.calls)
            places = self.settings.batch_size + self.settings.max_waiting
            if held + sampling.n > places:
                raise Overloaded(
                    f"the generator has {held} answers to make already and takes {places}; try again in a moment"
                )
            if not self.calls:
                self.heard = time.monotonic()
            if adapter is not None:
                adapter.leases += 1
            left = len(request.token_ids) + sampling.n * sampling.max_tokens
            call = Call(request, asyncio.get_running_loop(), adapter, left)
            self.calls.add(call)
        return call

    def _leave(self, call: Call) -> None:
        with self.lock:
            self.calls.discard(call)
            if call.adapter is not None:
                call.adapter.leases -= 1
        if call.adapter is not None:
            self._remove_if_left(call.adapter)

    def _known(self, digest: str) -> Adapter:
        if digest not in self.adapters:
            raise NotFound(f"adapter {digest[:12]} was not added to this engine")
        return self.adapters[digest]

    def _remove_if_left(self, adapter: Adapter) -> None:
        """Take a dropped adapter out of vLLM once nobody uses it."""
        with self.lock:
            if not adapter.dropped or adapter.leases or not adapter.loaded:
                return
            adapter.loaded = False
            if self.recent.get(adapter.digest) is adapter:
                del self.recent[adapter.digest]
        asyncio.run_coroutine_threadsafe(self.llm.remove_lora(adapter.number), self.loop)

    def _check_open(self) -> None:
        self.check_health()
        if self.stopping:
            raise Unavailable("the engine is stopping")

    # -- on the thread's event loop ------------------------------------------------------------------------------

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def _end_thread(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        if self.thread is not None:
            self.thread.join(timeout=30)
            self.thread = None

    async def _open(self) -> Any:
        from transformers import AutoConfig
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        settings, base = self.settings, self.config.base
        model = AutoConfig.from_pretrained(self.directory, trust_remote_code=base.trust_remote_code)
        text = model.get_text_config()
        self.hosted = self._hosted(text)
        on_cpu = current_platform.is_cpu()
        whole = base.context_tokens if on_cpu else 0
        arguments = AsyncEngineArgs(
            model=str(self.directory),
            dtype=base.dtype,
            max_model_len=base.context_tokens,
            trust_remote_code=base.trust_remote_code,
            max_num_seqs=settings.batch_size,
            max_num_batched_tokens=max(settings.prefill_tokens + settings.batch_size, whole),
            enable_chunked_prefill=not on_cpu,
            block_size=-(-settings.page_tokens // 32) * 32 if on_cpu else None,  # its kernels want multiples of 32
            kv_cache_memory_bytes=self._cache_bytes(text),
            enable_prefix_caching=True,
            enable_lora=True,
            max_loras=settings.adapters_resident + on_cpu,
            max_cpu_loras=self.hosted + on_cpu,
            max_lora_rank=self._max_rank(),
            max_logprobs=settings.limits.logprobs,
            enforce_eager=not settings.compile,
            disable_log_stats=True,
        )
        engine = self

        def listener(vllm_config: Any, engine_index: int = 0) -> Any:
            return Listener(engine)

        try:
            llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[listener])
        except ValueError as error:
            raise ResourcesShort(f"vLLM does not start with these settings: {error}") from error
        if on_cpu:
            await self._hold_last_slot(llm, settings.adapters_resident + 1)
        return llm

    async def _hold_last_slot(self, llm: Any, slots: int) -> None:
        """Pin an adapter that changes nothing in the last slot; slots are given out from the first on."""
        import torch
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        shapes = weights(self.directory)
        layer = next((name.removesuffix(".weight") for name in sorted(shapes) if name.endswith(OUTPUT_LAYERS)), None)
        if layer is None:
            raise ConfigError(
                f"the vllm engine cannot keep adapters apart on CPUs for {self.directory}; set serving.generator.engine to native",
                param="serving.generator.engine",
            )
        wide, deep = shapes[f"{layer}.weight"]
        name = f"base_model.model.{layer}"
        about = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [layer.rpartition(".")[2]]}
        tensors = {f"{name}.lora_A.weight": torch.zeros(1, deep), f"{name}.lora_B.weight": torch.zeros(wide, 1)}
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
            save_file(tensors, Path(directory, "adapter_model.safetensors"))
            for self.numbers in range(1, slots + 1):
                await llm.add_lora(LoRARequest(f"empty {self.numbers}", self.numbers, directory))
        await llm.pin_lora(slots)
        for number in range(1, slots):
            await llm.remove_lora(number)

    async def _close(self) -> None:
        for task in asyncio.all_tasks(self.loop) - {asyncio.current_task()}:
            if task.get_name().startswith("answer "):
                task.cancel()
        await asyncio.sleep(0)
        self.llm.shutdown(timeout=10)

    async def _answer(self, call: Call) -> None:
        """Run `call` to its end; what comes, and the error in place of it, goes to its inbox."""
        request = call.request
        current = asyncio.current_task()
        assert current is not None
        current.set_name(f"answer {request.request_id}")
        try:
            async with asyncio.timeout(request.deadline_s):
                await self._stream(call)
        except asyncio.CancelledError:
            if self.stopping:
                call.put([Unavailable("the engine stopped before the answer was complete")])
            raise
        except Exception as error:
            call.put([self._as_ours(call, error)])

    async def _stream(self, call: Call) -> None:
        from vllm import TokensPrompt
        from vllm.lora.request import LoRARequest

        request, adapter = call.request, call.adapter
        if adapter is not None:
            await self._take_slot(adapter)
        try:
            lora = None
            if adapter is not None:
                await self._load(adapter)
                lora = LoRARequest(adapter.digest, adapter.number, str(adapter.directory))
            with self.lock:
                self.numbers += 1
                name = f"{request.request_id}-{self.numbers}"  # vLLM wants them different; callers need not
            prompt = TokensPrompt(prompt_token_ids=list(request.token_ids))
            parameters = sampling_params(request.sampling, request.stream)
            async for output in self.llm.generate(prompt, parameters, name, lora_request=lora):
                call.put(self._deltas(call, output))
        finally:
            if adapter is not None:
                self.using -= Counter([adapter.digest])
                self.slot_left.set()

    async def _take_slot(self, adapter: Adapter) -> None:
        """Wait until `adapter` can have a slot as long as it runs; vLLM's own scheduler knows nothing of pinned ones."""
        async with self.door:
            while len({*self.using, *self.pinned, adapter.digest}) > self.settings.adapters_resident:
                self.slot_left.clear()
                await self.slot_left.wait()
            self.using[adapter.digest] += 1

    async def _load(self, adapter: Adapter) -> None:
        """Have vLLM read `adapter`, unless it has and could not have let it go since."""
        from vllm.lora.request import LoRARequest

        with self.lock:
            if adapter.loaded and len(self.adapters) <= self.hosted:
                self.recent.move_to_end(adapter.digest)
                return
        began = time.monotonic()
        await asyncio.to_thread(self._check, adapter)
        try:
            await self.llm.add_lora(LoRARequest(adapter.digest, adapter.number, str(adapter.directory)))
        except Exception as error:
            if self.llm.errored:
                raise
            raise Mismatch(f"vLLM does not load adapter {adapter.digest[:12]}: {error}") from error
        with self.lock:
            self.heard = time.monotonic()
            if adapter.digest not in self.recent:
                self.counts["loads"] += 1
                self.load_s += time.monotonic() - began
            adapter.loaded = True
            self.recent[adapter.digest] = adapter
            self.recent.move_to_end(adapter.digest)
            while len(self.recent) > self.hosted:
                self.recent.popitem(last=False)
        self._remove_if_left(adapter)

    def _check(self, adapter: Adapter) -> None:
        rank = int(check_adapter_files(adapter.directory, self.directory)["r"])
        if rank > self.settings.max_rank:
            raise Mismatch(
                f"adapter {adapter.digest[:12]} has r {rank}, and serving.generator.max_rank is {self.settings.max_rank}; raise it",
                param="r",
            )
        vllm_max_lora_rank(adapter.directory)

    def _deltas(self, call: Call, output: Any) -> list[Item]:
        self.heard = time.monotonic()
        sampling, prompt = call.request.sampling, len(call.request.token_ids)
        cached = output.num_cached_tokens or 0
        items: list[Item] = []
        for part in output.outputs:
            if part.finish_reason not in (None, "stop", "length"):
                return [*items, Unavailable(f"vLLM ended the answer: {part.finish_reason}")]
            # Greedy answers are all alike, and vLLM makes one.
            places = range(sampling.n) if sampling.temperature < GREEDY else (part.index,)
            ids = list(part.token_ids)
            with self.lock:
                self.counts["answer"] += len(ids) * len(places)
                if not call.begun:
                    self.counts["prompt"] += prompt
                    self.counts["cached"] += cached
                    call.left -= prompt
                call.left -= len(ids) * len(places)
            if part.finish_reason == "stop" and not isinstance(part.stop_reason, str):
                ids.pop()  # the end of turn; of a stop string the ids stay
            logprobs = tuple(
                _logprob(token, found, sampling.logprobs)
                for token, found in zip(ids, part.logprobs or (), strict=False)
            )
            for place in places:
                first = place not in call.begun
                call.begun.add(place)
                items.append(Delta(tuple(ids), part.finish_reason, place, logprobs, cached if first else 0))
        return items

    def _as_ours(self, call: Call, error: Exception) -> MetierError:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, MetierError):
            return error
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(f"the answer was not complete {call.request.deadline_s:g} s after the question")
        if isinstance(error, EngineDeadError):
            return Unavailable("vLLM's engine has ended; its log says why")
        if isinstance(error, (VLLMClientError, ValueError)):
            return BadInput(f"vLLM does not take this request: {error}")
        log.error("a request failed", exc_info=error)
        return Unavailable(f"the generator could not answer: {error}")

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _max_rank(self) -> int:
        """The least rank vLLM makes room for that holds `max_rank`."""
        return next(rank for rank in RANKS if rank >= self.settings.max_rank)

    def _cache_bytes(self, text: Any) -> int | None:
        """Of the key-value cache; ``None`` leaves it to vLLM, which on GPUs takes what the model leaves free.

        Args:
            text: the model's text config.
        """
        import torch

        from serving.engine.native.cache import page_bytes

        if self.settings.cache_bytes or self.settings.gpus:
            return self.settings.cache_bytes or None
        a_token = page_bytes(text, 1, getattr(torch, self.config.base.dtype))
        weights = sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))
        free = int((free_memory() - weights) * self.settings.cache_share)
        return min(free, a_token * self.config.base.context_tokens * self.settings.batch_size)

    def _hosted(self, text: Any) -> int:
        """How many of the largest adapters ``adapters_host_bytes`` holds, and those in slots: vLLM counts both together."""
        width, inner = text.hidden_size, text.intermediate_size
        wide = 4 if self.config.base.dtype == "float32" else 2
        largest: int = wide * self.settings.max_rank * text.num_hidden_layers * (8 * width + 3 * (width + inner))
        return self.settings.adapters_resident + self.settings.adapters_host_bytes // largest


class Listener:
    """vLLM's ``StatLoggerBase``, by shape: takes down what a step says of itself."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        engine = self.engine
        engine.heard = time.monotonic()
        if scheduler_stats is not None:
            engine.running, engine.usage = scheduler_stats.num_running_reqs, scheduler_stats.kv_cache_usage
        if iteration_stats is not None and iteration_stats.num_preempted_reqs:
            with engine.lock:
                engine.counts["preemptions"] += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Said by :meth:`VllmEngine.start`."""

    def log(self) -> None:
        """Nothing: the replica reports."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """It never sleeps."""


def sampling_params(sampling: Sampling, stream: bool) -> Any:
    """`sampling` as vLLM's ``SamplingParams``."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    grammar = sampling.grammar
    structured = None
    if grammar is not None:
        structured = {
            "json_object": lambda: StructuredOutputsParams(json_object=True),
            "json_schema": lambda: StructuredOutputsParams(json=grammar.text),
            "regex": lambda: StructuredOutputsParams(regex=grammar.text),
        }[grammar.kind]()
    return SamplingParams(
        n=1 if sampling.temperature < GREEDY else sampling.n,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=None if sampling.seed is None else sampling.seed % (1 << 62),  # vLLM's -1 means none
        stop=list(sampling.stop),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        structured_outputs=structured,
        skip_clone=True,
    )


def _logprob(token: int, found: Any, wanted: int | None) -> TokenLogprob:
    """`found` of vLLM: id -> log probability and rank, the chosen token among them."""
    ranked = sorted(found.items(), key=lambda item: item[1].rank)
    top = tuple((other, each.logprob) for other, each in ranked[: wanted or 0])
    return TokenLogprob(token, found[token].logprob, top)
