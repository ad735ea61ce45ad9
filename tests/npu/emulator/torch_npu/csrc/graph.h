// Capturing what the device is asked to do, to do it again later.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>

namespace emulator {

extern std::atomic<bool> capturing;

// Keeps a launch for the replays of the graph that is being captured.
void capture(std::function<void()> launch);
// Remembers what is in a tensor's memory before the capture's own run changes it.
void will_write(const at::Tensor& cpu);
// What makes the host wait can't be captured.
void refuse_in_capture(const std::string& what);

void capture_begin();
// Gives what replays the graph.
std::function<void()> capture_end();

}  // namespace emulator
