// The library's C interface: everything that Python calls. Pointers are to memory that the caller keeps alive; sizes
// and strides count elements. bf16 is uint16_t. Nothing allocates, throws or keeps a pointer, unless it says so.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)  // all else stays inside the library

#define LATENTD_ABI 7

// INT8_INPUTS: the numbers of INT8 of the transposed weight, whose scales are multiplied into the activations.
typedef enum { LATENTD_BF16 = 0, LATENTD_INT8 = 1, LATENTD_INT4 = 2, LATENTD_INT8_INPUTS = 3 } latentd_format;

int latentd_abi(void);
// "avx512_bf16", "avx512", "avx2" or "portable": the best that this machine runs, unless another was asked for.
const char* latentd_isa(void);
// For tests. 0, or -1 where the machine does not run it or the library was built without it.
int latentd_use_isa(const char* name);
void latentd_set_threads(int threads);

// A weight [N, K], K a multiple of 32, as the kernels read it: 64 rows side by side (missing ones are 0). That of
// LATENTD_INT8_INPUTS is given as its transpose, [K, N].
size_t latentd_packed_bytes(latentd_format format, int64_t n, int64_t k);
void latentd_pack(latentd_format format, const uint16_t* weight, int64_t n, int64_t k, void* packed);

// y [M, N] = x [M, K] weight^T + bias + residual; bias [N] and residual [M, N] (its rows ldy apart) may be NULL.
// y is bf16, or float where y_is_float is set (then residual is NULL). y may be residual.
void latentd_linear(latentd_format format, const uint16_t* x, int64_t ldx, const void* weight, int64_t m, int64_t n,
                    int64_t k, const uint16_t* bias, const uint16_t* residual, void* y, int64_t ldy, int y_is_float);

// y = x / sqrt(mean(x^2) + eps) * weight, rows [M, D]; statistics in float32.
void latentd_rms_norm(const uint16_t* x, int64_t ldx, const uint16_t* weight, float eps, int64_t m, int64_t d,
                      uint16_t* y, int64_t ldy);

// y [M, D] = rows of the table [*, D].
void latentd_gather(const uint16_t* table, const int64_t* index, int64_t m, int64_t d, uint16_t* y);

// cosines and sines [M, pairs] of positions [M] times frequencies [pairs], times amplitude.
void latentd_rotation(const int64_t* positions, const float* frequencies, float amplitude, int64_t m, int64_t pairs,
                      float* cosines, float* sines);

// The index [M] of the largest of each row of x [M, N], N > 0, the first of equal ones; -1 where not all are finite.
void latentd_argmax(const float* x, int64_t m, int64_t n, int64_t* chosen);
// An index [M] for each row of logits x [M, N], N > 0, as model/sampler.py draws it: the first of the largest where the
// temperature [M] is 0. top_k [M] of 0, top_p [M] of 1 and min_p [M] of 0 limit nothing. -inf is never chosen; -1 where all are -inf. None may be NaN.
void latentd_draw(const float* x, int64_t m, int64_t n, const double* temperature, const int64_t* top_k,
                  const double* top_p, const double* min_p, const uint64_t* seed, const int64_t* position,
                  int64_t* chosen);

// What a layer's attention of one step needs to know of the rows and of the cache.
typedef struct {
    int64_t rows, tokens;         // R, T
    const int32_t* query_start;   // [R + 1]
    const int32_t* context_lens;  // [R]
    const int32_t* block_tables;  // [R, max_blocks]
    int64_t max_blocks;
    uint16_t* cache;              // [blocks, layers, block_size, rank + rope]
    int64_t layers, block_size;
    int64_t heads, rank, rope, nope, value;  // H, r, dr, dn, dv
    float scale;
} latentd_attention_shape;

// The latents of the step's tokens into the cache, and the queries' rope part turned in place.
// kv [T, rank + rope], rows ldkv apart; q_rope [T, H, rope] with strides; cosines and sines [T, rope / 2].
void latentd_rope_and_cache(const latentd_attention_shape* shape, int64_t layer, const uint16_t* kv, int64_t ldkv,
                            const uint16_t* norm_weight, float eps, const float* cosines, const float* sines,
                            const int64_t* slot_mapping, uint16_t* q_rope, int64_t token_stride, int64_t head_stride);

// output [T, H, dv]. q_nope [T, H, dn] and q_rope [T, H, dr] with strides. Packed weights of each head, one behind the
// other: absorb [rank, nope] (W_UK transposed), expand [nope, rank] (W_UK), value [dv, rank] (W_UV), in bf16, or in int8
// with absorb in LATENTD_INT8_INPUTS. Rows are attended absorbed or expanded, whichever needs fewer operations.
// workspace: latentd_attention_workspace bytes.
size_t latentd_attention_workspace(const latentd_attention_shape* shape);
void latentd_attention(latentd_format format, const latentd_attention_shape* shape, int64_t layer,
                       const uint16_t* q_nope, int64_t nope_token_stride, int64_t nope_head_stride,
                       const uint16_t* q_rope, int64_t rope_token_stride, int64_t rope_head_stride,
                       const void* absorb, const void* expand, const void* value, uint16_t* output, void* workspace);

typedef struct {
    int64_t experts, groups, top_groups, per_token;  // E, n_group, topk_group, k
    int sigmoid;              // scores: softmax otherwise
    int two_best_per_group;   // noaux_tc: a group is scored by its two best experts, else by its best one
    int normalise;
    float scaling;
} latentd_router_shape;

// The k experts of each token, in descending order of choice, and their weights [T, k]. weight [E, D], bias [E] or
// NULL.
size_t latentd_router_workspace(int64_t tokens, int64_t experts);
void latentd_router(const latentd_router_shape* shape, const uint16_t* x, int64_t ldx, int64_t tokens, int64_t d,
                    const float* weight, const float* bias, int32_t* experts, float* weights, void* workspace);

// y [T, D] = sum of each token's weighted experts, plus the shared MLP where shared_width is not 0, plus residual where
// it is not NULL (y may be residual). Experts one behind the other: gate_up is one packed weight [2 I, D], 32 rows
// of gate and the same 32 of up in turn, down one packed [D, I].
size_t latentd_moe_workspace(int64_t tokens, int64_t d, int64_t width, int64_t experts, int64_t per_token,
                             int64_t shared_width);
void latentd_moe(latentd_format format, const uint16_t* x, int64_t ldx, int64_t tokens, int64_t d, int64_t width,
                 int64_t experts, int64_t per_token, const int32_t* chosen, const float* weights, const void* gate_up,
                 const void* down, int64_t shared_width, const void* shared_gate_up, const void* shared_down,
                 const uint16_t* residual, uint16_t* y, void* workspace);
// down(silu(gate x) * up x): the dense layers' MLP, weights as one expert's above. Workspace: that of a MoE of no
// experts whose shared MLP it is.
void latentd_mlp(latentd_format format, const uint16_t* x, int64_t ldx, int64_t tokens, int64_t d, int64_t width,
                 const void* gate_up, const void* down, const uint16_t* residual, uint16_t* y, void* workspace);

// Calls of the functions above that were written down once, made again with other rows. An argument is
// bases[base].address + bases[base].rows * scale + offset: a constant (its base is all 0), a number of rows, or a place
// in memory that has `scale` bytes a row before it. Floats are given by their bits.
typedef struct {
    int64_t address, rows;
} latentd_base;
typedef struct {
    int64_t offset;
    int32_t base, scale;
} latentd_argument;
// NULL where there is no such function or it cannot be replayed. The name is without its prefix.
const void* latentd_function(const char* name);
// `functions` [calls] are called in order; their arguments lie one behind the other. The first `sizes` of them are
// workspace functions: where the largest says more than workspace_bytes, it is returned and nothing is computed, else 0.
size_t latentd_replay(const void* const* functions, int64_t sizes, int64_t calls, const latentd_argument* arguments,
                      const latentd_base* bases, size_t workspace_bytes);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
