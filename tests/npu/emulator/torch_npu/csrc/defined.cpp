// The operators that a device has to define itself: memory, copies, convolution; and autocast.
#include "aliases.h"
#include "graph.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace emulator {
namespace {
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  // Ascend's message.
  TORCH_CHECK(
      !format || (*format != at::MemoryFormat::ChannelsLast &&
                  *format != at::MemoryFormat::ChannelsLast3d),
      "Only contiguous_format or preserve_format is supported.");
  c10::DeviceGuard guard(with_index(device.value_or(Device(kNpu))));
  record("aten::empty.memory_format", {}, false);
  return at::detail::empty_generic(
      size, allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(with_index(device.value_or(Device(kNpu))));
  record("aten::empty_strided", {}, false);
  return at::detail::empty_strided_generic(
      size, stride, allocator(), kKeys, c10::dtype_or_default(dtype));
}

// What copy_ and to() end in.
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const auto bytes = static_cast<int64_t>(from.nbytes());
  if (from.is_privateuseone() && to.is_cpu()) {
    tell("read", "copy to the host", bytes);
  } else if (from.is_cpu() && to.is_privateuseone()) {
    const bool waits = !(non_blocking && from.is_pinned());
    if (waits) refuse_in_capture("a copy from memory that isn't pinned");
    tell("copy", waits ? "copy that waits" : "copy from pinned memory", bytes);
  } else {
    TORCH_CHECK(from.device() == to.device(), "npu emulator: copy between two devices");
    record("aten::copy_", {from, to}, true);
  }
  Call call;
  const auto target = call.to_cpu(to), source = call.to_cpu(from);
  if (capturing) {
    will_write(target);
    capture([target, source] { target.copy_(source); });
  }
  target.copy_(source);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& t) {
  tell("read", "aten::_local_scalar_dense", static_cast<int64_t>(t.nbytes()));
  Call call;
  return at::_local_scalar_dense(call.to_cpu(t));
}

at::Tensor& set_storage_offset(
    at::Tensor& t, at::Storage storage, int64_t offset, c10::IntArrayRef size,
    c10::IntArrayRef stride) {
  std::vector<int64_t> strides(stride.begin(), stride.end());
  if (strides.empty() && !size.empty()) {
    strides.assign(size.size(), 1);
    for (auto i = size.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * size[i];
  }
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(size, strides, offset);
  return t;
}

at::Tensor& set_storage(at::Tensor& t, at::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / t.itemsize());
  return set_storage_offset(t, std::move(storage), 0, {size}, {1});
}

at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& from) {
  return set_storage_offset(
      t, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

void require_same_device(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(
      a.device() == b.device(),
      "Expected all tensors to be on the same device, but found at least two devices, ",
      a.device().str(), " and ", b.device().str(), "!");
}

// at::convolution sends devices that torch doesn't know here. As an NPU it knows contiguous
// tensors only; others are laid out anew first.
at::Tensor convolution(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
    c10::IntArrayRef output_padding, int64_t groups) {
  require_same_device(x, weight);
  Call call;
  call.device = x.device();
  std::optional<at::Tensor> cpu_bias;
  if (bias && bias->defined()) cpu_bias = call.to_cpu(*bias);
  const auto run = [=, x = call.to_cpu(x), weight = call.to_cpu(weight), stride = stride.vec(),
                    padding = padding.vec(), dilation = dilation.vec(),
                    output_padding = output_padding.vec()] {
    return at::convolution(
        x.contiguous(), weight.contiguous(), cpu_bias, stride, padding, dilation, transposed,
        output_padding, groups);
  };
  const auto result = run();
  if (capturing) capture([run, result] { result.copy_(run()); });
  auto made = call.to_npu(result);
  record("aten::convolution_overrideable", {x, weight, made}, true);
  return made;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
    c10::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  require_same_device(x, weight);
  const std::string name = "aten::convolution_backward_overrideable";
  Call call;
  call.device = x.device();
  const auto bias_size = weight.size(transposed ? 1 : 0) * (transposed ? groups : 1);
  const auto run = [=, grad = call.to_cpu(grad), x = call.to_cpu(x), weight = call.to_cpu(weight),
                    stride = stride.vec(), padding = padding.vec(), dilation = dilation.vec(),
                    output_padding = output_padding.vec()] {
    return at::convolution_backward(
        grad.contiguous(), x.contiguous(), weight.contiguous(),
        at::OptionalIntArrayRef(bias_size), stride, padding, dilation, transposed,
        output_padding, groups, mask);
  };
  const auto [grad_x, grad_weight, grad_bias] = run();
  if (capturing) {
    const std::vector<at::Tensor> results{grad_x, grad_weight, grad_bias};
    capture([run, results] {
      const auto [a, b, c] = run();
      const std::vector<at::Tensor> again{a, b, c};
      for (size_t i = 0; i < again.size(); ++i)
        if (results[i].defined()) results[i].copy_(again[i]);
    });
  }
  auto made = std::make_tuple(
      call.to_npu(grad_x), call.to_npu(grad_weight), call.to_npu(grad_bias));
  record(
      name, {grad, x, weight, std::get<0>(made), std::get<1>(made), std::get<2>(made)}, true);
  return made;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
}
}  // namespace
}  // namespace emulator

namespace at::autocast {  // torch's macros want its own names unqualified
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FP32_SET(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FP32_SET)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(PROMOTE)
}
}  // namespace at::autocast
