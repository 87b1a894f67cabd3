// Sets how many threads run the kernels' jobs.
#pragma once

namespace latentd {

// From 1 on. Threads start with the first jobs that want them, again in a forked child, and are joined at exit.
void set_threads(int threads);

}  // namespace latentd
