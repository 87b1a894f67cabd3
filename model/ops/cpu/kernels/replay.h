// Makes recorded calls: see latentd_replay in abi.h.
#pragma once

#include <string.h>

#include <type_traits>
#include <utility>

#include "kernels.h"

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

struct Replayable {
    const char* name;
    size_t arguments;
    size_t (*call)(const Kernels& kernels, const int64_t* words);
};

template <auto MEMBER>
constexpr Replayable replayable(const char* name) {
    constexpr size_t arguments = count(decltype(Kernels{}.*MEMBER){});
    static_assert(arguments <= MAX_ARGUMENTS);
    return {name, arguments, [](const Kernels& kernels, const int64_t* words) {
                return latentd::call(kernels.*MEMBER, words, std::make_index_sequence<arguments>());
            }};
}

constexpr Replayable REPLAYABLE[] = {
    replayable<&Kernels::linear>("linear"),
    replayable<&Kernels::rms_norm>("rms_norm"),
    replayable<&Kernels::gather>("gather"),
    replayable<&Kernels::rotation>("rotation"),
    replayable<&Kernels::rope_and_cache>("rope_and_cache"),
    replayable<&Kernels::attention_workspace>("attention_workspace"),
    replayable<&Kernels::attention>("attention"),
    replayable<&Kernels::router_workspace>("router_workspace"),
    replayable<&Kernels::router>("router"),
    replayable<&Kernels::moe_workspace>("moe_workspace"),
    replayable<&Kernels::moe>("moe"),
    replayable<&Kernels::mlp>("mlp"),
};

inline const Replayable* find_replayable(const char* name) {
    for (const Replayable& function : REPLAYABLE)
        if (!strcmp(function.name, name)) return &function;
    return nullptr;
}

inline size_t replay(const Kernels& kernels, const void* const* functions, int64_t sizes, int64_t calls,
                     const latentd_argument* arguments, const latentd_base* bases, size_t workspace_bytes) {
    size_t needed = 0;
    for (int64_t index = 0; index < calls; index++) {
        if (index == sizes && needed > workspace_bytes) return needed;
        const Replayable& function = *static_cast<const Replayable*>(functions[index]);
        int64_t words[MAX_ARGUMENTS];
        for (size_t i = 0; i < function.arguments; i++, arguments++) {
            const latentd_base& base = bases[arguments->base];
            words[i] = base.address + base.rows * arguments->scale + arguments->offset;
        }
        size_t size = function.call(kernels, words);
        needed = size > needed ? size : needed;
    }
    return 0;
}

}  // namespace latentd
