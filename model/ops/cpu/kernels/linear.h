#pragma once
#include "abi.h"
#include "packed.h"
#include "parallel.h"
#include "tile.h"
namespace ISA {
inline void pack(latentd_format format, const uint16_t* weight, int64_t n, int64_t k, void* packed) {}
inline void linear(latentd_format format, const uint16_t* x, int64_t ldx, const void* weight, int64_t m, int64_t n,
                    int64_t k, const uint16_t* bias, const uint16_t* residual, void* y, int64_t ldy, int y_is_float) {}
}
