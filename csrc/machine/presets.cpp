// Peak rates are from the makers' data sheets, dense (no sparsity), for one device; memory sizes are what the sheet says, of which a process can use
// less. Bandwidths of links are of one direction; data sheets of NVLink give the sum of both. Latencies are those of one step of a ring in NCCL's own
// model of itself (src/graph/tuning.cc, hwLat of Ring with the Simple protocol): NVLink 3.4 us, PCI 5.7 us, network 14 us.
// What the host takes is measured beside one H200 and counted for every GPU since V100, whatever its host; the presets of the papers' clusters, p100 and k80,
// count 5 and 8 us for each operator on the device instead, as the papers have no host.
// Efficiencies and curves of h100 and h200 are measured (docs/machines.md, "Measured GPUs"), a100's curves of attention published. The other efficiencies are
// round figures of ours, to be replaced by what one measured step of the real machine says.
#include "machine/presets.h"

#include <functional>

#include "base/error.h"
#include "fmt/ranges.h"

namespace soap {
namespace {

constexpr double kNvlinkStep = 3.4e3, kPciStep = 5.7e3, kNetworkStep = 14e3;  // ns
constexpr double kTera = 1e12, kGiga = 1e9;
constexpr double kGigabits = 1e9 / 8;  // bytes
constexpr int64_t kGigabytes = 1'000'000'000, kGibibytes = 1LL << 30;

// What all GPUs share.
Machine gpu() {
  Machine m;
  m.overlap = true;
  m.op_overhead_ns = 5e3;  // ours; 8 us on the processors of K80's time
  m.efficiency = {
      {"convolution", 0.5}, {"matmul", 0.7},    {"attention", 0.5}, {"normalization", 0.7},
      {"pointwise", 0.8},   {"embedding", 0.5}, {"recurrent", 0.3}, {"other", 0.7},
  };
  return m;
}

// The same for the types of 16 bits.
void add_curve(Machine& m, const std::string& family, const std::string& width, const EfficiencyCurve& curve) {
  for (const char* type : {"bfloat16", "float16"}) m.curves[family + "/" + type + width] = curve;
}

// Devices that their host tells what to do.
Machine launched_gpu() {
  Machine m = gpu();
  // Of an operator's 5 us (above) a kernel's begin and end are 1.9 (benchmarks/results/gpu_h100_2026-11-26.json, launches); most operators have several.
  // benchmarks/results/gpu_launch_h200_2026-11-26.json (2026-11-26, torch 2.11, a virtual Intel Xeon): benchmarks/gpu_launch_table.py makes these of it. AdamW
  // as it comes (foreach). What torch does within the call of another operator takes nothing by itself.
  m.launch = {
      {"add", {13.7e3, 24.7e3}},         {"attention", {39.9e3, 101e3}},      {"batch_norm", {52.9e3, 66.6e3}}, {"ce_count", {0, 0}},
      {"ce_rows", {34.1e3, 68.7e3}},     {"collective", {51.9e3, 0}},         {"conv2d", {33.7e3, 82.6e3}},     {"convolution", {39.5e3, 96.2e3}},
      {"dropout", {34.9e3, 32.4e3}},     {"embedding", {27.3e3, 46.3e3}},     {"gelu", {13.8e3, 29.7e3}},       {"layer_norm", {24e3, 64.3e3}},
      {"linear", {30.3e3, 102.7e3}},     {"log_softmax", {14.8e3, 29e3}},     {"matmul", {27.1e3, 75.2e3}},     {"max_pool2d", {18.5e3, 41.5e3}},
      {"mul", {13.7e3, 41.2e3}},         {"normalization", {19.4e3, 53.8e3}}, {"other", {19.7e3, 41.5e3}},      {"pointwise", {13.8e3, 29.7e3}},
      {"recurrent", {505.5e3, 927.3e3}}, {"relu", {15.7e3, 27.9e3}},          {"running_average", {0, 0}},      {"softmax", {14.8e3, 43.3e3}},
      {"update", {368e3, 18e3}},         {"view", {2.5e3, 11.5e3}},
  };
  return m;
}

// FlexFlow's and OptCNN's cluster: 4 hosts, 4 devices each, NVLink within, 100 Gb/s EDR InfiniBand between (arXiv:1807.05358; arXiv:1802.04924).
Machine p100() {
  Machine m = gpu();  // NVIDIA Tesla P100 data sheet (2016), SXM2
  m.flops_by_dtype = {{"float64", 5.3 * kTera}, {"float32", 10.6 * kTera}, {"float16", 21.2 * kTera}};
  m.flops_per_s = 10.6 * kTera;
  m.memory_bytes_per_s = 732 * kGiga;
  m.memory_bytes = 16 * kGibibytes;
  m.intra = {kNvlinkStep, 20 * kGiga, 0};        // one NVLink 1.0 between two devices, each direction: NVIDIA Tesla P100 white paper (WP-08019), "NVLink"
  m.inter = {kNetworkStep, 100 * kGigabits, 1};  // one NIC for the host
  return m;
}

// FlexFlow's other cluster: 16 hosts, 4 devices (2 boards) each, PCIe within, 56 Gb/s InfiniBand between (arXiv:1807.05358).
Machine k80() {
  Machine m = gpu();  // NVIDIA Tesla K80 data sheet (2014): the board's rates with boost, halved, as a board is two devices
  m.flops_by_dtype = {{"float64", 1.455 * kTera}, {"float32", 4.37 * kTera}};
  m.flops_per_s = 4.37 * kTera;
  m.memory_bytes_per_s = 240 * kGiga;
  m.memory_bytes = 12 * kGibibytes;
  m.op_overhead_ns = 8e3;
  m.intra = {kPciStep, 15.75 * kGiga, 2};  // PCIe 3.0 x16 (PCI-SIG: 8 GT/s, 128b/130b), one switch for each pair of devices
  m.inter = {kNetworkStep, 56 * kGigabits, 1};
  return m;
}

// DGX-1: NVIDIA DGX-1 with Tesla V100 white paper (WP-08437).
Machine v100() {
  Machine m = launched_gpu();  // NVIDIA V100 data sheet (2020), SXM2 32 GB
  m.flops_by_dtype = {{"float64", 7.8 * kTera}, {"float32", 15.7 * kTera}, {"float16", 125 * kTera}};
  m.flops_per_s = 15.7 * kTera;
  m.memory_bytes_per_s = 900 * kGiga;
  m.memory_bytes = 32 * kGibibytes;
  m.intra = {kNvlinkStep, 150 * kGiga, 0};       // 6 NVLinks 2.0, 300 GB/s both directions
  m.inter = {kNetworkStep, 100 * kGigabits, 4};  // 4 EDR InfiniBand ports
  return m;
}

// DGX A100: NVIDIA DGX A100 user guide (DU-09821).
Machine a100() {
  Machine m = launched_gpu();  // NVIDIA A100 80GB data sheet (2021), SXM4
  m.flops_by_dtype = {{"float64", 19.5 * kTera}, {"float32", 19.5 * kTera}, {"tf32", 156 * kTera}, {"bfloat16", 312 * kTera}, {"float16", 312 * kTera}};
  m.flops_per_s = 19.5 * kTera;
  m.memory_bytes_per_s = 2039 * kGiga;
  m.memory_bytes = 80 * kGigabytes;
  m.intra = {kNvlinkStep, 300 * kGiga, 0};       // 12 NVLinks 3.0 to switches, 600 GB/s both directions
  m.inter = {kNetworkStep, 200 * kGigabits, 0};  // a ConnectX-6 for each device
  // FlashAttention-2 with a causal mask on this card, arXiv:2307.08691: TFLOP/s forward by figure 5 (c, d), and backward by what forward leaves of figure 4
  // (c, d), whose 3.5 times forward counted as 3 here; over 312.
  add_curve(m, "attention", "/64", {{512, 0.37, 0.21}, {1024, 0.47, 0.28}, {2048, 0.54, 0.34}, {4096, 0.57, 0.38}, {8192, 0.58, 0.41}, {16384, 0.59, 0.43}});
  add_curve(m, "attention", "/128", {{512, 0.42, 0.23}, {1024, 0.53, 0.32}, {2048, 0.60, 0.37}, {4096, 0.63, 0.42}, {8192, 0.64, 0.45}, {16384, 0.63, 0.48}});
  return m;
}

// DGX H100: NVIDIA DGX H100/H200 user guide.
Machine h100() {
  Machine m = launched_gpu();  // NVIDIA H100 data sheet (2022), SXM5
  m.flops_by_dtype = {{"float64", 67 * kTera}, {"float32", 67 * kTera}, {"tf32", 494.7 * kTera}, {"bfloat16", 989.4 * kTera}, {"float16", 989.4 * kTera}};
  m.flops_per_s = 67 * kTera;
  m.memory_bytes_per_s = 3350 * kGiga;
  m.memory_bytes = 80 * kGigabytes;
  m.intra = {kNvlinkStep, 450 * kGiga, 0};       // 18 NVLinks 4.0 to switches, 900 GB/s both directions
  m.inter = {kNetworkStep, 400 * kGigabits, 0};  // a ConnectX-7 for each device
  // benchmarks/results/gpu_h100_2026-11-26.json: forward and backward, median over the shapes of each family
  m.efficiency = {
      {"convolution", 0.28}, {"matmul", 0.69},    {"attention", 0.37}, {"normalization", 0.48},
      {"pointwise", 1.07},   {"embedding", 0.14}, {"recurrent", 0.07}, {"other", 0.29},
  };
  // benchmarks/results/gpu_shapes_h100_2026-11-26.json: bfloat16, medians by size (benchmarks/gpu_table.py, curves)
  add_curve(m, "matmul", "",
            {{64, 0.66, 0.54},
             {256, 0.61, 0.50},
             {512, 0.62, 0.59},
             {768, 0.68, 0.71},
             {1024, 0.72, 0.76},
             {1536, 0.77, 0.78},
             {2048, 0.79, 0.81},
             {2560, 0.80, 0.81},
             {4096, 0.80, 0.80},
             {5120, 0.81, 0.81},
             {7168, 0.81, 0.80},
             {8192, 0.81, 0.79}});
  add_curve(m, "attention", "/64", {{512, 0.63, 0.28}, {1024, 0.41, 0.22}, {2048, 0.41, 0.26}, {4096, 0.45, 0.31}, {8192, 0.46, 0.35}});
  add_curve(m, "attention", "/128", {{512, 0.80, 0.32}, {1024, 0.53, 0.27}, {2048, 0.53, 0.32}, {4096, 0.58, 0.38}, {8192, 0.62, 0.42}});
  add_curve(m, "normalization", "", {{768, 0.51, 0.29}, {1024, 0.58, 0.36}, {2048, 0.69, 0.52}, {4096, 0.59, 0.51}, {8192, 0.57, 0.48}, {50368, 0.64, 0.90}});
  m.update = {{640'000, 5'614}, {67'108'864, 501'000}};  // the same file: torch.optim.AdamW in float32 as it comes (foreach)
  return m;
}

Machine h200() {
  Machine m = h100();  // NVIDIA H200 data sheet (2023), SXM5: H100's rates, more and faster memory
  m.memory_bytes_per_s = 4800 * kGiga;
  m.memory_bytes = 141 * kGigabytes;
  m.efficiency = {
      // benchmarks/results/gpu_h200_2026-11-26.json; the curves of products and attention are h100's, whose processors it has
      {"convolution", 0.28}, {"matmul", 0.69},    {"attention", 0.38}, {"normalization", 0.40},
      {"pointwise", 1.04},   {"embedding", 0.11}, {"recurrent", 0.08}, {"other", 0.24},
  };
  for (const char* type : {"bfloat16", "float16"}) m.curves.erase(std::string("normalization/") + type);
  m.update = {{640'000, 4'600}, {67'108'864, 372'215}};
  return m;
}

// A server whose devices are groups of its cores: rates as of a 16-core share of a current server processor with AVX2 (16 cores * 2.5 GHz * 32 operations,
// of which products reach two thirds), a share of 8 channels of DDR4-3200 (JEDEC: 25.6 GB/s each), and gloo over shared memory.
Machine cpu(double gigabits) {
  Machine m;
  m.flops_per_s = 850 * kGiga;
  m.flops_by_dtype = {{"float64", 425 * kGiga}};
  m.memory_bytes_per_s = 50 * kGiga;
  m.memory_bytes = 64 * kGibibytes;
  m.op_overhead_ns = 10e3;
  m.intra = {20e3, 5 * kGiga, 2};
  m.inter = {50e3, gigabits * kGigabits * 0.94, 1};  // TCP's part of Ethernet with 1500-byte frames: 1448 of 1538 bytes
  return m;
}

const std::map<std::string, std::function<Machine()>>& presets() {
  static const std::map<std::string, std::function<Machine()>> all{
      {"p100", p100},
      {"k80", k80},
      {"v100", v100},
      {"a100", a100},
      {"h100", h100},
      {"h200", h200},
      {"cpu-1g", [] { return cpu(1); }},
      {"cpu-10g", [] { return cpu(10); }},
      {"cpu-25g", [] { return cpu(25); }},
  };
  return all;
}

}  // namespace

std::vector<std::string> preset_names() {
  std::vector<std::string> out;
  for (const auto& [name, make] : presets()) out.push_back(name);
  return out;
}

Machine preset(const std::string& name, int hosts, int devices_per_host) {
  const auto it = presets().find(name);
  if (it == presets().end()) user_error("[machine] there is no preset \"{}\"; there are {}", name, fmt::join(preset_names(), ", "));
  if (hosts < 1 || devices_per_host < 1) user_error("[machine] {} hosts with {} devices each: both must be at least 1", hosts, devices_per_host);
  Machine m = it->second();
  m.name = fmt::format("{} {}x{}", name, hosts, devices_per_host);
  m.host_of = make_machine(hosts * devices_per_host, hosts).host_of;
  return m;
}

}  // namespace soap
