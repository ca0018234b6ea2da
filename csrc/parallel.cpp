// OpenMP found at run time, the fork case, and the cutting of a list of tensors. Knows nothing of what the parts do.
#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <thread>

#include "float_environment.h"

namespace adamops {

namespace {

// libgomp's entry points; LLVM's and Intel's libomp have them too.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();

  explicit operator bool() const { return parallel && thread_num && num_threads; }
};

// torch loads its runtime with global visibility, under a file name that differs between releases, so it is asked for
// by symbol. Asked again until it is found, since this code may be loaded before torch.
OpenMp find_openmp() {
  static std::mutex mutex;
  static OpenMp found;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!found) {
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.thread_num = reinterpret_cast<decltype(found.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    found.num_threads = reinterpret_cast<decltype(found.num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  }
  return found;
}

struct Region {
  OpenMp openmp;
  int parts;
  void (*body)(void*, int);
  void* context;
};

void run_parts(const Region& region, int first, int stride) {
  const DefaultFloatEnvironment environment;
  for (int part = first; part < region.parts; part += stride) region.body(region.context, part);
}

// The runtime may grant fewer threads than asked for, so parts are dealt out by what there is.
void run_in_team(void* argument) {
  const Region& region = *static_cast<const Region*>(argument);
  run_parts(region, region.openmp.thread_num(), region.openmp.num_threads());
}

void run_region(Region& region) {
  region.openmp.parallel(run_in_team, &region, static_cast<unsigned>(region.parts), 0);
}

const pid_t process_at_load = getpid();

}  // namespace

void parallel_for(int parts, void (*body)(void* context, int part), void* context) {
  Region region{{}, parts, body, context};
  if (parts > 1) region.openmp = find_openmp();
  if (!region.openmp) {
    run_parts(region, 0, 1);
  } else if (getpid() == process_at_load) {
    run_region(region);
  } else {
    // A forked child. The forking thread's team did not survive the fork, but libgomp still believes in it and would
    // wait for it forever; a new thread starts with a team of its own.
    std::thread([&region] { run_region(region); }).join();
  }
}

const char* openmp_runtime() {
  const OpenMp openmp = find_openmp();
  Dl_info info;
  if (!openmp || !dladdr(reinterpret_cast<void*>(openmp.parallel), &info)) return "";
  return info.dli_fname;
}

Partition::Partition(const std::vector<int64_t>& sizes, int max_parts, int64_t least_elements_per_part) {
  starts_.reserve(sizes.size() + 1);
  int64_t total = 0;
  for (const int64_t size : sizes) {
    starts_.push_back(total);
    total += size;
  }
  starts_.push_back(total);
  parts_ = static_cast<int>(std::clamp<int64_t>(total / least_elements_per_part, 1, std::max(max_parts, 1)));
}

Partition::Position Partition::position(int part) const {
  const int64_t total = starts_.back(), tensors = static_cast<int64_t>(starts_.size()) - 1;
  if (part == parts_) return {static_cast<size_t>(tensors), 0};
  const int64_t share = total / parts_, rest = total % parts_;
  const int64_t start = share * part + std::min<int64_t>(part, rest);
  const auto next = std::upper_bound(starts_.begin(), starts_.end() - 1, start);
  const size_t tensor = static_cast<size_t>(next - starts_.begin()) - (next == starts_.begin() ? 0 : 1);
  return {tensor, (start - starts_[tensor]) / kGrain * kGrain};
}

}  // namespace adamops
