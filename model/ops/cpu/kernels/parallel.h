// The only place that knows of threads.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace latentd {

extern int num_threads;

// Which of the threads 0 ... num_threads - 1 this is, to a job: whose memory it may use.
inline __attribute__((always_inline)) int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Calls job(0) ... job(jobs - 1), each once, on up to num_threads threads; which one runs on which is left open, so a
// job must not depend on others of the same call. Returns when all have ended.
template <typename Job>
inline void parallel_for(int64_t jobs, const Job& job) {
    if (jobs <= 1 || num_threads <= 1) {
        for (int64_t index = 0; index < jobs; index++) job(index);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t index = 0; index < jobs; index++) job(index);
}

// So few rows of cheap work are done by the caller alone: waking another thread would take longer.
constexpr int64_t SMALL_ROWS = 16;

// Calls job(start, stop) for ranges of at most `size` that cover 0 ... count.
template <typename Job>
inline void parallel_ranges(int64_t count, int64_t size, const Job& job) {
    parallel_for((count + size - 1) / size, [&](int64_t index) {
        int64_t stop = (index + 1) * size;
        job(index * size, stop < count ? stop : count);
    });
}

}  // namespace latentd
