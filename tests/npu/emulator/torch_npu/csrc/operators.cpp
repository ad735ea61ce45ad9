// Any operator of the device: the CPU's kernel on the same memory, recorded and checked.
#include "aliases.h"
#include "graph.h"

#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <pybind11/functional.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <unordered_set>

namespace emulator {
namespace {
struct Recording {
  std::map<std::string, int64_t> operators;  // all that reached the device
  std::map<std::string, int64_t> launches;   // those of them that compute
  std::set<std::string> signatures;          // of launches: name, dtypes and shapes
  int64_t bytes = 0;                         // of launches' operands
  int64_t doubles = 0;                       // launches with float64 operands
};
std::mutex recording_mutex;
Recording recording;
std::atomic<bool> on{false};
py::object* listener = nullptr;  // callable(kind, name, bytes); guarded by the GIL

std::atomic<bool> fallbacks_denied{false};
std::unordered_set<std::string> exempt;  // names without overload

void describe(const at::Tensor& t, std::string& signature) {
  signature += std::string(" ") + c10::toString(t.scalar_type()) + "[";
  for (auto size : t.sizes()) signature += std::to_string(size) + ",";
  signature += "]";
}
}  // namespace

// Tensors of an operator that has just run: arguments first, then what it returned.
void record(const std::string& full, const std::vector<at::Tensor>& tensors, bool computes) {
  if (!on) return;
  std::lock_guard<std::mutex> lock(recording_mutex);
  ++recording.operators[full];
  if (!computes) return;
  ++recording.launches[full];
  std::string signature = full;
  bool has_double = false;
  std::unordered_set<const c10::TensorImpl*> seen;
  for (const auto& t : tensors) {
    if (!t.defined() || !seen.insert(t.unsafeGetTensorImpl()).second) continue;
    recording.bytes += t.numel() * static_cast<int64_t>(t.itemsize());
    has_double |= t.scalar_type() == at::kDouble && !t.unsafeGetTensorImpl()->is_wrapped_number();
    describe(t, signature);
  }
  recording.doubles += has_double;
  recording.signatures.insert(std::move(signature));
}

void tell(const char* kind, const std::string& name, int64_t bytes) {
  if (std::string(kind) == "read" || std::string(kind) == "fallback") refuse_in_capture(name);
  if (!on) return;
  py::gil_scoped_acquire lock;
  if (listener) (*listener)(kind, name, bytes);
}

namespace {
bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

bool is_index(const std::string& name) {
  return starts(name, "aten::index") || starts(name, "aten::_index") ||
         starts(name, "aten::_unsafe_index");
}

// Only masks among indices make a result's size, and so the host, depend on data.
bool reads_back(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t first) {
  const auto& name = op.schema().name();
  if (!is_index(name))
    return op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output);
  bool masked = false;
  for (size_t i = first; i < stack.size(); ++i)
    if (stack[i].isList())
      visit(stack[i], [&](const at::Tensor& t) {
        masked |= t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
      });
  return masked;
}

// What torch_npu's fused optimizer does on the host before it launches.
void fused_sgd(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t first) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& name = arguments[i].name();
    const auto& value = stack[first + i];
    if (name == "momentum")
      TORCH_CHECK(value.toDouble() > 0, "momentum must be positive, but got ", value.toDouble());
    if ((name == "lr" || name == "found_inf") && value.isTensor() && value.toTensor().defined())
      tell("read", name + " of " + op.schema().name(), 4);
  }
}

// Shifts by a number take it as a tensor, which is copied to the device each time.
bool shifts_by_number(const c10::OperatorHandle& op) {
  return op.schema().name().find("shift") != std::string::npos &&
         op.schema().overload_name().find("Scalar") != std::string::npos;
}

// A view, or another change of nothing but a tensor's description or memory, starts no work.
bool computes(const c10::FunctionSchema& schema) {
  for (const char* name : {"aten::resize_", "aten::record_stream", "aten::new_empty_strided"})
    if (schema.name() == name) return false;
  for (const auto& made : schema.returns())
    if (made.alias_info() && !made.alias_info()->isWrite()) return false;
  return true;
}

// A launch's memory stays: when it is run again, results go where the first ones went.
void keep(
    const c10::OperatorHandle& op, torch::jit::Stack inputs, const torch::jit::Stack& stack) {
  std::unordered_set<const c10::TensorImpl*> given;
  for (const auto& value : inputs)
    visit(value, [&](const at::Tensor& t) { given.insert(t.unsafeGetTensorImpl()); });
  std::vector<at::Tensor> results;  // undefined where the operator wrote to an argument
  for (size_t i = stack.size() - op.schema().returns().size(); i < stack.size(); ++i)
    visit(stack[i], [&](const at::Tensor& t) {
      results.push_back(given.count(t.unsafeGetTensorImpl()) ? at::Tensor() : t);
    });
  capture([op, inputs = std::move(inputs), results = std::move(results)] {
    auto again = inputs;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &again);
    size_t at = 0;
    for (const auto& value : again)
      visit(value, [&](const at::Tensor& t) {
        const auto& result = results.at(at++);
        if (result.defined() && t.defined()) result.copy_(t);
      });
  });
}

void any_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto full = schema.overload_name().empty() ? name : name + "." + schema.overload_name();
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  Call call;
  for (size_t i = first; i < stack->size(); ++i)
    visit((*stack)[i], [&](const at::Tensor& t) {
      if (t.defined() && t.is_privateuseone() && !call.device) call.device = t.device();
    });
  std::vector<at::Tensor> tensors;
  for (size_t i = first; i < stack->size(); ++i) {
    const auto& value = (*stack)[i];
    visit(value, [&](const at::Tensor& t) {
      if (!t.defined()) return;
      tensors.push_back(t);
      if (!call.device || t.device() == *call.device) return;
      TORCH_CHECK(
          t.device().is_cpu() && t.dim() == 0,
          "Expected all tensors to be on the same device, but found at least two devices, ",
          call.device->str(), " and ", t.device().str(), "! (when checking arguments of ", full, ")");
      if (!t.unsafeGetTensorImpl()->is_wrapped_number())
        tell("copy", "scalar argument of " + full, static_cast<int64_t>(t.nbytes()));
    });
    if (value.isDevice() && value.toDevice().type() == kNpu)
      call.device = with_index(value.toDevice());
  }
  if (reads_back(op, *stack, first)) tell("read", full, 0);
  if (starts(name, "aten::_fused_sgd_")) fused_sgd(op, *stack, first);
  if (shifts_by_number(op)) tell("copy", "scalar argument of " + full, 8);
  c10::OptionalDeviceGuard guard(call.device);
  const auto generator = c10::OptionalType::create(c10::GeneratorType::get());
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isDevice() && value.toDevice().type() == kNpu) {
      value = Device(c10::kCPU);
    } else if (value.isGenerator() && value.toGenerator().device().type() == kNpu) {
      value = cpu_generator(value.toGenerator());
    } else if (
        value.isNone() && call.device && schema.arguments()[i].type()->isSubtypeOf(*generator)) {
      value = cpu_generator(default_generator(call.device->index()));
    } else {
      value = map_tensors(value, [&](const at::Tensor& t) { return call.to_cpu(t); });
    }
  }
  const bool captured = capturing && computes(schema);
  torch::jit::Stack inputs;
  if (captured) {
    inputs.assign(stack->begin() + static_cast<int64_t>(first), stack->end());
    for (size_t i = 0; i < count; ++i) {
      const auto* info = schema.arguments()[i].alias_info();
      if (info && info->isWrite()) visit(inputs[i], [](const at::Tensor& t) { will_write(t); });
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (captured) keep(op, std::move(inputs), *stack);
  call.write_back();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    value = map_tensors(value, [&](const at::Tensor& t) { return call.to_npu(t); });
    visit(value, [&](const at::Tensor& t) { tensors.push_back(t); });
  }
  record(full, tensors, computes(schema));
}

// What torch_npu does with an operator that it has no kernel for.
void cpu_fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  TORCH_CHECK_NOT_IMPLEMENTED(
      !fallbacks_denied || exempt.count(name),
      "CAUTION: The operator '", toString(op.operator_name()), "' is not currently supported on "
      "the NPU backend, and falling back to the CPU is disabled.");
  tell("fallback", toString(op.operator_name()), 0);
  any_operator(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&cpu_fallback>());
}
}  // namespace
}  // namespace emulator

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace emulator;
  register_hooks();
  m.def("capturing", [] { return capturing.load(); });
  m.def("capture_begin", &capture_begin);
  m.def("capture_end", &capture_end, "Gives a function that does again what was captured.");
  m.def("will_write", [](const at::Tensor& t) { will_write(Call().to_cpu(t.detach())); });
  m.def("capture", [](py::function launch) {
    auto kept = std::make_shared<py::function>(std::move(launch));
    capture([kept] {
      py::gil_scoped_acquire lock;
      (*kept)();
    });
  }, "For kernels that are written in Python.");
  m.def("device_count", [] { return static_cast<int>(device_count()); });
  m.def("current_device", [] { return static_cast<int>(current_device()); });
  m.def("set_device", [](int device) { exchange_device(static_cast<c10::DeviceIndex>(device)); });
  m.def("default_generator", [](int device) {
    return default_generator(static_cast<c10::DeviceIndex>(device));
  });
  m.def("cpu_alias", [](const at::Tensor& t) { return Call().to_cpu(t.detach()); },
        "A CPU tensor over the same bytes: no copy, and nothing is recorded.");
  m.def("npu_alias", [](const at::Tensor& t, int device) {
    Call call;
    call.device = c10::Device(kNpu, static_cast<c10::DeviceIndex>(device));
    return call.to_npu(t);
  }, "The converse.");
  m.def("record", [](const std::string& name, const std::vector<at::Tensor>& tensors) {
    record(name, tensors, true);
  }, "For kernels that are written in Python.");
  m.def("implement", [](const std::vector<std::string>& names) {
    static auto* library = new torch::Library(
        torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
    for (const auto& name : names)
      library->impl(
          name.c_str(), torch::CppFunction::makeFromBoxedFunction<&any_operator>());
  }, "Give the device a kernel for each of these; what has none falls back to the CPU.");
  m.def("deny_fallbacks", [](bool deny, const std::vector<std::string>& names) {
    exempt = {names.begin(), names.end()};
    fallbacks_denied = deny;
  });
  m.def("start", [](py::object f) {
    if (!listener) listener = new py::object();
    *listener = std::move(f);
    std::lock_guard<std::mutex> lock(recording_mutex);
    recording = {};
    on = true;
  });
  m.def("stop", [] {
    on = false;
    std::lock_guard<std::mutex> lock(recording_mutex);
    py::dict made;
    made["operators"] = recording.operators;
    made["launches"] = recording.launches;
    made["signatures"] = recording.signatures;
    made["bytes"] = recording.bytes;
    made["doubles"] = recording.doubles;
    return made;
  });
}
