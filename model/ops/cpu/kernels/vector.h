// A register of numbers, in the vector extensions of GCC and Clang: one source for every instruction set. Its width is
// the instruction set's own: compilers keep wider ones in memory. The few places where an instruction has no spelling
// in the language are marked; each has a plain twin that computes the same.
//
// Every instruction set's copy of this code lives in a namespace of its own (ISA, given by the build), and nothing of
// the standard library's templates is used in it: the linker would keep one copy for all, perhaps the wrong one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LATENTD_INLINE inline __attribute__((always_inline))
// Before loops over arrays of vectors: unrolled early they are registers, unrolled late they stay in memory too.
#if defined(__clang__)
#define LATENTD_UNROLL _Pragma("unroll")
#else
#define LATENTD_UNROLL _Pragma("GCC unroll 8")
#endif

namespace ISA {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;  // SSE2, NEON
#endif

using bf16 = uint16_t;
typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t Uint __attribute__((vector_size(4 * LANES)));
typedef int16_t Short __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));

template <typename V, typename T>
LATENTD_INLINE V load_as(const T* from) {
    V value;
    static_assert(sizeof(V) % sizeof(T) == 0, "whole elements");
    memcpy(&value, from, sizeof value);
    return value;
}

LATENTD_INLINE Float load(const float* from) { return load_as<Float>(from); }
LATENTD_INLINE void store(float* to, Float value) { memcpy(to, &value, sizeof value); }
LATENTD_INLINE Float splat(float value) { return value - Float{}; }
LATENTD_INLINE Uint splat_bits(uint32_t value) { return value + Uint{}; }

template <typename To, typename From>
LATENTD_INLINE To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "reinterpreted, not converted");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

LATENTD_INLINE float to_float(bf16 value) {
    uint32_t wide = uint32_t(value) << 16;
    float result;
    memcpy(&result, &wide, sizeof result);
    return result;
}

LATENTD_INLINE Float load(const bf16* from) {
    return bits<Float>(__builtin_convertvector(load_as<Half>(from), Uint) << 16);
}

// Round to nearest, ties to even. A NaN stays one: the quiet bit is set, so that rounding cannot make it infinite.
LATENTD_INLINE bf16 to_bf16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    if ((wide & 0x7fffffff) > 0x7f800000) return bf16(wide >> 16 | 0x40);
    return bf16((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

LATENTD_INLINE Half to_bf16(Float value) {
#if defined(__AVX512BF16__)
    return bits<Half>(_mm512_cvtneps_pbh(bits<__m512>(value)));  // numbers below 1.2e-38 become 0
#else
    Uint wide = bits<Uint>(value);
    Uint rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
    Int is_nan = bits<Int>((wide & 0x7fffffff) > 0x7f800000);
    rounded = is_nan ? (wide >> 16 | 0x40) : rounded;
    return __builtin_convertvector(rounded, Half);
#endif
}

LATENTD_INLINE void store(bf16* to, Float value) {
    Half narrow = to_bf16(value);
    memcpy(to, &narrow, sizeof narrow);
}

// Sums and largest lanes by a fixed tree, whatever the compiler would prefer.
LATENTD_INLINE float sum(Float value) {
    float total[LANES];
    store(total, value);
    for (int64_t width = LANES / 2; width > 0; width /= 2)
        for (int64_t lane = 0; lane < width; lane++) total[lane] += total[lane + width];
    return total[0];
}

LATENTD_INLINE int32_t sum(Int value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32(bits<__m512i>(value));
#else
    int32_t total = 0;
    for (int64_t lane = 0; lane < LANES; lane++) total += value[lane];
    return total;
#endif
}

LATENTD_INLINE float largest(Float value) {
    float best[LANES];
    store(best, value);
    for (int64_t width = LANES / 2; width > 0; width /= 2)
        for (int64_t lane = 0; lane < width; lane++)
            best[lane] = best[lane + width] > best[lane] ? best[lane + width] : best[lane];
    return best[0];
}

LATENTD_INLINE int32_t largest(Int value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32(bits<__m512i>(value));
#else
    int32_t best = value[0];
    for (int64_t lane = 1; lane < LANES; lane++) best = value[lane] > best ? value[lane] : best;
    return best;
#endif
}

LATENTD_INLINE Float max(Float a, Float b) { return a > b ? a : b; }
LATENTD_INLINE Float min(Float a, Float b) { return a < b ? a : b; }

// total + a.low * b.low + a.high * b.high, pairs of bf16 in 32 bits each: what every matrix product here is made of.
LATENTD_INLINE Float dot_pairs(Float total, Uint a, Uint b) {
#if defined(__AVX512BF16__)
    return bits<Float>(_mm512_dpbf16_ps(bits<__m512>(total), bits<__m512bh>(a), bits<__m512bh>(b)));
#else
    total += bits<Float>(a << 16) * bits<Float>(b << 16);
    return total + bits<Float>(a & 0xffff0000) * bits<Float>(b & 0xffff0000);
#endif
}

// a.low * b.low + a.high * b.high, pairs of 16-bit integers.
LATENTD_INLINE Int multiply_pairs(Short a, Short b) {
#if defined(__AVX512BW__)
    return bits<Int>(_mm512_madd_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    return bits<Int>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
    Int pairs_a = bits<Int>(a), pairs_b = bits<Int>(b);
    return (pairs_a << 16 >> 16) * (pairs_b << 16 >> 16) + (pairs_a >> 16) * (pairs_b >> 16);
#endif
}

// total + the dot product of four unsigned bytes of a with four signed bytes of b, in each 32 bits.
LATENTD_INLINE Int dot_bytes(Int total, Uint a, Uint b) {
#if defined(__AVX512VNNI__)
    return bits<Int>(_mm512_dpbusd_epi32(bits<__m512i>(total), bits<__m512i>(a), bits<__m512i>(b)));
#else
    // The even bytes, then the odd ones: the instruction for bytes would saturate.
    total += multiply_pairs(bits<Short>(a & 0x00ff00ff), bits<Short>(b) << 8 >> 8);
    return total + multiply_pairs(bits<Short>(a >> 8 & 0x00ff00ff), bits<Short>(b) >> 8);
#endif
}

// e^x within 2 units in the last place; 0 below -87, x above 88 is taken as 88. NaN gives NaN.
LATENTD_INLINE Float exp(Float x) {
    Int is_tiny = x < splat(-87.0f);
    x = x > splat(88.0f) ? splat(88.0f) : x;
    Float power = x * splat(1.44269504f);
    // To the nearest whole number, by the rounding of the addition.
    Float shifted = power + splat(12582912.0f);
    Float whole = shifted - splat(12582912.0f);
    Float rest = x - whole * splat(0.693359375f);  // ln 2 in two parts, so that the product is exact
    rest = rest - whole * splat(-2.12194440e-4f);
    Float result = splat(1.9875691500e-4f);  // Cephes' polynomial for e^rest, |rest| <= ln(2) / 2
    result = result * rest + splat(1.3981999507e-3f);
    result = result * rest + splat(8.3334519073e-3f);
    result = result * rest + splat(4.1665795894e-2f);
    result = result * rest + splat(1.6666665459e-1f);
    result = result * rest + splat(5.0000001201e-1f);
    result = result * rest * rest + rest + splat(1.0f);
    Int exponent = (bits<Int>(shifted) - bits<Int>(splat(12582912.0f))) << 23;
    Float scaled = bits<Float>(bits<Int>(result) + exponent);
    return is_tiny ? Float{} : scaled;
}

LATENTD_INLINE Float silu(Float x) { return x / (splat(1.0f) + exp(-x)); }

}  // namespace ISA
