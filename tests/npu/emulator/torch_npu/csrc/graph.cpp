// Graphs: what is launched while one is captured is kept, on the memory that it was launched on.
//
// A real device captures without running. Here shapes come from running, so that is done too, and
// what was written to is put back at the end.
#include "graph.h"

#include <cstring>
#include <mutex>
#include <unordered_set>
#include <vector>

namespace emulator {
namespace {
struct Graph {
  std::vector<std::function<void()>> launches;
};
struct Backup {
  c10::Storage storage;
  std::vector<char> bytes;
};
std::mutex graph_mutex;
std::shared_ptr<Graph> open_graph;
std::vector<Backup> backups;
std::unordered_set<const void*> saved;
std::string failure;
}  // namespace

std::atomic<bool> capturing{false};

void capture(std::function<void()> launch) {
  std::lock_guard<std::mutex> lock(graph_mutex);
  if (open_graph) open_graph->launches.push_back(std::move(launch));
}

void will_write(const at::Tensor& cpu) {
  if (!cpu.defined()) return;
  std::lock_guard<std::mutex> lock(graph_mutex);
  const auto& storage = cpu.storage();
  if (!saved.insert(storage.data()).second) return;
  const auto* data = static_cast<const char*>(storage.data());
  backups.push_back({storage, {data, data + storage.nbytes()}});
}

void refuse_in_capture(const std::string& what) {
  if (!capturing) return;
  {
    std::lock_guard<std::mutex> lock(graph_mutex);
    failure = what;
  }
  TORCH_CHECK(false, "npu emulator: not permitted while a graph is captured: ", what);
}

void capture_begin() {
  std::lock_guard<std::mutex> lock(graph_mutex);
  TORCH_CHECK(!open_graph, "npu emulator: a graph is being captured already");
  open_graph = std::make_shared<Graph>();
  failure.clear();
  capturing = true;
}

std::function<void()> capture_end() {
  std::lock_guard<std::mutex> lock(graph_mutex);
  TORCH_CHECK(open_graph, "npu emulator: no graph is being captured");
  capturing = false;
  for (auto backup = backups.rbegin(); backup != backups.rend(); ++backup)
    std::memcpy(backup->storage.mutable_data(), backup->bytes.data(), backup->bytes.size());
  backups.clear();
  saved.clear();
  auto made = std::move(open_graph);
  open_graph.reset();
  TORCH_CHECK(failure.empty(), "npu emulator: the capture was spoilt by ", failure);
  return [made] {
    for (const auto& launch : made->launches) launch();
  };
}
}  // namespace emulator
