// Weights [N, K] into panels, and the choice of scales. Done once, when a model is loaded.
#pragma once

#include "packed.h"
#include "parallel.h"
#include "vector.h"

namespace ISA {

using latentd::GROUP;
using latentd::PANEL;

// A group of as many rows as a vector has lanes: `values[k]` holds number k of every row.
struct GroupOfRows {
    Float values[GROUP];
};

// A scale a lane, and what an int4 scale is judged by: how much of the squares it explains.
struct Scales {
    Float scale, explained;
};

LATENTD_INLINE Float rounded(Float value) { return value + splat(12582912.0f) - splat(12582912.0f); }

LATENTD_INLINE Float magnitude(Float value) { return bits<Float>(bits<Uint>(value) & 0x7fffffff); }

// Of a scale that is 0, 0: all of its group is.
LATENTD_INLINE Float inverse(Float scale) { return scale == 0.0f ? Float{} : splat(1.0f) / scale; }

LATENTD_INLINE Float as_bf16(Float value) { return bits<Float>(__builtin_convertvector(to_bf16(value), Uint) << 16); }

// Numbers as the group counts them, its zero at 0. NaN becomes the lowest; the scale is NaN as well then.
LATENTD_INLINE Float counted(Float value, Float inverse_scale, float lowest, float highest) {
    return min(max(rounded(value * inverse_scale), splat(lowest)), splat(highest));
}

// The number of largest magnitude, with its sign. NaN where there is one.
LATENTD_INLINE Float extreme(const GroupOfRows& group) {
    Float best = group.values[0];
    for (int64_t k = 1; k < GROUP; k++) {
        Float value = group.values[k];
        best = magnitude(best) >= magnitude(value) || best != best ? best : value;
    }
    return best;
}

// Numbers of a group counted with a tried scale are q; the scale that fits those best is sum(w q) / sum(q q), and with
// it sum(w w) - sum(w q)^2 / sum(q q) is left as squared error.
LATENTD_INLINE Scales fitted(const GroupOfRows& group, Float tried) {
    Float inverse_scale = inverse(tried), products = {}, squares = {};
    for (int64_t k = 0; k < GROUP; k++) {
        Float q = counted(group.values[k], inverse_scale, -8.0f, 7.0f);
        products += group.values[k] * q;
        squares += q * q;
    }
    Float scale = products * inverse(squares);
    return {scale, products * scale};
}

// Four bits have 16 numbers, one more below 0 than above: both signs are tried, each with the extreme number between a
// bit outside of what can be counted and well inside.
LATENTD_INLINE Float int4_scale(const GroupOfRows& group) {
    Float largest = extreme(group);
    Scales best = fitted(group, largest * splat(-1.0f / 8.0f));
    for (int step = 0; step < 14; step++) {
        float reach = 5.5f + 0.25f * float(step);
        for (float sign = -1.0f; sign <= 1.0f; sign += 2.0f) {
            Scales other = fitted(group, largest * splat(sign / reach));
            Int better = other.explained > best.explained;
            best.scale = better ? other.scale : best.scale;
            best.explained = better ? other.explained : best.explained;
        }
    }
    return largest == largest ? best.scale : largest;
}

// Rows [first, first + LANES) of a panel; those from `rows` on are 0, and so are numbers from `count` on.
LATENTD_INLINE GroupOfRows read_group(const bf16* weight, int64_t rows, int64_t k, int64_t count, int64_t first) {
    float lines[GROUP][LANES] = {};
    for (int64_t row = first; row < first + LANES && row < rows; row++)
        for (int64_t i = 0; i < count; i++) lines[i][row - first] = to_float(weight[row * k + i]);
    GroupOfRows group;
    for (int64_t i = 0; i < GROUP; i++) group.values[i] = load(lines[i]);
    return group;
}

// What each of the rows is counted in, and its numbers, the zero added.
template <latentd_format FORMAT>
LATENTD_INLINE Float count_group(const GroupOfRows& group, Uint* numbers) {
    constexpr bool HALVES = FORMAT == LATENTD_INT4;
    constexpr float LOWEST = HALVES ? -8.0f : -127.0f, HIGHEST = HALVES ? 7.0f : 127.0f;
    Float scale = HALVES ? int4_scale(group) : magnitude(extreme(group)) * splat(1.0f / 127.0f);
    scale = as_bf16(scale);
    Float inverse_scale = inverse(scale);
    for (int64_t i = 0; i < GROUP; i++) {
        Float number = counted(group.values[i], inverse_scale, LOWEST, HIGHEST) + splat(latentd::zero_of(FORMAT));
        numbers[i] = bits<Uint>(__builtin_convertvector(number, Int));
    }
    return scale;
}

template <latentd_format FORMAT>
inline void pack_group(const bf16* weight, int64_t rows, int64_t k, int64_t count, uint8_t* to) {
    constexpr bool HALVES = FORMAT == LATENTD_INT4;
    bf16* scales = reinterpret_cast<bf16*>(to + latentd::weight_bytes(FORMAT, count));
    for (int64_t first = 0; first < PANEL; first += LANES) {
        GroupOfRows group = read_group(weight, rows, k, count, first);
        Uint numbers[GROUP];
        store(scales + first, count_group<FORMAT>(group, numbers));
        for (int64_t quad = 0; quad < count / 4; quad += HALVES ? 2 : 1) {
            Uint packed = {};
            for (int64_t i = 0; i < 4; i++) {
                packed |= numbers[4 * quad + i] << uint32_t(8 * i);
                if (HALVES) packed |= numbers[4 * quad + 4 + i] << uint32_t(8 * i + 4);
            }
            memcpy(to + (HALVES ? quad / 2 : quad) * 4 * PANEL + 4 * first, &packed, sizeof packed);
        }
    }
}

// Rows of the weight become k of the panel, as many as are left: each keeps its scale, and four of them lie beside each
// other.
inline void pack_inputs(const bf16* weight, int64_t rows, int64_t k, int64_t count, uint8_t* to) {
    bf16* scales = reinterpret_cast<bf16*>(to + latentd::weight_bytes(LATENTD_INT8_INPUTS, rows));
    for (int64_t first = 0; first < rows; first += LANES) {
        Uint numbers[GROUP];
        store(scales + first, count_group<LATENTD_INT8_INPUTS>(read_group(weight, rows, k, count, first), numbers));
        for (int64_t column = 0; column < PANEL; column++) {
            typedef uint8_t Bytes __attribute__((vector_size(LANES)));
            Bytes bytes = __builtin_convertvector(numbers[column], Bytes);
            for (int64_t i = 0; i < LANES; i += 4)
                memcpy(to + (first + i) * PANEL + 4 * column, reinterpret_cast<const uint8_t*>(&bytes) + i, 4);
        }
    }
}

inline void pack_pairs(const bf16* weight, int64_t rows, int64_t k, bf16* to) {
    for (int64_t pair = 0; pair < k / 2; pair++, to += 2 * PANEL) {
        for (int64_t row = 0; row < rows; row++) memcpy(to + 2 * row, weight + row * k + 2 * pair, 4);
        memset(to + 2 * rows, 0, size_t(4 * (PANEL - rows)));
    }
}

// weight [k, n]
inline void pack_transposed(const bf16* weight, int64_t n, int64_t k, uint8_t* packed) {
    latentd::parallel_for(latentd::panels(n), [=](int64_t panel) {
        uint8_t* to = packed + panel * latentd::panel_bytes(LATENTD_INT8_INPUTS, k);
        int64_t column = panel * PANEL, columns = n - column < PANEL ? n - column : PANEL;
        for (int64_t i = 0; i < k; i += GROUP, to += latentd::group_bytes(LATENTD_INT8_INPUTS, GROUP))
            pack_inputs(weight + i * n + column, k - i < GROUP ? k - i : GROUP, n, columns, to);
    });
}

inline void pack(latentd_format format, const bf16* weight, int64_t n, int64_t k, void* packed) {
    if (format == LATENTD_INT8_INPUTS) return pack_transposed(weight, n, k, static_cast<uint8_t*>(packed));
    latentd::parallel_for(latentd::panels(n), [=](int64_t panel) {
        const bf16* from = weight + panel * PANEL * k;
        uint8_t* to = static_cast<uint8_t*>(packed) + panel * latentd::panel_bytes(format, k);
        int64_t rows = n - panel * PANEL < PANEL ? n - panel * PANEL : PANEL;
        if (format == LATENTD_BF16) return pack_pairs(from, rows, k, reinterpret_cast<bf16*>(to));
        for (int64_t i = 0; i < k; i += GROUP, to += latentd::group_bytes(format, GROUP)) {
            int64_t count = k - i < GROUP ? k - i : GROUP;
            if (format == LATENTD_INT8) pack_group<LATENTD_INT8>(from + i, rows, k, count, to);
            else pack_group<LATENTD_INT4>(from + i, rows, k, count, to);
        }
    });
}

}  // namespace ISA
