// Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
//
// Encoding of the multi-codebook quantiser, the part between and after its two matrix products: one block a frame.
// Compiled at run time by cuda_encoder.py, which defines CODEBOOKS (2, 4, 8 or 16), WARPS, BLOCKS (a
// multiprocessor's, at least), CELLS and UNROLL. tests/cuda_on_cpu.h
// lets a C++ compiler take the same text.
//
// refinement.py says what the search computes. Here a merge looks up only the inner products of those centres in which an
// option still in use differs from the incoming codes.

#ifndef CUDA_ON_CPU
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

// To shared memory, without waiting.
__device__ inline void copy_async(float* target, const float* source) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(source) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline unsigned short to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline float from_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

constexpr int SIZE = 256;                  // centres of a codebook
constexpr int WIDTH = CODEBOOKS * SIZE;
constexpr int LANES = 32;
constexpr int THREADS = LANES * WARPS;
constexpr int UNROLLED = UNROLL;           // a pragma takes no macro
constexpr unsigned ALL = 0xffffffffu;
constexpr int SINGLE = 16;                 // options kept of a codebook: refinement.cutoff(256, 1)
constexpr int MOST = 32;                   // options kept of a group at most
constexpr int ENTRIES = SINGLE + 1;        // of a codebook: the incoming code, and the kept ones that differ from it
constexpr int COLUMNS = CODEBOOKS / 2 * ENTRIES;
constexpr int CANDIDATES = 64;             // of `select`: at least MOST and LANES, which a lane may have equal ones at most
constexpr int HALF_RANGE = 13;           // splits have their largest number in 2^13 to 2^14
constexpr float TINY = 1e-30f;             // frames below are as good as zero
constexpr float LARGE = 1e15f;             // sums of squares of numbers below are finite

__device__ constexpr int options_of(int length) { return length < 4 ? 16 : 32; }  // refinement.cutoff(256, length)

struct alignas(8) Candidate {
    float value;
    int place;
};

// What a warp has in shared memory, of the frame it works on.
struct Frame {
    union {
        float table[CELLS];                   // inner products of even entries with odd ones
        Candidate candidates[CANDIDATES];     // of `select`
    };
    float field[ENTRIES * MOST];              // of even entries with odd options
    float cost[CODEBOOKS * SINGLE];           // by group and option
    int row[MOST];                            // of `field`, by even option
    unsigned short columns[COLUMNS];          // entries of the odd group: places of centres
    unsigned short rows[ENTRIES];             // of an even codebook
    unsigned short chosen[MOST];              // pairs of options that a merge keeps
    unsigned char kept[CODEBOOKS][SINGLE];    // codes by slot
    unsigned char slot[CODEBOOKS][MOST];      // by option of the codebook's group
};

__device__ inline float warp_min(float value) {
    for (int step = 16; step; step /= 2) value = fminf(value, __shfl_xor_sync(ALL, value, step));
    return value;
}

__device__ inline float warp_max(float value) { return -warp_min(-value); }

// Of the lanes up to this one, this one included.
__device__ inline int warp_prefix(int value) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const int before = __shfl_up_sync(ALL, value, step);
        if (threadIdx.x % LANES >= step) value += before;
    }
    return value;
}

template <int COUNT>
__device__ inline int count_below(const float (&values)[COUNT], float bound) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) count += values[i] <= bound;
    return count;
}

// Halfway from `low` to `high`, if there is a number between them.
__device__ inline bool halfway(float low, float high, float& middle) {
    middle = low + 0.5f * (high - low);
    return middle > low && middle < high;
}

// `put(n, value, place)`, n = 0 .. KEEP - 1, for the lowest values of a warp, where values[i] of a lane has the place
// i * LANES + lane. Which of equal ones at the bound are among them depends on nothing but the values.
template <int KEEP, int COUNT, typename Put>
__device__ inline void select(const float (&values)[COUNT], Candidate* candidates, Put put) {
    const int lane = threadIdx.x % LANES;
    const unsigned before = (1u << lane) - 1;
    float lowest = values[0];
#pragma unroll
    for (int i = 1; i < COUNT; ++i) lowest = fminf(lowest, values[i]);
    float low = warp_min(lowest), high = warp_max(lowest), bound = high, middle;
    low -= 1e-6f * fabsf(low) + TINY;
    // From here on fewer than KEEP values are <= low, and at least KEEP <= high.
    // A bound that the lowest values of half of the lanes meet is a cheap guess.
    for (float left = low; halfway(left, bound, middle);) {
        const int lanes = __popc(__ballot_sync(ALL, lowest <= middle));
        (lanes < LANES / 2 ? left : bound) = middle;
        if (lanes == LANES / 2) break;
    }
    int own;
    for (;;) {
        own = count_below(values, bound);
        const int all = __reduce_add_sync(ALL, own);
        (all < KEEP ? low : high) = bound;
        if (all >= KEEP && all <= CANDIDATES) break;
        if (!halfway(low, high, bound)) {
            // Many equal ones: they are taken from the first lanes.
            const int below = count_below(values, low), equal = count_below(values, high) - below;
            const bool taken = __reduce_add_sync(ALL, below) + warp_prefix(equal) - equal < KEEP;
            bound = taken ? high : low;
            own = taken ? below + equal : below;
            break;
        }
    }
    int n = warp_prefix(own);
    const int all = __shfl_sync(ALL, n, LANES - 1);
    n -= own;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (values[i] <= bound) candidates[n++] = {values[i], i * LANES + lane};
    __syncwarp();
    Candidate mine[CANDIDATES / LANES];
#pragma unroll
    for (int i = 0; i < CANDIDATES / LANES; ++i) {
        mine[i] = candidates[i * LANES + lane];
        if (i * LANES + lane >= all) mine[i].value = INFINITY;
    }
    while (halfway(low, high, middle)) {
        int below = 0;
#pragma unroll
        for (const Candidate& candidate : mine) below += __popc(__ballot_sync(ALL, candidate.value <= middle));
        (below < KEEP ? low : high) = middle;
        if (below == KEEP) low = high;
    }
    // First those that are <= low, then, if these are too few, those that are equal to `high`.
    int placed = 0;
    for (float from = -INFINITY, to = low;; from = low, to = high) {
#pragma unroll
        for (const Candidate& candidate : mine) {
            const bool taken = candidate.value > from && candidate.value <= to;
            const unsigned lanes = __ballot_sync(ALL, taken);
            const int place = placed + __popc(lanes & before);
            if (taken && place < KEEP) put(place, candidate.value, candidate.place);
            placed += __popc(lanes);
        }
        if (placed >= KEEP) break;
    }
}

// The kept codes of a codebook in use that differ from the incoming one.
struct Entries {
    int count, place, code;  // of this lane's option: its place among them, from 1, or 0 if it has the incoming code
};

template <int OPTIONS>
__device__ inline Entries entries_of(const Frame& f, int c, int incoming) {
    const int slot = f.slot[c][threadIdx.x % OPTIONS], code = f.kept[c][slot];
    const unsigned bit = code == incoming ? 0 : 1u << slot, used = __reduce_or_sync(ALL, bit);
    return {__popc(used), bit ? 1 + __popc(used & (bit - 1)) : 0, code};
}

// What merging a pair of groups of LENGTH codebooks adds to the costs of its options: the inner products of the even
// options' differences from the incoming codes with the odd ones'. With e of an even option, o of an odd one, and the
// incoming codes e', o', that is e.o - e.o' - e'.o + e'.o'. The first goes to `values` (the even option i * HALVES + half
// with the odd `option`), the others to the costs of the even and the odd option. `incoming` is codebook `lane`'s.
template <int LENGTH, int COUNT>
__device__ inline void add_products(Frame& f, const float* __restrict__ gram, int pair, int incoming,
                                    float& even_cost, float& odd_cost, float (&values)[COUNT]) {
    constexpr int OPTIONS = options_of(LENGTH), HALVES = LANES / OPTIONS;
    const int lane = threadIdx.x, option = lane % OPTIONS, half = lane / OPTIONS;
    const int even = 2 * pair * LENGTH, odd = even + LENGTH;
    int here[LENGTH], height = LENGTH;  // the first columns are the incoming codes
#pragma unroll
    for (int b = 0; b < LENGTH; ++b) {
        const int code = __shfl_sync(ALL, incoming, odd + b);
        const Entries entries = entries_of<OPTIONS>(f, odd + b, code);
        here[b] = entries.place ? height + entries.place - 1 : b;
        f.columns[here[b]] = (odd + b) * SIZE + entries.code;
        f.columns[b] = (odd + b) * SIZE + code;
        height += entries.count;
    }
    const int room = CELLS / height;  // even entries in the table at a time
    const unsigned inverse = (1 << 20) / height + 1;
#pragma unroll 1
    for (int a = 0; a < LENGTH; ++a) {
        const int code = __shfl_sync(ALL, incoming, even + a);
        const Entries entries = entries_of<OPTIONS>(f, even + a, code);
        f.rows[entries.place] = (even + a) * SIZE + entries.code;
        f.rows[0] = (even + a) * SIZE + code;
        f.row[option] = entries.place * OPTIONS;
        float common = 0;  // of even entry `lane` with the odd group's incoming codes
#pragma unroll 1
        for (int first = 0; first <= entries.count; first += room) {
            const int last = min(entries.count + 1, first + room);
            __syncwarp();
#pragma unroll UNROLLED
            for (int cell = lane; cell < (last - first) * height; cell += LANES) {
                const int j = cell * inverse >> 20;  // cell / height
                copy_async(f.table + cell, gram + f.rows[first + j] * WIDTH + f.columns[cell - j * height]);
            }
            wait_for_copies();
            __syncwarp();
#pragma unroll UNROLLED
            for (int j = first + half; j < last; j += HALVES) {
                const float* cells = f.table + (j - first) * height;
                float sum = 0;
#pragma unroll
                for (int b = 0; b < LENGTH; ++b) sum += cells[here[b]];
                f.field[j * OPTIONS + option] = sum;
            }
            if (lane >= first && lane < last) {
                const float* cells = f.table + (lane - first) * height;
#pragma unroll
                for (int b = 0; b < LENGTH; ++b) common += cells[b];
            }
        }
        __syncwarp();
        odd_cost += __shfl_sync(ALL, common, 0) - f.field[option];
        even_cost -= __shfl_sync(ALL, common, entries.place);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] += f.field[f.row[i * HALVES + half] + option];
        __syncwarp();
    }
}

// The same for codebooks, whose options are their kept codes: all of these products are needed.
template <int COUNT>
__device__ inline void add_products_of_two(const Frame& f, const float* __restrict__ gram, int pair, int incoming,
                                           float& even_cost, float& odd_cost, float (&values)[COUNT]) {
    const int option = threadIdx.x % SINGLE, half = threadIdx.x / SINGLE, even = 2 * pair, odd = even + 1;
    const int row = (even * SIZE + f.kept[even][option]) * WIDTH, column = odd * SIZE + f.kept[odd][option];
    const int old_row = (even * SIZE + __shfl_sync(ALL, incoming, even)) * WIDTH;
    const int old_column = odd * SIZE + __shfl_sync(ALL, incoming, odd);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = gram[__shfl_sync(ALL, row, 2 * i + half) + column];
    const float of_one = half ? gram[old_row + column] : gram[row + old_column];
    even_cost -= __shfl_sync(ALL, of_one, option);
    odd_cost += gram[old_row + old_column] - __shfl_sync(ALL, of_one, SINGLE + option);
}

// Merges groups of LENGTH codebooks pairwise.
template <int LENGTH>
__device__ inline void merge(Frame& f, const float* __restrict__ gram, int incoming) {
    constexpr int OPTIONS = options_of(LENGTH), HALVES = LANES / OPTIONS, COUNT = OPTIONS / HALVES;
    constexpr bool LAST = 2 * LENGTH == CODEBOOKS;
    constexpr int NEXT = LAST ? 1 : options_of(2 * LENGTH);
    const int lane = threadIdx.x, option = lane % OPTIONS, half = lane / OPTIONS;
#pragma unroll 1
    for (int pair = 0; pair < CODEBOOKS / 2 / LENGTH; ++pair) {
        float even_cost = f.cost[2 * pair * OPTIONS + option], odd_cost = f.cost[(2 * pair + 1) * OPTIONS + option];
        float values[COUNT] = {};
        if constexpr (LENGTH == 1) add_products_of_two(f, gram, pair, incoming, even_cost, odd_cost, values);
        else add_products<LENGTH>(f, gram, pair, incoming, even_cost, odd_cost, values);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] += odd_cost + __shfl_sync(ALL, even_cost, i * HALVES + half);
        if constexpr (LAST) {
            float lowest = values[0];
            int found = lane;
#pragma unroll
            for (int i = 1; i < COUNT; ++i)
                if (values[i] < lowest) {
                    lowest = values[i];
                    found = i * LANES + lane;
                }
            f.chosen[0] = __reduce_min_sync(ALL, lowest == warp_min(lowest) ? found : OPTIONS * OPTIONS);
        } else {
            select<NEXT>(values, f.candidates, [&](int n, float value, int options) {
                f.chosen[n] = options;
                f.cost[pair * NEXT + n] = value;  // in the place of groups already merged
            });
        }
        __syncwarp();
        const int chosen = f.chosen[lane % NEXT];
#pragma unroll
        for (int i = 0; i < 2 * LENGTH; ++i) {
            const int c = 2 * pair * LENGTH + i;
            const int slot = f.slot[c][option];
            f.slot[c][lane] = __shfl_sync(ALL, slot, i < LENGTH ? chosen / OPTIONS : chosen % OPTIONS);
        }
        __syncwarp();
    }
}

// Numbers 4 * lane to 4 * lane + 3 of every 128 of a row of SIZE: its order within a warp.
__device__ inline int centre(int i, int lane) { return i / 4 * 4 * LANES + 4 * lane + i % 4; }

__device__ inline void load_row(const float* row, int lane, float (&numbers)[SIZE / LANES]) {
#pragma unroll
    for (int i = 0; i < SIZE / LANES; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(row + centre(i, lane));
        numbers[i] = four.x;
        numbers[i + 1] = four.y;
        numbers[i + 2] = four.z;
        numbers[i + 3] = four.w;
    }
}

__device__ inline void store_row(const float (&numbers)[SIZE / LANES], int lane, float* row) {
#pragma unroll
    for (int i = 0; i < SIZE / LANES; i += 4) {
        const float4 four = {numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]};
        *reinterpret_cast<float4*>(row + centre(i, lane)) = four;
    }
}

// Passes for frames `active`: codes (frames, CODEBOOKS) -> better codes. `products` (rows of the grid, WIDTH): of what the
// codes leave of each frame with all centres, divided by its scale and centre_scale; `gram`: of all centres with all.
// While a pass changes no more than `most` codes, the products are brought up to date for the next one. `left` (frames):
// passes still to do; `again` (rows of the grid): whether they need new products.
extern "C" __global__ void __launch_bounds__(LANES, BLOCKS)
refine(float* products, const float* __restrict__ scale, float centre_scale, const float* __restrict__ half_norms,
       const float* __restrict__ gram, const int* __restrict__ active, int most, unsigned char* codes,
       int* left, unsigned char* again) {
    __shared__ Frame f;
    constexpr int COUNT = SIZE / LANES;
    const int lane = threadIdx.x, frame = active[blockIdx.x];
    codes += frame * CODEBOOKS;
    products += (long long)blockIdx.x * WIDTH;
    int incoming = lane < CODEBOOKS ? codes[lane] : 0, outgoing;
    const float unit = scale[blockIdx.x] * centre_scale;
    int passes = left[frame];
    unsigned changed;
    for (;;) {
#pragma unroll 1
        for (int c = 0; c < CODEBOOKS; ++c) {
            // Costs of the codebook's centres, given the other codebooks' codes.
            float costs[COUNT], product[COUNT], own[COUNT];
            load_row(half_norms + c * SIZE, lane, costs);
            load_row(products + c * SIZE, lane, product);
            load_row(gram + (c * SIZE + __shfl_sync(ALL, incoming, c)) * WIDTH + c * SIZE, lane, own);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) costs[i] -= unit * product[i] + own[i];
            select<SINGLE>(costs, f.candidates, [&](int n, float value, int place) {
                f.kept[c][n] = centre(place / LANES, place % LANES);
                f.cost[c * SINGLE + n] = value;
            });
            f.slot[c][lane] = lane;
        }
        __syncwarp();
        merge<1>(f, gram, incoming);
        if constexpr (CODEBOOKS > 2) merge<2>(f, gram, incoming);
        if constexpr (CODEBOOKS > 4) merge<4>(f, gram, incoming);
        if constexpr (CODEBOOKS > 8) merge<8>(f, gram, incoming);

        outgoing = lane < CODEBOOKS ? f.kept[lane][f.slot[lane][0]] : 0;
        changed = __ballot_sync(ALL, incoming != outgoing);
        --passes;
        if (!changed || !passes || __popc(changed) > most) break;
#pragma unroll 1
        for (int c = 0; c < CODEBOOKS; ++c) {
            float product[COUNT], moved[COUNT] = {};
#pragma unroll 1
            for (unsigned rest = changed; rest; rest &= rest - 1) {
                const int other = __ffs(rest) - 1;
                const int to = other * SIZE + __shfl_sync(ALL, outgoing, other);
                const int from = other * SIZE + __shfl_sync(ALL, incoming, other);
                float added[COUNT], removed[COUNT];
                load_row(gram + to * WIDTH + c * SIZE, lane, added);
                load_row(gram + from * WIDTH + c * SIZE, lane, removed);
#pragma unroll
                for (int i = 0; i < COUNT; ++i) moved[i] += added[i] - removed[i];
            }
            load_row(products + c * SIZE, lane, product);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) product[i] -= moved[i] / unit;
            store_row(product, lane, products + c * SIZE);
        }
        incoming = outgoing;
    }
    if (lane < CODEBOOKS) codes[lane] = outgoing;
    if (lane == 0) {
        left[frame] = passes;
        again[blockIdx.x] = changed && passes;
    }
}

__device__ inline float block_max(float value) {
    __shared__ float found[WARPS];
    value = warp_max(value);
    if (threadIdx.x % LANES == 0) found[threadIdx.x / LANES] = value;
    __syncthreads();
    value = found[0];
    for (int warp = 1; warp < WARPS; ++warp) value = fmaxf(value, found[warp]);
    return value;
}

// A frame's numbers, each as two float16: the nearest, and what is left, in units of a power of two. Written as (high,
// low, high) for a product with (high, high, low) of the centres: only low * low is left out. A thread reads the four
// numbers of every THREADS that it wrote itself.
__device__ inline void write_split(const float* numbers, float largest, int dim, unsigned short* split, float* scale) {
    const int exponent = largest > TINY ? ilogbf(largest) - HALF_RANGE : 0;
    const float inverse = ldexpf(1, -exponent);
    for (int d = 4 * threadIdx.x; d < dim; d += 4 * THREADS) {
        const float4 four = *reinterpret_cast<const float4*>(numbers + d);
        const float parts[4] = {four.x * inverse, four.y * inverse, four.z * inverse, four.w * inverse};
        unsigned short high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            high[i] = to_half(parts[i]);
            low[i] = to_half(parts[i] - from_half(high[i]));
        }
        const ushort4 highs = {high[0], high[1], high[2], high[3]}, lows = {low[0], low[1], low[2], low[3]};
        *reinterpret_cast<ushort4*>(split + d) = highs;
        *reinterpret_cast<ushort4*>(split + dim + d) = lows;
        *reinterpret_cast<ushort4*>(split + 2 * dim + d) = highs;
    }
    if (threadIdx.x == 0) *scale = ldexpf(1, exponent);
}

// Frames (frames, dim) -> standardised, and their splits. A number that is not finite, or beyond LARGE once standardised,
// becomes zero, and `bad` becomes 1.
extern "C" __global__ void __launch_bounds__(THREADS)
standardise(const float* __restrict__ frames, int dim, const float* __restrict__ mean,
            const float* __restrict__ deviation, float* standardised, unsigned short* split, float* scale, int* bad) {
    const long long frame = blockIdx.x;
    standardised += frame * dim;
    float largest = 0;
    for (int d = 4 * threadIdx.x; d < dim; d += 4 * THREADS)
        for (int i = d; i < d + 4; ++i) {
            float number = (frames[frame * dim + i] - mean[i]) / deviation[i];
            if (!(fabsf(number) < LARGE)) {
                number = 0;
                *bad = 1;
            }
            standardised[i] = number;
            largest = fmaxf(largest, fabsf(number));
        }
    write_split(standardised, block_max(largest), dim, split + frame * 3 * dim, scale + frame);
}

// The classifier's codes of each frame.
extern "C" __global__ void __launch_bounds__(THREADS)
classify(const float* __restrict__ logits, const float* __restrict__ scale, float weight_scale,
         const float* __restrict__ bias, unsigned char* codes) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const long long frame = blockIdx.x;
    const float unit = scale[frame] * weight_scale;
    for (int c = warp; c < CODEBOOKS; c += WARPS) {
        float products[SIZE / LANES], shift[SIZE / LANES], best = -INFINITY;
        int code = SIZE - 1;
        load_row(logits + frame * WIDTH + c * SIZE, lane, products);
        load_row(bias + c * SIZE, lane, shift);
#pragma unroll
        for (int i = 0; i < SIZE / LANES; ++i) {
            const float logit = products[i] * unit + shift[i];
            if (logit > best) {
                best = logit;
                code = centre(i, lane);
            }
        }
        const float highest = warp_max(best);
        code = __reduce_min_sync(ALL, best == highest ? code : SIZE);
        if (lane == 0) codes[frame * CODEBOOKS + c] = code;
    }
}

// The splits of what the codes leave of frames `active`. `residual` is room for as many frames.
extern "C" __global__ void __launch_bounds__(THREADS)
subtract(const float* __restrict__ standardised, int dim, const float* __restrict__ offset,
         const float* __restrict__ centres, const unsigned char* __restrict__ codes, const int* __restrict__ active,
         float* residual, unsigned short* split, float* scale) {
    __shared__ int places[CODEBOOKS];
    const long long row = blockIdx.x, frame = active[row];
    if (threadIdx.x < CODEBOOKS) places[threadIdx.x] = threadIdx.x * SIZE + codes[frame * CODEBOOKS + threadIdx.x];
    __syncthreads();
    standardised += frame * dim;
    residual += row * dim;
    float largest = 0;
    for (int d = 4 * threadIdx.x; d < dim; d += 4 * THREADS) {
        const float4 given = *reinterpret_cast<const float4*>(standardised + d);
        const float4 common = *reinterpret_cast<const float4*>(offset + d);
        float4 sum = {0, 0, 0, 0};
#pragma unroll
        for (int c = 0; c < CODEBOOKS; ++c) {
            const float4 four = *reinterpret_cast<const float4*>(centres + places[c] * (long long)dim + d);
            sum.x += four.x;
            sum.y += four.y;
            sum.z += four.z;
            sum.w += four.w;
        }
        const float4 left = {given.x - common.x - sum.x, given.y - common.y - sum.y, given.z - common.z - sum.z,
                             given.w - common.w - sum.w};
        *reinterpret_cast<float4*>(residual + d) = left;
        largest = fmaxf(largest, fmaxf(fmaxf(fabsf(left.x), fabsf(left.y)), fmaxf(fabsf(left.z), fabsf(left.w))));
    }
    write_split(residual, block_max(largest), dim, split + row * 3 * dim, scale + row);
}
