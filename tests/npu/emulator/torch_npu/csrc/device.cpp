// A device that is ordinary memory: allocator, guard, streams, generators, hooks.
#include "emulator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_set>
#include <vector>

namespace emulator {
using c10::Device;
using c10::DeviceIndex;

namespace {
thread_local DeviceIndex current = 0;
constexpr size_t kAlignment = 64;

void* host_memory(size_t bytes) {
  void* pointer = nullptr;
  if (bytes) {
    const auto rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    TORCH_CHECK(!posix_memalign(&pointer, kAlignment, rounded), "npu emulator: out of memory");
  }
  return pointer;
}

struct Block {
  void* pointer;  // null where the memory is a CPU storage's
  size_t bytes;
  DeviceIndex device;
  c10::Storage lender;
};

struct DeviceMemory final : c10::DeviceAllocator {
  std::mutex mutex;
  std::array<c10::CachingDeviceAllocator::DeviceStats, 16> stats;

  static DeviceMemory& get() {
    static auto* memory = new DeviceMemory();
    return *memory;
  }
  void account(DeviceIndex device, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto* stat : {&stats[device].allocated_bytes[0], &stats[device].reserved_bytes[0]}) {
      if (bytes >= 0) stat->increase(bytes);
      else stat->decrease(-bytes);
    }
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    get().account(block->device, -static_cast<int64_t>(block->bytes));
    std::free(block->pointer);
    delete block;
  }
  c10::DataPtr take(Block* block, void* pointer) {
    account(block->device, static_cast<int64_t>(block->bytes));
    return {pointer, block, &release, Device(kNpu, block->device)};
  }
  c10::DataPtr allocate(size_t bytes) override {
    auto* pointer = host_memory(bytes);
    return take(new Block{pointer, bytes, current, {}}, pointer);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    return stats[device];
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    stats[device].allocated_bytes[0].reset_peak();
    stats[device].reserved_bytes[0].reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex) override { return {1ull << 35, 1ull << 36}; }
};

// Work is done when a call returns, so streams and events have nothing to wait for. What a
// host would wait for is told all the same.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kNpu; }
  Device exchangeDevice(Device device) const override {
    return {kNpu, exchange_device(device.index())};
  }
  Device getDevice() const override { return {kNpu, current}; }
  void setDevice(Device device) const override { exchange_device(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Stream getStream(Device device) const override { return getDefaultStream(device); }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, with_index(device));
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getDefaultStream(device);
  }
  c10::Stream getNewStream(Device device, int) const override { return getDefaultStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getDefaultStream(stream.device());
  }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag)
      const override {
    static std::atomic<int64_t> clock{1};
    *event = reinterpret_cast<void*>(++clock);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { tell("read", "Stream.synchronize", 0); }
  void synchronizeEvent(void*) const override { tell("read", "Event.synchronize", 0); }
  void synchronizeDevice(const DeviceIndex) const override { tell("read", "synchronize", 0); }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0.0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// State and seed are the device's own; the numbers are those of the CPU's engine.
struct Generator final : c10::GeneratorImpl {
  at::Generator cpu = at::detail::createCPUGenerator();

  explicit Generator(DeviceIndex device)
      : GeneratorImpl(Device(kNpu, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* other = new Generator(device().index());
    other->cpu = cpu.clone();
    return other;
  }
};

// Pinned host memory: ordinary memory whose addresses are remembered.
struct PinnedMemory final : c10::Allocator {
  std::mutex mutex;
  std::unordered_set<const void*> live;

  static PinnedMemory& get() {
    static auto* memory = new PinnedMemory();
    return *memory;
  }
  static void release(void* pointer) {
    {
      std::lock_guard<std::mutex> lock(get().mutex);
      get().live.erase(pointer);
    }
    std::free(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    auto* pointer = host_memory(bytes + 1);
    std::lock_guard<std::mutex> lock(mutex);
    live.insert(pointer);
    return {pointer, pointer, &release, Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  void setCurrentDevice(DeviceIndex device) const override { exchange_device(device); }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return exchange_device(device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return exchange_device(device);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? current : device);
  }
  at::Device getDeviceFromPtr(void*) const override { return {kNpu, current}; }
  bool isPinnedPtr(const void* pointer) const override {
    auto& pinned = PinnedMemory::get();
    std::lock_guard<std::mutex> lock(pinned.mutex);
    return pinned.live.count(pointer) > 0;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &PinnedMemory::get(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DeviceGuard guard(storage.device());
    auto memory = DeviceMemory::get().allocate(bytes);
    if (auto kept = std::min(bytes, storage.nbytes()))
      std::memcpy(memory.get(), storage.data(), kept);
    storage.set_data_ptr_noswap(std::move(memory));
    storage.set_nbytes(bytes);
  }
};
}  // namespace

DeviceIndex device_count() {
  static const auto count = [] {
    const char* wanted = std::getenv("NPU_EMULATOR_DEVICES");
    return static_cast<DeviceIndex>(wanted ? std::atoi(wanted) : 2);
  }();
  return count;
}

DeviceIndex current_device() { return current; }

DeviceIndex exchange_device(DeviceIndex device) {
  TORCH_CHECK(device < device_count(), "npu emulator: invalid device ordinal ", int(device));
  const auto before = current;
  if (device >= 0) current = device;
  return before;
}

Device with_index(Device device) { return device.has_index() ? device : Device(kNpu, current); }

c10::Allocator* allocator() { return &DeviceMemory::get(); }

c10::DataPtr adopt(c10::Storage cpu, DeviceIndex device) {
  auto* pointer = cpu.mutable_data();
  const auto bytes = cpu.nbytes();
  return DeviceMemory::get().take(new Block{nullptr, bytes, device, std::move(cpu)}, pointer);
}

const at::Generator& default_generator(DeviceIndex device) {
  static auto* generators = [] {
    auto* made = new std::vector<at::Generator>();
    for (DeviceIndex i = 0; i < device_count(); ++i)
      made->push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return generators->at(device < 0 ? current : device);
}

at::Generator& cpu_generator(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

void register_hooks() {
  static Hooks hooks;
  c10::SetAllocator(kNpu, &DeviceMemory::get());
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

}  // namespace emulator
