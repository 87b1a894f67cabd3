// C = A B for a few rows and 64 columns: the inner loop of linear layers, experts and both products of attention.
//
// A [rows, K] bf16, row-major. B is packed: [K / 2][64][2] bf16, pairs of consecutive k beside each other, so that one
// 32-bit lane of a register holds what `dot_pairs` multiplies. K is even. The sum over k runs from 0 upwards in pairs
// whatever the number of rows is: a row's result does not depend on which rows it is computed with.
#pragma once

#include "vector.h"

namespace ISA {

constexpr int64_t COLUMNS = 64;

// Accumulators of a row: with those of TILE_ROWS rows, B and A they fill the registers, 32 of AVX-512 and 16 of others.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6;
constexpr int vectors_of(int) { return 4; }
#else
constexpr int TILE_ROWS = 4;
constexpr int vectors_of(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
#endif

// Memory that will be read next: brought nearer, `lines` at each step, while registers are busy.
struct Ahead {
    const uint8_t* from;
    int64_t lines;

    LATENTD_INLINE void fetch() {
        for (int64_t line = 0; line < lines; line++, from += 64) __builtin_prefetch(from, 0, 2);
    }
};

// Rows of A are lda apart, those of C ldc. `add`: onto what C holds.
template <int ROWS>
LATENTD_INLINE void tile_rows(const bf16* a, int64_t lda, const bf16* b, int64_t pairs, float* c, int64_t ldc, bool add,
                              Ahead ahead) {
    constexpr int VECTORS = vectors_of(ROWS);
    for (int64_t first = 0; first < COLUMNS; first += VECTORS * LANES, ahead.lines = 0) {
        Float total[ROWS][VECTORS];
        LATENTD_UNROLL for (int row = 0; row < ROWS; row++)
            LATENTD_UNROLL for (int v = 0; v < VECTORS; v++)
                total[row][v] = add ? load(c + row * ldc + first + v * LANES) : Float{};
        const bf16* from = b + 2 * first;
        for (int64_t pair = 0; pair < pairs; pair++, from += 2 * COLUMNS) {
            ahead.fetch();
            Uint column[VECTORS];
            for (int v = 0; v < VECTORS; v++) column[v] = load_as<Uint>(from + 2 * LANES * v);
            for (int row = 0; row < ROWS; row++) {
                uint32_t both;
                memcpy(&both, a + row * lda + 2 * pair, sizeof both);
                Uint spread = splat_bits(both);
                for (int v = 0; v < VECTORS; v++) total[row][v] = dot_pairs(total[row][v], spread, column[v]);
            }
        }
        LATENTD_UNROLL for (int row = 0; row < ROWS; row++)
            LATENTD_UNROLL for (int v = 0; v < VECTORS; v++) store(c + row * ldc + first + v * LANES, total[row][v]);
    }
}

// Any number of rows.
inline void tile(int64_t rows, const bf16* a, int64_t lda, const bf16* b, int64_t pairs, float* c, int64_t ldc,
                 bool add, Ahead ahead = {}) {
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS, a += TILE_ROWS * lda, c += TILE_ROWS * ldc)
        tile_rows<TILE_ROWS>(a, lda, b, pairs, c, ldc, add, ahead);
    switch (rows) {
#if defined(__AVX512F__)
        case 5: tile_rows<5>(a, lda, b, pairs, c, ldc, add, ahead); break;
        case 4: tile_rows<4>(a, lda, b, pairs, c, ldc, add, ahead); break;
#endif
        case 3: tile_rows<3>(a, lda, b, pairs, c, ldc, add, ahead); break;
        case 2: tile_rows<2>(a, lda, b, pairs, c, ldc, add, ahead); break;
        case 1: tile_rows<1>(a, lda, b, pairs, c, ldc, add, ahead); break;
    }
}

}  // namespace ISA
