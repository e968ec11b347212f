// SPDX-License-Identifier: Apache-2.0
// An accelerator that is only pretended: two devices whose memory is the computer's own and whose
// kernels are those of the CPU. It refuses tensors of two devices in one operation, as a GPU does,
// and reports each kernel and everything for which a GPU would let the host wait.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <set>
#include <string>
#include <tuple>

namespace {

constexpr auto kHere = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;

thread_local c10::DeviceIndex current = 0;
thread_local int nested = 0;  // inside of a kernel: what it does on the CPU is not reported

// --- reports -------------------------------------------------------------------------------------

using Listener = void (*)(const char* kind, const char* what);
std::atomic<Listener> listener{nullptr};

void report(const char* kind, const std::string& what) {
  if (Listener to = listener.load(); to != nullptr && nested == 0) to(kind, what.c_str());
}

struct Kernel {
  Kernel() { ++nested; }
  ~Kernel() { --nested; }
};

// --- memory --------------------------------------------------------------------------------------

std::array<std::atomic<int64_t>, kDevices> in_use{}, most{};

struct Block {
  void* data;
  int64_t size;
  int device;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  in_use[block->device] -= block->size;
  std::free(block->data);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, size == 0 ? 64 : size) == 0, "out of memory");
    const int64_t now = in_use[current] += static_cast<int64_t>(size);
    if (now > most[current]) most[current] = now;
    auto* block = new Block{data, static_cast<int64_t>(size), current};
    return {data, block, &release, c10::Device(kHere, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
};

Memory memory;
REGISTER_ALLOCATOR(kHere, &memory);

// --- devices -------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kHere;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kHere; }
  c10::Device getDevice() const override { return {kHere, current}; }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  // One stream for each device, on which everything is done when it is asked for.
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.index() < 0 ? getDevice() : device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
};

struct OnDevice {
  c10::DeviceIndex before = current;
  explicit OnDevice(std::optional<c10::Device> device) {
    if (device && device->index() >= 0) current = device->index();
  }
  ~OnDevice() { current = before; }
};

// --- tensors -------------------------------------------------------------------------------------

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> type,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const OnDevice on(device);
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> type, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const OnDevice on(device);
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys,
                                           c10::dtype_or_default(type));
}

// The same memory as a tensor of the CPU.
at::Tensor seen(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {},
                       options);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (!from.is_cpu() && to.is_cpu()) {
    report("wait", "copy to the host");
  } else if (from.is_cpu() && !to.is_cpu() && !non_blocking) {
    report("wait", "copy from the host");
  } else {
    report("kernel", "copy");
  }
  const Kernel kernel;
  seen(to).copy_(seen(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar number(const at::Tensor& tensor) {
  report("wait", "item");
  const Kernel kernel;
  return seen(tensor).item();
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef symbolic,
                         std::optional<at::MemoryFormat>) {
  const auto size = C10_AS_INTARRAYREF_SLOW(symbolic);
  auto* inside = tensor.unsafeGetTensorImpl();
  int64_t count = inside->storage_offset();
  int64_t entries = 1;
  for (const auto length : size) entries *= length;
  count = (count + entries) * static_cast<int64_t>(inside->itemsize());
  auto storage = tensor.storage();
  if (static_cast<int64_t>(storage.nbytes()) < count) {
    const OnDevice on(tensor.device());
    auto larger = memory.allocate(count);
    if (storage.nbytes() > 0) std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(count);
  }
  inside->set_sizes_contiguous(size);
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset,
                        at::IntArrayRef size, at::IntArrayRef stride) {
  auto* inside = tensor.unsafeGetTensorImpl();
  inside->set_storage_keep_dtype(std::move(storage));
  inside->set_storage_offset(offset);
  inside->set_sizes_and_strides(size, stride);
  return tensor;
}

at::Tensor strided(const at::Tensor& tensor, at::IntArrayRef size, at::IntArrayRef stride,
                   std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, offset);
}

// --- kernels -------------------------------------------------------------------------------------

// What a GPU answers with a number of its own, so that the host waits for it.
const std::set<std::string> kWaiting = {
    "aten::_linalg_check_errors", "aten::_unique2",         "aten::bincount",
    "aten::equal",                "aten::histc",            "aten::is_nonzero",
    "aten::masked_select",        "aten::nonzero",          "aten::repeat_interleave",
    "aten::unique_consecutive",   "aten::unique_dim",
};

// The devices of an operation's tensors. A number on the CPU goes with any device, and so do
// positions for indexing.
class Devices {
 public:
  explicit Devices(bool indexing) : indexing_(indexing) {}

  void look(const at::Tensor& tensor, bool is_index = false) {
    if (!tensor.defined()) return;
    if (tensor.is_cpu() && (tensor.dim() == 0 || is_index)) return;
    if (!first_) first_ = tensor.device();
    if (*first_ != tensor.device()) other_ = tensor.device();
  }

  void look(const c10::IValue& value) {
    if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isList()) {
      for (const c10::IValue& item : value.toListRef()) {
        if (item.isTensor()) look(item.toTensor(), indexing_);
      }
    }
  }

  void check(const std::string& name) const {
    TORCH_CHECK(!other_, "Expected all tensors to be on the same device, but found at least two "
                "devices, ", first_->str(), " and ", other_->str(), "! (", name, ")");
  }

 private:
  bool indexing_;
  std::optional<c10::Device> first_, other_;
};

void on_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  if (nested == 0) {
    const auto name = operation.schema().operator_name().name;
    Devices devices(name == "aten::index" || name.rfind("aten::index_put", 0) == 0 ||
                    name == "aten::_index_put_impl_");
    for (const auto& value : torch::jit::last(stack, operation.schema().arguments().size())) {
      devices.look(value);
    }
    devices.check(name);
    report("kernel", name);
    if (kWaiting.count(name) != 0) report("wait", name);
  }
  const Kernel kernel;
  at::native::cpu_fallback(operation, stack);
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  report("kernel", "aten::convolution");
  const Kernel kernel;
  std::optional<at::Tensor> own;
  if (bias && bias->defined()) own = seen(*bias);
  return at::convolution(seen(input), seen(weight), own, stride, padding, dilation, transposed,
                         output_padding, groups)
      .to(input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  report("kernel", "aten::convolution_backward");
  const Kernel kernel;
  const std::array<int64_t, 1> features{gradient.size(1)};
  at::OptionalIntArrayRef bias;
  if (wanted[2]) bias = at::IntArrayRef(features);
  auto [a, b, c] = at::convolution_backward(seen(gradient).contiguous(), seen(input), seen(weight),
                                            bias, stride, padding, dilation, transposed,
                                            output_padding, groups, wanted);
  const auto there = [&](const at::Tensor& t) { return t.defined() ? t.to(input.device()) : t; };
  return {there(a), there(b), there(c)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &number);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("as_strided", &strided);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

}  // namespace

extern "C" {

void pretended_start() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }
void pretended_listen(void (*to)(const char*, const char*)) { listener = to; }
int pretended_current() { return current; }
void pretended_set_current(int device) { current = static_cast<c10::DeviceIndex>(device); }
int64_t pretended_in_use(int device) { return in_use[device]; }
int64_t pretended_most(int device) { return most[device]; }
void pretended_reset_most(int device) { most[device] = in_use[device].load(); }

}
