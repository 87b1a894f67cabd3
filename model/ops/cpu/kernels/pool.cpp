// The threads behind parallel_for: the caller and its workers take the jobs of a region one by one.
//
// The caller takes every job that nobody has claimed and waits for claimed jobs, never for threads. So a worker that
// sleeps, or that waits for a core which another process has, costs nothing, unless it lost the core within a job.
// Then the caller gives up its own core, which lets the system bring the worker over, and the worker takes part again
// only after a rest of many times what it was waited for: beside a busy process, a step costs what fewer threads need.
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <memory>

#include "parallel.h"
#include "pool.h"

namespace latentd {

int num_threads = 1;

namespace {

// A caller computes for less than this between two regions of a step, and jobs rarely differ by more.
constexpr int64_t SPIN_NANOSECONDS = 200'000;
// How much longer than it was waited for a worker rests that lost its core.
constexpr int64_t REST = 16;

thread_local int index_of_thread = 0;

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // `yield` does nothing on most cores
#endif
}

// What is fetched while waiting, piece by piece. They are small, and a pause goes between them: a processor drops
// prefetches that come faster than memory answers.
class Fetch {
public:
    void set(Soon soon) {
        const char* from = static_cast<const char*>(soon.from);
        stop_.store(nullptr, std::memory_order_release);  // so that no one reads on from the old end
        next_.store(from, std::memory_order_release);
        stop_.store(from + (soon.bytes < MOST ? soon.bytes : MOST), std::memory_order_release);
    }

    void piece() {
        const char* stop = stop_.load(std::memory_order_acquire);
        const char* from = next_.load(std::memory_order_acquire);
        if (from >= stop || !next_.compare_exchange_weak(from, from + PIECE, std::memory_order_relaxed)) return;
        for (int64_t line = 0; line < PIECE; line += 64) __builtin_prefetch(from + line, 0, 2);
    }

private:
    static constexpr int64_t MOST = 2 << 20, PIECE = 512;

    alignas(64) std::atomic<const char*> next_{nullptr};
    std::atomic<const char*> stop_{nullptr};
};

Fetch fetch;

// Whether `done` came true within the time that is worth spinning.
template <typename Condition>
bool spin_until(const Condition& done) {
    for (int64_t stop = now() + SPIN_NANOSECONDS;;) {
        for (int i = 0; i < 64; i++) {
            if (done()) return true;
            fetch.piece();
            pause();
        }
        if (now() > stop) return false;
    }
}

using Word = std::atomic<uint32_t>;

// Returns when the word is woken, at once if it is not `value`, after `timeout` nanoseconds unless that is 0, or at any
// time.
void futex_wait(Word& word, uint32_t value, int64_t timeout = 0) {
    timespec time{timeout / 1'000'000'000, timeout % 1'000'000'000};
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, timeout ? &time : nullptr, nullptr, 0);
}

void futex_wake(Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }

// How often this thread had to give its core to another.
int64_t times_preempted() {
    rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
}

class Pool {
public:
    Pool() {
        pthread_atfork(nullptr, nullptr, [] { pool.forget_workers(); });
    }

    // A thread that still calls kernels while the process ends does their jobs alone, since the pool stays taken.
    ~Pool() {
        take();
        stop();
    }

    void resize(int threads) {
        take();
        if (threads != num_threads) stop();
        num_threads = threads;
        taken.store(false, std::memory_order_release);
    }

    void run(int64_t jobs, void (*job)(const void*, int64_t), const void* context) {
        // Another thread's region, or that of this one, whose jobs have regions of their own.
        if (taken.exchange(true, std::memory_order_acquire)) {
            for (int64_t index = 0; index < jobs; index++) job(context, index);
            return;
        }
        if (!started) start();
        region.jobs.store(uint32_t(jobs), std::memory_order_relaxed);
        region.job.store(job, std::memory_order_relaxed);
        region.context.store(context, std::memory_order_relaxed);
        unfinished.store(uint32_t(jobs), std::memory_order_relaxed);
        uint64_t epoch = (open_jobs.load(std::memory_order_relaxed) >> 32) + 1;
        open_jobs.store(epoch << 32 | uint64_t(jobs));
        for (int64_t i = 0; i < workers_running && i < jobs - 1; i++) wake(workers[i]);
        uint32_t done = do_jobs();
        if (unfinished.fetch_sub(done, std::memory_order_acq_rel) != done) wait_for_claimed_jobs();
        taken.store(false, std::memory_order_release);
    }

private:
    // AWAKE is no state to wait in: a worker that finds it goes on.
    enum State : uint32_t { AWAKE, ASLEEP, RESTING };

    struct alignas(64) Worker {
        Word state{AWAKE};
        pthread_t thread;
        int index;
        int64_t preempted = 0;
    };

    static constexpr uint32_t WAITING = 1u << 31;

    void take() {
        while (taken.exchange(true, std::memory_order_acquire)) sched_yield();
    }

    // Does jobs as long as there are unclaimed ones, and returns how many. A claim that succeeds proves that the
    // region it read of was still this one: what was read of a later one is dropped with the claim.
    uint32_t do_jobs() {
        uint32_t done = 0;
        uint64_t open = open_jobs.load(std::memory_order_acquire);
        while (uint32_t left = uint32_t(open)) {
            uint32_t jobs = region.jobs.load(std::memory_order_relaxed);
            auto job = region.job.load(std::memory_order_relaxed);
            const void* context = region.context.load(std::memory_order_relaxed);
            if (!open_jobs.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel, std::memory_order_acquire))
                continue;
            job(context, jobs - left);
            done++;
            open = open_jobs.load(std::memory_order_acquire);
        }
        return done;
    }

    void wait_for_claimed_jobs() {
        auto done = [this] { return unfinished.load(std::memory_order_acquire) == 0; };
        if (spin_until(done)) return;
        waiting_since.store(now(), std::memory_order_relaxed);
        uint32_t left = unfinished.fetch_or(WAITING, std::memory_order_acq_rel) | WAITING;
        for (; left != WAITING; left = unfinished.load(std::memory_order_acquire)) futex_wait(unfinished, left);
    }

    void work(Worker& self) {
        index_of_thread = self.index;
        while (wait_for_region(self))
            if (uint32_t done = do_jobs()) report(self, done);
    }

    // False when the pool stops.
    bool wait_for_region(Worker& self) {
        auto called = [this] { return uint32_t(open_jobs.load()) != 0 || stopping.load(); };
        if (!spin_until(called)) {
            self.state.store(ASLEEP);
            while (!called() && self.state.load() == ASLEEP) futex_wait(self.state, ASLEEP);
            self.state.store(AWAKE);
        }
        return !stopping.load();
    }

    void wake(Worker& worker) {
        uint32_t asleep = ASLEEP;
        if (worker.state.load() == ASLEEP && worker.state.compare_exchange_strong(asleep, AWAKE))
            futex_wake(worker.state);
    }

    void report(Worker& self, uint32_t done) {
        uint32_t left = unfinished.fetch_sub(done, std::memory_order_acq_rel) - done;
        if (!(left & WAITING)) return;
        int64_t waited = now() - waiting_since.load(std::memory_order_relaxed);
        if (left == WAITING) futex_wake(unfinished);
        int64_t preempted = times_preempted();
        if (preempted != self.preempted) rest(self, REST * (waited + SPIN_NANOSECONDS));
        self.preempted = preempted;
    }

    void rest(Worker& self, int64_t nanoseconds) {
        int64_t stop = now() + nanoseconds;
        self.state.store(RESTING);
        while (!stopping.load() && nanoseconds > 0) {
            futex_wait(self.state, RESTING, nanoseconds);
            nanoseconds = stop - now();
        }
        self.state.store(AWAKE);
    }

    // As many as there can be; the caller is the thread with index 0.
    void start() {
        started = true;
        stopping.store(false);
        workers = std::make_unique<Worker[]>(size_t(num_threads - 1));
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads of the program
        for (workers_running = 0; workers_running < num_threads - 1; workers_running++) {
            Worker& worker = workers[workers_running];
            worker.index = workers_running + 1;
            auto run = [](void* worker) -> void* {
                pool.work(*static_cast<Worker*>(worker));
                return nullptr;
            };
            if (pthread_create(&worker.thread, nullptr, run, &worker) != 0) break;
            pthread_setname_np(worker.thread, "latentd-kernels");
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void stop() {
        stopping.store(true);
        for (int i = 0; i < workers_running; i++) {
            workers[i].state.store(AWAKE);
            futex_wake(workers[i].state);
        }
        for (int i = 0; i < workers_running; i++) pthread_join(workers[i].thread, nullptr);
        workers.reset();
        workers_running = 0;
        started = false;
    }

    // In a forked child, which has only the thread that forked.
    void forget_workers() {
        workers.release();
        workers_running = 0;
        started = false;
        open_jobs.store(0);
        taken.store(false);
    }

    alignas(64) std::atomic<uint64_t> open_jobs{0};  // which region it is, and how many of its jobs nobody has claimed
    alignas(64) struct {
        std::atomic<uint32_t> jobs{0};
        std::atomic<void (*)(const void*, int64_t)> job{nullptr};
        std::atomic<const void*> context{nullptr};
    } region;
    alignas(64) Word unfinished{0};  // jobs, claimed or not, and whether the caller sleeps until there are none
    std::atomic<int64_t> waiting_since{0};
    alignas(64) std::atomic<bool> taken{false};  // by a region, or by a change of the workers
    std::atomic<bool> stopping{false};
    bool started = false;
    int workers_running = 0;
    std::unique_ptr<Worker[]> workers;

    static Pool pool;
    friend void latentd::run_jobs(int64_t, void (*)(const void*, int64_t), const void*);
    friend void latentd::set_threads(int);
};

Pool Pool::pool;

}  // namespace

thread_local Soon next_call;

void fetch_while_waiting(Soon soon) {
    if (num_threads > 1) fetch.set(soon);
}

int thread_index() { return index_of_thread; }

void run_jobs(int64_t jobs, void (*job)(const void*, int64_t), const void* context) {
    Pool::pool.run(jobs, job, context);
}

void set_threads(int threads) { Pool::pool.resize(threads > 1 ? threads : 1); }

}  // namespace latentd
