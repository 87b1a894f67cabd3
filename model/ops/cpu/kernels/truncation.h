// Which ids of a row top_k, top_p and min_p leave: `truncate` of model/sampler.py, without sorting.
//
// Ids are ordered by how far their logit is below the largest one, a float that is not negative, so that its bits
// compare as it does. A place in that order is found digit by digit of those bits: how many ids, and how much of the
// mass, have each value of a digit tells in which of them the place lies.
#pragma once

#include "abi.h"
#include "vector.h"

namespace ISA {

constexpr uint32_t INFINITE = 0x7f800000;  // of ids that cannot be drawn

// Those nearer than `distance`, and the first so many of those as near.
struct Kept {
    uint32_t distance = UINT32_MAX;
    int64_t ties = 0;
    double mass = 0;

    // Of ids in ascending order, each once.
    LATENTD_INLINE bool take(uint32_t other) { return other < distance || (other == distance && ties-- > 0); }
};

// The distances of 64 ids from `start` on; those behind the row's end are infinite.
struct Distances {
    static constexpr int64_t COUNT = 64;
    uint32_t bits_of[COUNT];

    LATENTD_INLINE Distances(const float* x, int64_t n, int64_t start, float top) {
        float some[COUNT];
        const float* from = x + start;
        if (start + COUNT > n) {
            for (int64_t i = 0; i < COUNT; i++) some[i] = start + i < n ? x[start + i] : -__builtin_inff();
            from = some;
        }
        for (int64_t i = 0; i < COUNT; i += LANES) {
            Uint distance = bits<Uint>(splat(top) - load(from + i)) & 0x7fffffff;  // of zeros, one with a sign
            memcpy(bits_of + i, &distance, sizeof distance);
        }
    }

    LATENTD_INLINE Uint at(int64_t i) const { return load_as<Uint>(bits_of + i); }

    // Whether any of them is at most `limit`, or has `prefix` before its last `shift` bits.
    LATENTD_INLINE bool any_within(uint32_t limit) const {
        Int found{};
        for (int64_t i = 0; i < COUNT; i += LANES) found |= at(i) <= splat_bits(limit);
        return sum(found) != 0;
    }
    LATENTD_INLINE bool any_with(uint32_t prefix, int shift) const {
        Int found{};
        for (int64_t i = 0; i < COUNT; i += LANES) found |= at(i) >> uint32_t(shift) == splat_bits(prefix);
        return sum(found) != 0;
    }
};

class Truncation {
public:
    // The largest of the row is `top`; an id's mass is e^(-distance * scale).
    Truncation(const float* x, int64_t n, float top, float scale) : x_(x), n_(n), top_(top), scale_(scale) {}

    // top_k: 0 is no limit, and so is a top_p from 1 on. At least one id stays.
    Kept keep(int64_t top_k, double top_p) {
        if (top_k <= 0 || top_k >= n_) top_k = n_;
        if (top_k == n_ && !(top_p < 1.0)) return {};
        count_digit(0, 0, all_);
        if (!(top_p < 1.0)) return find(top_k, __builtin_inf());
        double total = 0;
        if (top_k < n_) total = find(top_k, __builtin_inf()).mass;
        else
            for (const Bin& bin : all_) total += bin.mass;
        return find(top_k, top_p * total);
    }

private:
    static constexpr int DIGITS = 3, SHIFTS[DIGITS + 1] = {20, 10, 0, 0};
    static constexpr int64_t BINS = 2048;

    struct Bin {
        double mass;
        int64_t count;
    };

    // Ids whose earlier digits are `prefix`, by the next one.
    void count_digit(int digit, uint32_t prefix, Bin (&bins)[BINS]) const {
        memset(bins, 0, sizeof bins);
        int shift = SHIFTS[digit], before = digit ? SHIFTS[digit - 1] : 31;
        uint32_t mask = (1u << (before - shift)) - 1;
        for (int64_t start = 0; start < n_; start += Distances::COUNT) {
            Distances distances(x_, n_, start, top_);
            if (!distances.any_with(prefix, before)) continue;
            float mass[Distances::COUNT];
            for (int64_t i = 0; i < Distances::COUNT; i += LANES) {
                Uint distance = distances.at(i);
                Float some = exp(bits<Float>(distance) * splat(-scale_));
                store(mass + i, distance < INFINITE ? some : Float{});
            }
            int64_t count = start + Distances::COUNT < n_ ? Distances::COUNT : n_ - start;
            for (int64_t i = 0; i < count; i++) {
                if (distances.bits_of[i] >> before != prefix) continue;
                Bin& bin = bins[distances.bits_of[i] >> shift & mask];
                bin.mass += double(mass[i]);
                bin.count++;
            }
        }
    }

    // The shortest beginning of the order that has so many ids or that mass.
    Kept find(int64_t ids, double mass) const {
        Kept kept;
        int64_t count = 0;  // of ids before the digit's value
        Bin bins[BINS];
        uint32_t prefix = 0;
        const Bin* found = nullptr;
        for (int digit = 0; digit < DIGITS; digit++) {
            if (digit) count_digit(digit, prefix, bins);
            const Bin* from = digit ? bins : all_;
            found = nullptr;
            for (const Bin* bin = from; bin < from + BINS; bin++) {
                if (!bin->count) continue;
                if (found) {  // it is not there
                    count += found->count;
                    kept.mass += found->mass;
                }
                found = bin;
                if (count + bin->count >= ids || kept.mass + bin->mass >= mass) break;
            }
            prefix = prefix << (digit ? SHIFTS[digit - 1] - SHIFTS[digit] : 0) | uint32_t(found - from);
        }
        kept.distance = prefix;
        double each = found->mass / double(found->count);
        while (kept.ties < found->count && count + kept.ties < ids && kept.mass < mass) {
            kept.ties++;
            kept.mass += each;
        }
        return kept;
    }

    const float* x_;
    int64_t n_;
    float top_, scale_;
    Bin all_[BINS];
};

}  // namespace ISA
