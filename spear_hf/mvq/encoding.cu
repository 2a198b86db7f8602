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
constexpr int FIELD_CELLS = 8 * ENTRIES * SINGLE;
constexpr int HALF_RANGE = 13;           // splits have their largest number in 2^13 to 2^14
constexpr float TINY = 1e-30f;             // frames below are as good as zero
constexpr float LARGE = 1e15f;             // sums of squares of numbers below are finite

__device__ constexpr int options_of(int length) { return length < 4 ? 16 : 32; }  // refinement.cutoff(256, length)

struct Shared {
    float table[CELLS];                    // inner products of even entries with odd ones
    float field[FIELD_CELLS];              // of even entries with odd options
    float common[COLUMNS];                 // of even entries with the incoming codes of the odd group
    float sums[CODEBOOKS / 2 * SINGLE * SINGLE > 1024 ? CODEBOOKS / 2 * SINGLE * SINGLE : 1024];
    float cost[CODEBOOKS][MOST];           // by group and option
    int start[CODEBOOKS], count[CODEBOOKS];
    int incoming[CODEBOOKS], outgoing[CODEBOOKS];
    unsigned short kept[CODEBOOKS][SINGLE];      // codes by slot
    unsigned short list[CODEBOOKS][ENTRIES];     // entries by codebook: places of centres
    unsigned short flat[2][COLUMNS];             // entries of even groups, of odd groups
    unsigned short chosen[CODEBOOKS / 2][MOST];  // pairs of options that a merge keeps
    unsigned char slot[2][CODEBOOKS][MOST];      // by codebook and option of its group
    unsigned char place[CODEBOOKS][MOST];        // entry, likewise
};

__device__ inline float warp_min(float value) {
    for (int step = 16; step; step /= 2) value = fminf(value, __shfl_xor_sync(ALL, value, step));
    return value;
}

__device__ inline float warp_max(float value) { return -warp_min(-value); }

template <int COUNT>
__device__ inline int warp_count(const float (&values)[COUNT], float bound) {
    unsigned count = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) count += values[i] <= bound;
    return __reduce_add_sync(ALL, count);
}

// `put(n, i)`, n = 0 .. KEEP - 1, for the lowest values of a warp; of equal ones at the bound those of lower i, then lane.
template <int KEEP, int COUNT, typename Put>
__device__ inline void select(const float (&values)[COUNT], Put put) {
    const int lane = threadIdx.x % LANES;
    float lowest = values[0];
#pragma unroll
    for (int i = 1; i < COUNT; ++i) lowest = fminf(lowest, values[i]);
    // At least KEEP values are <= high. The lanes' lowest tell cheaply about where the bound lies.
    const float low = warp_min(lowest);
    float high = warp_max(lowest), guess = low;
    if constexpr (KEEP < LANES) {
        for (;;) {
            const float middle = guess + 0.5f * (high - guess);
            if (!(middle > guess && middle < high)) break;
            const int lanes = __popc(__ballot_sync(ALL, lowest <= middle));
            if (lanes >= KEEP) high = middle;
            else guess = middle;
            if (lanes == KEEP) break;
        }
    }
    // `count` values, at most KEEP, are <= cut.
    float cut = -INFINITY, bottom = low;
    int count = 0;
    const auto probe = [&](float bound) {
        const int below = warp_count(values, bound);
        if (below > KEEP) {
            high = bound;
        } else {
            cut = bound;
            count = below;
        }
    };
    float middle = guess > low ? guess : low + 0.5f * (high - low);
    while (count < KEEP && middle > bottom && middle < high) {
        probe(middle);
        bottom = fmaxf(low, cut);
        middle = bottom + 0.5f * (high - bottom);
    }
    if (count < KEEP && cut < low) probe(low);

    int own = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) own += values[i] <= cut;
    int n = own;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const int before = __shfl_up_sync(ALL, n, step);
        if (lane >= step) n += before;
    }
    n -= own;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (values[i] <= cut) put(n++, i);
    if (count == KEEP) return;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const bool tie = values[i] > cut && values[i] <= high;
        const unsigned ties = __ballot_sync(ALL, tie);
        n = count + __popc(ties & ((1u << lane) - 1));
        if (tie && n < KEEP) put(n, i);
        count += __popc(ties);
    }
}

// Merges groups of LENGTH codebooks pairwise; the last merge writes `outgoing`. `slots` says which of s.slot is filled.
template <int LENGTH>
__device__ inline void merge(Shared& s, const float* __restrict__ gram, int slots) {
    constexpr int PAIRS = CODEBOOKS / 2 / LENGTH, OPTIONS = options_of(LENGTH), TEAMS = THREADS / OPTIONS;
    constexpr bool LAST = PAIRS == 1;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int option = threadIdx.x % OPTIONS, team = threadIdx.x / OPTIONS;

    // The entries in use of every codebook, and which of them each option has.
#pragma unroll UNROLLED
    for (int c = warp; c < CODEBOOKS; c += WARPS) {
        unsigned bit = 0;
        int code = 0;
        if (lane < OPTIONS) {
            const int slot = s.slot[slots][c][lane];
            code = s.kept[c][slot];
            if (code != s.incoming[c]) bit = 1u << slot;
        }
        const unsigned used = __reduce_or_sync(ALL, bit);
        const int place = bit ? 1 + __popc(used & (bit - 1)) : 0;
        if (lane < OPTIONS) {
            s.place[c][lane] = place;
            s.list[c][place] = c * SIZE + code;
        }
        if (lane == 0) {
            s.list[c][0] = c * SIZE + s.incoming[c];
            s.count[c] = 1 + __popc(used);
        }
    }
    __syncthreads();
#pragma unroll UNROLLED
    for (int c = warp; c < CODEBOOKS; c += WARPS) {
        const bool odd = c / LENGTH % 2;
        const unsigned before = lane < c && lane / LENGTH % 2 == odd ? s.count[lane] : 0;
        const int start = __reduce_add_sync(ALL, before);
        if (lane < s.count[c]) s.flat[odd][start + lane] = s.list[c][lane];
        if (lane == 0) s.start[c] = start;
    }
    __syncthreads();

    const auto rows = [&](int pair) {  // entries of the pair's odd group
        const int odd = (2 * pair + 1) * LENGTH, last = odd + LENGTH - 1;
        return s.start[last] + s.count[last] - s.start[odd];
    };
    int stride = 0;
    for (int pair = 0; pair < PAIRS; ++pair) stride = max(stride, rows(pair));
    // As many even codebooks at a time as there is room for: nearly always all.
    for (int first = 0, end; first < CODEBOOKS / 2; first = end) {
        const int origin = s.start[first / LENGTH * 2 * LENGTH + first % LENGTH];
        int columns = 0;
        for (end = first; end < CODEBOOKS / 2; ++end) {
            const int more = columns + s.count[end / LENGTH * 2 * LENGTH + end % LENGTH];
            if (more * stride > CELLS || more * OPTIONS > FIELD_CELLS) break;
            columns = more;
        }
#pragma unroll 1
        for (int pair = 0; pair < PAIRS; ++pair) {
            const int even = 2 * pair * LENGTH, odd = even + LENGTH;
            const int left = max(s.start[even], origin);
            const int right = min(s.start[odd - 1] + s.count[odd - 1], origin + columns);
            const unsigned short* places = s.flat[1] + s.start[odd];
            const int height = rows(pair);
            // Another warp begins with every pair, as pairs may have few columns.
#pragma unroll UNROLLED
            for (int column = left + (warp + pair) % WARPS; column < right; column += WARPS) {
                const float* products = gram + s.flat[0][column] * WIDTH;
                float* cells = s.table + (column - origin) * stride;
#pragma unroll 1
                for (int row = lane; row < height; row += LANES) copy_async(cells + row, products + places[row]);
            }
        }
        wait_for_copies();
        __syncthreads();
#pragma unroll 1
        for (int pair = 0; pair < PAIRS; ++pair) {
            const int even = 2 * pair * LENGTH, odd = even + LENGTH;
            const int left = max(s.start[even], origin);
            const int right = min(s.start[odd - 1] + s.count[odd - 1], origin + columns);
            int here[LENGTH], incoming[LENGTH];
#pragma unroll
            for (int b = 0; b < LENGTH; ++b) {
                incoming[b] = s.start[odd + b] - s.start[odd];
                here[b] = incoming[b] + s.place[odd + b][option];
            }
#pragma unroll UNROLLED
            for (int column = left + (team + pair) % TEAMS; column < right; column += TEAMS) {
                const float* cells = s.table + (column - origin) * stride;
                float sum = 0;
#pragma unroll
                for (int b = 0; b < LENGTH; ++b) sum += cells[here[b]];
                s.field[(column - origin) * OPTIONS + option] = sum;
            }
            for (int column = left + (threadIdx.x + pair * LANES) % THREADS; column < right; column += THREADS) {
                const float* cells = s.table + (column - origin) * stride;
                float sum = 0;
#pragma unroll
                for (int b = 0; b < LENGTH; ++b) sum += cells[incoming[b]];
                s.common[column - origin] = sum;
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int pair = 0; pair < PAIRS; ++pair) {
            const int even = 2 * pair * LENGTH;
            // With e of an even option, o of an odd one, and the incoming codes e', o', the product of the differences is
            // e.o - e.o' - e'.o + e'.o': the last two go with the odd cost, `of_even` with the even one.
            float odd_cost = first ? 0 : s.cost[2 * pair + 1][option], of_even = 0;
            int from[LENGTH];
#pragma unroll
            for (int a = 0; a < LENGTH; ++a) {
                const bool present = pair * LENGTH + a >= first && pair * LENGTH + a < end;
                from[a] = present ? s.start[even + a] - origin : -1;
                if (present) {
                    odd_cost += s.common[from[a]] - s.field[from[a] * OPTIONS + option];
                    of_even += s.common[from[a] + s.place[even + a][option]];
                }
            }
#pragma unroll UNROLLED
            for (int i = team; i < OPTIONS; i += TEAMS) {
                float* target = s.sums + (pair * OPTIONS + i) * OPTIONS + option;
                float sum = odd_cost - __shfl_sync(ALL, of_even, i);
#pragma unroll
                for (int a = 0; a < LENGTH; ++a)
                    if (from[a] >= 0) sum += s.field[(from[a] + s.place[even + a][i]) * OPTIONS + option];
                *target = sum + (first ? *target : s.cost[2 * pair][i]);
            }
        }
        __syncthreads();
    }

    constexpr int COUNT = OPTIONS * OPTIONS / LANES;
#pragma unroll 1
    for (int pair = warp; pair < PAIRS; pair += WARPS) {
        float values[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = s.sums[pair * OPTIONS * OPTIONS + i * LANES + lane];
        if constexpr (LAST) {
            float lowest = values[0];
            int found = lane;
#pragma unroll
            for (int i = 1; i < COUNT; ++i)
                if (values[i] < lowest) {
                    lowest = values[i];
                    found = i * LANES + lane;
                }
            found = __reduce_min_sync(ALL, lowest == warp_min(lowest) ? found : OPTIONS * OPTIONS);
            if (lane == 0) s.chosen[pair][0] = found;
        } else {
            select<options_of(2 * LENGTH)>(values, [&](int n, int i) {
                s.chosen[pair][n] = i * LANES + lane;
                s.cost[pair][n] = values[i];
            });
        }
    }
    __syncthreads();
    constexpr int NEXT = LAST ? 1 : options_of(2 * LENGTH);
#pragma unroll 1
    for (int place = threadIdx.x; place < CODEBOOKS * NEXT; place += THREADS) {
        const int c = place / NEXT, n = place % NEXT, pair = s.chosen[c / (2 * LENGTH)][n];
        const int slot = s.slot[slots][c][c / LENGTH % 2 ? pair % OPTIONS : pair / OPTIONS];
        if (LAST) s.outgoing[c] = s.kept[c][slot];
        else s.slot[1 - slots][c][n] = slot;
    }
    __syncthreads();
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
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
refine(float* products, const float* __restrict__ scale, float centre_scale, const float* __restrict__ half_norms,
       const float* __restrict__ gram, const int* __restrict__ active, int most, unsigned char* codes,
       int* left, unsigned char* again) {
    __shared__ Shared s;
    constexpr int COUNT = SIZE / LANES;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, frame = active[blockIdx.x];
    codes += frame * CODEBOOKS;
    products += (long long)blockIdx.x * WIDTH;
    if (threadIdx.x < CODEBOOKS) s.incoming[threadIdx.x] = codes[threadIdx.x];
    const float unit = scale[blockIdx.x] * centre_scale;
    int passes = left[frame];
    unsigned changed;
    for (;;) {
        for (int place = threadIdx.x; place < CODEBOOKS * SINGLE; place += THREADS)
            s.slot[0][place / SINGLE][place % SINGLE] = place % SINGLE;
        __syncthreads();
#pragma unroll 1
        for (int c = warp; c < CODEBOOKS; c += WARPS) {
            // Costs of the codebook's centres, given the other codebooks' codes.
            float costs[COUNT], product[COUNT], own[COUNT];
            load_row(half_norms + c * SIZE, lane, costs);
            load_row(products + c * SIZE, lane, product);
            load_row(gram + (c * SIZE + s.incoming[c]) * WIDTH + c * SIZE, lane, own);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) costs[i] -= unit * product[i] + own[i];
            select<SINGLE>(costs, [&](int n, int i) {
                s.kept[c][n] = centre(i, lane);
                s.cost[c][n] = costs[i];
            });
        }
        __syncthreads();
        merge<1>(s, gram, 0);
        if constexpr (CODEBOOKS > 2) merge<2>(s, gram, 1);
        if constexpr (CODEBOOKS > 4) merge<4>(s, gram, 0);
        if constexpr (CODEBOOKS > 8) merge<8>(s, gram, 1);

        changed = __ballot_sync(ALL, lane < CODEBOOKS && s.incoming[lane] != s.outgoing[lane]);
        --passes;
        if (!changed || !passes || __popc(changed) > most) break;
#pragma unroll 1
        for (int c = warp; c < CODEBOOKS; c += WARPS) {
            float product[COUNT], moved[COUNT] = {};
#pragma unroll 1
            for (unsigned rest = changed; rest; rest &= rest - 1) {
                const int other = __ffs(rest) - 1;
                float added[COUNT], removed[COUNT];
                load_row(gram + (other * SIZE + s.outgoing[other]) * WIDTH + c * SIZE, lane, added);
                load_row(gram + (other * SIZE + s.incoming[other]) * WIDTH + c * SIZE, lane, removed);
#pragma unroll
                for (int i = 0; i < COUNT; ++i) moved[i] += added[i] - removed[i];
            }
            load_row(products + c * SIZE, lane, product);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) product[i] -= moved[i] / unit;
            store_row(product, lane, products + c * SIZE);
        }
        __syncthreads();
        if (threadIdx.x < CODEBOOKS) s.incoming[threadIdx.x] = s.outgoing[threadIdx.x];
    }
    if (threadIdx.x < CODEBOOKS) codes[threadIdx.x] = s.outgoing[threadIdx.x];
    if (threadIdx.x == 0) {
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
