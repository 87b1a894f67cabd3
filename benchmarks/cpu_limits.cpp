// What this machine can do at most: the limits that benchmarks/cpu_kernels.py compares the kernels with.
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs work(thread) on all threads at once; returns seconds.
template <typename Work>
double timed(int threads, const Work& work) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> others;
    for (int thread = 0; thread < threads; thread++)
        others.emplace_back([&, thread] {
            cpu_set_t own;
            CPU_ZERO(&own);
            CPU_SET(thread, &own);
            sched_setaffinity(0, sizeof own, &own);  // fails where that processor is not ours: left to the system
            ready++;
            while (!go) std::this_thread::yield();
            work(thread);
        });
    while (ready < threads) std::this_thread::yield();
    double start = now();
    go = true;
    for (auto& other : others) other.join();
    return now() - start;
}

typedef int64_t Line __attribute__((vector_size(64)));
volatile int64_t sink;

}  // namespace

extern "C" {

// Bytes a second, read in order from memory by `threads` threads at once, each its own part.
double read_bandwidth(int threads) {
    const size_t size = size_t(1) << 30, part = size / size_t(threads) / 4096 * 4096;
    void* memory = mmap(nullptr, size + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 0;
    char* base = reinterpret_cast<char*>((uintptr_t(memory) + (2 << 20) - 1) >> 21 << 21);
    madvise(base, size, MADV_HUGEPAGE);
    for (size_t i = 0; i < size; i += 4096) base[i] = 1;
    double best = 1e9;
    for (int run = 0; run < 5; run++) {
        double seconds = timed(threads, [&](int thread) {
            const Line* from = reinterpret_cast<const Line*>(base + part * size_t(thread));
            Line sums[8] = {};
            for (size_t i = 0; i < part / 64; i += 8)
                _Pragma("GCC unroll 8") for (size_t line = 0; line < 8; line++) sums[line] ^= from[i + line];
            for (Line sum : sums) sink = sum[0];
        });
        best = seconds < best ? seconds : best;
    }
    munmap(memory, size + (2 << 20));
    return double(part) * threads / best;
}

// Operations a second (a multiplication and an addition are two) of products of bf16 pairs, and of bytes: in registers
// only. 0 where the instruction is missing.
#define TO(instruction, sum) instruction " %%zmm30, %%zmm31, %%zmm" #sum "\n\t"
#define TO_FOUR(instruction, a, b, c, d) TO(instruction, a) TO(instruction, b) TO(instruction, c) TO(instruction, d)
#define TO_TWELVE(instruction)                                              \
    asm volatile(TO_FOUR(instruction, 0, 1, 2, 3) TO_FOUR(instruction, 4, 5, 6, 7) \
                     TO_FOUR(instruction, 8, 9, 10, 11)::                   \
                     : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11")
constexpr int64_t ROUNDS = 20000000;

double bf16_peak(int threads) {
#if defined(__AVX512BF16__)
    double seconds = timed(threads, [](int) {
        for (int64_t round = 0; round < ROUNDS; round++) TO_TWELVE("vdpbf16ps");
    });
    return double(ROUNDS) * 12 * 64 * threads / seconds;
#else
    (void)threads;
    return 0;
#endif
}

double int8_peak(int threads) {
#if defined(__AVX512VNNI__)
    double seconds = timed(threads, [](int) {
        for (int64_t round = 0; round < ROUNDS; round++) TO_TWELVE("vpdpbusd");
    });
    return double(ROUNDS) * 12 * 128 * threads / seconds;
#else
    (void)threads;
    return 0;
#endif
}
}
