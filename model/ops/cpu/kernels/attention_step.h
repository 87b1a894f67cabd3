// What attention is called with, in one piece.
#pragma once

#include "abi.h"
#include "attention_page.h"
#include "parallel.h"
#include "product.h"

namespace ISA {

// Rows as a product reads them, so many bytes apart.
struct Rows {
    const void* data;
    int64_t stride;
};

// The packed weights [n, k] of all heads, one behind the other.
struct HeadWeight {
    latentd_format format;
    const uint8_t* data;
    int64_t heads, n, k;

    HeadWeight(latentd_format format, const void* packed, int64_t heads, int64_t n, int64_t k)
        : format(format), data(static_cast<const uint8_t*>(packed)), heads(heads), n(n), k(k) {}

    // That of rows from `first` on, a multiple of 64.
    const uint8_t* panel(int64_t head, int64_t first) const {
        return data + (head * latentd::panels(n) + first / COLUMNS) * latentd::panel_bytes(format, k);
    }

    latentd::Soon all() const { return {data, heads * latentd::panels(n) * latentd::panel_bytes(format, k)}; }

    // Rows x [count, k], ldx apart, for a product with a panel, or, but of LATENTD_INT8_INPUTS, with any. `space`
    // [count, groups of k] is where they go unless they serve as they are.
    Rows encode(const bf16* x, int64_t ldx, int64_t count, const uint8_t* panel, QuantisedGroup* space) const {
        if (format == LATENTD_BF16) return {x, ldx * int64_t(sizeof(bf16))};
        for (int64_t row = 0; row < count; row++, x += ldx) {
            QuantisedGroup* to = space + row * latentd::groups(k);
            if (format == LATENTD_INT8_INPUTS) quantise_scaled(x, k, panel, to);
            else quantise(x, k, latentd::zero_of(format), to);
        }
        return {space, activation_bytes(format, k)};
    }

    // Columns [first, first + 64) of some rows' product with a head's weight, [count, 64]. After the head's last columns
    // those of `next_head`, if there is one, are wanted.
    void multiply(int64_t head, int64_t first, const Rows& rows, int64_t count, float* product,
                  int64_t next_head) const {
        const uint8_t* next = first + COLUMNS < n ? panel(head, first + COLUMNS) : panel(next_head, 0);
        panel_product(format, count, rows.data, rows.stride, panel(head, first), k, product, COLUMNS,
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
