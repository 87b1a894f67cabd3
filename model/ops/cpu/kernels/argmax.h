// The token with the largest logit.
#pragma once

#include "abi.h"
#include "parallel.h"
#include "vector.h"

namespace ISA {

// One pass: of each piece only its largest is kept, and the best piece is searched again for the place.
inline int64_t argmax_row(const float* x, int64_t n) {
    constexpr int64_t PIECE = 32 * LANES;
    Float odd{};  // infinities and NaN leave NaN behind, all else 0
    float best = -__builtin_inff();
    int64_t place = 0;
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t stop = start + PIECE < n ? start + PIECE : n, i = start;
        Float top = splat(-__builtin_inff());
        for (; i + LANES <= stop; i += LANES) {
            Float value = load(x + i);
            odd += value - value;
            top = max(value, top);
        }
        float found = largest(top);
        for (; i < stop; i++) {
            odd[0] += x[i] - x[i];
            found = x[i] > found ? x[i] : found;
        }
        if (found > best) {
            best = found;
            place = start;
        }
    }
    if (!(sum(odd) == 0.0f)) return -1;
    while (x[place] != best) place++;
    return place;
}

inline void argmax(const float* x, int64_t m, int64_t n, int64_t* chosen) {
    latentd::parallel_ranges(m, 4, [&](int64_t row, int64_t stop) {
        for (; row < stop; row++) chosen[row] = argmax_row(x + row * n, n);
    });
}

}  // namespace ISA
