// C = A B of rows of activations with one panel of a packed weight, whatever its format.
//
// bf16 weights take bf16 activations as they are. int8 and int4 weights take activations that are quantised too, each group
// of 32 with a scale of its own, so that the sum over a group is one of whole numbers, and exact. The sum over k runs in
// one order whatever the number of rows is: a row's result does not depend on which rows it is computed with.
#pragma once

#include "packed.h"
#include "tile.h"

namespace ISA {

using latentd::GROUP;
using latentd::PANEL;

// Weights of so many k of a panel stay in the level 1 cache while the rows pass.
constexpr int64_t K_BLOCK = 128;

struct QuantisedGroup {
    int8_t values[GROUP];
    float scale;
    int32_t sum;  // of the values: weights are counted from -zero on
};

// One row of activations as a format's product reads it.
constexpr int64_t activation_bytes(latentd_format format, int64_t k) {
    return format == LATENTD_BF16 ? 2 * k : k / GROUP * int64_t(sizeof(QuantisedGroup));
}

// A NaN or an infinity is in the scale, and so in every sum that the group takes part in.
inline void quantise(const bf16* x, int64_t k, QuantisedGroup* to) {
    for (; k > 0; k -= GROUP, x += GROUP, to++) {
        // Magnitudes compare as integers do, NaN above all.
        uint16_t best = 0;
        for (int64_t i = 0; i < GROUP; i++) {
            uint16_t size = x[i] & 0x7fff;
            best = size > best ? size : best;
        }
        float largest = to_float(best);
        float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
        Int sums = {};
        for (int64_t i = 0; i < GROUP; i += LANES) {
            Float value = load(x + i) * splat(inverse) + splat(12582912.0f);
            Int number = bits<Int>(value) - 0x4b400000;  // the low bits of that sum are the number
            sums += number;
            typedef int8_t Bytes __attribute__((vector_size(LANES)));
            Bytes narrow = __builtin_convertvector(number, Bytes);
            memcpy(to->values + i, &narrow, sizeof narrow);
        }
        int32_t lanes[LANES], sum = 0;
        memcpy(lanes, &sums, sizeof lanes);
        for (int64_t lane = 0; lane < LANES; lane++) sum += lanes[lane];
        to->scale = largest / 127.0f;
        to->sum = sum;
    }
}

// Rows of A are lda groups apart. BYTES: a weight is a byte (of int8, or of int4 spread out), or half a one. `zero` is what
// stands for a weight of 0.
template <int ROWS, bool BYTES>
LATENTD_INLINE void group_rows(const QuantisedGroup* a, int64_t lda, const uint8_t* b, int64_t groups, int zero, float* c,
                               int64_t ldc, bool add) {
    constexpr int VECTORS = vectors_of(2 * ROWS);
    constexpr int64_t WEIGHTS = PANEL * GROUP / (BYTES ? 1 : 2);
    for (int64_t first = 0; first < PANEL; first += VECTORS * LANES) {
        Float total[ROWS][VECTORS];
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < VECTORS; v++)
                total[row][v] = add ? load(c + row * ldc + first + v * LANES) : Float{};
        const uint8_t* from = b + 4 * first;
        for (int64_t group = 0; group < groups; group++, from += WEIGHTS + 2 * PANEL) {
            Int sum[ROWS][VECTORS];
            for (int row = 0; row < ROWS; row++)
                for (int v = 0; v < VECTORS; v++) sum[row][v] = Int{} - a[row * lda + group].sum * zero;
            for (int64_t line = 0; line < WEIGHTS / (4 * PANEL); line++) {
                Uint read[VECTORS];
                for (int v = 0; v < VECTORS; v++) {
                    const uint8_t* at = from + 4 * (line * PANEL + v * LANES);
                    read[v] = load_as<Uint>(at);
                    // With few rows the loop waits for memory; with more, the next lines come by themselves.
                    if (ROWS <= 2) __builtin_prefetch(at + PREFETCH_PAIRS * 4 * PANEL, 0, 3);
                }
                for (int half = 0; half < (BYTES ? 1 : 2); half++)
                    for (int row = 0; row < ROWS; row++) {
                        uint32_t four;
                        memcpy(&four, a[row * lda + group].values + 4 * (BYTES ? line : 2 * line + half), sizeof four);
                        Uint spread = splat_bits(four);
                        for (int v = 0; v < VECTORS; v++) {
                            Uint weights = BYTES ? read[v] : read[v] >> uint32_t(4 * half) & 0x0f0f0f0f;
                            sum[row][v] = dot_bytes(sum[row][v], weights, spread);
                        }
                    }
            }
            const bf16* scales = reinterpret_cast<const bf16*>(from - 4 * first + WEIGHTS) + first;
            for (int v = 0; v < VECTORS; v++) {
                Float scale = load(scales + v * LANES);
                for (int row = 0; row < ROWS; row++)
                    total[row][v] += __builtin_convertvector(sum[row][v], Float) * (scale * splat(a[row * lda + group].scale));
            }
        }
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < VECTORS; v++) store(c + row * ldc + first + v * LANES, total[row][v]);
    }
}

constexpr int GROUP_ROWS = TILE_ROWS / 2;

template <bool BYTES>
inline void group_tile(int64_t rows, const QuantisedGroup* a, int64_t lda, const uint8_t* b, int64_t groups, int zero,
                       float* c, int64_t ldc, bool add) {
    for (; rows >= GROUP_ROWS; rows -= GROUP_ROWS, a += GROUP_ROWS * lda, c += GROUP_ROWS * ldc)
        group_rows<GROUP_ROWS, BYTES>(a, lda, b, groups, zero, c, ldc, add);
    switch (rows) {
        case 2: group_rows<2, BYTES>(a, lda, b, groups, zero, c, ldc, add); break;
        case 1: group_rows<1, BYTES>(a, lda, b, groups, zero, c, ldc, add); break;
    }
}

// int4 groups as int8 ones, but that 8 stands for 0.
inline void spread_halves(const uint8_t* from, int64_t groups, uint8_t* to) {
    for (int64_t group = 0; group < groups; group++) {
        for (int64_t line = 0; line < GROUP / 8; line++)
            for (int64_t at = 0; at < 4 * PANEL; at += 4 * LANES, from += 4 * LANES) {
                Uint both = load_as<Uint>(from), low = both & 0x0f0f0f0f, high = both >> 4 & 0x0f0f0f0f;
                memcpy(to + 2 * line * 4 * PANEL + at, &low, sizeof low);
                memcpy(to + (2 * line + 1) * 4 * PANEL + at, &high, sizeof high);
            }
        memcpy(to + PANEL * GROUP, from, 2 * PANEL);
        from += 2 * PANEL;
        to += latentd::group_bytes(LATENTD_INT8);
    }
}

// Rows of A lie `lda` bytes apart, each activation_bytes long; those of C, 64 numbers each, ldc floats.
inline void panel_product(latentd_format format, int64_t rows, const void* a, int64_t lda, const void* panel, int64_t k,
                          float* c, int64_t ldc) {
    const uint8_t* b = static_cast<const uint8_t*>(panel);
    const QuantisedGroup* groups = static_cast<const QuantisedGroup*>(a);
    int zero = latentd::zero_of(format);
    int64_t group_stride = lda / int64_t(sizeof(QuantisedGroup));
    // One pass over k for a few rows: they read each weight once, and memory likes a long stream.
    int64_t block = rows <= (format == LATENTD_BF16 ? TILE_ROWS : GROUP_ROWS) ? k : K_BLOCK;
    for (int64_t first = 0; first < k; first += block) {
        int64_t some = k - first < block ? k - first : block;
        const uint8_t* from = b + latentd::panel_bytes(format, first);
        const QuantisedGroup* some_groups = groups + first / GROUP;
        if (format == LATENTD_BF16) {
            tile(rows, static_cast<const bf16*>(a) + first, lda / 2, reinterpret_cast<const bf16*>(from), some / 2, c, ldc,
                 first > 0);
        } else if (format == LATENTD_INT8) {
            group_tile<true>(rows, some_groups, group_stride, from, some / GROUP, zero, c, ldc, first > 0);
        } else if (rows <= GROUP_ROWS) {
            group_tile<false>(rows, some_groups, group_stride, from, some / GROUP, zero, c, ldc, first > 0);
        } else {
            alignas(64) uint8_t bytes[K_BLOCK / GROUP * latentd::group_bytes(LATENTD_INT8)];
            spread_halves(from, some / GROUP, bytes);
            group_tile<true>(rows, some_groups, group_stride, bytes, some / GROUP, zero, c, ldc, first > 0);
        }
    }
}

}  // namespace ISA
