// Compiled once for every instruction set, with ISA as the namespace of all it contains.
#include "kernels.h"

#include "attention.h"
#include "linear.h"
#include "moe.h"
#include "norm.h"
#include "router.h"
#include "sampler.h"

namespace ISA {

extern const latentd::Kernels kernels;
const latentd::Kernels kernels = {
    .pack = pack,
    .linear = linear,
    .rms_norm = rms_norm,
    .gather = gather,
    .rotation = rotation,
    .argmax = argmax,
    .draw = draw,
    .rope_and_cache = rope_and_cache,
    .attention_workspace = attention_workspace,
    .attention = attention,
    .router_workspace = router_workspace,
    .router = router,
    .moe_workspace = moe_workspace,
    .moe = moe,
    .mlp = mlp,
};

}  // namespace ISA
