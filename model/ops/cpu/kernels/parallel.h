// What kernels know of threads; pool.cpp has them.
#pragma once

#include <cstdint>

namespace latentd {

extern int num_threads;

// Which of the threads 0 ... num_threads - 1 this is, to a job: whose memory it may use.
int thread_index();

// Calls job(context, 0) ... job(context, jobs - 1), at least 2 of them, by the pool.
void run_jobs(int64_t jobs, void (*job)(const void* context, int64_t index), const void* context);

// Calls job(0) ... job(jobs - 1), each once, on up to num_threads threads; which one runs on which is left open, so a
// job must not depend on others of the same call. Returns when all have ended.
template <typename Job>
inline void parallel_for(int64_t jobs, const Job& job) {
    if (jobs > 1 && num_threads > 1) {
        run_jobs(
            jobs, [](const void* context, int64_t index) { (*static_cast<const Job*>(context))(index); }, &job);
        return;
    }
    for (int64_t index = 0; index < jobs; index++) job(index);
}

// The job of a region that this thread does after `job`, likely: where all jobs are alike, threads take them in turn.
inline int64_t likely_next(int64_t job) { return job + num_threads; }

// Memory that is read soon. Threads that have no job, or wait for the end of others', bring it into the caches meanwhile:
// memory would rest while one thread computes, and while the last job of a region is done.
struct Soon {
    const void* from = nullptr;
    int64_t bytes = 0;
};

// Instead of what was named before; more than a part of a cache is not fetched.
void fetch_while_waiting(Soon soon);

// What the call after this one reads first: `replay` knows.
extern thread_local Soon next_call;

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
