// C = A B of rows of activations with one panel of a packed weight, whatever its format.
//
// bf16 weights take bf16 activations as they are. Quantised weights take activations that are quantised too, each group
// of 64 with a scale of its own, so that the sum over a group is one of whole numbers, and exact. The sum over k
// runs in one order whatever the number of rows is: a row's result does not depend on which rows it is computed with.
#pragma once

#include "packed.h"
#include "tile.h"

namespace ISA {

using latentd::GROUP;
using latentd::PANEL;

// Weights of so many k of a panel, 16 KB, stay in the level 1 cache while the rows pass.
constexpr int64_t block_of(latentd_format format) { return format == LATENTD_BF16 ? 128 : 256; }

struct QuantisedGroup {
    int8_t values[GROUP];
    float scale;
    int32_t start;  // of a sum: weights are counted from -zero on, so -zero times the sum of the values
};

// One row of activations as a format's product reads it.
constexpr int64_t activation_bytes(latentd_format format, int64_t k) {
    return format == LATENTD_BF16 ? 2 * k : latentd::groups(k) * int64_t(sizeof(QuantisedGroup));
}

// A group of numbers, those from the row's end on 0. `zero` is what stands for a weight of 0. Where there is a NaN or an
// infinity the scale is one, and every sum that the group takes part in is NaN.
LATENTD_INLINE void quantise_group(const Float (&values)[GROUP / LANES], int zero, QuantisedGroup* to) {
    // Magnitudes compare as integers do, NaN above all.
    Int best{};
    for (Float value : values) {
        Int size = bits<Int>(value) & 0x7fffffff;
        best = size > best ? size : best;
    }
    int32_t most = largest(best);
    float reach = bits<float>(most);
    to->scale = reach / 127.0f;
    bool is_flat = most >= 0x7f800000 || reach < 1e-30f;  // only the scale says which
    Float inverse = splat(is_flat ? 0.0f : 127.0f / reach);
    Int sums{};
    for (int64_t v = 0; v < GROUP / LANES; v++) {
        Float value = values[v] * inverse + splat(12582912.0f);
        Int number = is_flat ? Int{} : bits<Int>(value) - 0x4b400000;  // the low bits of that sum are the number
        sums += number;
        typedef int8_t Bytes __attribute__((vector_size(LANES)));
        Bytes narrow = __builtin_convertvector(number, Bytes);
        memcpy(to->values + v * LANES, &narrow, sizeof narrow);
    }
    to->start = -zero * sum(sums);
}

// A row [k].
inline void quantise(const bf16* x, int64_t k, int zero, QuantisedGroup* to) {
    for (; k > 0; k -= GROUP, x += GROUP, to++) {
        Float values[GROUP / LANES] = {};
        for (int64_t i = 0; i < GROUP && i < k; i += LANES) values[i / LANES] = load(x + i);
        quantise_group(values, zero, to);
    }
}

// The same for a panel of LATENTD_INT8_INPUTS: numbers times the scales of its weights.
inline void quantise_scaled(const bf16* x, int64_t k, const uint8_t* panel, QuantisedGroup* to) {
    for (; k > 0; k -= GROUP, x += GROUP, to++, panel += latentd::group_bytes(LATENTD_INT8_INPUTS, GROUP)) {
        int64_t count = k < GROUP ? k : GROUP;
        const bf16* scales = reinterpret_cast<const bf16*>(panel + latentd::weight_bytes(LATENTD_INT8_INPUTS, count));
        Float values[GROUP / LANES] = {};
        for (int64_t i = 0; i < count; i += LANES) values[i / LANES] = load(x + i) * load(scales + i);
        quantise_group(values, latentd::zero_of(LATENTD_INT8_INPUTS), to);
    }
}

// Rows of A are lda groups apart.
template <int ROWS, latentd_format FORMAT>
LATENTD_INLINE void group_rows(const QuantisedGroup* a, int64_t lda, const uint8_t* b, int64_t k,
                               float* c, int64_t ldc, bool add, Ahead ahead) {
    constexpr int VECTORS = vectors_of(2 * ROWS);
    constexpr bool BYTES = FORMAT != LATENTD_INT4;  // a weight is one, or half a one
    constexpr int64_t LINE = 4 * PANEL, LINES = latentd::weight_bytes(FORMAT, GROUP) / LINE;
    for (int64_t first = 0; first < PANEL; first += VECTORS * LANES, ahead.lines = 0) {
        Float total[ROWS][VECTORS];
        LATENTD_UNROLL for (int row = 0; row < ROWS; row++)
            LATENTD_UNROLL for (int v = 0; v < VECTORS; v++)
                total[row][v] = add ? load(c + row * ldc + first + v * LANES) : Float{};
        const uint8_t* from = b + 4 * first;
        for (int64_t group = 0; group * GROUP < k; group++) {
            int64_t lines = k - group * GROUP < GROUP ? LINES / 2 : LINES;
            Int sum[ROWS][VECTORS];
            for (int row = 0; row < ROWS; row++)
                for (int v = 0; v < VECTORS; v++) sum[row][v] = Int{} + a[row * lda + group].start;
            for (int64_t line = 0; line < lines; line++, from += LINE) {
                ahead.fetch();
                Uint read[VECTORS];
                for (int v = 0; v < VECTORS; v++) read[v] = load_as<Uint>(from + 4 * v * LANES);
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
            const bf16* scales = reinterpret_cast<const bf16*>(from - 4 * first) + first;
            from += 2 * PANEL;
            for (int v = 0; v < VECTORS; v++) {
                Float scale = FORMAT == LATENTD_INT8_INPUTS ? splat(1.0f) : load(scales + v * LANES);
                for (int row = 0; row < ROWS; row++) {
                    Float both_scales = scale * splat(a[row * lda + group].scale);
                    total[row][v] += __builtin_convertvector(sum[row][v], Float) * both_scales;
                }
            }
        }
        LATENTD_UNROLL for (int row = 0; row < ROWS; row++)
            LATENTD_UNROLL for (int v = 0; v < VECTORS; v++) store(c + row * ldc + first + v * LANES, total[row][v]);
    }
}

// Rows of a tile where there are several: the sums over a group fill the registers, those over the groups are near. Up
// to TILE_ROWS that have no others beside them pass at once, so that the weights are one long stream.
constexpr int GROUP_ROWS = TILE_ROWS * 2 / 3;

template <latentd_format FORMAT>
inline void group_tile(int64_t rows, const QuantisedGroup* a, int64_t lda, const uint8_t* b, int64_t k,
                       float* c, int64_t ldc, bool add, Ahead ahead) {
    switch (rows) {
#if defined(__AVX512F__)
        case 6: group_rows<6, FORMAT>(a, lda, b, k, c, ldc, add, ahead); break;
        case 5: group_rows<5, FORMAT>(a, lda, b, k, c, ldc, add, ahead); break;
#endif
        case 4: group_rows<4, FORMAT>(a, lda, b, k, c, ldc, add, ahead); break;
        case 3: group_rows<3, FORMAT>(a, lda, b, k, c, ldc, add, ahead); break;
        case 2: group_rows<2, FORMAT>(a, lda, b, k, c, ldc, add, ahead); break;
        case 1: group_rows<1, FORMAT>(a, lda, b, k, c, ldc, add, ahead); break;
    }
}

// At most TILE_ROWS rows with the weights of `k` that begin at `b`.
inline void block_product(latentd_format format, int64_t rows, const char* a, int64_t lda, const uint8_t* b,
                          int64_t k, float* c, int64_t ldc, bool add, Ahead ahead) {
    if (format == LATENTD_BF16)
        return tile(rows, reinterpret_cast<const bf16*>(a), lda / 2, reinterpret_cast<const bf16*>(b), k / 2, c, ldc,
                    add, ahead);
    const QuantisedGroup* groups = reinterpret_cast<const QuantisedGroup*>(a);
    int64_t stride = lda / int64_t(sizeof(QuantisedGroup));
    auto product = format == LATENTD_INT8   ? group_tile<LATENTD_INT8>
                   : format == LATENTD_INT4 ? group_tile<LATENTD_INT4>
                                            : group_tile<LATENTD_INT8_INPUTS>;
    product(rows, groups, stride, b, k, c, ldc, add, ahead);
}

// Rows of A lie `lda` bytes apart, each activation_bytes long; those of C, 64 numbers each, ldc floats. `next`: the
// panel that is wanted after this one, or null.
//
// Rows pass block after block of weights. While they do, the first tiles of a block bring the next block from memory:
// short pieces are read as fast as long ones then, and memory is busy while registers are.
inline void panel_product(latentd_format format, int64_t rows, const void* a, int64_t lda, const void* panel, int64_t k,
                          float* c, int64_t ldc, const void* next) {
    const char* activations = static_cast<const char*>(a);
    const uint8_t* weights = static_cast<const uint8_t*>(panel);
    int64_t tile_rows = format == LATENTD_BF16 || rows <= TILE_ROWS ? TILE_ROWS : GROUP_ROWS;
    int64_t tiles = (rows + tile_rows - 1) / tile_rows, block = block_of(format);
    for (int64_t first = 0; first < k; first += block) {
        int64_t some = k - first < block ? k - first : block;
        const uint8_t* from = weights + latentd::panel_bytes(format, first);
        bool last = first + some == k;
        const uint8_t* following = last ? static_cast<const uint8_t*>(next) : from + latentd::panel_bytes(format, some);
        int64_t left = last ? k : k - first - some;
        int64_t wanted = following ? latentd::panel_bytes(format, left < block ? left : block) / 64 : 0;  // in lines
        int64_t steps = some / (format == LATENTD_BF16 ? 2 : format == LATENTD_INT4 ? 8 : 4);
        int64_t fetching = tiles < 4 ? tiles : 4, lines = (wanted + steps * fetching - 1) / (steps * fetching);
        for (int64_t tile = 0, row = 0, count; tile < tiles; tile++, row += count) {
            count = (rows - row + tiles - tile - 1) / (tiles - tile);  // of about equal size
            int64_t fetched = tile * steps * lines;
            Ahead ahead = {following + 64 * fetched, fetched < wanted ? lines : 0};
            block_product(format, count, activations + row * lda + activation_bytes(format, first), lda, from,
                          some, c + row * ldc, ldc, first > 0, ahead);
        }
    }
}

}  // namespace ISA
