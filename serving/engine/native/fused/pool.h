// Threads that compute one forward pass together: woken once a pass, kept together by spinning barriers inside it.
//
// A pass has hundreds of short phases, so a barrier must cost less than a microsecond. Work inside a phase is handed
// out in chunks from a shared counter: a thread that loses its core for a moment is not waited for longer than a chunk.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

struct Pool {
    static constexpr int SPINS_ASLEEP = 4000;  // between passes: Python wants the core
    static constexpr int SPINS_BARRIER = 1000; // inside a pass; then others may have the core
    static constexpr int MOST = 256;

    // All zero at first.
    int threads;
    void (*body)(void *, int);
    void *argument;
    pthread_t handles[MOST];
    alignas(64) uint32_t round; // a new value wakes the others
    alignas(64) uint32_t arrived;
    alignas(64) uint32_t phase;
    alignas(64) int64_t next[2]; // chunks handed out in this phase, and in the one that follows
    bool stopping;

    struct Seat {
        Pool *pool;
        int index;
    } seats[MOST];

    void start(int count) {
        threads = count < 1 ? 1 : count > MOST ? MOST : count;
        for (int i = 1; i < threads; i++) {
            seats[i] = {this, i};
            if (pthread_create(&handles[i], nullptr, &Pool::serve, &seats[i])) threads = i; // what there is must do
        }
    }

    void stop() {
        stopping = true;
        wake();
        for (int i = 1; i < threads; i++) pthread_join(handles[i], nullptr);
    }

    void wake() {
        __atomic_add_fetch(&round, 1, __ATOMIC_RELEASE);
        syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
    }

    static void *serve(void *raw) {
        Seat *seat = static_cast<Seat *>(raw);
        Pool *pool = seat->pool;
        uint32_t seen = 0;
        for (;;) {
            uint32_t now;
            int spins = 0;
            while ((now = __atomic_load_n(&pool->round, __ATOMIC_ACQUIRE)) == seen) {
                if (++spins < SPINS_ASLEEP) _mm_pause();
                else syscall(SYS_futex, &pool->round, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
            }
            seen = now;
            if (pool->stopping) return nullptr;
            pool->body(pool->argument, seat->index);
            pool->barrier();
        }
    }

    // Run `function(context, thread)` on every thread; returns when all are done. The caller is thread 0.
    void run(void (*function)(void *, int), void *context) {
        body = function;
        argument = context;
        next[0] = next[1] = 0;
        if (threads > 1) wake();
        function(context, 0);
        barrier();
    }

    // All threads meet; the counter of chunks starts anew. `next` alternates between two cells, so that resetting one
    // cannot race with a thread that still asks the other.
    void barrier() {
        if (threads == 1) {
            next[phase & 1] = 0;
            phase++;
            return;
        }
        uint32_t current = __atomic_load_n(&phase, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == (uint32_t)threads) {
            arrived = 0;
            next[current & 1] = 0;
            __atomic_store_n(&phase, current + 1, __ATOMIC_RELEASE);
        } else {
            int spins = 0;
            while (__atomic_load_n(&phase, __ATOMIC_ACQUIRE) == current) {
                _mm_pause();
                if (++spins >= SPINS_BARRIER) sched_yield();
            }
        }
    }

    // The next chunk of this phase.
    int64_t take() { return __atomic_fetch_add(&next[__atomic_load_n(&phase, __ATOMIC_RELAXED) & 1], 1, __ATOMIC_RELAXED); }
};
