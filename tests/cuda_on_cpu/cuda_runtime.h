// As much of CUDA as csrc/cuda uses, for g++: a .cu file compiled with this folder on the include
// path runs on a CPU, slowly, one block after another.
//
// A block's threads are fibers of one thread of the machine. Each warp runs until it must wait for
// the others, as far ahead as CUDA allows, so that what lacks a barrier goes wrong here. Threads that wait for different barriers are an error that ends the
// process with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::fma;
using std::isfinite;
using std::sqrt;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32, kStackBytes = 1 << 16;

// Blocks [first, last) of a grid that run: a test of a huge tensor wants only some.
inline uint64_t first_block = 0, last_block = ~uint64_t{0};
inline int launches = 0;

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it waits: a jump costs no system call, as a switch of contexts would
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false, done = false;
};

// Threads that wait for each other: a block or a warp.
struct Group {
  unsigned size = 0, arrived = 0, phase = 0;
};

struct Machine {
  jmp_buf scheduler;
  std::vector<Fiber> fibers;
  std::vector<Group> warps;
  Group block;
  std::vector<uint64_t> value;  // what each thread offers to the others
  std::function<void()> body;
  unsigned running = 0, progress = 0;
};
inline Machine machine;

inline void wait(Group& group) {
  const unsigned phase = group.phase;
  ++machine.progress;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.phase;
  }
  while (group.phase == phase) {
    if (_setjmp(machine.fibers[machine.running].place) == 0) _longjmp(machine.scheduler, 1);
  }
}

inline void run_fiber() {
  machine.body();
  machine.fibers[machine.running].done = true;
  ++machine.progress;
  _longjmp(machine.scheduler, 1);
}

// Returns when the fiber waits or is done.
inline void resume(Fiber& fiber) {
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

}  // namespace cuda_on_cpu

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

// Runs the threads from `first` on until all of them are done or wait for other warps.
inline void run_warp(unsigned first) {
  unsigned before;
  do {
    before = machine.progress;
    for (unsigned thread = first; thread < first + kWarpSize; ++thread) {
      if (machine.fibers[thread].done) continue;
      machine.running = thread;
      threadIdx = dim3(thread);
      resume(machine.fibers[thread]);
    }
  } while (machine.progress != before);
}

inline void run_block(unsigned threads) {
  machine.fibers.resize(threads);
  machine.value.resize(threads);
  machine.block = {threads};
  machine.warps.assign(threads / kWarpSize, {kWarpSize});
  for (Fiber& fiber : machine.fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.started = fiber.done = false;
    makecontext(&fiber.start, run_fiber, 0);
  }
  const auto is_done = [](const Fiber& fiber) { return fiber.done; };
  while (!std::all_of(machine.fibers.begin(), machine.fibers.end(), is_done)) {
    const unsigned before = machine.progress;
    for (unsigned warp = 0; warp < threads; warp += kWarpSize) run_warp(warp);
    if (machine.progress == before) {
      std::fprintf(stderr, "threads of block %u wait for each other forever\n", blockIdx.x);
      std::abort();
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::machine.block); }

inline int __syncthreads_count(int predicate) {
  auto& machine = cuda_on_cpu::machine;
  machine.value[threadIdx.x] = predicate != 0;
  __syncthreads();
  int count = 0;
  for (const uint64_t value : machine.value) count += static_cast<int>(value);
  __syncthreads();
  return count;
}

inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  auto& machine = cuda_on_cpu::machine;
  const unsigned thread = threadIdx.x;
  auto& warp = machine.warps[thread / cuda_on_cpu::kWarpSize];
  std::memcpy(&machine.value[thread], &value, sizeof(T));
  cuda_on_cpu::wait(warp);
  std::memcpy(&value, &machine.value[thread ^ static_cast<unsigned>(mask)], sizeof(T));
  cuda_on_cpu::wait(warp);
  return value;
}

// Words must lie where a GPU could load them.
template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    std::fprintf(stderr, "misaligned address %p\n", static_cast<const void*>(address));
    std::abort();
  }
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return __ldg(address);
}
template <class T>
void __stcs(T* address, T value) {
  __ldg(address);
  *address = value;
}

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  ++launches;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  machine.body = [&] { kernel(arguments...); };
  for (uint64_t block = first_block; block < gridDim.x && block < last_block; ++block) {
    blockIdx = dim3(static_cast<unsigned>(block));
    run_block(blockDim.x);
  }
  return cudaSuccess;
}
