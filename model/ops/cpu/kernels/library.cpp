// The library's functions: each calls the twin of the same name that was compiled for the instruction set in use.
#include <string.h>

#include "kernels.h"
#include "packed.h"
#include "pool.h"
#include "replay.h"

// The build names the instruction sets it compiled, best first: BUILT(avx2) BUILT(portable).
#define BUILT(isa)                          \
    namespace isa {                         \
    extern const latentd::Kernels kernels;  \
    }
LATENTD_BUILT
#undef BUILT

namespace latentd {

namespace {

struct Isa {
    const char* name;
    const Kernels* kernels;
};

const Isa built[] = {
#define BUILT(isa) {#isa, &isa::kernels},
    LATENTD_BUILT
#undef BUILT
};

// The compiler's test asks the processor and, for the wide registers, whether the system saves them.
bool machine_runs(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512")) return avx512;
#if defined(LATENTD_HAS_AVX512_BF16)  // a compiler that cannot compile for it does not know its name either
    if (!strcmp(name, "avx512_bf16"))
        return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
#endif
    return !strcmp(name, "portable");
}

const Isa* find(const char* name) {
    for (const Isa& isa : built)
        if ((!name || !strcmp(isa.name, name)) && machine_runs(isa.name)) return &isa;
    return nullptr;
}

const Isa* chosen = find(nullptr);

}  // namespace
}  // namespace latentd

using latentd::chosen;

int latentd_abi(void) { return LATENTD_ABI; }

const char* latentd_isa(void) { return chosen->name; }

int latentd_use_isa(const char* name) {
    const latentd::Isa* isa = latentd::find(name);
    if (!isa) return -1;
    chosen = isa;
    return 0;
}

void latentd_set_threads(int threads) { latentd::set_threads(threads); }

size_t latentd_packed_bytes(latentd_format format, int64_t n, int64_t k) {
    return size_t(latentd::panels(n) * latentd::panel_bytes(format, k));
}

void latentd_pack(latentd_format format, const uint16_t* weight, int64_t n, int64_t k, void* packed) {
    chosen->kernels->pack(format, weight, n, k, packed);
}

void latentd_linear(latentd_format format, const uint16_t* x, int64_t ldx, const void* weight, int64_t m, int64_t n,
                    int64_t k, const uint16_t* bias, const uint16_t* residual, void* y, int64_t ldy, int y_is_float) {
    chosen->kernels->linear(format, x, ldx, weight, m, n, k, bias, residual, y, ldy, y_is_float);
}

void latentd_rms_norm(const uint16_t* x, int64_t ldx, const uint16_t* weight, float eps, int64_t m, int64_t d,
                      uint16_t* y, int64_t ldy) {
    chosen->kernels->rms_norm(x, ldx, weight, eps, m, d, y, ldy);
}

void latentd_gather(const uint16_t* table, const int64_t* index, int64_t m, int64_t d, uint16_t* y) {
    chosen->kernels->gather(table, index, m, d, y);
}

void latentd_rotation(const int64_t* positions, const float* frequencies, float amplitude, int64_t m, int64_t pairs,
                      float* cosines, float* sines) {
    chosen->kernels->rotation(positions, frequencies, amplitude, m, pairs, cosines, sines);
}

void latentd_argmax(const float* x, int64_t m, int64_t n, int64_t* index) {
    chosen->kernels->argmax(x, m, n, index);
}

void latentd_draw(const float* x, int64_t m, int64_t n, const double* temperature, const int64_t* top_k,
                  const double* top_p, const double* min_p, const uint64_t* seed, const int64_t* position,
                  int64_t* index) {
    chosen->kernels->draw(x, m, n, temperature, top_k, top_p, min_p, seed, position, index);
}

void latentd_rope_and_cache(const latentd_attention_shape* shape, int64_t layer, const uint16_t* kv, int64_t ldkv,
                            const uint16_t* norm_weight, float eps, const float* cosines, const float* sines,
                            const int64_t* slot_mapping, uint16_t* q_rope, int64_t token_stride, int64_t head_stride) {
    chosen->kernels->rope_and_cache(shape, layer, kv, ldkv, norm_weight, eps, cosines, sines, slot_mapping, q_rope,
                                    token_stride, head_stride);
}

size_t latentd_attention_workspace(const latentd_attention_shape* shape) {
    return chosen->kernels->attention_workspace(shape);
}

void latentd_attention(latentd_format format, const latentd_attention_shape* shape, int64_t layer,
                       const uint16_t* q_nope, int64_t nope_token_stride, int64_t nope_head_stride,
                       const uint16_t* q_rope, int64_t rope_token_stride, int64_t rope_head_stride,
                       const void* absorb, const void* expand, const void* value, uint16_t* output, void* workspace) {
    chosen->kernels->attention(format, shape, layer, q_nope, nope_token_stride, nope_head_stride, q_rope,
                               rope_token_stride, rope_head_stride, absorb, expand, value, output, workspace);
}

size_t latentd_router_workspace(int64_t tokens, int64_t experts) {
    return chosen->kernels->router_workspace(tokens, experts);
}

void latentd_router(const latentd_router_shape* shape, const uint16_t* x, int64_t ldx, int64_t tokens, int64_t d,
                    const float* weight, const float* bias, int32_t* experts, float* weights, void* workspace) {
    chosen->kernels->router(shape, x, ldx, tokens, d, weight, bias, experts, weights, workspace);
}

size_t latentd_moe_workspace(int64_t tokens, int64_t d, int64_t width, int64_t experts, int64_t per_token,
                             int64_t shared_width) {
    return chosen->kernels->moe_workspace(tokens, d, width, experts, per_token, shared_width);
}

void latentd_moe(latentd_format format, const uint16_t* x, int64_t ldx, int64_t tokens, int64_t d, int64_t width,
                 int64_t experts, int64_t per_token, const int32_t* chosen_experts, const float* weights,
                 const void* gate_up, const void* down, int64_t shared_width, const void* shared_gate_up,
                 const void* shared_down, const uint16_t* residual, uint16_t* y, void* workspace) {
    chosen->kernels->moe(format, x, ldx, tokens, d, width, experts, per_token, chosen_experts, weights, gate_up, down,
                         shared_width, shared_gate_up, shared_down, residual, y, workspace);
}

void latentd_mlp(latentd_format format, const uint16_t* x, int64_t ldx, int64_t tokens, int64_t d, int64_t width,
                 const void* gate_up, const void* down, const uint16_t* residual, uint16_t* y, void* workspace) {
    chosen->kernels->mlp(format, x, ldx, tokens, d, width, gate_up, down, residual, y, workspace);
}

const void* latentd_function(const char* name) { return latentd::find_replayable(name); }

size_t latentd_replay(const void* const* functions, int64_t sizes, int64_t calls, const latentd_argument* arguments,
                      const latentd_base* bases, size_t workspace_bytes) {
    return latentd::replay(*chosen->kernels, functions, sizes, calls, arguments, bases, workspace_bytes);
}
