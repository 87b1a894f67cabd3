// y = x weight^T + bias + residual.
#pragma once

#include <stdlib.h>

#include "pack.h"
#include "parallel.h"
#include "product.h"

namespace ISA {

// Rows a job takes: their sums stay in the cache, and so do a panel's weights from one job to the next.
constexpr int64_t JOB_ROWS = 96;

// Memory of the calling thread that grows and stays, for the quantised rows.
inline QuantisedGroup* quantised_rows(int64_t groups) {
    struct Buffer {
        QuantisedGroup* data = nullptr;
        int64_t groups = 0;
        ~Buffer() { free(data); }
    };
    static thread_local Buffer buffer;
    if (buffer.groups < groups) {
        free(buffer.data);
        buffer.data = static_cast<QuantisedGroup*>(malloc(size_t(groups) * sizeof(QuantisedGroup)));
        if (!buffer.data) abort();
        buffer.groups = groups;
    }
    return buffer.data;
}

// One row of a panel's sums to where they belong.
template <typename T>
LATENTD_INLINE void finish_row(const float* sums, int64_t columns, const bf16* bias, const bf16* residual, T* y) {
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES) {
        Float value = load(sums + column);
        if (bias) value += load(bias + column);
        if (residual) value += load(residual + column);
        store(y + column, value);
    }
    for (; column < columns; column++) {
        float value = sums[column];
        if (bias) value += to_float(bias[column]);
        if (residual) value += to_float(residual[column]);
        if constexpr (sizeof(T) == sizeof(float)) y[column] = value;
        else y[column] = to_bf16(value);
    }
}

inline void linear(latentd_format format, const bf16* x, int64_t ldx, const void* weight, int64_t m, int64_t n,
                   int64_t k, const bf16* bias, const bf16* residual, void* y, int64_t ldy, int y_is_float) {
    const char* weights = static_cast<const char*>(weight);
    const void* rows = x;
    int64_t row_bytes = ldx * 2;
    if (format != LATENTD_BF16) {
        QuantisedGroup* quantised = quantised_rows(m * latentd::groups(k));
        int zero = latentd::zero_of(format);
        latentd::parallel_ranges(m, latentd::SMALL_ROWS, [=](int64_t row, int64_t stop) {
            for (; row < stop; row++) quantise(x + row * ldx, k, zero, quantised + row * latentd::groups(k));
        });
        rows = quantised;
        row_bytes = activation_bytes(format, k);
    }
    // Of about equal size, and of whole tiles.
    int64_t row_jobs = (m + JOB_ROWS - 1) / JOB_ROWS;
    int64_t job_rows = row_jobs ? ((m + row_jobs - 1) / row_jobs + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : 0;
    int64_t panels = latentd::panels(n), panel_bytes = latentd::panel_bytes(format, k);
    int64_t job_panels = row_jobs > 1 ? 1 : latentd::panels_a_job(panels, panel_bytes, latentd::num_threads);
    int64_t column_jobs = (panels + job_panels - 1) / job_panels;
    latentd::fetch_while_waiting(latentd::next_call);
    latentd::parallel_for(column_jobs * row_jobs, [=](int64_t job) {
        int64_t first_panel = job / row_jobs * job_panels, first_row = job % row_jobs * job_rows;
        int64_t some = m - first_row < job_rows ? m - first_row : job_rows;
        alignas(64) float sums[JOB_ROWS * PANEL];
        int64_t stop_panel = first_panel + job_panels < panels ? first_panel + job_panels : panels;
        for (int64_t panel = first_panel; panel < stop_panel; panel++) {
            int64_t next = panel + 1 < stop_panel ? panel + 1 : latentd::likely_next(job) / row_jobs * job_panels;
            panel_product(format, some, static_cast<const char*>(rows) + first_row * row_bytes, row_bytes,
                          weights + panel * panel_bytes, k, sums, PANEL,
                          next < panels ? weights + next * panel_bytes : nullptr);
            int64_t column = panel * PANEL, columns = n - column < PANEL ? n - column : PANEL;
            for (int64_t row = 0; row < some; row++) {
                const bf16* row_bias = bias ? bias + column : nullptr;
                int64_t at = (first_row + row) * ldy + column;
                const bf16* row_residual = residual ? residual + at : nullptr;
                const float* from = sums + row * PANEL;
                if (y_is_float) finish_row(from, columns, row_bias, row_residual, static_cast<float*>(y) + at);
                else finish_row(from, columns, row_bias, row_residual, static_cast<bf16*>(y) + at);
            }
        }
    });
}

}  // namespace ISA
