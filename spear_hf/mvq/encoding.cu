// Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
//
// Encoding of the multi-codebook quantiser, the part between and after its two matrix products. A warp refines a frame
// alone; the other kernels have a block for each.
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
constexpr int COLUMNS = (CODEBOOKS < 8 ? 4 : CODEBOOKS / 2) * ENTRIES;
constexpr int GUESSES = 6;                 // of `select`, cheap ones
constexpr int HALF_RANGE = 13;             // splits have their largest number in 2^13 to 2^14
constexpr float TINY = 1e-30f;             // frames below are as good as zero
constexpr float LARGE = 1e15f;             // sums of squares of numbers below are finite

__device__ constexpr int options_of(int length) { return length < 4 ? 16 : 32; }  // refinement.cutoff(256, length)

struct alignas(8) Candidate {
    float value;
    int place;
};

// What a warp has in shared memory, of the frame it works on. The 32 lanes are one team, or two teams of 16, each with
// a pair of groups of its own.
struct Frame {
    union {
        float table[CELLS];                   // inner products of even entries with odd ones
        Candidate candidates[4 * MOST];       // of `select`
    };
    float field[ENTRIES * MOST];              // of even entries with odd options
    float common[2 * ENTRIES];                // of even entries with the incoming codes of the odd group
    float cost[CODEBOOKS * SINGLE];           // by group and option
    int row[LANES];                           // of `field`, by even option
    int rows[2 * ENTRIES];                    // of the Gram matrix, of entries of an even codebook: places of numbers
    unsigned short columns[COLUMNS];          // entries of the odd group: places of centres
    unsigned short chosen[2 * MOST];          // pairs of options that a merge keeps
    unsigned char kept[CODEBOOKS][SINGLE];    // codes by slot
    unsigned char slot[CODEBOOKS][MOST];      // by option of the codebook's group
};

// The first lane of this lane's team.
template <int TEAM>
__device__ inline int first_lane() { return threadIdx.x % LANES / TEAM * TEAM; }

// The team's part of a word that has TEAM bits of every team.
template <int TEAM>
__device__ inline unsigned own_bits(unsigned word) {
    if constexpr (TEAM == LANES) return word;
    else return word >> first_lane<TEAM>() & ((1u << TEAM) - 1);
}

template <int TEAM>
__device__ inline unsigned team_ballot(bool vote) { return own_bits<TEAM>(__ballot_sync(ALL, vote)); }

// Of small numbers.
template <int TEAM>
__device__ inline int team_sum(int value) { return own_bits<TEAM>(__reduce_add_sync(ALL, value << first_lane<TEAM>())); }

template <int TEAM>
__device__ inline float team_min(float value) {
#pragma unroll
    for (int step = TEAM / 2; step; step /= 2) value = fminf(value, __shfl_xor_sync(ALL, value, step));
    return value;
}

template <int TEAM>
__device__ inline float team_max(float value) { return -team_min<TEAM>(-value); }

// Of the team's lanes up to this one, this one included.
template <int TEAM>
__device__ inline int team_prefix(int value) {
#pragma unroll
    for (int step = 1; step < TEAM; step *= 2) {
        const int before = __shfl_up_sync(ALL, value, step);
        if (threadIdx.x % TEAM >= step) value += before;
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

// Halfway from `low` to `high`; whether that is a number between them.
__device__ inline bool halfway(float low, float high, float& middle) {
    middle = low + 0.5f * (high - low);
    return middle > low && middle < high;
}

// `put(n, value, place)`, n = 0 .. KEEP - 1, for the lowest values of a team, where values[i] of its lane l has the place
// i * TEAM + l. Which of equal ones at the bound are among them depends on nothing but the values. The teams of a warp go
// through the loops together; what one has found, further rounds leave as it is.
template <int KEEP, int TEAM, int COUNT, typename Put>
__device__ inline void select(const float (&values)[COUNT], Candidate* candidates, Put put) {
    constexpr int ROOM = 2 * KEEP;
    static_assert(COUNT <= ROOM - KEEP && COUNT * TEAM > ROOM);
    const int lane = threadIdx.x % TEAM;
    candidates += first_lane<TEAM>() / TEAM * ROOM;
    float lowest = values[0], highest = values[0];
#pragma unroll
    for (int i = 1; i < COUNT; ++i) {
        lowest = fminf(lowest, values[i]);
        highest = fmaxf(highest, values[i]);
    }
    // Fewer than KEEP values are <= low, and at least KEEP <= high.
    float low = team_min<TEAM>(lowest), bound = team_max<TEAM>(lowest), middle;
    float high = KEEP > TEAM ? team_max<TEAM>(highest) : bound;
    low -= 1e-6f * fabsf(low) + TINY;
    // A bound that the lowest values of about half of the lanes meet is a cheap guess.
    float left = low;
#pragma unroll
    for (int step = 0; step < GUESSES; ++step) {
        halfway(left, bound, middle);
        (__popc(team_ballot<TEAM>(lowest <= middle)) <= TEAM / 2 ? left : bound) = middle;
    }
    // From KEEP to ROOM values are <= bound.
    int own;
    bool tied, more;
    do {
        own = count_below(values, bound);
        const int all = team_sum<TEAM>(own);
        const bool fits = all >= KEEP && all <= ROOM;
        (all < KEEP ? low : high) = bound;
        more = !fits && halfway(low, high, middle);
        tied = !fits && !more;
        if (more) bound = middle;
    } while (__any_sync(ALL, more));
    if (__any_sync(ALL, tied)) {
        // Many equal ones: they are taken from the first lanes.
        const int below = count_below(values, low), equal = count_below(values, high) - below;
        const bool taken = team_sum<TEAM>(below) + team_prefix<TEAM>(equal) - equal < KEEP;
        if (tied) {
            bound = taken ? high : low;
            own = taken ? below + equal : below;
        }
    }
    const int n = team_prefix<TEAM>(own);
    const int all = __shfl_sync(ALL, n, first_lane<TEAM>() + TEAM - 1);
    Candidate* next = candidates + n - own;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (values[i] <= bound) *next++ = {values[i], i * TEAM + lane};
    __syncwarp();
    Candidate mine[ROOM / TEAM];
#pragma unroll
    for (int i = 0; i < ROOM / TEAM; ++i) {
        mine[i] = candidates[i * TEAM + lane];
        if (i * TEAM + lane >= all) mine[i].value = INFINITY;
    }
    while (__any_sync(ALL, halfway(low, high, middle))) {
        int below = 0;
#pragma unroll
        for (const Candidate& candidate : mine) below += __popc(team_ballot<TEAM>(candidate.value <= middle));
        (below < KEEP ? low : high) = middle;
        if (below == KEEP) low = high;
    }
    // First those that are <= low, then, if these are too few, those that are equal to `high`.
    int placed = 0;
    float from = -INFINITY, to = low;
    for (int round = 0; round < 2 && __any_sync(ALL, placed < KEEP); ++round, from = low, to = high) {
#pragma unroll
        for (const Candidate& candidate : mine) {
            const bool taken = candidate.value > from && candidate.value <= to;
            const unsigned lanes = team_ballot<TEAM>(taken);
            const int n = placed + __popc(lanes & ((1u << lane) - 1));
            if (taken && n < KEEP) put(n, candidate.value, candidate.place);
            placed += __popc(lanes);
        }
    }
}

// The kept codes of a codebook in use that differ from the incoming one.
struct Entries {
    int count, place, code;  // of this lane's option: its place among them, from 1, or 0 if it has the incoming code
};

template <int TEAM>
__device__ inline Entries entries_of(const Frame& f, int c, int incoming) {
    const int slot = f.slot[c][threadIdx.x % TEAM], code = f.kept[c][slot];
    const unsigned bit = code == incoming ? 0 : 1u << slot;
    const unsigned used = own_bits<TEAM>(__reduce_or_sync(ALL, bit << first_lane<TEAM>()));
    return {__popc(used), bit ? 1 + __popc(used & (bit - 1)) : 0, code};
}

// What merging a pair of groups of LENGTH codebooks adds to the costs of its options: the inner products of the even
// options' differences from the incoming codes with the odd ones'. With e of an even option, o of an odd one, and the
// incoming codes e', o', that is e.o - e.o' - e'.o + e'.o'. The first goes to `values`, by even option, the others to the
// costs of the even and of the odd option of the lane. `incoming` is codebook `threadIdx.x`'s.
template <int LENGTH, int TEAM>
__device__ inline void add_products(Frame& f, const float* __restrict__ gram, int pair, int incoming,
                                    float& even_cost, float& odd_cost, float (&values)[TEAM]) {
    constexpr int TEAMS = LANES / TEAM;
    const int option = threadIdx.x % TEAM, team = threadIdx.x / TEAM;
    const int even = 2 * pair * LENGTH, odd = even + LENGTH;
    unsigned short* const columns = f.columns + team * (LENGTH * ENTRIES);
    int* const rows = f.rows + team * ENTRIES;
    float* const table = f.table + team * (CELLS / TEAMS);
    float* const field = f.field + team * (ENTRIES * TEAM) + option;
    float* const common = f.common + team * ENTRIES;
    int* const row = f.row + team * TEAM;
    int here[LENGTH], height = LENGTH;  // the first columns are the incoming codes
#pragma unroll
    for (int b = 0; b < LENGTH; ++b) {
        const int code = __shfl_sync(ALL, incoming, odd + b);
        const Entries entries = entries_of<TEAM>(f, odd + b, code);
        here[b] = entries.place ? height + entries.place - 1 : b;
        columns[here[b]] = (odd + b) * SIZE + entries.code;
        columns[b] = (odd + b) * SIZE + code;
        height += entries.count;
    }
    const int room = CELLS / TEAMS / height;  // even entries in the table at a time
    const unsigned inverse = (1 << 20) / height + 1;
#pragma unroll 1
    for (int a = 0; a < LENGTH; ++a) {
        const int code = __shfl_sync(ALL, incoming, even + a);
        const Entries entries = entries_of<TEAM>(f, even + a, code);
        rows[entries.place] = ((even + a) * SIZE + entries.code) * WIDTH;
        rows[0] = ((even + a) * SIZE + code) * WIDTH;
        row[option] = entries.place * TEAM;
#pragma unroll 1
        for (int first = 0; __any_sync(ALL, first <= entries.count); first += room) {
            const int last = min(entries.count + 1, first + room);
            __syncwarp();
#pragma unroll UNROLLED
            for (int cell = option; cell < (last - first) * height; cell += TEAM) {
                const int j = cell * inverse >> 20;  // cell / height
                copy_async(table + cell, gram + (rows[first + j] + columns[cell - j * height]));
            }
            wait_for_copies();
            __syncwarp();
#pragma unroll UNROLLED
            for (int j = first; j < last; ++j) {
                const float* cells = table + (j - first) * height;
                float sum = 0;
#pragma unroll
                for (int b = 0; b < LENGTH; ++b) sum += cells[here[b]];
                field[j * TEAM] = sum;
            }
            for (int j = first + option; j < last; j += TEAM) {
                const float* cells = table + (j - first) * height;
                float sum = 0;
#pragma unroll
                for (int b = 0; b < LENGTH; ++b) sum += cells[b];
                common[j] = sum;
            }
        }
        __syncwarp();
        odd_cost += common[0] - field[0];
        even_cost -= common[entries.place];
#pragma unroll
        for (int i = 0; i < TEAM; ++i) values[i] += field[row[i]];
        __syncwarp();
    }
}

// The same for codebooks, whose options are their kept codes: all of these products are needed.
__device__ inline void add_products_of_two(const Frame& f, const float* __restrict__ gram, int pair, int incoming,
                                           float& even_cost, float& odd_cost, float (&values)[SINGLE]) {
    const int option = threadIdx.x % SINGLE, even = 2 * pair, odd = even + 1;
    const int row = (even * SIZE + f.kept[even][option]) * WIDTH, column = odd * SIZE + f.kept[odd][option];
    const int old_row = (even * SIZE + __shfl_sync(ALL, incoming, even)) * WIDTH;
    const int old_column = odd * SIZE + __shfl_sync(ALL, incoming, odd);
#pragma unroll
    for (int i = 0; i < SINGLE; ++i) values[i] = gram[__shfl_sync(ALL, row, first_lane<SINGLE>() + i) + column];
    even_cost -= gram[row + old_column];
    odd_cost += gram[old_row + old_column] - gram[old_row + column];
}

// Merges groups of LENGTH codebooks pairwise.
template <int LENGTH>
__device__ inline void merge(Frame& f, const float* __restrict__ gram, int incoming) {
    constexpr int OPTIONS = options_of(LENGTH), TEAMS = LANES / OPTIONS, PAIRS = CODEBOOKS / 2 / LENGTH;
    constexpr bool LAST = PAIRS == 1;
    constexpr int NEXT = LAST ? 1 : options_of(2 * LENGTH), EACH = NEXT > OPTIONS ? NEXT / OPTIONS : 1;
    const int option = threadIdx.x % OPTIONS, team = threadIdx.x / OPTIONS;
    unsigned short* const chosen = f.chosen + team * MOST;
#pragma unroll 1
    for (int first = 0; first < PAIRS; first += TEAMS) {
        const int pair = min(first + team, PAIRS - 1);  // one alone is merged by every team
        float even_cost = f.cost[2 * pair * OPTIONS + option], odd_cost = f.cost[(2 * pair + 1) * OPTIONS + option];
        float values[OPTIONS] = {};
        if constexpr (LENGTH == 1) add_products_of_two(f, gram, pair, incoming, even_cost, odd_cost, values);
        else add_products<LENGTH>(f, gram, pair, incoming, even_cost, odd_cost, values);
#pragma unroll
        for (int i = 0; i < OPTIONS; ++i) values[i] += odd_cost + __shfl_sync(ALL, even_cost, team * OPTIONS + i);
        if constexpr (LAST) {
            float lowest = values[0];
            int found = option;
#pragma unroll
            for (int i = 1; i < OPTIONS; ++i)
                if (values[i] < lowest) {
                    lowest = values[i];
                    found = i * OPTIONS + option;
                }
            chosen[0] = __reduce_min_sync(ALL, lowest == team_min<OPTIONS>(lowest) ? found : OPTIONS * OPTIONS);
        } else {
            select<NEXT, OPTIONS>(values, f.candidates, [&](int n, float value, int options) {
                chosen[n] = options;
                f.cost[pair * NEXT + n] = value;  // in the place of groups already merged
            });
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2 * LENGTH; ++i) {
            const int c = 2 * pair * LENGTH + i, slot = f.slot[c][option];
            int next[EACH];
#pragma unroll
            for (int n = 0; n < EACH; ++n) {
                const int options = chosen[(n * OPTIONS + option) % NEXT];
                const int from = i < LENGTH ? options / OPTIONS : options % OPTIONS;
                next[n] = __shfl_sync(ALL, slot, team * OPTIONS + from);
            }
#pragma unroll
            for (int n = 0; n < EACH; ++n) f.slot[c][n * OPTIONS + option] = next[n];
        }
        __syncwarp();
    }
}

// Numbers 4 * lane to 4 * lane + 3 of every 4 * TEAM of a row of SIZE: its order within a team.
template <int TEAM>
__device__ inline int centre(int i, int lane) { return i / 4 * 4 * TEAM + 4 * lane + i % 4; }

template <int COUNT>
__device__ inline void load_row(const float* row, int lane, float (&numbers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(row + centre<SIZE / COUNT>(i, lane));
        numbers[i] = four.x;
        numbers[i + 1] = four.y;
        numbers[i + 2] = four.z;
        numbers[i + 3] = four.w;
    }
}

// A pass for frames `active`: codes (frames, CODEBOOKS) -> better codes. `products` (rows of the grid, WIDTH): of what the
// codes leave of each frame with all centres, divided by its scale and centre_scale; `gram`: of all centres with all.
// `again` (rows of the grid): whether a code has changed, so that another pass may change more.
extern "C" __global__ void __launch_bounds__(LANES, BLOCKS)
refine(const float* __restrict__ products, const float* __restrict__ scale, float centre_scale,
       const float* __restrict__ half_norms, const float* __restrict__ gram, const int* __restrict__ active,
       unsigned char* codes, unsigned char* again) {
    __shared__ Frame f;
    const int lane = threadIdx.x, frame = active[blockIdx.x];
    codes += frame * CODEBOOKS;
    products += (long long)blockIdx.x * WIDTH;
    const int incoming = lane < CODEBOOKS ? codes[lane] : 0;
    const float unit = scale[blockIdx.x] * centre_scale;
#pragma unroll 1
    for (int c = lane / SINGLE; c < CODEBOOKS; c += LANES / SINGLE) {
        // Costs of the codebook's centres, given the other codebooks' codes.
        float costs[SINGLE], product[SINGLE], own[SINGLE];
        load_row(half_norms + c * SIZE, lane % SINGLE, costs);
        load_row(products + c * SIZE, lane % SINGLE, product);
        load_row(gram + (c * SIZE + __shfl_sync(ALL, incoming, c)) * WIDTH + c * SIZE, lane % SINGLE, own);
#pragma unroll
        for (int i = 0; i < SINGLE; ++i) costs[i] -= unit * product[i] + own[i];
        select<SINGLE, SINGLE>(costs, f.candidates, [&](int n, float value, int place) {
            f.kept[c][n] = centre<SINGLE>(place / SINGLE, place % SINGLE);
            f.cost[c * SINGLE + n] = value;
        });
        f.slot[c][lane % SINGLE] = lane % SINGLE;
        __syncwarp();
    }
    merge<1>(f, gram, incoming);
    if constexpr (CODEBOOKS > 2) merge<2>(f, gram, incoming);
    if constexpr (CODEBOOKS > 4) merge<4>(f, gram, incoming);
    if constexpr (CODEBOOKS > 8) merge<8>(f, gram, incoming);

    const int outgoing = lane < CODEBOOKS ? f.kept[lane][f.slot[lane][0]] : 0;
    const unsigned changed = __ballot_sync(ALL, incoming != outgoing);
    if (lane < CODEBOOKS) codes[lane] = outgoing;
    if (lane == 0) again[blockIdx.x] = changed != 0;
}

__device__ inline float block_max(float value) {
    __shared__ float found[WARPS];
    value = team_max<LANES>(value);
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
                code = centre<LANES>(i, lane);
            }
        }
        const float highest = team_max<LANES>(best);
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
