// Attention of up to 64 queries over 64 keys at a time, with an online softmax: what both forms are made of.
//
// Scores are made as keys times queries, so that keys are read as they lie in the cache, and that everything about a
// query, its largest score and its sum, is one lane of a register. A query's result depends on itself and its keys
// only.
#pragma once

#include "attention_layout.h"
#include "product.h"

namespace ISA {

// Finite, so that 2^(HIDDEN - x) is 0 for every score x, and 1 where nothing has been seen at all.
constexpr float HIDDEN = -1e30f;

// 2^x within 3e-6, far below what rounding probabilities to bf16 adds; 0 from -127 down, 1 at 0. x is below 127.
LATENTD_INLINE Float power_of_two(Float x) {
    x = max(splat(-127.0f), x);
    Float shifted = x + splat(12582912.0f);  // to the nearest whole number, by the rounding of the addition
    Float rest = x - (shifted - splat(12582912.0f));
    Float result = splat(9.5828529447e-3f) * rest + splat(5.5906426162e-2f);
    result = result * rest + splat(2.4024099112e-1f);
    result = result * rest + splat(6.9312417507e-1f);
    result = result * rest + splat(1.0f);
    return bits<Float>(bits<Uint>(result) + (bits<Uint>(shifted) << 23));
}

// What one thread needs while it attends.
struct PageScratch {
    bf16* queries;        // [width / 2][64][2]
    bf16* values;         // [32][64][2]
    float* scores;        // [64 keys][64 queries]; then pairs of probabilities, [32][64][2] bf16
    bf16* probabilities;  // [64 queries][64 keys]
    QuantisedGroup* rows;  // [TOKENS_A_JOB, groups of width]: a head's, for weights that want them so

    PageScratch(Arena& arena, int64_t width)
        : queries(arena.take<bf16>(width * QUERIES)),
          values(arena.take<bf16>(VALUE_BLOCK)),
          scores(arena.take<float>(KEYS * QUERIES)),
          probabilities(arena.take<bf16>(QUERIES * KEYS)),
          rows(arena.take<QuantisedGroup>(TOKENS_A_JOB * latentd::groups(width))) {}
};

// Queries attended together, and what they have seen.
struct QueryGroup {
    int64_t count, padded;      // padded to whole vectors
    int64_t pairs;              // half the width of queries and keys
    const bf16* queries;        // [pairs][padded][2]
    int64_t value_width;        // a multiple of 64
    float* sums;                // [count, value_width]: of values weighted with 2^(score - peak)
    bool fresh;                 // nothing seen yet: `sums` is not written
    int32_t visible[QUERIES];   // how many of the row's keys each sees
    float peak[QUERIES], total[QUERIES];  // largest score, sum of the weights

    void begin() {
        fresh = true;
        for (int64_t i = 0; i < padded; i++) peak[i] = HIDDEN, total[i] = 0;
    }

    // Queries of consecutive tokens, `heads` of each; the first token sees `first_visible` keys.
    void see(int64_t first_visible, int64_t heads, int64_t first_head) {
        for (int64_t i = 0; i < padded; i++)
            visible[i] = int32_t(first_visible + (first_head + smaller(i, count - 1)) / heads);
    }
};

#if defined(__AVX512F__)
constexpr int SCORE_SUMS = 16;  // vectors of sums in registers
#else
constexpr int SCORE_SUMS = 8;
#endif
constexpr int SCORE_VECTORS = 2;

// Scores [SUMS / VECTORS keys, VECTORS of queries]. As many numbers are brought near from `next` on as keys are read.
template <int VECTORS>
LATENTD_INLINE void score_keys(const bf16* keys, int64_t ldk, const bf16* queries, int64_t padded, int64_t pairs,
                               float* scores, const bf16* next) {
    constexpr int ROWS = SCORE_SUMS / VECTORS;
    Float total[ROWS][VECTORS] = {};
    for (int64_t pair = 0; pair < pairs; pair++, queries += 2 * padded, next += 2 * ROWS) {
        __builtin_prefetch(next, 0, 2);
        Uint column[VECTORS];
        for (int v = 0; v < VECTORS; v++) column[v] = load_as<Uint>(queries + 2 * LANES * v);
        for (int row = 0; row < ROWS; row++) {
            uint32_t both;
            memcpy(&both, keys + row * ldk + 2 * pair, sizeof both);
            Uint spread = splat_bits(both);
            for (int v = 0; v < VECTORS; v++) total[row][v] = dot_pairs(total[row][v], column[v], spread);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < VECTORS; v++) store(scores + row * padded + v * LANES, total[row][v]);
}

// Scores [keys, padded]; computed, and read, for keys to the next whole block.
inline void score_page(const QueryGroup& group, const bf16* keys, int64_t ldk, int64_t count, float* scores,
                       const bf16* next) {
    int64_t query = 0;
    for (; query + SCORE_VECTORS * LANES <= group.padded; query += SCORE_VECTORS * LANES)
        for (int64_t key = 0; key < count; key += SCORE_SUMS / SCORE_VECTORS)
            score_keys<SCORE_VECTORS>(keys + key * ldk, ldk, group.queries + 2 * query, group.padded, group.pairs,
                                      scores + key * group.padded + query, next + key * 2 * group.pairs);
    for (; query < group.padded; query += LANES)
        for (int64_t key = 0; key < count; key += SCORE_SUMS)
            score_keys<1>(keys + key * ldk, ldk, group.queries + 2 * query, group.padded, group.pairs,
                          scores + key * group.padded + query, next + key * 2 * group.pairs);
}

// Scores of one vector of queries become probabilities: pairs of keys, over the scores already read. `count` is even.
// Returns by how much what was summed before shrinks.
LATENTD_INLINE Float weigh(float* scores, int64_t padded, int64_t count, float scale, float* peak, float* total) {
    Float best = load(scores);
    for (int64_t key = 1; key < count; key++) best = max(best, load(scores + key * padded));
    Float old = load(peak), top = max(old, best * splat(scale));
    Float shrink = power_of_two(old - top), seen = load(total) * shrink;
    for (int64_t key = 0; key < count; key += 2) {
        Float first = power_of_two(load(scores + key * padded) * splat(scale) - top);
        Float second = power_of_two(load(scores + (key + 1) * padded) * splat(scale) - top);
        seen += first + second;
        // To the nearest bf16, ties upwards. A NaN stays one: those of bf16 numbers have nothing below to carry.
        Uint pair = (bits<Uint>(first) + 0x8000) >> 16 | ((bits<Uint>(second) + 0x8000) & 0xffff0000);
        memcpy(scores + key / 2 * padded, &pair, sizeof pair);
    }
    store(peak, top);
    store(total, seen);
    return shrink;
}

// Keys [count, 2 * pairs], ldk apart, the first of which is `first_key` of its row. values(column) gives 64 columns of
// their values from that one on in the tile's layout, [32][64][2]. Scores are multiplied with `scale` to be powers of
// two.
// Rows of keys beyond `count` are read up to 64 and may hold anything. `next`: keys that are wanted after these.
template <typename Values>
LATENTD_INLINE void attend_page(QueryGroup& group, const bf16* keys, int64_t ldk, int64_t first_key, int64_t count,
                                const Values& values, float scale, const PageScratch& scratch, const bf16* next) {
    float* scores = scratch.scores;
    float shrink[QUERIES];
    score_page(group, keys, ldk, count, scores, next);
    count += count % 2;
    bool any_hidden = group.visible[0] < first_key + count;  // the first sees least
    for (int64_t query = 0; query < group.padded; query += LANES) {
        if (any_hidden) {
            Int visible = load_as<Int>(group.visible + query) - int32_t(first_key);
            for (int64_t key = 0; key < count; key++) {
                float* score = scores + key * group.padded + query;
                store(score, visible > int32_t(key) ? load(score) : splat(-__builtin_inff()));
            }
        }
        float *peak = group.peak + query, *total = group.total + query;
        store(shrink + query, weigh(scores + query, group.padded, count, scale, peak, total));
    }
    transpose_pairs(reinterpret_cast<const bf16*>(scores), 2 * group.padded, count / 2, group.padded, KEYS / 2,
                    scratch.probabilities);
    if (!group.fresh) {
        for (int64_t query = 0; query < group.count; query++) {
            if (shrink[query] == 1.0f) continue;
            float* sums = group.sums + query * group.value_width;
            Float by = splat(shrink[query]);
            for (int64_t i = 0; i < group.value_width; i += LANES) store(sums + i, load(sums + i) * by);
        }
    }
    for (int64_t column = 0; column < group.value_width; column += COLUMNS)
        tile(group.count, scratch.probabilities, KEYS, values(column), count / 2, group.sums + column,
             group.value_width, !group.fresh);
    group.fresh = false;
}

}  // namespace ISA
