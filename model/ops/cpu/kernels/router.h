// Which experts a token goes to (DeepSeek-V2, arXiv 2405.04434, 2.2; V3, arXiv 2412.19437, 2.1.2). All in float32.
#pragma once

#include "abi.h"
#include "parallel.h"
#include "vector.h"

namespace ISA {

// Tokens and experts multiplied together: as many sums as registers hold.
#if defined(__AVX512F__)
constexpr int LOGIT_TOKENS = 4;
#else
constexpr int LOGIT_TOKENS = 2;
#endif
constexpr int LOGIT_EXPERTS = 4;
constexpr int64_t EXPERTS_A_JOB = 32;

// The workspace has three rows of this length for each token: its scores, what experts are chosen by, and its groups.
LATENTD_INLINE int64_t router_stride(int64_t experts) { return (experts + 15) / 16 * 16; }

inline size_t router_workspace(int64_t tokens, int64_t experts) {
    return size_t(3 * tokens * router_stride(experts)) * sizeof(float);
}

// The sum over d is made in the same order whatever the block is.
template <int TOKENS, int EXPERTS>
LATENTD_INLINE void logit_block(const bf16* x, int64_t ldx, const float* weight, int64_t d, float* logits,
                                int64_t ldl) {
    Float total[TOKENS][EXPERTS] = {};
    for (int64_t i = 0; i < d; i += LANES) {
        Float row[EXPERTS];
        for (int expert = 0; expert < EXPERTS; expert++) row[expert] = load(weight + expert * d + i);
        for (int token = 0; token < TOKENS; token++) {
            Float value = load(x + token * ldx + i);
            for (int expert = 0; expert < EXPERTS; expert++) total[token][expert] += value * row[expert];
        }
    }
    for (int token = 0; token < TOKENS; token++)
        for (int expert = 0; expert < EXPERTS; expert++) logits[token * ldl + expert] = sum(total[token][expert]);
}

template <int TOKENS>
inline void logit_rows(const bf16* x, int64_t ldx, const float* weight, int64_t d, int64_t experts, float* logits,
                       int64_t ldl) {
    for (; experts >= LOGIT_EXPERTS; experts -= LOGIT_EXPERTS, weight += LOGIT_EXPERTS * d, logits += LOGIT_EXPERTS)
        logit_block<TOKENS, LOGIT_EXPERTS>(x, ldx, weight, d, logits, ldl);
    for (; experts > 0; experts--, weight += d, logits++) logit_block<TOKENS, 1>(x, ldx, weight, d, logits, ldl);
}

inline void score(const latentd_router_shape* shape, float* scores) {
    int64_t padded = router_stride(shape->experts);
    for (int64_t expert = shape->experts; expert < padded; expert++) scores[expert] = -__builtin_inff();
    if (shape->sigmoid) {
        for (int64_t i = 0; i < padded; i += LANES)
            store(scores + i, splat(1.0f) / (splat(1.0f) + exp(-load(scores + i))));
        return;
    }
    Float peak = load(scores);
    for (int64_t i = LANES; i < padded; i += LANES) peak = max(peak, load(scores + i));
    Float top = splat(largest(peak)), total{};
    for (int64_t i = 0; i < padded; i += LANES) {
        Float power = exp(load(scores + i) - top);
        total += power;
        store(scores + i, power);
    }
    Float whole = splat(sum(total));
    for (int64_t i = 0; i < padded; i += LANES) store(scores + i, load(scores + i) / whole);
}

// All but the best groups' experts to -inf: a biased score may be below 0, so 0 would not keep them out.
inline void keep_best_groups(const latentd_router_shape* shape, float* choice, float* groups) {
    int64_t width = shape->experts / shape->groups;
    for (int64_t group = 0; group < shape->groups; group++) {
        float best = -__builtin_inff(), second = best;
        for (int64_t i = group * width; i < (group + 1) * width; i++) {
            float value = choice[i];
            second = value > best ? best : value > second ? value : second;
            best = value > best ? value : best;
        }
        groups[group] = shape->two_best_per_group ? best + second : best;
    }
    for (int64_t group = 0; group < shape->groups; group++) {
        int64_t better = 0;
        for (int64_t other = 0; other < shape->groups; other++)
            better += groups[other] > groups[group] || (groups[other] == groups[group] && other < group);
        if (better < shape->top_groups) continue;
        for (int64_t i = group * width; i < (group + 1) * width; i++) choice[i] = -__builtin_inff();
    }
}

// The `count` largest of `choice`, in descending order, the first of equals first. There are always as many different
// ones, be it that all are NaN. `values` [count] is overwritten.
inline void select_largest(const float* choice, int64_t experts, int64_t count, int32_t* selected, float* values) {
    int64_t found = 0;
    for (int64_t expert = 0; expert < experts; expert++) {
        float value = choice[expert];
        if (found == count && !(value > values[count - 1])) continue;
        int64_t place = found < count ? found++ : count - 1;
        for (; place > 0 && value > values[place - 1]; place--) {
            values[place] = values[place - 1];
            selected[place] = selected[place - 1];
        }
        values[place] = value;
        selected[place] = int32_t(expert);
    }
}

// Logits become scores; the bias steers the choice only, weights are the unbiased scores.
inline void choose(const latentd_router_shape* shape, const float* bias, float* scores, int32_t* experts,
                   float* weights) {
    int64_t per_token = shape->per_token, stride = router_stride(shape->experts);
    float *choice = scores + stride, *groups = choice + stride;
    score(shape, scores);
    for (int64_t expert = 0; expert < shape->experts; expert++)
        choice[expert] = bias ? scores[expert] + bias[expert] : scores[expert];
    if (shape->groups > 1) keep_best_groups(shape, choice, groups);
    select_largest(choice, shape->experts, per_token, experts, weights);
    float total = 0;
    for (int64_t i = 0; i < per_token; i++) total += weights[i] = scores[experts[i]];
    float divisor = shape->normalise && per_token > 1 ? total + 1e-20f : 1.0f;
    for (int64_t i = 0; i < per_token; i++) weights[i] = weights[i] / divisor * shape->scaling;
}

inline void router(const latentd_router_shape* shape, const uint16_t* x, int64_t ldx, int64_t tokens, int64_t d,
                   const float* weight, const float* bias, int32_t* experts, float* weights, void* workspace) {
    float* scores = static_cast<float*>(workspace);
    int64_t stride = 3 * router_stride(shape->experts);
    int64_t parts = (shape->experts + EXPERTS_A_JOB - 1) / EXPERTS_A_JOB;
    int64_t ranges = (tokens + latentd::SMALL_ROWS - 1) / latentd::SMALL_ROWS;
    latentd::fetch_while_waiting(latentd::next_call);
    latentd::parallel_for(ranges * parts, [&](int64_t job) {
        int64_t first = job % parts * EXPERTS_A_JOB;
        int64_t count = EXPERTS_A_JOB < shape->experts - first ? EXPERTS_A_JOB : shape->experts - first;
        int64_t token = job / parts * latentd::SMALL_ROWS;
        int64_t stop = token + latentd::SMALL_ROWS < tokens ? token + latentd::SMALL_ROWS : tokens;
        const float* rows = weight + first * d;
        for (; token + LOGIT_TOKENS <= stop; token += LOGIT_TOKENS)
            logit_rows<LOGIT_TOKENS>(x + token * ldx, ldx, rows, d, count, scores + token * stride + first, stride);
        for (; token < stop; token++)
            logit_rows<1>(x + token * ldx, ldx, rows, d, count, scores + token * stride + first, stride);
    });
    latentd::parallel_ranges(tokens, latentd::SMALL_ROWS, [&](int64_t start, int64_t stop) {
        for (int64_t token = start; token < stop; token++)
            choose(shape, bias, scores + token * stride, experts + token * shape->per_token,
                   weights + token * shape->per_token);
    });
}

}  // namespace ISA
