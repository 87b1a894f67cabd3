// What attention is called with, in one piece.
#pragma once

#include "abi.h"
#include "attention_page.h"
#include "packed.h"
#include "parallel.h"

namespace ISA {

// The packed weights [n, k] of all heads, one behind the other.
struct HeadWeight {
    const bf16* data;
    int64_t panel, head;  // how many numbers each has

    HeadWeight(const void* packed, int64_t n, int64_t k)
        : data(static_cast<const bf16*>(packed)),
          panel(latentd::panel_bytes(LATENTD_BF16, k) / int64_t(sizeof(bf16))),
          head(latentd::panels(n) * panel) {}

    // The panel of rows from `first` on, a multiple of 64.
    const bf16* rows(int64_t of_head, int64_t first) const { return data + of_head * head + first / COLUMNS * panel; }
};

struct AttentionStep {
    const latentd_attention_shape& shape;
    int64_t layer;
    const bf16 *q_nope, *q_rope;
    int64_t nope_token_stride, nope_head_stride, rope_token_stride, rope_head_stride;
    HeadWeight absorb, expand, value;
    bf16* output;

    int64_t latent_width() const { return shape.rank + shape.rope; }
    float scale() const { return shape.scale * 1.44269504f; }  // of scores that are powers of two
    int64_t tokens_of(int64_t row) const { return shape.query_start[row + 1] - shape.query_start[row]; }

    // How many keys a token of a row sees: those before it and itself.
    int64_t visible(int64_t row, int64_t token) const {
        return shape.context_lens[row] - (shape.query_start[row + 1] - 1 - token);
    }

    // The latents of the row's keys [first_key, first_key + 64), [64, rank + rope].
    const bf16* page(int64_t row, int64_t first_key) const {
        int64_t block = shape.block_tables[row * shape.max_blocks + first_key / KEYS];
        return shape.cache + (block * shape.layers + layer) * KEYS * latent_width();
    }

    const bf16* nope(int64_t token, int64_t head) const {
        return q_nope + token * nope_token_stride + head * nope_head_stride;
    }
    const bf16* rope(int64_t token, int64_t head) const {
        return q_rope + token * rope_token_stride + head * rope_head_stride;
    }
    bf16* attended(int64_t token, int64_t head) const {
        return output + (token * shape.heads + head) * shape.value;
    }
};

}  // namespace ISA
