// Mixture of experts: down(silu(gate x) * up x) of each token's experts, weighted, plus shared MLP and residual.
//
// Pairs of token and expert are sorted by expert, so that an expert's weights are read once for all its tokens. The
// shared MLP is the last expert, of weight 1 and perhaps another width, which every token has; a dense layer's MLP is
// one shared MLP and no experts. Nothing is added atomically: a token's experts are summed in ascending order, in
// float32, by the one job that owns its columns, so that its result does not depend on its neighbours.
#pragma once

#include "abi.h"
#include "parallel.h"
#include "product.h"

namespace ISA {

using latentd::panel_bytes;
using latentd::panels;
using latentd::panels_a_job;

constexpr int64_t ROWS_AT_ONCE = 48;    // their 64 columns of gate and up stay in the nearest cache
constexpr int64_t HALF = PANEL / 2;     // rows of gate, then as many of up, are a panel
constexpr int64_t ROWS_A_JOB = 192;     // a multiple of it: an expert that all tokens chose is not one thread's work
constexpr int64_t MIN_TOKENS_A_JOB = 64;
constexpr int64_t MANY_TOKENS = 64;     // weights stay in the cache for so many: a job takes one panel

struct MoeShape {
    int64_t tokens, d, width, experts, per_token, shared_width;

    int64_t slots() const { return per_token + (shared_width > 0); }
    int64_t all_experts() const { return experts + (shared_width > 0); }
};

struct Expert {
    int64_t first, rows;  // its pairs, in the order of tokens
    int64_t first_job;    // of the first phase
    int64_t width;
    const char *gate_up, *down;
    char* hidden;  // [rows, width in whole panels]: silu(gate x) * up x
};

// Where everything lies in the workspace, which is as large as bf16 rows need: those of other formats are shorter.
struct MoeLayout {
    size_t experts, places, tokens, weights, rows, hidden, sums, bytes = 0;

    explicit MoeLayout(const MoeShape& shape) {
        int64_t pairs = shape.tokens * shape.slots();
        int64_t hidden_numbers = shape.per_token * panels(shape.width) + panels(shape.shared_width);
        experts = take(shape.all_experts() * int64_t(sizeof(Expert)));
        places = take(pairs * int64_t(sizeof(int32_t)));
        tokens = take(pairs * int64_t(sizeof(int32_t)));
        weights = take(pairs * int64_t(sizeof(float)));
        rows = take(pairs * activation_bytes(LATENTD_BF16, panels(shape.d) * PANEL));
        hidden = take(shape.tokens * activation_bytes(LATENTD_BF16, hidden_numbers * PANEL));
        sums = take(shape.tokens * panels(shape.d) * PANEL * int64_t(sizeof(float)));
    }

private:
    size_t take(int64_t size) {
        size_t start = bytes;
        bytes += size_t(size + 63) / 64 * 64;
        return start;
    }
};

inline size_t moe_workspace(int64_t tokens, int64_t d, int64_t width, int64_t experts, int64_t per_token,
                            int64_t shared_width) {
    return MoeLayout({tokens, d, width, experts, per_token, shared_width}).bytes;
}

struct MoeWeights {
    const char *gate_up, *down, *shared_gate_up, *shared_down;
};

struct Moe {
    const latentd_format format;
    const MoeShape shape;
    const int64_t row_bytes;
    Expert* experts;
    int32_t* places;  // [tokens, slots]: where a token's pairs are
    int32_t* tokens;  // [pairs]
    float* weights;   // [pairs]
    char* rows;       // [pairs, d]
    char* hidden;
    float* sums;  // [panels of d, tokens, 64]
    int64_t job_panels = 1;  // of the first phase

    Moe(latentd_format format, const MoeShape& shape, void* workspace)
        : format(format), shape(shape), row_bytes(activation_bytes(format, shape.d)) {
        MoeLayout layout(shape);
        char* base = static_cast<char*>(workspace);
        experts = reinterpret_cast<Expert*>(base + layout.experts);
        places = reinterpret_cast<int32_t*>(base + layout.places);
        tokens = reinterpret_cast<int32_t*>(base + layout.tokens);
        weights = reinterpret_cast<float*>(base + layout.weights);
        rows = base + layout.rows;
        hidden = base + layout.hidden;
        sums = reinterpret_cast<float*>(base + layout.sums);
    }

    // Counting sort by expert. Returns the number of jobs of the first phase.
    int64_t sort(const int32_t* chosen, const float* chosen_weights, const MoeWeights& packed) {
        int64_t chosen_pairs = shape.tokens * shape.per_token;
        for (int64_t index = 0; index < shape.experts; index++) experts[index].rows = 0;
        for (int64_t pair = 0; pair < chosen_pairs; pair++) experts[chosen[pair]].rows++;
        int64_t gate_up_bytes = panels(2 * shape.width) * panel_bytes(format, shape.d);
        int64_t down_bytes = panels(shape.d) * panel_bytes(format, shape.width);
        int64_t first = 0, jobs = 0, wanted_panels = panels(shape.shared_width);
        for (int64_t index = 0; index < shape.experts; index++)
            wanted_panels += experts[index].rows ? panels(shape.width) : 0;
        if (shape.tokens <= MANY_TOKENS)
            job_panels = panels_a_job(wanted_panels, panel_bytes(format, shape.d), latentd::num_threads);
        char* next_hidden = hidden;
        for (int64_t index = 0; index < shape.all_experts(); index++) {
            Expert& expert = experts[index];
            if (index < shape.experts) {
                expert.width = shape.width;
                expert.gate_up = packed.gate_up + index * gate_up_bytes;
                expert.down = packed.down + index * down_bytes;
            } else {
                expert.rows = shape.tokens;
                expert.width = shape.shared_width;
                expert.gate_up = packed.shared_gate_up;
                expert.down = packed.shared_down;
            }
            expert.first = first;
            expert.first_job = jobs;
            expert.hidden = next_hidden;
            first += expert.rows;
            jobs += column_jobs(expert) * ranges(expert);
            next_hidden += expert.rows * hidden_bytes(expert);
            expert.rows = 0;
        }
        for (int64_t token = 0; token < shape.tokens; token++)
            for (int64_t slot = 0; slot < shape.slots(); slot++) {
                bool shared = slot == shape.per_token;
                Expert& expert = experts[shared ? shape.experts : chosen[token * shape.per_token + slot]];
                int64_t place = expert.first + expert.rows++;
                places[token * shape.slots() + slot] = int32_t(place);
                tokens[place] = int32_t(token);
                weights[place] = shared ? 1.0f : chosen_weights[token * shape.per_token + slot];
            }
        return jobs;
    }

    // Each token to all its pairs.
    void gather(const bf16* x, int64_t ldx) const {
        int64_t slots = shape.slots();
        latentd::parallel_ranges(shape.tokens, latentd::SMALL_ROWS, [&](int64_t start, int64_t stop) {
            for (int64_t token = start; token < stop; token++) {
                const int32_t* place = places + token * slots;
                char* row = rows + place[0] * row_bytes;
                encode(x + token * ldx, shape.d, row);
                for (int64_t slot = 1; slot < slots; slot++)
                    memcpy(rows + place[slot] * row_bytes, row, size_t(row_bytes));
            }
        });
    }

    // First phase: 64 columns of an expert's gate and the same of its up for up to ROWS_A_JOB rows. The shared MLP,
    // which has the most rows, comes first: the small jobs fill the gaps at the end.
    void compute_hidden(int64_t jobs) const {
        if (const char* down = next_down(-1, 0))
            latentd::fetch_while_waiting({down, panels(shape.d) * panel_bytes(format, shape.width)});
        latentd::parallel_for(jobs, [&](int64_t index) {
            int64_t job = jobs - 1 - index;
            const Expert& expert = expert_of(job);
            int64_t first_panel = first_panel_of(job, expert);
            int64_t stop_panel = first_panel + job_panels;
            stop_panel = stop_panel < panels(expert.width) ? stop_panel : panels(expert.width);
            int64_t start = (job - expert.first_job) % ranges(expert) * ROWS_A_JOB;
            int64_t stop = start + ROWS_A_JOB < expert.rows ? start + ROWS_A_JOB : expert.rows;
            int64_t next_job = jobs - 1 - latentd::likely_next(index);
            const char* following = next_job >= 0 ? gate_of(next_job) : nullptr;
            for (int64_t panel = first_panel; panel < stop_panel; panel++) {
                const char* next = panel + 1 < stop_panel ? gate_panel(expert, panel + 1) : following;
                hidden_panel(expert, panel, next, start, stop);
            }
        });
    }

    // Second phase: some panels of columns of y, over all experts; for all tokens, so that weights are read once, unless
    // there are more threads than columns.
    void sum_experts(const bf16* residual, bf16* y) const {
        int64_t all = panels(shape.d), some = 1;
        int64_t width = shape.experts > 0 ? shape.width : shape.shared_width;
        if (shape.tokens <= MANY_TOKENS)
            some = panels_a_job(all, panel_bytes(format, width), latentd::num_threads);
        int64_t column_jobs = (all + some - 1) / some;
        int64_t wanted = (latentd::JOBS_A_THREAD * latentd::num_threads + column_jobs - 1) / column_jobs;
        int64_t size = (shape.tokens + wanted - 1) / wanted;
        size = size > MIN_TOKENS_A_JOB ? size : MIN_TOKENS_A_JOB;
        int64_t token_ranges = (shape.tokens + size - 1) / size;
        latentd::fetch_while_waiting(latentd::next_call);
        latentd::parallel_for(column_jobs * token_ranges, [&](int64_t job) {
            int64_t first_panel = job / token_ranges * some, start = job % token_ranges * size;
            int64_t stop_panel = first_panel + some < all ? first_panel + some : all;
            int64_t stop = start + size < shape.tokens ? start + size : shape.tokens;
            for (int64_t panel = first_panel; panel < stop_panel; panel++)
                memset(sums + (panel * shape.tokens + start) * PANEL, 0, size_t((stop - start) * PANEL) * sizeof(float));
            int64_t next_panel = latentd::likely_next(job) / token_ranges * some;
            for (int64_t index = 0; index < shape.all_experts(); index++) {
                const Expert& expert = experts[index];
                int64_t size = panel_bytes(format, expert.width);
                for (int64_t panel = first_panel; panel < stop_panel; panel++) {
                    const char* from = expert.down + panel * size;
                    const char* next = panel + 1 < stop_panel ? from + size : next_down(index, first_panel);
                    if (!next && next_panel < all) next = next_down(-1, next_panel);
                    add_expert(expert, from, next, start, stop, sums + panel * shape.tokens * PANEL);
                }
            }
            for (int64_t panel = first_panel; panel < stop_panel; panel++) finish(panel, start, stop, residual, y);
        });
    }

private:
    // Of the gate and up of 64 columns.
    const char* gate_panel(const Expert& expert, int64_t panel) const {
        return expert.gate_up + 2 * panel * panel_bytes(format, shape.d);
    }

    // The first panel of a job of the first phase.
    const char* gate_of(int64_t job) const {
        const Expert& expert = expert_of(job);
        return gate_panel(expert, first_panel_of(job, expert));
    }

    // Jobs are taken from the last to the first, panels from the first to the last.
    int64_t first_panel_of(int64_t job, const Expert& expert) const {
        return (column_jobs(expert) - 1 - (job - expert.first_job) / ranges(expert)) * job_panels;
    }

    void hidden_panel(const Expert& expert, int64_t panel, const char* next, int64_t start, int64_t stop) const {
        const char* weights = gate_panel(expert, panel);
        int64_t columns = PANEL < expert.width - panel * PANEL ? PANEL : expert.width - panel * PANEL;
        alignas(64) float products[PANEL / HALF][ROWS_AT_ONCE * PANEL];
        for (int64_t row = start; row < stop; row += ROWS_AT_ONCE) {
            int64_t count = ROWS_AT_ONCE < stop - row ? ROWS_AT_ONCE : stop - row;
            const char* from = rows + (expert.first + row) * row_bytes;
            for (int64_t first = 0; first < columns; first += HALF) {
                const char* half = weights + first / HALF * panel_bytes(format, shape.d);
                panel_product(format, count, from, row_bytes, half, shape.d, products[first / HALF], PANEL,
                              first + HALF < columns ? half + panel_bytes(format, shape.d) : next);
            }
            for (int64_t i = 0; i < count; i++) {
                bf16 activated[PANEL];
                for (int64_t column = 0; column < columns; column += LANES) {
                    const float* gate = products[column / HALF] + i * PANEL + column % HALF;
                    store(activated + column, silu(load(gate)) * load(gate + HALF));
                }
                char* to = expert.hidden + (row + i) * hidden_bytes(expert);
                encode(activated, columns, to + activation_bytes(format, panel * PANEL));
            }
        }
    }

    // Parts of whole groups of a row stand for themselves: they may be written one by one.
    void encode(const bf16* x, int64_t k, char* row) const {
        if (format == LATENTD_BF16) memcpy(row, x, size_t(2 * k));
        else quantise(x, k, latentd::zero_of(format), reinterpret_cast<QuantisedGroup*>(row));
    }

    int64_t column_jobs(const Expert& expert) const { return (panels(expert.width) + job_panels - 1) / job_panels; }
    int64_t ranges(const Expert& expert) const { return (expert.rows + ROWS_A_JOB - 1) / ROWS_A_JOB; }
    int64_t hidden_bytes(const Expert& expert) const { return activation_bytes(format, panels(expert.width) * PANEL); }

    // The last one whose first job is not behind: experts without rows have no jobs and are stepped over.
    const Expert& expert_of(int64_t job) const {
        int64_t low = 0, high = shape.all_experts();
        while (high - low > 1) {
            int64_t middle = (low + high) / 2;
            (experts[middle].first_job <= job ? low : high) = middle;
        }
        return experts[low];
    }

    // The panel of the next expert that has rows.
    const char* next_down(int64_t index, int64_t panel) const {
        while (++index < shape.all_experts())
            if (experts[index].rows) return experts[index].down + panel * panel_bytes(format, experts[index].width);
        return nullptr;
    }

    // The first of an expert's rows whose token is not before.
    int64_t row_of(const Expert& expert, int64_t token) const {
        int64_t low = 0, high = expert.rows;
        while (low < high) {
            int64_t middle = (low + high) / 2;
            if (tokens[expert.first + middle] < token) low = middle + 1;
            else high = middle;
        }
        return low;
    }

    void add_expert(const Expert& expert, const char* down_panel, const char* next, int64_t first_token,
                    int64_t last_token, float* sum) const {
        int64_t stop = row_of(expert, last_token);
        alignas(64) float output[ROWS_AT_ONCE * PANEL];
        for (int64_t row = row_of(expert, first_token); row < stop; row += ROWS_AT_ONCE) {
            int64_t count = ROWS_AT_ONCE < stop - row ? ROWS_AT_ONCE : stop - row;
            panel_product(format, count, expert.hidden + row * hidden_bytes(expert), hidden_bytes(expert), down_panel,
                          expert.width, output, PANEL, next);
            for (int64_t i = 0; i < count; i++) {
                int64_t pair = expert.first + row + i;
                float* to = sum + tokens[pair] * PANEL;
                Float weight = splat(weights[pair]);
                for (int64_t v = 0; v < PANEL; v += LANES)
                    store(to + v, load(to + v) + weight * load(output + i * PANEL + v));
            }
        }
    }

    void finish(int64_t panel, int64_t first_token, int64_t last_token, const bf16* residual, bf16* y) const {
        int64_t columns = PANEL < shape.d - panel * PANEL ? PANEL : shape.d - panel * PANEL;
        for (int64_t token = first_token; token < last_token; token++)
            for (int64_t v = 0; v < columns; v += LANES) {
                int64_t at = token * shape.d + panel * PANEL + v;
                Float value = load(sums + (panel * shape.tokens + token) * PANEL + v);
                store(y + at, residual ? value + load(residual + at) : value);
            }
    }
};

inline void moe(latentd_format format, const uint16_t* x, int64_t ldx, int64_t tokens, int64_t d, int64_t width,
                int64_t experts, int64_t per_token, const int32_t* chosen, const float* weights, const void* gate_up,
                const void* down, int64_t shared_width, const void* shared_gate_up, const void* shared_down,
                const uint16_t* residual, uint16_t* y, void* workspace) {
    Moe moe(format, {tokens, d, width, experts, per_token, shared_width}, workspace);
    int64_t jobs = moe.sort(chosen, weights,
                            {static_cast<const char*>(gate_up), static_cast<const char*>(down),
                             static_cast<const char*>(shared_gate_up), static_cast<const char*>(shared_down)});
    moe.gather(x, ldx);
    moe.compute_hidden(jobs);
    moe.sum_experts(residual, y);
}

inline void mlp(latentd_format format, const uint16_t* x, int64_t ldx, int64_t tokens, int64_t d, int64_t width,
                const void* gate_up, const void* down, const uint16_t* residual, uint16_t* y, void* workspace) {
    moe(format, x, ldx, tokens, d, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, width, gate_up, down, residual, y,
        workspace);
}

}  // namespace ISA
