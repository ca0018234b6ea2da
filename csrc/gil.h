// Releases the GIL while C++ works. Must not know what the work is.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace adamops {

// Releases the GIL while an object lives, as pybind11::gil_scoped_release does, but for a daemon thread that comes back
// when the interpreter is being finalized. Python before 3.14 ends such a thread with pthread_exit(), which unwinds the
// stack through this destructor, and so through functions that are noexcept: std::terminate(). And objects on the way
// would drop references without the GIL. So the thread stays here until the process ends, as Python 3.14 does itself.
class GilRelease {
 public:
  GilRelease() : thread_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {  // the unwinding by pthread_exit(); leaving this block would go on with it
      for (;;) pause();
    }
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* thread_;
};

}  // namespace adamops
