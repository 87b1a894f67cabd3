// Rows of numbers into the layouts that attention multiplies, and workspace to hold them.
#pragma once

#include "tile.h"

namespace ISA {

constexpr int64_t KEYS = 64;     // of a cache block: what is attended to at a time
constexpr int64_t QUERIES = 64;  // attended together at most
constexpr int64_t TOKENS_A_JOB = 8 * TILE_ROWS;  // that meet a head's weights together

LATENTD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LATENTD_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LATENTD_INLINE int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Hands out memory piece by piece; started at 0 it measures how much is needed.
struct Arena {
    uintptr_t at;

    template <typename T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(at);
        at += size_t(rounded_up(count * int64_t(sizeof(T)), 64));
        return piece;
    }
};

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds it in its own intrinsics

// LANES x LANES numbers of 32 bits, their rows ld bytes apart; `to`'s rows are whole. Rows from `rows` on are 0,
// columns from `columns` on are neither read nor written.
LATENTD_INLINE void transpose_block(const char* from, int64_t ld, int64_t rows, int64_t columns, char* to,
                                    int64_t ldt) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
    __mmask16 read = __mmask16((1u << columns) - 1);
    for (int i = 0; i < 16; i++)
        a[i] = i < rows ? _mm512_maskz_loadu_epi32(read, from + i * ld) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i even = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        __m512i even_below = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        __m512i odd_below = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        b[i] = _mm512_shuffle_i32x4(even, even_below, 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
        b[i + 8] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
        b[i + 12] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
    }
    for (int i = 0; i < 16; i++)
        if (i < columns) _mm512_storeu_si512(to + i * ldt, b[i]);
#else
    for (int64_t column = 0; column < columns; column++) {
        uint32_t line[LANES] = {};
        for (int64_t row = 0; row < rows; row++) memcpy(line + row, from + row * ld + 4 * column, 4);
        memcpy(to + column * ldt, line, sizeof line);
    }
#endif
}

// Rows [rows, 2 * pairs], ld apart, to [pairs][padded][2], where rows that are missing to `padded`, whole vectors,
// are 0.
inline void transpose_pairs(const bf16* from, int64_t ld, int64_t rows, int64_t pairs, int64_t padded, bf16* to) {
    for (int64_t row = 0; row < padded; row += LANES)
        for (int64_t pair = 0; pair < pairs; pair += LANES)
            transpose_block(reinterpret_cast<const char*>(from + row * ld + 2 * pair), 2 * ld,
                            smaller(rows - row, LANES), smaller(pairs - pair, LANES),
                            reinterpret_cast<char*>(to + 2 * (pair * padded + row)), 4 * padded);
}

constexpr int64_t VALUE_BLOCK = KEYS * COLUMNS;

// Rows [keys, width <= 64], ld apart, to the tile's [keys / 2][64][2]; a missing second key is 0. Rows are read up to
// the next whole vector, columns beyond are left as they are.
inline void pair_keys(const bf16* from, int64_t ld, int64_t keys, int64_t width, bf16* to) {
    for (int64_t key = 0; key < keys; key += 2, from += 2 * ld, to += 2 * COLUMNS) {
        bool both = key + 1 < keys;
        int64_t column = 0;
#if defined(__AVX512BW__)
        for (; both && column + 32 <= width; column += 32) {
            __m512i first = _mm512_loadu_si512(from + column), second = _mm512_loadu_si512(from + ld + column);
            // Halves of 16 bytes are shuffled by themselves: quarters first, so that the columns stay in order.
            const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
            first = _mm512_permutexvar_epi64(order, first);
            second = _mm512_permutexvar_epi64(order, second);
            _mm512_storeu_si512(to + 2 * column, _mm512_unpacklo_epi16(first, second));
            _mm512_storeu_si512(to + 2 * column + 32, _mm512_unpackhi_epi16(first, second));
        }
#endif
        for (; column < width; column += LANES) {
            Uint pair = __builtin_convertvector(load_as<Half>(from + column), Uint);
            if (both) pair |= __builtin_convertvector(load_as<Half>(from + ld + column), Uint) << 16;
            memcpy(to + 2 * column, &pair, sizeof pair);
        }
    }
}

#pragma GCC diagnostic pop

inline void narrow(const float* from, int64_t count, bf16* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; i++) to[i] = to_bf16(from[i]);
}

}  // namespace ISA
