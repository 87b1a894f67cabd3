// Weights as the kernels read them: panels of 64 rows of the weight, which are 64 columns of the product.
//
// A panel of a weight [N, K] is, of
//   bf16: [K / 2][64][2] bf16, pairs of consecutive k beside each other;
//   int8: for every group of 64 k, [16][64][4] bytes, w / scale + 128 of four consecutive k, then 64 bf16 scales;
//   int4: for every group of 64 k, [8][64][4] bytes, the i-th of whose low halves are w / scale + 8 of the k in
//         [8 i, 8 i + 4), and whose high halves are those of the next four k; then 64 bf16 scales;
//   int8_inputs: as int8, but the 64 scales are those of the group's k. A matrix and its transpose are the same
//         numbers so: int8 of the one has its scales where int8_inputs of the other has them.
// The last group has as many k as are left, 32 or 64, and all its scales. Weights are unsigned because the instruction for bytes wants one side to be.
#pragma once

#include "abi.h"

namespace latentd {

constexpr int64_t PANEL = 64;
constexpr int64_t GROUP = 64;

// The number of a group that stands for 0.
constexpr int32_t zero_of(latentd_format format) { return format == LATENTD_INT4 ? 8 : 128; }

// Of so many k of a panel, at most a group: their weights, and with their scales.
constexpr int64_t weight_bytes(latentd_format format, int64_t k) { return PANEL * k / (format == LATENTD_INT4 ? 2 : 1); }
constexpr int64_t group_bytes(latentd_format format, int64_t k) { return weight_bytes(format, k) + PANEL * 2; }

constexpr int64_t groups(int64_t k) { return (k + GROUP - 1) / GROUP; }
constexpr int64_t panels(int64_t n) { return (n + PANEL - 1) / PANEL; }
constexpr int64_t panel_bytes(latentd_format format, int64_t k) {
    return format == LATENTD_BF16 ? k * PANEL * 2 : weight_bytes(format, k) + groups(k) * PANEL * 2;
}

// How many neighbouring panels of `size` bytes, out of `all`, a job takes where it reads them but once: memory is read
// fastest in long pieces, yet every thread must find some jobs.
constexpr int64_t JOB_BYTES = 256 << 10;
constexpr int64_t JOBS_A_THREAD = 4;
inline int64_t panels_a_job(int64_t all, int64_t size, int64_t threads) {
    int64_t most = all / (JOBS_A_THREAD * threads), wanted = (JOB_BYTES + size - 1) / size;
    int64_t some = wanted < most ? wanted : most;
    return some > 1 ? some : 1;
}

}  // namespace latentd
