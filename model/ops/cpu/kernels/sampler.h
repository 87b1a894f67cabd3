// The next token of each row, greedy or drawn: `greedy` and `draw` of model/sampler.py.
#pragma once

#include "abi.h"
#include "parallel.h"
#include "truncation.h"

namespace ISA {

struct Largest {
    float value;
    int64_t place;
    bool is_odd;  // infinities or NaN are among them
};

// One pass: of each piece only its largest is kept, and the best piece is searched again for the place.
inline Largest largest_of(const float* x, int64_t n) {
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
    while (place < n && x[place] != best) place++;
    return {best, place, !(sum(odd) == 0.0f)};
}

inline void argmax(const float* x, int64_t m, int64_t n, int64_t* chosen) {
    latentd::parallel_ranges(m, 4, [&](int64_t row, int64_t stop) {
        for (; row < stop; row++) {
            Largest found = largest_of(x + row * n, n);
            chosen[row] = found.is_odd ? -1 : found.place;
        }
    });
}

constexpr uint64_t GOLDEN_GAMMA = 0x9E3779B97F4A7C15;

LATENTD_INLINE uint64_t mix64(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

// Of a uniform random number u between 0 and 1, which is never either: 1 - u.
LATENTD_INLINE double rest_of_uniform(uint64_t key, int64_t id) {
    return 1.0 - (double(mix64(key + uint64_t(id + 1) * GOLDEN_GAMMA) >> 11) + 0.5) * 0x1p-53;
}

// The id that arrives first: id i runs for -ln(u_i) / exp(below_i / temperature). Logarithm and exponential are
// computed only where bounds do not tell that another was faster: -ln(u) >= 1 - u, and the number whose bits are
// those of a float with y where its exponent belongs is at least 2^y. Those below min_p, relative to the largest, and
// those that are not kept do not run.
inline int64_t race(const float* x, int64_t n, Largest top, double temperature, double min_p, Kept kept, uint64_t key) {
    constexpr int64_t PIECE = Distances::COUNT;
    auto speed = [&](int64_t id) {
        double u = (double(mix64(key + uint64_t(id + 1) * GOLDEN_GAMMA) >> 11) + 0.5) * 0x1p-53;
        double weight = __builtin_exp(double(x[id] - top.value) / temperature);
        return weight >= min_p ? weight / -__builtin_log(u) : 0.0;
    };
    double binary = 1.4426950408889634 / temperature;
    float scale = binary < 1e38 ? float(binary) : 1e38f;
    int64_t chosen = top.place;
    double fastest = speed(chosen);
    for (int64_t start = 0; start < n; start += PIECE) {
        Distances distances(x, n, start, top.value);
        if (!distances.any_within(kept.distance)) continue;
        int64_t count = start + PIECE < n ? PIECE : n - start;
        double least[PIECE];
        float most[PIECE];
        for (int64_t i = 0; i < count; i++) {
            float y = (x[start + i] - top.value) * scale;
            int32_t raised = int32_t(((y > -126.0f ? y : -126.0f) + 127.0f) * 8388608.0f);
            memcpy(most + i, &raised, sizeof raised);
            most[i] *= 1.0001f;  // more than rounding takes away
            least[i] = rest_of_uniform(key, start + i);
        }
        for (int64_t i = 0; i < count; i++) {
            if (!kept.take(distances.bits_of[i]) || least[i] * fastest >= double(most[i])) continue;
            double found = speed(start + i);
            if (found > fastest) {
                fastest = found;
                chosen = start + i;
            }
        }
    }
    return chosen;
}

// Of a row that is not greedy.
inline int64_t draw_one(const float* x, int64_t n, Largest top, double temperature, int64_t top_k, double top_p,
                        double min_p, uint64_t key) {
    double slope = 1.0 / temperature;
    Kept kept = Truncation(x, n, top.value, slope < 1e38 ? float(slope) : 1e38f).keep(top_k, top_p);
    if (min_p > 0.0) {
        // What is farther has less than min_p for sure; of what is nearer the race computes it.
        float farthest = float(__builtin_fabs(__builtin_log(min_p)) * temperature * 1.000001);
        uint32_t limit = bits<uint32_t>(farthest);
        if (limit < kept.distance) kept = {limit, n};
    }
    return race(x, n, top, temperature, min_p, kept, key);
}

inline void draw(const float* x, int64_t m, int64_t n, const double* temperature, const int64_t* top_k,
                 const double* top_p, const double* min_p, const uint64_t* seed, const int64_t* position,
                 int64_t* chosen) {
    latentd::parallel_for(m, [&](int64_t row) {
        Largest top = largest_of(x + row * n, n);
        if (top.place == n || top.value == -__builtin_inff())
            chosen[row] = -1;
        else if (temperature[row] == 0.0)
            chosen[row] = top.place;
        else
            chosen[row] = draw_one(x + row * n, n, top, temperature[row], top_k[row], top_p[row], min_p[row],
                                   mix64(mix64(seed[row]) ^ uint64_t(position[row])));
    });
}

}  // namespace ISA
