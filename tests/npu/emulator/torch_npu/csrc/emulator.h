// What the two halves of the emulated device share.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>

#include <string>
#include <vector>

namespace emulator {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;

c10::DeviceIndex device_count();
c10::DeviceIndex current_device();
// Makes a device current and returns the one before; a negative index changes nothing.
c10::DeviceIndex exchange_device(c10::DeviceIndex device);
// Fills in the current device's index where there is none.
c10::Device with_index(c10::Device device);

c10::Allocator* allocator();
// Device memory that is a CPU storage's own: nothing is copied, both see the same bytes.
c10::DataPtr adopt(c10::Storage cpu, c10::DeviceIndex device);

const at::Generator& default_generator(c10::DeviceIndex device);
// The CPU generator that draws a device generator's numbers.
at::Generator& cpu_generator(const at::Generator& generator);

void register_hooks();

// Notes an operator that has run, with its arguments and what it returned.
void record(const std::string& full, const std::vector<at::Tensor>& tensors, bool computes);
// Tells the listener of a host read ("read"), a copy to the device ("copy"), or an operator that
// the CPU computed in the device's place ("fallback").
void tell(const char* kind, const std::string& name, int64_t bytes);

}  // namespace emulator
