// What attention is called with, in one piece.
#pragma once

#include "abi.h"
#include "attention_page.h"
#include "parallel.h"
#include "product.h"

namespace ISA {

// The packed weights [n, k] of all heads, one behind the other.
struct HeadWeight {
    const bf16* data;
    int64_t heads, n, k;

    HeadWeight(const void* packed, int64_t heads, int64_t n, int64_t k)
        : data(static_cast<const bf16*>(packed)), heads(heads), n(n), k(k) {}

    // The panel of rows from `first` on, a multiple of 64.
    const bf16* rows(int64_t head, int64_t first) const {
        return data + (head * latentd::panels(n) + first / COLUMNS) * (k * latentd::PANEL);
    }

    // Columns [first, first + 64) of some rows' product with a head's weight. x [count, k], rows ldx apart; product
    // [count, 64]. After the head's last columns those of `next_head`, if there is one, are wanted.
    void multiply(int64_t head, int64_t first, const bf16* x, int64_t ldx, int64_t count, float* product,
                  int64_t next_head) const {
        const bf16* next = first + COLUMNS < n ? rows(head, first + COLUMNS) : rows(next_head, 0);
        panel_product(LATENTD_BF16, count, x, ldx * int64_t(sizeof(bf16)), rows(head, first), k, product, COLUMNS,
                      next_head < heads ? next : nullptr);
    }
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
