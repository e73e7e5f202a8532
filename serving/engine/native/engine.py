"""The engine: one thread that plans a step, computes it, chooses a token for each row and hands out what was made.

The thread owns the executor and the scheduler. Callers live on event loops: they leave requests in a bounded queue and
receive deltas, all of a step and a loop in one message. What takes long is done elsewhere meanwhile: grammars are
compiled and adapters are read by other threads while the row waits. :mod:`.scheduler` decides who computes what,
:mod:`.executor` is what computes, :mod:`.sampling` what chooses.

Not covered: planning the next step while an accelerator still computes this one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cluster.config import Config
from cluster.errors import DeadlineExceeded, MetierError, Overloaded, ResourcesShort, Unavailable
from cluster.models import load_tokenizer
from serving.engine.base import Delta, EngineStats, FinishReason, GenerateRequest, TokenLogprob
from serving.engine.limits import check_request
from serving.engine.native.delivery import Inbox, Item, Post
from serving.engine.native.executor import Executor, Memory, Part
from serving.engine.native.grammar import Grammars, Matcher
from serving.engine.native.load import eos_ids, load_executor
from serving.engine.native.lora import read_lora
from serving.engine.native.pages import Pages
from serving.engine.native.residency import Residency
from serving.engine.native.sampling import Choice, Chooser, choose
from serving.engine.native.scheduler import Row, Scheduler, Work
from serving.text import StopText

log = logging.getLogger(__name__)
FAILURES = 3
"""Passes that may fail in a row before the engine takes itself for broken."""
COMPILERS = 2
"""Grammars compiled at a time."""
STOP_SECONDS = 30.0
"""Time for the step that runs when the engine is stopped."""
MIB = 1 << 20


@dataclass(eq=False)
class Call:
    """One request and who asked."""

    request: GenerateRequest
    loop: asyncio.AbstractEventLoop
    inbox: Inbox = field(default_factory=Inbox)
    answers: list[Answer] = field(default_factory=list)


@dataclass(eq=False)
class Answer:
    """What belongs to a row beside its place in the plan."""

    call: Call
    index: int
    row: Row
    chooser: Chooser
    stop: StopText | None
    held: list[int] = field(default_factory=list)
    """Tokens that were not handed out yet, and their log probabilities."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    begun: bool = False
    """Whether something was handed out."""


class NativeEngine:
    """See the module's docstring; the seam is :class:`serving.engine.base.Engine`."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config, self.directory = config, directory
        self.settings = config.serving.generator
        self.wake = threading.Condition()
        # What callers leave for the thread; guarded by `wake`.
        self.arrived: list[Call] = []
        self.left: list[Call] = []
        self.errands: list[tuple[Callable[[], None], Future[None]]] = []
        self.preparing = 0
        """Answers whose grammar is being compiled."""
        self.changed = False
        self.stopping = False
        self.answers: dict[Row, Answer] = {}
        """Answers that wait or run."""
        self.step_began = 0.0
        self.failures = 0
        self.failure: Exception | None = None
        self.thread: threading.Thread | None = None

    # -- the seam, called from any thread ------------------------------------------------------------------------

    def start(self) -> None:
        torch.set_num_threads(self.settings.threads or os.cpu_count() or 1)
        self.executor = load_executor(self.config, self.directory)
        self._check_memory(self.executor)
        self.tokenizer = load_tokenizer(self.directory, self.config.base.trust_remote_code)
        self.eos = eos_ids(self.directory, self.tokenizer)
        self.grammars = Grammars(self.tokenizer, self.executor.vocabulary, self.eos)
        self.compilers = ThreadPoolExecutor(COMPILERS, "metier-grammar")
        dtype, max_rank = getattr(torch, self.config.base.dtype), self.settings.max_rank
        self.residency = Residency(
            self.executor,
            slots=self.settings.adapters_resident,
            host_bytes=self.settings.adapters_host_bytes,
            read=lambda directory: read_lora(directory, dtype=dtype, max_rank=max_rank),
        )
        self.scheduler = Scheduler(
            Pages(self.executor.pages, self.executor.page_tokens, prefixes=self.settings.prefix_cache),
            self.residency,
            batch=self.settings.batch_size,
            prefill_tokens=self.settings.prefill_tokens,
        )
        self.post = Post()
        self.thread = threading.Thread(target=self._run, name="metier-engine", daemon=True)
        self.thread.start()

    def add_adapter(self, digest: str, directory: Path) -> None:
        self.residency.add(digest, directory)

    def preload(self, digest: str, pin: bool = False) -> None:
        read = threading.Event()

        def change() -> None:
            read.set()
            self._change()

        if pin:
            self.residency.pin(digest)
        self.residency.prefetch(digest, change)
        while not read.wait(timeout=1):
            self._check_open()

        def settle() -> None:
            if self.residency.state(digest) == "ready" and self.residency.can_lease(digest):
                self.residency.lease(digest)
                self.residency.release(digest)

        done: Future[None] = Future()
        with self.wake:
            self._check_open()
            self.errands.append((settle, done))
            self.wake.notify()
        try:
            done.result()
        except Exception:
            if pin:
                self.residency.unpin(digest)
            raise

    def drop_adapter(self, digest: str) -> None:
        self.residency.drop(digest)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self._check_open()
        check_request(request, self.settings.limits, self.executor.vocabulary, self.config.base.context_tokens)
        call = Call(request, asyncio.get_running_loop())
        timer = None
        if request.deadline_s is not None:
            timer = call.loop.call_later(request.deadline_s, self._expire, call)
        try:
            await self._enter(call)
            running = request.sampling.n
            while running:
                delta = await call.inbox.get()
                running -= delta.finish_reason is not None
                yield delta
        finally:
            if timer is not None:
                timer.cancel()
            self._leave(call)

    def stats(self) -> EngineStats:
        if self.stopping:
            return EngineStats()
        rows = list(self.answers)  # in one go: the thread does not change it meanwhile
        scheduler, pages = self.scheduler, self.scheduler.pages
        running = len(scheduler.running)
        with self.wake:
            entering = self._entering()
        return EngineStats(
            running=running,
            waiting=max(len(rows) - running, 0) + entering,
            waiting_tokens=sum(row.left for row in rows),
            pages=pages.count,
            free_pages=pages.free,
            resident=self.residency.resident(),
            hosted=self.residency.hosted(),
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            answer_tokens=scheduler.answer_tokens,
            preemptions=scheduler.preemptions,
            adapter_loads=self.residency.loads,
            adapter_load_s=self.residency.load_s,
        )

    def check_health(self) -> None:
        if self.failure is not None:
            raise Unavailable(f"the engine stopped: {self.failure}") from self.failure
        if self.thread is None or not self.thread.is_alive():
            raise Unavailable("the engine is not running")
        began, stuck = self.step_began, self.settings.stuck_s
        if began and time.monotonic() - began > stuck:
            raise Unavailable(f"the engine has been in one step for over {stuck:g} s")

    def stop(self) -> None:
        with self.wake:
            self.stopping = True
            self.wake.notify()
        if self.thread is None:
            return
        self.thread.join(timeout=STOP_SECONDS)
        if self.thread.is_alive():
            log.error("the engine did not end its step within %g s; its memory is held until it does", STOP_SECONDS)
            return
        self.compilers.shutdown(wait=False, cancel_futures=True)
        self.residency.close()
        del self.executor, self.residency, self.scheduler
        self.thread = None

    # -- on a caller's event loop --------------------------------------------------------------------------------

    async def _enter(self, call: Call) -> None:
        sampling = call.request.sampling
        with self.wake:
            self._check_open()
            places = self.settings.batch_size + self.settings.max_waiting
            held = len(self.answers) + self._entering()
            if held + sampling.n > places:
                raise Overloaded(
                    f"the generator has {held} answers to make already and takes {places}; try again in a moment"
                )
            self.preparing += sampling.n
        try:
            if call.request.adapter is not None:
                self.residency.prefetch(call.request.adapter, self._change)
            matchers = await self._compile(call)
        except BaseException:
            with self.wake:
                self.preparing -= sampling.n
            raise
        call.answers += [self._answer(call, index, matcher) for index, matcher in enumerate(matchers)]
        with self.wake:
            self.preparing -= sampling.n
            self._check_open()
            self.arrived.append(call)
            self.wake.notify()

    async def _compile(self, call: Call) -> list[Matcher | None]:
        grammar, n = call.request.sampling.grammar, call.request.sampling.n
        if grammar is None:
            return [None] * n

        def compile() -> list[Matcher | None]:
            return [self.grammars.matcher(grammar) for _ in range(n)]

        try:
            async with asyncio.timeout(call.request.deadline_s):
                return await call.loop.run_in_executor(self.compilers, compile)
        except TimeoutError:
            raise _late(call) from None

    def _answer(self, call: Call, index: int, matcher: Matcher | None) -> Answer:
        request, sampling = call.request, call.request.sampling
        row = Row(list(request.token_ids), sampling.max_tokens, request.adapter, request.tenant)
        chooser = Chooser(sampling, request.token_ids, index, self.eos, self.executor.vocabulary, matcher)
        stop = StopText(self.tokenizer, sampling.stop) if sampling.stop else None
        return Answer(call, index, row, chooser, stop)

    def _expire(self, call: Call) -> None:
        call.inbox.put(_late(call))
        self._leave(call)

    def _leave(self, call: Call) -> None:
        with self.wake:
            self.left.append(call)
            self.wake.notify()

    def _entering(self) -> int:
        """Answers that the thread does not know of yet; ask with `wake` held."""
        return self.preparing + sum(call.request.sampling.n for call in self.arrived)

    def _check_open(self) -> None:
        self.check_health()
        if self.stopping:
            raise Unavailable("the engine is stopping")

    def _change(self) -> None:
        """Something a waiting row waits for may have happened; called by any thread."""
        with self.wake:
            self.changed = True
            self.wake.notify()

    # -- the loop, on the engine's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self.step_began = time.monotonic()
                    self._step()
                    self.step_began = 0.0
        except Exception as error:
            log.exception("engine failed")
            self.failure = error
        self.step_began = 0.0
        with self.wake:
            self.stopping = True  # from here on nobody joins a queue that is not read any more
            calls = {*self.arrived, *(answer.call for answer in self.answers.values())}
            for _, done in self.errands:
                done.set_exception(Unavailable("the engine stopped"))
        for call in calls:
            self._send(call, Unavailable("the engine stopped before the answer was complete"))
        self.post.send()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when told to stop."""
        with self.wake:
            while not (
                self.stopping or self.scheduler.running or self.arrived or self.left or self.errands or self.changed
            ):
                self.wake.wait()
            return not self.stopping

    def _step(self) -> None:
        self._receive()
        step = self.scheduler.schedule()
        failed = {self.answers.pop(row).call: error for row, error in step.failed}
        for call, error in failed.items():
            self._fail(call, error)
        if work := [each for each in step.work if each.row in self.answers]:
            self._compute(work)
        self.post.send()

    def _receive(self) -> None:
        with self.wake:
            arrived, self.arrived = self.arrived, []
            left, self.left = self.left, []
            errands, self.errands = self.errands, []
            self.changed = False
            for call in arrived:
                for answer in call.answers:
                    self.answers[answer.row] = answer
                    self.scheduler.add(answer.row)
        for call in left:
            self._forget(call)
        for errand, done in errands:
            try:
                errand()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _compute(self, work: list[Work]) -> None:
        chosen: list[tuple[Answer, Choice]] = []
        try:
            logits = self.executor.forward([_part(each) for each in work])
            choosing = [self.answers[each.row] for each in work if each.chooses]
            if choosing:
                choices = choose(logits, [answer.chooser for answer in choosing])
                chosen = list(zip(choosing, choices, strict=True))
        except Exception as error:
            self._fail_pass(work, error)
            return
        self.failures = 0
        self.scheduler.computed(work)
        for answer, choice in chosen:
            try:
                self._take(answer, choice)
            except Exception as error:  # what a grammar or tokenizer stumbles over is that answer's own trouble
                self._fail(answer.call, error)

    def _fail_pass(self, work: list[Work], error: Exception) -> None:
        """End the rows of a pass that failed; the engine goes on, unless that happens again and again."""
        log.error("a pass over %d rows failed", len(work), exc_info=error)
        for each in work:
            self.scheduler.spoil(each.row)
        for call in {self.answers[each.row].call for each in work}:
            self._fail(call, Unavailable("the model failed to compute this answer; try again"))
        self.failures += 1
        if self.failures >= FAILURES or _is_fatal(error):
            raise error

    def _take(self, answer: Answer, choice: Choice) -> None:
        row, sampling = answer.row, answer.call.request.sampling
        if row not in self.answers:  # another answer of the same request failed in this step
            return
        if answer.call.inbox.lost:
            self._forget(answer.call)
            return
        if choice.error is not None:
            self._fail(answer.call, choice.error)
            return
        token = choice.token
        self.scheduler.take(row, token)
        answer.chooser.take(token)
        reason: FinishReason | None = None
        if token in self.eos and not sampling.ignore_eos:
            reason = "stop"
        else:
            answer.held.append(token)
            if choice.logprob is not None:
                answer.logprobs.append(choice.logprob)
            if answer.stop is not None:
                answer.stop.push([token])
            if answer.chooser.finished or (answer.stop is not None and answer.stop.stopped):
                reason = "stop"
            elif row.made >= sampling.max_tokens:
                reason = "length"
        if reason is not None or answer.call.request.stream:
            self._hand_out(answer, reason)
        if reason is not None:
            del self.answers[row]
            self.scheduler.remove(row)

    def _hand_out(self, answer: Answer, reason: FinishReason | None) -> None:
        cached = 0 if answer.begun else answer.row.cached
        delta = Delta(tuple(answer.held), reason, answer.index, tuple(answer.logprobs), cached)
        self._send(answer.call, delta)
        answer.begun = True
        answer.held.clear()
        answer.logprobs.clear()

    def _send(self, call: Call, item: Item) -> None:
        self.post.add(call.loop, call.inbox, item)

    def _fail(self, call: Call, error: Exception) -> None:
        self._forget(call)
        if not isinstance(error, MetierError):
            log.error("a request failed", exc_info=error)
            error = Unavailable(f"the generator could not answer: {error}")
        self._send(call, error)

    def _forget(self, call: Call) -> None:
        """Take all rows of `call` out, wherever they are."""
        for answer in call.answers:
            if self.answers.pop(answer.row, None) is not None:
                self.scheduler.remove(answer.row)

    # -- memory --------------------------------------------------------------------------------------------------

    def _check_memory(self, executor: Executor) -> None:
        memory, reserved = executor.memory, self.settings.memory_bytes
        tokens = executor.pages * executor.page_tokens
        parts = (
            f"weights {memory.weights / MIB:.0f} MiB, cache {memory.cache / MIB:.0f} MiB ({executor.pages} pages of "
            f"{executor.page_tokens} tokens, {tokens} in all), slots of {self.settings.adapters_resident} adapters "
            f"{memory.adapters / MIB:.0f} MiB"
        )
        if reserved and _total(memory) > reserved:
            raise ResourcesShort(
                f"the generator takes {_total(memory) / MIB:.0f} MiB ({parts}), and serving.generator.memory_bytes "
                f"reserves {reserved / MIB:.0f} MiB; raise it, or lower serving.generator.cache_bytes",
                param="serving.generator.memory_bytes",
            )
        log.info("engine: %s", parts)


def _part(work: Work) -> Part:
    row = work.row
    tokens = row.tokens[row.computed : row.computed + work.count]
    return Part(tokens, row.computed, row.pages, row.slot, work.chooses)


def _late(call: Call) -> DeadlineExceeded:
    return DeadlineExceeded(f"the answer was not complete {call.request.deadline_s:g} s after the question")


def _is_fatal(error: Exception) -> bool:
    """Whether an accelerator is in a state that no later pass can work in."""
    return isinstance(error, torch.AcceleratorError)


def _total(memory: Memory) -> int:
    return memory.weights + memory.cache + memory.adapters
