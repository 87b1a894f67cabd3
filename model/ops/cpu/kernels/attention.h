// Attention of a step over the paged latent cache: each row absorbed or expanded, whichever needs fewer operations.
#pragma once

#include "attention_absorbed.h"
#include "attention_expanded.h"

namespace ISA {

// A row of so few tokens is absorbed whatever that costs: drafts get what they would have got one by one.
constexpr int64_t FEW_TOKENS = 16;

// Multiplications a head: expanding needs fewer for each pair of query and key, but rebuilds the cached keys too.
inline bool expanding_is_cheaper(const latentd_attention_shape& shape, int64_t row) {
    double tokens = shape.query_start[row + 1] - shape.query_start[row];
    double cached = shape.context_lens[row] - tokens;
    double pairs = tokens * (cached + tokens / 2);
    double saved = double(2 * shape.rank + shape.rope) - double(shape.nope + shape.rope + shape.value);
    return tokens > FEW_TOKENS && pairs * saved > cached * double(shape.rank) * double(shape.nope + shape.value);
}

// How the workspace is divided: scratch of every thread, then what one form needs after the other.
struct AttentionPlan {
    PageScratch* scratch;
    Arena rest;
    int64_t capacity;  // of a wave of absorbed tokens
    uintptr_t end;

    AttentionPlan(Arena arena, const latentd_attention_shape& shape, bool measure) {
        arena.at = uintptr_t(rounded_up(int64_t(arena.at), 64));
        scratch = arena.take<PageScratch>(latentd::num_threads);
        for (int64_t thread = 0; thread < latentd::num_threads; thread++) {
            PageScratch piece(arena, shape.rope + larger(shape.rank, shape.nope));
            if (!measure) scratch[thread] = piece;
        }
        rest = arena;
        end = arena.at;
        int64_t needed = 0, largest = 0;
        for (int64_t row = 0; row < shape.rows; row++) {
            int64_t token = shape.query_start[row], stop = shape.query_start[row + 1];
            if (expanding_is_cheaper(shape, row)) {
                ExpandedAttention expanded(rest, shape, stop - token, shape.context_lens[row]);
                end = expanded.end() > end ? expanded.end() : end;
                continue;
            }
            while (token < stop) {
                Span span(shape, row, token);
                needed += span.sums(shape.heads);
                largest = larger(largest, span.sums(shape.heads));
                token += span.tokens;
            }
        }
        capacity = wave_sums(needed, largest);
        AbsorbedAttention absorbed(rest, capacity, shape);
        end = absorbed.end() > end ? absorbed.end() : end;
    }
};

inline size_t attention_workspace(const latentd_attention_shape* shape) {
    return size_t(AttentionPlan(Arena{0}, *shape, true).end) + 64;  // wherever it begins
}

inline void attention(latentd_format format, const latentd_attention_shape* shape, int64_t layer,
                      const uint16_t* q_nope, int64_t nope_token_stride, int64_t nope_head_stride,
                      const uint16_t* q_rope, int64_t rope_token_stride, int64_t rope_head_stride,
                      const void* absorb, const void* expand, const void* value, uint16_t* output, void* workspace) {
    latentd_format transposed = format == LATENTD_BF16 ? LATENTD_BF16 : LATENTD_INT8_INPUTS;
    AttentionPlan plan(Arena{reinterpret_cast<uintptr_t>(workspace)}, *shape, false);
    AttentionStep step{*shape,
                       layer,
                       q_nope,
                       q_rope,
                       nope_token_stride,
                       nope_head_stride,
                       rope_token_stride,
                       rope_head_stride,
                       HeadWeight(transposed, absorb, shape->heads, shape->rank, shape->nope),
                       HeadWeight(format, expand, shape->heads, shape->nope, shape->rank),
                       HeadWeight(format, value, shape->heads, shape->value, shape->rank),
                       output};
    AbsorbedAttention absorbed(plan.rest, plan.capacity, *shape);
    int64_t row = 0;
    while (row < shape->rows) {
        int64_t first = row;
        while (row < shape->rows && !expanding_is_cheaper(*shape, row)) row++;
        absorbed.attend(step, first, row, plan.scratch);
        if (row == shape->rows) break;
        ExpandedAttention expanded(plan.rest, *shape, step.tokens_of(row), shape->context_lens[row]);
        expanded.attend(step, row, plan.scratch);
        row++;
    }
}

}  // namespace ISA
