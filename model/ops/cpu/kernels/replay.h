// Makes recorded calls: see latentd_replay in abi.h.
#pragma once

#include <string.h>

#include <type_traits>
#include <utility>

#include "kernels.h"
#include "packed.h"
#include "parallel.h"

namespace latentd {

template <typename To>
To as(int64_t word) {
    if constexpr (std::is_pointer_v<To>) {
        return reinterpret_cast<To>(word);
    } else if constexpr (std::is_same_v<To, float>) {
        float value;
        memcpy(&value, &word, sizeof value);
        return value;
    } else {
        return static_cast<To>(word);
    }
}

template <typename Result, typename... Parameters, size_t... INDEX>
size_t call(Result (*function)(Parameters...), const int64_t* words, std::index_sequence<INDEX...>) {
    if constexpr (std::is_void_v<Result>) {
        function(as<Parameters>(words[INDEX])...);
        return 0;
    } else {
        return function(as<Parameters>(words[INDEX])...);
    }
}

template <typename Result, typename... Parameters>
constexpr size_t count(Result (*)(Parameters...)) {
    return sizeof...(Parameters);
}

constexpr size_t MAX_ARGUMENTS = 24;

// What a call with these arguments reads first, of its weights.
using FirstWeights = Soon (*)(const int64_t* words);

struct Replayable {
    const char* name;
    size_t arguments;
    size_t (*call)(const Kernels& kernels, const int64_t* words);
    FirstWeights weights;
};

template <auto MEMBER>
constexpr Replayable replayable(const char* name, FirstWeights weights = nullptr) {
    constexpr size_t arguments = count(decltype(Kernels{}.*MEMBER){});
    static_assert(arguments <= MAX_ARGUMENTS);
    return {name, arguments,
            [](const Kernels& kernels, const int64_t* words) {
                return latentd::call(kernels.*MEMBER, words, std::make_index_sequence<arguments>());
            },
            weights};
}

// So many packed weights [n, k] one behind the other.
inline Soon packed(int64_t format, int64_t from, int64_t number, int64_t n, int64_t k) {
    return {as<const void*>(from), number * panels(n) * panel_bytes(latentd_format(format), k)};
}

// The numbers of words are those of the parameters in abi.h.
inline Soon linear_weights(const int64_t* words) { return packed(words[0], words[3], 1, words[5], words[6]); }

inline Soon absorb_weights(const int64_t* words) {
    const auto& shape = *as<const latentd_attention_shape*>(words[1]);
    latentd_format format = words[0] == LATENTD_BF16 ? LATENTD_BF16 : LATENTD_INT8_INPUTS;
    return packed(format, words[9], shape.heads, shape.rank, shape.nope);
}

inline Soon router_weights(const int64_t* words) {
    const auto& shape = *as<const latentd_router_shape*>(words[0]);
    return {as<const void*>(words[5]), shape.experts * words[4] * int64_t(sizeof(float))};
}

inline Soon shared_weights(const int64_t* words) { return packed(words[0], words[13], 1, 2 * words[12], words[4]); }

inline Soon mlp_weights(const int64_t* words) { return packed(words[0], words[6], 1, 2 * words[5], words[4]); }

constexpr Replayable REPLAYABLE[] = {
    replayable<&Kernels::linear>("linear", linear_weights),
    replayable<&Kernels::rms_norm>("rms_norm"),
    replayable<&Kernels::gather>("gather"),
    replayable<&Kernels::rotation>("rotation"),
    replayable<&Kernels::rope_and_cache>("rope_and_cache"),
    replayable<&Kernels::attention_workspace>("attention_workspace"),
    replayable<&Kernels::attention>("attention", absorb_weights),
    replayable<&Kernels::router_workspace>("router_workspace"),
    replayable<&Kernels::router>("router", router_weights),
    replayable<&Kernels::moe_workspace>("moe_workspace"),
    replayable<&Kernels::moe>("moe", shared_weights),
    replayable<&Kernels::mlp>("mlp", mlp_weights),
};

inline const Replayable* find_replayable(const char* name) {
    for (const Replayable& function : REPLAYABLE)
        if (!strcmp(function.name, name)) return &function;
    return nullptr;
}

// Recorded calls one after another, each with its arguments.
class Calls {
public:
    Calls(const void* const* functions, const latentd_argument* arguments, const latentd_base* bases)
        : function_(functions), argument_(arguments), bases_(bases) {}

    const Replayable& function() const { return *static_cast<const Replayable*>(*function_); }

    void read(int64_t* words) const {
        for (size_t i = 0; i < function().arguments; i++) {
            const latentd_base& base = bases_[argument_[i].base];
            words[i] = base.address + base.rows * argument_[i].scale + argument_[i].offset;
        }
    }

    void advance() {
        argument_ += function().arguments;
        function_++;
    }

private:
    const void* const* function_;
    const latentd_argument* argument_;
    const latentd_base* bases_;
};

inline size_t replay(const Kernels& kernels, const void* const* functions, int64_t sizes, int64_t calls,
                     const latentd_argument* arguments, const latentd_base* bases, size_t workspace_bytes) {
    size_t needed = 0;
    Calls call(functions, arguments, bases), ahead = call;
    int64_t words[MAX_ARGUMENTS], ahead_index = 0;
    for (int64_t index = 0; index < calls; index++, call.advance()) {
        if (index == sizes && needed > workspace_bytes) return needed;
        while (ahead_index < calls && (ahead_index <= index || !ahead.function().weights)) {
            ahead.advance();
            ahead_index++;
        }
        next_call = {};
        if (ahead_index < calls) {
            ahead.read(words);
            next_call = ahead.function().weights(words);
        }
        call.read(words);
        size_t size = call.function().call(kernels, words);
        needed = size > needed ? size : needed;
    }
    next_call = {};
    return 0;
}

}  // namespace latentd
