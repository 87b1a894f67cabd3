// Compiled once for every instruction set, with ISA as the namespace of all it contains.
#include "kernels.h"

#include "attention.h"
#include "linear.h"

namespace ISA {

extern const latentd::Kernels kernels;
const latentd::Kernels kernels = {
    .pack = pack,
    .linear = linear,
    .rms_norm = nullptr,
    .rope_and_cache = nullptr,
    .attention_workspace = attention_workspace,
    .attention = attention,
    .router_workspace = nullptr,
    .router = nullptr,
    .moe_workspace = nullptr,
    .moe = nullptr,
    .mlp = nullptr,
};

}  // namespace ISA
