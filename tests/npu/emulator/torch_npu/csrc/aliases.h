// Tensors of one device seen by another: they share their memory, nothing is copied.
#pragma once

#include "emulator.h"

#include <ATen/core/List.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Allocator.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <vector>

namespace emulator {
using c10::Device;
using c10::IValue;

inline at::Tensor alias(const c10::Storage& storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return made;
}

inline c10::Storage storage_over(c10::DataPtr data, size_t bytes, c10::Allocator* allocator) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, std::move(data), allocator, true));
}

// The tensors of one call. Storages that occur twice stay one, so views and in-place work.
struct Call {
  std::optional<Device> device;
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_of, npu_of;
  std::unordered_map<c10::TensorImpl*, at::Tensor> arguments;  // CPU alias -> device tensor
  std::vector<std::pair<at::Tensor, at::Tensor>> aliased;      // (device tensor, CPU alias)

  at::Tensor to_cpu(const at::Tensor& t) {
    if (!t.defined() || !t.is_privateuseone()) return t;
    auto* own = t.storage().unsafeGetStorageImpl();
    auto found = cpu_of.find(own);
    if (found == cpu_of.end()) {
      c10::DataPtr data(
          own->mutable_data(), new c10::Storage(t.storage()),
          [](void* lender) { delete static_cast<c10::Storage*>(lender); }, Device(c10::kCPU));
      auto cpu = storage_over(std::move(data), own->nbytes(), c10::GetAllocator(c10::kCPU));
      npu_of.emplace(cpu.unsafeGetStorageImpl(), t.storage());
      found = cpu_of.emplace(own, cpu).first;
    }
    auto made = alias(found->second, c10::DispatchKey::CPU, t);
    arguments.emplace(made.unsafeGetTensorImpl(), t);
    aliased.emplace_back(t, made);
    return made;
  }

  at::Tensor to_npu(const at::Tensor& t) {
    if (!t.defined() || !t.device().is_cpu() || !device) return t;
    auto argument = arguments.find(t.unsafeGetTensorImpl());
    if (argument != arguments.end()) return argument->second;
    auto* own = t.storage().unsafeGetStorageImpl();
    auto found = npu_of.find(own);
    if (found == npu_of.end()) {
      const auto bytes = t.storage().nbytes();
      auto npu = storage_over(adopt(t.storage(), device->index()), bytes, allocator());
      found = npu_of.emplace(own, npu).first;
    }
    return alias(found->second, c10::DispatchKey::PrivateUse1, t);
  }

  // Kernels with out= and resize_ may have changed geometry or moved the alias's memory.
  void write_back() {
    for (auto& [npu, cpu] : aliased) {
      auto* own = npu.storage().unsafeGetStorageImpl();
      auto* other = cpu.storage().unsafeGetStorageImpl();
      if (other->data() != own->data() || other->nbytes() != own->nbytes()) {
        own->set_data_ptr_noswap(adopt(cpu.storage(), npu.device().index()));
        own->set_nbytes(other->nbytes());
      }
      if (npu.sizes() != cpu.sizes() || npu.strides() != cpu.strides() ||
          npu.storage_offset() != cpu.storage_offset())
        npu.unsafeGetTensorImpl()->set_sizes_and_strides(
            cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
};

template <class Visit>
void visit(const IValue& value, const Visit& f) {
  if (value.isTensor()) f(value.toTensor());
  else if (value.isTensorList()) for (const at::Tensor& t : value.toTensorList()) f(t);
  else if (value.isList()) for (const IValue& entry : value.toListRef()) visit(entry, f);
}

template <class Map>
IValue map_tensors(const IValue& value, const Map& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& t : value.toTensorList()) made.push_back(f(t));
    return made;
  }
  if (!value.isList()) return value;
  const auto entries = value.toListRef();  // Tensor?[]
  if (std::none_of(entries.begin(), entries.end(), [](const IValue& e) { return e.isTensor(); }))
    return value;
  c10::List<std::optional<at::Tensor>> made;
  for (const auto& e : entries)
    made.push_back(e.isTensor() ? std::make_optional(f(e.toTensor())) : std::nullopt);
  return made;
}

}  // namespace emulator
