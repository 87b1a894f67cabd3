// What one instruction set's copy of the kernels gives to the library: a pointer for every function of abi.h that has
// one.
#pragma once

#include "abi.h"

namespace latentd {

struct Kernels {
    decltype(&latentd_pack) pack;
    decltype(&latentd_linear) linear;
    decltype(&latentd_rms_norm) rms_norm;
    decltype(&latentd_gather) gather;
    decltype(&latentd_rotation) rotation;
    decltype(&latentd_argmax) argmax;
    decltype(&latentd_draw) draw;
    decltype(&latentd_rope_and_cache) rope_and_cache;
    decltype(&latentd_attention_workspace) attention_workspace;
    decltype(&latentd_attention) attention;
    decltype(&latentd_router_workspace) router_workspace;
    decltype(&latentd_router) router;
    decltype(&latentd_moe_workspace) moe_workspace;
    decltype(&latentd_moe) moe;
    decltype(&latentd_mlp) mlp;
};

}  // namespace latentd
