// Lets CUDA compile a function for the device as well.
#pragma once

#if defined(__CUDACC__)
#define ADAMOPS_HOST_DEVICE __host__ __device__
#else
#define ADAMOPS_HOST_DEVICE
#endif
