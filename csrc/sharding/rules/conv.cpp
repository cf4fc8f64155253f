// Convolutions over 1, 2 or 3 spatial dims, and their transposes.
//   conv     x[n (g c) h'..]  w[(g k) c *..]  b[(g k)]  ->  y[n (g k) h..], summed over c
// The mapped dims h' are the windows of the output's tile: the halo. The bias is read where c holds index 0.
#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

std::vector<std::string> spatial_names(size_t n) {
  if (n == 1) return {"l"};
  if (n == 2) return {"h", "w"};
  return {"d", "h", "w"};
}

std::vector<int64_t> same_padding(const std::vector<int64_t>& kernel, const std::vector<int64_t>& dilation) {
  std::vector<int64_t> out;
  for (size_t d = 0; d < kernel.size(); ++d) out.push_back(dilation[d] * (kernel[d] - 1) / 2);
  return out;
}

Rule conv(const OpGraph& graph, const Node& node, bool transposed) {
  RuleSpec r(graph, node);
  const auto &x = graph.input(node, 0).shape, &w = graph.input(node, 1).shape, &y = graph.output(node, 0).shape;
  const size_t spatial = w.size() - 2, lead = y.size() - spatial - 1;  // lead: 1 with a batch dim, 0 without
  const int64_t groups = node.attr<int64_t>("groups", 1);
  const auto stride = node.ints("stride", spatial, 1), dilation = node.ints("dilation", spatial, 1);
  const std::vector<int64_t> kernel(w.begin() + 2, w.end());
  const std::string mode = node.attr<std::string>("padding", "");
  const auto pad = mode == "same" ? same_padding(kernel, dilation) : mode == "valid" ? std::vector<int64_t>(spatial, 0) : node.ints("padding", spatial, 0);
  if (lead) r.factor("n", y[0], FactorKind::kSample);
  const bool grouped = groups > 1;
  const int64_t in_group = x[lead] / groups, out_group = y[lead] / groups;
  if (grouped) r.factor("g", groups, FactorKind::kParameter);
  r.factor("k", out_group, FactorKind::kParameter).factor("c", in_group, FactorKind::kReduction);
  const auto names = spatial_names(spatial);
  for (size_t d = 0; d < spatial; ++d) r.factor(names[d], y[lead + 1 + d], FactorKind::kAttribute, Cuttable::kInterval);
  const std::string in = grouped ? "g c" : "c", out = grouped ? "g k" : "k";
  std::vector<std::string> xs, ws, ys;
  if (lead) xs.push_back("n"), ys.push_back("n");
  xs.push_back(in);
  ys.push_back(out);
  ws = transposed ? std::vector<std::string>{in, "k"} : std::vector<std::string>{out, "c"};
  for (size_t d = 0; d < spatial; ++d) {
    xs.push_back("*");
    ws.push_back("*");
    ys.push_back(names[d]);
  }
  r.operand(0, xs);
  for (size_t d = 0; d < spatial; ++d) {
    r.map(static_cast<int>(lead + 1 + d), names[d],
          {.kind = transposed ? IndexMap::Kind::kTransposedWindow : IndexMap::Kind::kWindow,
           .stride = stride[d],
           .pad = pad[d],
           .dilation = dilation[d],
           .kernel = kernel[d]});
  }
  return r.operand(1, ws).operand("bias", {out}).anchor("c").result(ys, Reduce::kSum).saves({"0", "1"}).build();
}

Rule forward(const OpGraph& graph, const Node& node) {
  return conv(graph, node, false);
}
Rule transposed(const OpGraph& graph, const Node& node) {
  return conv(graph, node, true);
}

// Max and average pools: windows per channel.
Rule pool(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &x = graph.input(node, 0).shape, &y = graph.output(node, 0).shape;
  const size_t spatial = node.target.find("1d") != std::string::npos ? 1 : node.target.find("2d") != std::string::npos ? 2 : 3;
  const size_t lead = x.size() - spatial;  // n c or c
  const auto kernel = node.ints("kernel_size", spatial, 1);
  auto stride = node.ints("stride", spatial, 0);
  const auto pad = node.ints("padding", spatial, 0), dilation = node.ints("dilation", spatial, 1);
  const auto names = spatial_names(spatial);
  std::vector<std::string> xs, ys;
  if (lead == 2) {
    r.factor("n", x[0], FactorKind::kSample);
    xs.push_back("n");
  }
  r.factor("c", x[lead - 1], FactorKind::kAttribute);
  xs.push_back("c");
  ys = xs;
  for (size_t d = 0; d < spatial; ++d) {
    r.factor(names[d], y[lead + d], FactorKind::kAttribute, Cuttable::kInterval);
    xs.push_back("*");
    ys.push_back(names[d]);
  }
  r.operand(0, xs);
  for (size_t d = 0; d < spatial; ++d) {
    r.map(static_cast<int>(lead + d), names[d],
          {.kind = IndexMap::Kind::kWindow, .stride = stride[d] ? stride[d] : kernel[d], .pad = pad[d], .dilation = dilation[d], .kernel = kernel[d]});
  }
  Rule rule = r.result(ys).saves({"0"}).build();
  if (node.target.starts_with("max")) rule.results[0].saved_bytes_more = 8;  // where its maximum was
  return rule;
}

// Adaptive pools and interpolation. A spatial dim can be cut where the window of every output index is the same (adaptive) or where
// the local computation knows its source rows (linear and nearest interpolation).
Rule resized(const OpGraph& graph, const Node& node, bool adaptive) {
  RuleSpec r(graph, node);
  const auto &x = graph.input(node, 0).shape, &y = graph.output(node, 0).shape;
  size_t spatial = node.target.find("1d") != std::string::npos ? 1 : node.target.find("2d") != std::string::npos ? 2 : 3;
  const size_t lead = x.size() - spatial;
  const auto names = spatial_names(spatial);
  const bool cubic = node.target.find("bicubic") != std::string::npos || node.target.find("aa") != std::string::npos;
  std::vector<std::string> xs, ys;
  if (lead == 2) {
    r.factor("n", x[0], FactorKind::kSample);
    xs.push_back("n");
  }
  r.factor("c", x[lead - 1], FactorKind::kAttribute);
  xs.push_back("c");
  ys = xs;
  for (size_t d = 0; d < spatial; ++d) {
    const bool can = adaptive ? x[lead + d] % y[lead + d] == 0 : !cubic;
    r.factor(names[d], y[lead + d], FactorKind::kAttribute, can ? Cuttable::kInterval : Cuttable::kWhole);
    xs.push_back("*");
    ys.push_back(names[d]);
  }
  r.operand(0, xs);
  const bool align = node.attr<bool>("align_corners", false);
  static const char* per_dim[] = {"scales_d", "scales_h", "scales_w"};
  const auto factors = node.attr<std::vector<double>>("scale_factors", {});
  for (size_t d = 0; d < spatial; ++d) {
    const int64_t in = x[lead + d], out = y[lead + d];
    if (adaptive) {
      r.map(static_cast<int>(lead + d), names[d], {.kind = IndexMap::Kind::kAdaptive, .out_size = out});
      continue;
    }
    const double given = !factors.empty() ? factors[d] : node.attr<double>(spatial == 1 ? "scales" : per_dim[3 - spatial + d], 0.0);
    const double scale = align       ? (out > 1 ? static_cast<double>(in - 1) / static_cast<double>(out - 1) : 0.0)
                         : given > 0 ? 1.0 / given
                                     : static_cast<double>(in) / static_cast<double>(out);
    r.map(static_cast<int>(lead + d), names[d], {.kind = IndexMap::Kind::kResample, .out_size = out, .scale = scale, .align_corners = align, .reach = 1});
  }
  return r.result(ys).saves({}).build();
}

Rule adaptive_pool(const OpGraph& graph, const Node& node) {
  return resized(graph, node, true);
}
Rule interpolate(const OpGraph& graph, const Node& node) {
  return resized(graph, node, false);
}

}  // namespace

void register_conv(RuleRegistry& rules) {
  rules.add({"conv1d", "conv2d", "conv3d"}, forward);
  rules.add({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}, transposed);
  rules.add({"max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"}, pool);
  rules.add({"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}, adaptive_pool);
  rules.add({"upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
             "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"},
            interpolate);
}

}  // namespace soap
