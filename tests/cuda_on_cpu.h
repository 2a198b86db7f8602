// Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
//
// What a CUDA kernel needs to run on a CPU, for tests: the threads of a block take turns on one real thread, and change
// where they wait for each other. Blocks run one after the other. The order of turns is drawn anew for every round, so
// that a missing barrier shows.

#pragma once

#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

using std::max;
using std::min;

#define CUDA_ON_CPU
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
    int x;
};
static Index threadIdx, blockIdx;

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) ushort4 {
    unsigned short x, y, z, w;
};

namespace cuda_on_cpu {

struct Barrier {
    int size, arrived = 0, rounds = 0;
};

struct Thread {
    jmp_buf place;
    ucontext_t context;
    std::vector<char> stack;
    bool started = false, finished = false;
    int exchanges = 0;
};

static std::vector<Thread> threads;
static std::vector<Barrier> warps;
static std::vector<unsigned> exchanged[2];
static Barrier block;
static jmp_buf scheduler;
static ucontext_t starter;
static std::function<void()> body;

static void yield() {
    const Index own = threadIdx;
    if (_setjmp(threads[own.x].place) == 0) _longjmp(scheduler, 1);
    threadIdx = own;
}

static void wait(Barrier& barrier) {
    const int round = barrier.rounds;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.rounds;
    }
    while (barrier.rounds == round) yield();
}

// The values that the 32 threads of a warp pass.
static const unsigned* exchange(unsigned value) {
    const int own = threadIdx.x;
    std::vector<unsigned>& values = exchanged[threads[own].exchanges++ % 2];
    values[own] = value;
    wait(warps[own / 32]);
    return &values[own / 32 * 32];
}

static void entry() {
    body();
    threads[threadIdx.x].finished = true;
    _longjmp(scheduler, 1);
}

static void run(int blocks, int size, unsigned seed, std::function<void()> kernel) {
    body = kernel;
    std::mt19937 random(seed);
    std::vector<int> order(size);
    for (int i = 0; i < size; ++i) order[i] = i;
    for (auto& values : exchanged) values.assign(size, 0);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        threads.clear();
        threads.resize(size);
        warps.assign(size / 32, Barrier{32});
        block = Barrier{size};
        for (volatile int left = size; left;) {
            std::shuffle(order.begin(), order.end(), random);
            for (volatile int turn = 0; turn < size; turn = turn + 1) {
                Thread& thread = threads[order[turn]];
                if (thread.finished) continue;
                threadIdx.x = order[turn];
                if (_setjmp(scheduler) == 0) {
                    if (thread.started) _longjmp(thread.place, 1);
                    thread.started = true;
                    thread.stack.resize(1 << 17);
                    getcontext(&thread.context);
                    thread.context.uc_stack.ss_sp = thread.stack.data();
                    thread.context.uc_stack.ss_size = thread.stack.size();
                    makecontext(&thread.context, entry, 0);
                    swapcontext(&starter, &thread.context);
                }
                if (threads[order[turn]].finished) left = left - 1;
            }
        }
    }
}

}  // namespace cuda_on_cpu

static inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block); }
static inline void __syncwarp() { cuda_on_cpu::wait(cuda_on_cpu::warps[threadIdx.x / 32]); }

static inline unsigned __ballot_sync(unsigned, bool vote) {
    const unsigned* votes = cuda_on_cpu::exchange(vote);
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= votes[i] << i;
    return result;
}

static inline bool __any_sync(unsigned all, bool vote) { return __ballot_sync(all, vote); }

template <typename Number>
static inline Number __shfl_sync(unsigned, Number value, int lane) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    bits = cuda_on_cpu::exchange(bits)[lane];
    memcpy(&value, &bits, 4);
    return value;
}

static inline float __shfl_xor_sync(unsigned all, float value, int mask) {
    return __shfl_sync(all, value, (threadIdx.x % 32) ^ mask);
}

static inline int __shfl_up_sync(unsigned all, int value, int step) {
    return __shfl_sync(all, value, max(threadIdx.x % 32 - step, 0));
}

static inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    const unsigned* values = cuda_on_cpu::exchange(value);
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result += values[i];
    return result;
}

static inline unsigned __reduce_or_sync(unsigned, unsigned value) {
    const unsigned* values = cuda_on_cpu::exchange(value);
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= values[i];
    return result;
}

static inline unsigned __reduce_min_sync(unsigned, unsigned value) {
    const unsigned* values = cuda_on_cpu::exchange(value);
    return *std::min_element(values, values + 32);
}

static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }

static inline void copy_async(float* target, const float* source) { *target = *source; }
static inline void wait_for_copies() {}

static inline unsigned short to_half(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

static inline float from_half(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return half;
}
