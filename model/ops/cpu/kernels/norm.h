// Embedding, RMS norm, and the latents' way into the cache. Widths of normed rows are multiples of 16.
#pragma once

#include "abi.h"
#include "parallel.h"
#include "vector.h"

namespace ISA {

// y may be x.
inline void rms_norm_row(const bf16* x, const bf16* weight, float eps, int64_t d, bf16* y) {
    Float squares{};
    for (int64_t i = 0; i < d; i += LANES) {
        Float value = load(x + i);
        squares += value * value;
    }
    Float scale = splat(1.0f / __builtin_sqrtf(sum(squares) / float(d) + eps));
    for (int64_t i = 0; i < d; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
}

inline void rms_norm(const uint16_t* x, int64_t ldx, const uint16_t* weight, float eps, int64_t m, int64_t d,
                     uint16_t* y, int64_t ldy) {
    latentd::parallel_ranges(m, latentd::SMALL_ROWS, [&](int64_t start, int64_t stop) {
        for (int64_t row = start; row < stop; row++) rms_norm_row(x + row * ldx, weight, eps, d, y + row * ldy);
    });
}

inline void gather(const uint16_t* table, const int64_t* index, int64_t m, int64_t d, uint16_t* y) {
    latentd::parallel_ranges(m, latentd::SMALL_ROWS, [&](int64_t row, int64_t stop) {
        for (; row < stop; row++) memcpy(y + row * d, table + index[row] * d, size_t(d) * sizeof(bf16));
    });
}

inline void rotation(const int64_t* positions, const float* frequencies, float amplitude, int64_t m, int64_t pairs,
                     float* cosines, float* sines) {
    latentd::parallel_ranges(m, latentd::SMALL_ROWS, [&](int64_t start, int64_t stop) {
        for (int64_t i = start * pairs; i < stop * pairs; i++) {
            float angle = float(positions[i / pairs]) * frequencies[i % pairs];
            cosines[i] = __builtin_cosf(angle) * amplitude;
            sines[i] = __builtin_sinf(angle) * amplitude;
        }
    });
}

// Every pair (x[2i], x[2i + 1]) turned by its angle. y may be x.
inline void rotate_pairs(const bf16* x, const float* cosines, const float* sines, int64_t pairs, bf16* y) {
    int64_t i = 0;
    for (; i + LANES <= pairs; i += LANES) {
        Uint both = load_as<Uint>(x + 2 * i);
        Float first = bits<Float>(both << 16), second = bits<Float>(both & 0xffff0000);
        Float cosine = load(cosines + i), sine = load(sines + i);
        Uint low = __builtin_convertvector(to_bf16(first * cosine - second * sine), Uint);
        Uint high = __builtin_convertvector(to_bf16(first * sine + second * cosine), Uint);
        Uint turned = low | high << 16;
        memcpy(y + 2 * i, &turned, sizeof turned);
    }
    for (; i < pairs; i++) {
        float first = to_float(x[2 * i]), second = to_float(x[2 * i + 1]);
        y[2 * i] = to_bf16(first * cosines[i] - second * sines[i]);
        y[2 * i + 1] = to_bf16(first * sines[i] + second * cosines[i]);
    }
}

inline void rope_and_cache(const latentd_attention_shape* shape, int64_t layer, const uint16_t* kv, int64_t ldkv,
                           const uint16_t* norm_weight, float eps, const float* cosines, const float* sines,
                           const int64_t* slot_mapping, uint16_t* q_rope, int64_t token_stride, int64_t head_stride) {
    int64_t rank = shape->rank, pairs = shape->rope / 2, size = shape->block_size;
    latentd::parallel_ranges(shape->tokens, latentd::SMALL_ROWS, [&](int64_t start, int64_t stop) {
        for (int64_t token = start; token < stop; token++) {
            int64_t slot = slot_mapping[token];
            int64_t row = ((slot / size) * shape->layers + layer) * size + slot % size;
            bf16* cached = shape->cache + row * (rank + 2 * pairs);
            const bf16* latent = kv + token * ldkv;
            const float *cosine = cosines + token * pairs, *sine = sines + token * pairs;
            rms_norm_row(latent, norm_weight, eps, rank, cached);
            rotate_pairs(latent + rank, cosine, sine, pairs, cached + rank);
            for (int64_t head = 0; head < shape->heads; head++) {
                bf16* query = q_rope + token * token_stride + head * head_stride;
                rotate_pairs(query, cosine, sine, pairs, query);
            }
        }
    });
}

}  // namespace ISA
