// Releases the GIL while C++ code runs. Must not know what that code does.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace adamops {

// Releases the GIL for the lifetime of the object, like pybind11::gil_scoped_release, except in a daemon thread that
// returns while the interpreter is being finalized. Python before 3.14 ends such a thread with pthread_exit(), which
// unwinds the stack through this destructor and other noexcept functions: std::terminate(). Objects on the way would
// also release their references without the GIL. So the thread stays here until the process ends, as Python 3.14 does
// itself.
class GilRelease {
 public:
  GilRelease() : thread_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {  // the unwinding of pthread_exit(); leaving this handler would continue it
      for (;;) pause();
    }
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* thread_;
};

}  // namespace adamops
