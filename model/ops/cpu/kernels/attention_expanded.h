// Expanded attention: keys and values of every head are rebuilt from the latents, a block of them at a time for as many
// heads as the workspace has room for, and serve all queries of the row; with many queries that is fewer operations.
#pragma once

#include "attention_step.h"

namespace ISA {

constexpr int64_t STATE_BYTES = 16 << 20;
constexpr int64_t EXPANDED_BYTES = 8 << 20;
constexpr int64_t EXPANDED_KEYS = 512;  // of one head they stay in a core's cache

class ExpandedAttention {
public:
    ExpandedAttention(Arena arena, const latentd_attention_shape& shape, int64_t tokens, int64_t keys)
        : key_width_(shape.nope + shape.rope),
          sum_width_(rounded_up(shape.value, COLUMNS)),
          tiles_((tokens + QUERIES - 1) / QUERIES) {
        int64_t state = tiles_ * QUERIES * (sum_width_ + 2);
        heads_ = smaller(shape.heads, larger(1, STATE_BYTES / (state * int64_t(sizeof(float)))));
        int64_t key = heads_ * (key_width_ + sum_width_) * int64_t(sizeof(bf16));
        block_keys_ = smaller(smaller(EXPANDED_KEYS, rounded_up(keys, KEYS)),
                              larger(KEYS, EXPANDED_BYTES / key / KEYS * KEYS));
        sums_ = arena.take<float>(heads_ * tiles_ * QUERIES * sum_width_);
        peaks_ = arena.take<float>(heads_ * tiles_ * QUERIES);
        totals_ = arena.take<float>(heads_ * tiles_ * QUERIES);
        keys_ = arena.take<bf16>(heads_ * block_keys_ * key_width_);
        values_ = arena.take<bf16>(heads_ * block_keys_ * sum_width_);
        quantised_ = arena.take<QuantisedGroup>(block_keys_ * latentd::groups(shape.rank));
        end_ = arena.at;
    }

    uintptr_t end() const { return end_; }

    // All tokens of a row.
    void attend(const AttentionStep& step, int64_t row, const PageScratch* scratch) {
        int64_t context = step.shape.context_lens[row];
        for (int64_t head = 0; head < step.shape.heads; head += heads_) {
            int64_t heads = smaller(heads_, step.shape.heads - head);
            for (int64_t key = 0; key < context; key += block_keys_) {
                int64_t stop = smaller(key + block_keys_, context), pages = (stop - key + KEYS - 1) / KEYS;
                if (step.expand.format != LATENTD_BF16)
                    latentd::parallel_for(pages, [&](int64_t page) {
                        int64_t first = key + page * KEYS;
                        step.expand.encode(step.page(row, first), step.latent_width(), smaller(KEYS, stop - first),
                                           nullptr, quantised_ + page * KEYS * latentd::groups(step.shape.rank));
                    });
                latentd::parallel_for(heads * pages, [&](int64_t index) {
                    int64_t page = key + index % pages * KEYS;
                    rebuild(step, row, head, index / pages, page, smaller(KEYS, stop - page), page - key,
                            scratch[latentd::thread_index()]);
                });
                // The last tile first: it sees most keys.
                latentd::parallel_for(heads * tiles_, [&](int64_t index) {
                    attend_tile(step, row, head, index / tiles_, tiles_ - 1 - index % tiles_, key, stop,
                                scratch[latentd::thread_index()]);
                });
            }
        }
    }

private:
    // Keys [first_key, first_key + count) of one head, to place `at` of the block.
    void rebuild(const AttentionStep& step, int64_t row, int64_t first_head, int64_t slot, int64_t first_key,
                 int64_t count, int64_t at, const PageScratch& scratch) {
        const auto& shape = step.shape;
        int64_t width = step.latent_width(), head = first_head + slot;
        const bf16* latents = step.page(row, first_key);
        bf16* keys = keys_ + (slot * block_keys_ + at) * key_width_;
        bf16* values = values_ + (slot * block_keys_ + at) * sum_width_;
        float* products = scratch.scores;
        Rows rows = {latents, width * int64_t(sizeof(bf16))};
        if (step.expand.format != LATENTD_BF16)
            rows = {quantised_ + at * latentd::groups(shape.rank), activation_bytes(step.expand.format, shape.rank)};
        for (int64_t column = 0; column < shape.nope; column += COLUMNS) {
            step.expand.multiply(head, column, rows, count, products, shape.heads);
            for (int64_t i = 0; i < count; i++)
                narrow(products + i * COLUMNS, smaller(COLUMNS, shape.nope - column), keys + i * key_width_ + column);
        }
        for (int64_t i = 0; i < count; i++)
            memcpy(keys + i * key_width_ + shape.nope, latents + i * width + shape.rank,
                   size_t(shape.rope) * sizeof(bf16));
        bf16* rounded = scratch.probabilities;
        for (int64_t column = 0; column < shape.value; column += COLUMNS) {
            step.value.multiply(head, column, rows, count, products, shape.heads);
            narrow(products, count * COLUMNS, rounded);
            pair_keys(rounded, COLUMNS, count, COLUMNS, values + column * KEYS);
        }
    }

    // 64 queries of one head over the keys of the block that they see.
    void attend_tile(const AttentionStep& step, int64_t row, int64_t first_head, int64_t slot, int64_t tile_index,
                     int64_t first_key, int64_t stop_key, const PageScratch& scratch) {
        const auto& shape = step.shape;
        int64_t token = shape.query_start[row] + tile_index * QUERIES, head = first_head + slot;
        int64_t count = smaller(QUERIES, shape.query_start[row + 1] - token);
        int64_t seen = step.visible(row, token + count - 1);
        if (seen <= first_key) return;
        int64_t state = (slot * tiles_ + tile_index) * QUERIES;
        QueryGroup group;
        group.count = count;
        group.padded = rounded_up(count, LANES);
        group.pairs = key_width_ / 2;
        group.queries = scratch.queries;
        group.value_width = sum_width_;
        group.sums = sums_ + state * sum_width_;
        group.begin();
        group.see(step.visible(row, token), 1, 0);
        if (first_key > 0) {
            group.fresh = false;
            memcpy(group.peak, peaks_ + state, sizeof group.peak);
            memcpy(group.total, totals_ + state, sizeof group.total);
        }
        transpose_pairs(step.nope(token, head), step.nope_token_stride, count, shape.nope / 2, group.padded,
                        scratch.queries);
        transpose_pairs(step.rope(token, head), step.rope_token_stride, count, shape.rope / 2, group.padded,
                        scratch.queries + shape.nope * group.padded);
        int64_t stop = smaller(stop_key, seen);
        for (int64_t key = first_key; key < stop; key += KEYS) {
            int64_t at = slot * block_keys_ + key - first_key;
            const bf16* keys = keys_ + at * key_width_;
            auto values = [&](int64_t column) { return values_ + at * sum_width_ + column * KEYS; };
            attend_page(group, keys, key_width_, key, smaller(KEYS, stop - key), values, step.scale(), scratch,
                        keys + KEYS * key_width_);
        }
        if (seen > stop_key) {
            memcpy(peaks_ + state, group.peak, sizeof group.peak);
            memcpy(totals_ + state, group.total, sizeof group.total);
            return;
        }
        for (int64_t i = 0; i < count; i++) {
            float* sums = group.sums + i * sum_width_;
            for (int64_t column = 0; column < sum_width_; column += LANES)
                store(sums + column, load(sums + column) / splat(group.total[i]));
            narrow(sums, shape.value, step.attended(token + i, head));
        }
    }

    int64_t key_width_, sum_width_, tiles_;
    int64_t heads_, block_keys_;  // at a time
    QuantisedGroup* quantised_;   // [block_keys_, groups of rank]: latents, for weights that want them so
    float* sums_;                 // [heads_, tiles_, 64, sum_width_]
    float *peaks_, *totals_;      // [heads_, tiles_, 64]
    bf16* keys_;                  // [heads_, block_keys_, key_width_]
    bf16* values_;                // [heads_, block_keys_ / 64][sum_width_ / 64][32][64][2]
    uintptr_t end_;
};

}  // namespace ISA
