// The blocks of cuda_runtime.h, and what torch built for CUDA would give the launchers.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <ucontext.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulated {
namespace {

constexpr size_t kStack = 128 << 10;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  ucontext_t context;
  unsigned index;
  std::vector<Copy> copies;
};

struct Warp {
  const void* place = nullptr;
  void* records[kLanes];
  std::vector<unsigned> waiting;
};

// One block at a time.
struct Block {
  ucontext_t scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> ready, waiting;
  unsigned running, finished = 0;
  const std::function<void()>* body;
};

Block* block;
std::mt19937 chance(0);
std::string failure;
std::map<const void*, int> allowed;

// Memory whose end is the end of what may be touched.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_((bytes + 15) / 16 * 16) {
    const size_t page = getpagesize();
    used_ = (bytes_ + page - 1) / page * page;
    memory_ = static_cast<unsigned char*>(
        mmap(nullptr, used_ + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (used_) mprotect(memory_, used_, PROT_READ | PROT_WRITE);
  }
  ~Guarded() { munmap(memory_, used_ + getpagesize()); }
  Guarded(const Guarded&) = delete;

  unsigned char* data() const { return memory_ + used_ - bytes_; }
  void poison() const { std::memset(data(), 0xff, bytes_); }

 private:
  size_t bytes_, used_;
  unsigned char* memory_;
};
Guarded* shared;

void leave() {
  swapcontext(&block->threads[block->running].context, &block->scheduler);
  threadIdx.x = block->running;
}

void fail(const std::string& why) {
  failure = why;
  leave();  // never to return: the scheduler stops
}

void wake(std::vector<unsigned>& sleepers) {
  block->ready.insert(block->ready.end(), sleepers.begin(), sleepers.end());
  sleepers.clear();
}

void enter() {
  threadIdx.x = block->running;
  (*block->body)();
  Thread& self = block->threads[block->running];
  if (!self.copies.empty()) fail("a thread ended before its copies were waited for");
  ++block->finished;
  leave();
}

void run_block(unsigned threads, const std::function<void()>& body) {
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() < threads) stacks.emplace_back(new unsigned char[kStack]);
  Block current;
  block = &current;
  current.body = &body;
  current.threads.resize(threads);
  current.warps.resize(threads / kLanes);
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = current.threads[i];
    thread.index = i;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks[i].get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    current.ready.push_back(i);
  }
  while (!current.ready.empty() && failure.empty()) {
    std::swap(current.ready[chance() % current.ready.size()], current.ready.back());
    current.running = current.ready.back();
    current.ready.pop_back();
    swapcontext(&current.scheduler, &current.threads[current.running].context);
  }
  if (failure.empty() && current.finished < threads)
    failure = "threads wait at a barrier or shuffle that others of their block do not reach";
}

}  // namespace

void together(const void* place, void* record, void (*meet)(Records)) {
  Warp& warp = block->warps[block->running / kLanes];
  if (warp.waiting.empty()) warp.place = place;
  if (warp.place != place) fail("lanes of a warp meet at different places");
  warp.records[block->running % kLanes] = record;
  if (warp.waiting.size() == kLanes - 1) {
    meet(warp.records);
    wake(warp.waiting);
  } else {
    warp.waiting.push_back(block->running);
    leave();
  }
}

void wait_for_block() {
  if (block->waiting.size() == block->threads.size() - 1) {
    wake(block->waiting);
  } else {
    block->waiting.push_back(block->running);
    leave();
  }
}

unsigned char* shared_memory() { return shared->data(); }

void must_be_aligned(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16)
    fail(std::string(what) + " is not aligned to 16 bytes");
}

void copy_later(void* to, const void* from, int bytes) {
  must_be_aligned(to, "the target of an asynchronous copy");
  must_be_aligned(from, "the source of an asynchronous copy");
  if (bytes < 0 || bytes > 16)
    fail("an asynchronous copy of 16 bytes has " + std::to_string(bytes));
  block->threads[block->running].copies.push_back({to, from, bytes});
}

void copy_now() {
  std::vector<Copy>& copies = block->threads[block->running].copies;
  for (const Copy& copy : copies) {
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.clear();
}

int most_shared = 163 << 10;  // of sm_80

cudaError_t allow(const void* kernel, int bytes) {
  if (bytes > most_shared) return cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config,
                   const std::function<void()>& thread) {
  const auto bytes = static_cast<int>(config.dynamicSmemBytes);
  if (bytes > std::max(48 << 10, allowed[kernel]) || config.blockDim.x % kLanes ||
      config.blockDim.x > 1024 || config.gridDim.x == 0)
    return cudaErrorInvalidValue;
  Guarded memory(config.dynamicSmemBytes);
  shared = &memory;
  failure.clear();
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  for (unsigned b = 0; b < config.gridDim.x && failure.empty(); ++b) {
    blockIdx.x = b;
    memory.poison();
    run_block(config.blockDim.x, thread);
  }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulated

extern "C" {

// Which thread runs next is drawn from here.
__attribute__((visibility("default"))) void edt_emulated_order(uint32_t seed) {
  emulated::chance.seed(seed);
}

// Bytes of shared memory that a block can have.
__attribute__((visibility("default"))) void edt_emulated_shared(int bytes) {
  emulated::most_shared = bytes;
}

// Why the last launch failed.
__attribute__((visibility("default"))) const char* edt_emulated_failure() {
  return emulated::failure.c_str();
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

// As torch's, but what is fresh is full of NaN.
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t device, int32_t index,
                                        AtenTensorHandle* out) {
  static const auto real = reinterpret_cast<decltype(&aoti_torch_empty_strided)>(
      dlsym(dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY), "aoti_torch_empty_strided"));
  const AOTITorchError error = real(dims, sizes, strides, dtype, device, index, out);
  void* data;
  int64_t bytes;
  if (error == AOTI_TORCH_SUCCESS && aoti_torch_get_data_ptr(*out, &data) == AOTI_TORCH_SUCCESS &&
      aoti_torch_get_storage_size(*out, &bytes) == AOTI_TORCH_SUCCESS && bytes > 0)
    std::memset(data, 0xff, bytes);
  return error;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                        char** out) {
  if (error == cudaSuccess) return AOTI_TORCH_SUCCESS;
  const std::string why =
      error == cudaErrorLaunchFailure ? emulated::failure : "invalid launch configuration";
  *out = new char[why.size() + 1];
  std::memcpy(*out, why.c_str(), why.size() + 1);
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { delete[] message; }
}
