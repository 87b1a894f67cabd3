// Rows of activations as a panel of a weight of some format is multiplied with them, and that product.
//
// A row is made of parts of 32 numbers that stand for themselves: the 64 columns from k on are `encode`d to bytes(k).
#pragma once

#include "packed.h"
#include "tile.h"

namespace ISA {

struct Bf16Rows {
    static constexpr int64_t K_AT_ONCE = 1024;  // of a panel: 128 KB, which stay in the second cache for all rows

    static int64_t bytes(int64_t k) { return 2 * k; }
    static int64_t panel_bytes(int64_t k) { return latentd::panel_bytes(LATENTD_BF16, k); }
    static void encode(const bf16* x, int64_t k, char* row) { memcpy(row, x, size_t(bytes(k))); }

    // c [rows, 64] = a panel^T
    static void product(int64_t rows, const char* a, int64_t row_bytes, const char* panel, int64_t k, float* c) {
        const bf16* from = reinterpret_cast<const bf16*>(a);
        const bf16* columns = reinterpret_cast<const bf16*>(panel);
        for (int64_t start = 0; start < k; start += K_AT_ONCE) {
            int64_t count = K_AT_ONCE < k - start ? K_AT_ONCE : k - start;
            tile(rows, from + start, row_bytes / 2, columns + start * COLUMNS, count / 2, c, COLUMNS, start > 0);
        }
    }
};

}  // namespace ISA
