// Finds OpenMP at run time, handles fork(), and splits a list of tensors. Must not know what the parts do.
#include "runtime/parallel.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include "runtime/float_environment.h"

namespace adamops {

namespace {

// libgomp's entry points, which LLVM's and Intel's libomp have too.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();

  explicit operator bool() const { return parallel && thread_num && num_threads; }
};

// A function of the process, as torch's own calls find it: with global visibility, else in what torch's library was
// linked with. torch's wheels for AArch64 load their OpenMP runtime without global visibility.
void* function_of_process(const char* name) {
  if (void* const found = dlsym(RTLD_DEFAULT, name)) return found;
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!torch) return nullptr;
  void* const found = dlsym(torch, name);
  dlclose(torch);
  return found;
}

// The same, looked up until it is found. Takes no lock, which a fork could leave locked.
template <class Function>
Function symbol(std::atomic<Function>& kept, const char* name) {
  Function found = kept.load(std::memory_order_relaxed);
  if (!found) {
    found = reinterpret_cast<Function>(function_of_process(name));
    kept.store(found, std::memory_order_relaxed);
  }
  return found;
}

// The file name of torch's runtime differs between releases, so look it up by symbol. Repeat until it is found, since
// this code may be loaded before torch.
OpenMp find_openmp() {
  static std::atomic<decltype(OpenMp::parallel)> parallel;
  static std::atomic<decltype(OpenMp::thread_num)> thread_num;
  static std::atomic<decltype(OpenMp::num_threads)> num_threads;
  return {symbol(parallel, "GOMP_parallel"), symbol(thread_num, "omp_get_thread_num"),
          symbol(num_threads, "omp_get_num_threads")};
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

// The runtime may grant fewer threads than requested, so distribute the parts over the actual team.
void run_in_team(void* argument) {
  const Region& region = *static_cast<const Region*>(argument);
  run_parts(region, region.openmp.thread_num(), region.openmp.num_threads());
}

// The number of cores available to this process. More threads would only wait for each other, and the runtime ends the
// process if the system refuses it a thread.
unsigned most_threads() {
  static const unsigned most = std::max(1u, std::thread::hardware_concurrency());
  return most;
}

// Whether the system can start this many threads at once.
bool grants(unsigned count) {
  std::vector<std::thread> threads;
  bool granted = true;
  try {
    for (unsigned i = 0; i < count; ++i) threads.emplace_back([] {});
  } catch (const std::system_error&) {
    granted = false;
  }
  for (std::thread& thread : threads) thread.join();
  return granted;
}

void run_region(Region& region) {
  const unsigned threads = std::min(static_cast<unsigned>(region.parts), most_threads());
  // If the caller wants far more threads than there are cores, torch may have used up all that the system allows:
  // torch.set_num_threads() starts threads for torch's own pools.
  constexpr unsigned kAbsurd = 16;
  if (static_cast<unsigned>(region.parts) > kAbsurd * threads && !grants(threads)) return run_parts(region, 0, 1);
  region.openmp.parallel(run_in_team, &region, threads, 0);
}

// Whether this process came from fork() without an exec() since, however long before this code was loaded; false if the
// system does not tell. On Linux, the flags in /proc/self/stat say so: the seventh field after the name in parentheses
// (proc(5); PF_FORKNOEXEC of linux/sched.h).
bool is_forked_child() {
  constexpr unsigned kForkedWithoutExec = 0x40;
  char text[512];
  const int file = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  const ssize_t size = read(file, text, sizeof text - 1);
  close(file);
  text[std::max<ssize_t>(size, 0)] = 0;
  const char* const after_name = std::strrchr(text, ')');
  unsigned flags = 0;
  if (!after_name || std::sscanf(after_name + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) return false;
  return flags & kForkedWithoutExec;
}

const pid_t process_at_load = getpid();
const bool loaded_in_a_forked_child = is_forked_child();

// Whether the calling thread is the one that survived a fork. Its OpenMP team, if it had one, did not survive, but
// libgomp does not know that and would wait for it forever. Threads started after the fork get teams of their own.
bool has_survived_a_fork() {
  const pid_t process = getpid();
  if (process == process_at_load && !loaded_in_a_forked_child) return false;
#if defined(__linux__)
  return syscall(SYS_gettid) == process;
#else
  return true;
#endif
}

}  // namespace

void parallel_for(int parts, void (*body)(void* context, int part), void* context) {
  Region region{{}, parts, body, context};
  if (parts > 1) region.openmp = find_openmp();
  if (!region.openmp) return run_parts(region, 0, 1);
  if (!has_survived_a_fork()) return run_region(region);
  std::thread with_a_team_of_its_own;
  try {
    with_a_team_of_its_own = std::thread([&region] { run_region(region); });
  } catch (const std::system_error&) {  // the system refuses a thread
    return run_parts(region, 0, 1);
  }
  with_a_team_of_its_own.join();
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
