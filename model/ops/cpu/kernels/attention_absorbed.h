// Absorbed attention (DeepSeek-V2, arXiv 2405.04434, 2.1.2): W_UK goes into the queries and W_UV behind the sum, so
// that all heads share one key, the latent as it lies in the cache.
//
// A row's keys are split among jobs by the number of keys alone, and what they found is put together in the order of
// the keys: a row's result does not depend on its neighbours. Tokens are taken in waves that the workspace has room
// for.
#pragma once

#include "attention_step.h"

namespace ISA {

constexpr int64_t SPLIT_KEYS = 512;
constexpr int64_t MAX_SPLITS = 64;
constexpr int64_t WAVE_SUMS = 8192;

// Keys of a split, where a token sees so many.
inline int64_t split_size(int64_t keys) {
    int64_t size = SPLIT_KEYS;
    while (size * MAX_SPLITS < keys) size *= 2;
    return size;
}

// Consecutive tokens of a row, as many as fill a query group (or one, whose heads are more) and have splits of the same
// size, over all keys they see.
struct Span {
    int64_t row, token, tokens;
    int64_t keys, split_keys, splits;

    Span(const latentd_attention_shape& shape, int64_t of_row, int64_t first_token)
        : row(of_row), token(first_token) {
        int64_t stop = shape.query_start[row + 1];
        tokens = smaller(larger(1, QUERIES / shape.heads), stop - token);
        int64_t before = shape.context_lens[row] - (stop - token);
        split_keys = split_size(before + 1);
        tokens = smaller(tokens, split_keys * MAX_SPLITS > before ? split_keys * MAX_SPLITS - before : tokens);
        keys = before + tokens;
        splits = (keys + split_keys - 1) / split_keys;
    }

    // Sums over part of the keys that are kept until they are put together.
    int64_t sums(int64_t heads) const { return tokens * heads * splits; }
};

// How many such sums a wave has room for; `needed` by all tokens together, `largest` by one span.
inline int64_t wave_sums(int64_t needed, int64_t largest) { return larger(largest, smaller(needed, WAVE_SUMS)); }

class AbsorbedAttention {
public:
    AbsorbedAttention(Arena arena, int64_t capacity, const latentd_attention_shape& shape)
        : capacity_(capacity),
          sum_width_(rounded_up(shape.rank, COLUMNS)),
          latents_(arena.take<bf16>(capacity * (shape.rank + shape.rope))),
          sums_(arena.take<float>(capacity * sum_width_)),
          peaks_(arena.take<float>(capacity)),
          totals_(arena.take<float>(capacity)),
          jobs_(arena.take<Job>(capacity)),
          tokens_(arena.take<Token>(capacity)),
          end_(arena.at) {}

    uintptr_t end() const { return end_; }

    // The tokens of consecutive rows.
    void attend(const AttentionStep& step, int64_t first_row, int64_t stop_row, const PageScratch* scratch) {
        int64_t row = first_row, token = step.shape.query_start[first_row];
        while (row < stop_row) {
            int64_t first_token = token, used = 0, jobs = 0;
            while (row < stop_row) {
                Span span(step.shape, row, token);
                if (used + span.sums(step.shape.heads) > capacity_) break;
                jobs = plan(span, step.shape.heads, first_token, used, jobs);
                used += span.sums(step.shape.heads);
                token += span.tokens;
                if (token == step.shape.query_start[row + 1]) row++;
            }
            run_wave(step, first_token, token - first_token, jobs, scratch);
        }
    }

private:
    // A group of queries over one split of the keys.
    struct Job {
        int64_t row, token;              // the span's first
        int64_t first_query, queries;    // of the wave, each token's heads in turn
        int64_t first_head;              // of the span's first token, that of the first query
        int64_t first_key, stop_key;
        int64_t sum;                     // where the first query's goes
        bool alone;                      // it is the only split: its results go to the place of the queries
    };

    // Where the sums of a token are: those of head h over split s at first + s * step + h.
    struct Token {
        int64_t first, step, splits;
    };

    int64_t plan(const Span& span, int64_t heads, int64_t first_token, int64_t used, int64_t jobs) {
        int64_t queries = span.tokens * heads;
        for (int64_t i = 0; i < span.tokens; i++)
            tokens_[span.token - first_token + i] = {used + i * heads, queries, span.splits};
        for (int64_t split = 0; split < span.splits; split++) {
            int64_t first_key = split * span.split_keys;
            for (int64_t query = 0; query < queries; query += QUERIES)
                jobs_[jobs++] = {span.row,
                                 span.token,
                                 (span.token - first_token) * heads + query,
                                 smaller(QUERIES, queries - query),
                                 query,
                                 first_key,
                                 smaller(first_key + span.split_keys, span.keys),
                                 used + split * queries + query,
                                 span.splits == 1};
        }
        return jobs;
    }

    void run_wave(const AttentionStep& step, int64_t first_token, int64_t tokens, int64_t jobs,
                  const PageScratch* scratch) {
        int64_t heads = step.shape.heads;
        int64_t parts = (tokens + TOKENS_A_JOB - 1) / TOKENS_A_JOB;
        auto by_head = [&](auto work) {
            latentd::parallel_for(heads * parts, [&](int64_t index) {
                int64_t first = index % parts * TOKENS_A_JOB;
                (this->*work)(step, first_token, first, smaller(TOKENS_A_JOB, tokens - first), index / parts,
                              latentd::likely_next(index) / parts, scratch[latentd::thread_index()]);
            });
        };
        latentd::fetch_while_waiting(step.value.all());
        by_head(&AbsorbedAttention::absorb);
        latentd::parallel_for(jobs, [&](int64_t index) {
            attend_split(step, jobs_[index], scratch[latentd::thread_index()]);
        });
        latentd::fetch_while_waiting(latentd::next_call);
        by_head(&AbsorbedAttention::finish);
    }

    // Queries of one head become latent ones.
    void absorb(const AttentionStep& step, int64_t first_token, int64_t first, int64_t count, int64_t head,
                int64_t next_head, const PageScratch& scratch) {
        const auto& shape = step.shape;
        int64_t width = step.latent_width(), stride = shape.heads * width;
        bf16* latents = latents_ + first * stride + head * width;
        const bf16* queries = step.nope(first_token + first, head);
        float products[TOKENS_A_JOB * COLUMNS];
        for (int64_t column = 0; column < shape.rank; column += COLUMNS) {
            const uint8_t* panel = step.absorb.panel(head, column);
            Rows rows = step.absorb.encode(queries, step.nope_token_stride, count, panel, scratch.rows);
            step.absorb.multiply(head, column, rows, count, products, next_head);
            for (int64_t i = 0; i < count; i++)
                narrow(products + i * COLUMNS, smaller(COLUMNS, shape.rank - column), latents + i * stride + column);
        }
        for (int64_t i = 0; i < count; i++)
            memcpy(latents + i * stride + shape.rank, step.rope(first_token + first + i, head),
                   size_t(shape.rope) * sizeof(bf16));
    }

    void attend_split(const AttentionStep& step, const Job& job, const PageScratch& scratch) {
        int64_t width = step.latent_width();
        QueryGroup group;
        group.count = job.queries;
        group.padded = rounded_up(job.queries, LANES);
        group.pairs = width / 2;
        group.queries = scratch.queries;
        group.value_width = sum_width_;
        group.sums = sums_ + job.sum * sum_width_;
        group.begin();
        group.see(step.visible(job.row, job.token), step.shape.heads, job.first_head);
        transpose_pairs(latents_ + job.first_query * width, width, job.queries, group.pairs, group.padded,
                        scratch.queries);
        const bf16* page = step.page(job.row, job.first_key);
        for (int64_t key = job.first_key; key < job.stop_key; key += KEYS) {
            int64_t count = smaller(KEYS, job.stop_key - key);
            const bf16* next = key + KEYS < job.stop_key ? step.page(job.row, key + KEYS) : page;
            auto values = [&](int64_t column) {
                pair_keys(page + column, width, count, smaller(COLUMNS, step.shape.rank - column), scratch.values);
                return scratch.values;
            };
            attend_page(group, page, width, key, count, values, step.scale(), scratch, next);
            page = next;
        }
        if (job.alone) {
            for (int64_t i = 0; i < job.queries; i++)
                divide(group.sums + i * sum_width_, group.total[i], step.shape.rank,
                       latents_ + (job.first_query + i) * width);
            return;
        }
        memcpy(peaks_ + job.sum, group.peak, size_t(job.queries) * sizeof(float));
        memcpy(totals_ + job.sum, group.total, size_t(job.queries) * sizeof(float));
    }

    static void divide(const float* sums, float total, int64_t rank, bf16* latent) {
        for (int64_t column = 0; column < rank; column += LANES) {
            float result[LANES];
            store(result, load(sums + column) / splat(total));
            narrow(result, smaller(LANES, rank - column), latent + column);
        }
    }

    // The sums of one head over all keys, as latents in the place of the queries, then as values.
    void finish(const AttentionStep& step, int64_t first_token, int64_t first, int64_t count, int64_t head,
                int64_t next_head, const PageScratch& scratch) {
        const auto& shape = step.shape;
        int64_t width = step.latent_width(), stride = shape.heads * width;
        bf16* latents = latents_ + first * stride + head * width;
        for (int64_t i = 0; i < count; i++)
            if (tokens_[first + i].splits > 1) merge(tokens_[first + i], head, shape.rank, latents + i * stride);
        Rows rows = step.value.encode(latents, stride, count, step.value.panel(head, 0), scratch.rows);
        float products[TOKENS_A_JOB * COLUMNS];
        for (int64_t column = 0; column < shape.value; column += COLUMNS) {
            step.value.multiply(head, column, rows, count, products, next_head);
            for (int64_t i = 0; i < count; i++)
                narrow(products + i * COLUMNS, smaller(COLUMNS, shape.value - column),
                       step.attended(first_token + first + i, head) + column);
        }
    }

    void merge(const Token& token, int64_t head, int64_t rank, bf16* latent) {
        float weights[MAX_SPLITS] = {};
        int64_t first = token.first + head;
        float peak = HIDDEN, total = 0;
        for (int64_t split = 0; split < token.splits; split++) {
            weights[split] = peaks_[first + split * token.step];
            peak = weights[split] > peak ? weights[split] : peak;
        }
        for (int64_t split = 0; split < token.splits; split += LANES)
            store(weights + split, power_of_two(load(weights + split) - splat(peak)));
        for (int64_t split = 0; split < token.splits; split++)
            total += weights[split] * totals_[first + split * token.step];
        for (int64_t column = 0; column < rank; column += LANES) {
            Float sum{};
            for (int64_t split = 0; split < token.splits; split++)
                sum += load(sums_ + (first + split * token.step) * sum_width_ + column) * splat(weights[split]);
            float result[LANES];
            store(result, sum / splat(total));
            narrow(result, smaller(LANES, rank - column), latent + column);
        }
    }

    int64_t capacity_, sum_width_;
    bf16* latents_;   // [tokens, heads, rank + rope]: queries, later results
    float* sums_;     // [capacity, sum_width_]
    float *peaks_, *totals_;
    Job* jobs_;
    Token* tokens_;
    uintptr_t end_;
};

}  // namespace ISA
