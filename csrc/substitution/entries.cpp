// What is known to be equal. A new entry needs no code unless it has a condition of a new kind.
#include "substitution/table.h"

namespace soap {

std::string_view substitutions_text() {
  return R"(
# Products that read the same become one: its weights are concatenated in every step (their gradient is cut apart again), its result is split.
fuse_linears: rounding
  from y* = linear(x, weight*, bias*?)
  if   rank(weight*, 2) alike_but(weight*, 0)
  to   weight = cat(weight*; dim=0)
  to   bias = cat(bias*; dim=0)
  to   joined = like y(x, weight, bias)
  to   y* = split(joined; dim=-1)

fuse_convolutions: rounding
  from y* = conv1d|conv2d|conv3d(x, weight*, bias*?; groups=1)
  if   alike_but(weight*, 0)
  to   weight = cat(weight*; dim=0)
  to   bias = cat(bias*; dim=0)
  to   joined = like y(x, weight, bias)
  to   y* = split(joined; dim=1-rank(weight*))

fuse_matmuls: rounding
  from y* = matmul|mm|bmm(x, weight*)
  if   rank_at_least(weight*, 2) alike_but(weight*, -1)
  to   weight = cat(weight*; dim=-1)
  to   joined = like y(x, weight)
  to   y* = split(joined; dim=-1)

fuse_addmms: rounding
  from y* = addmm(bias*, x, weight*)
  if   rank(bias*, 1) as_long_as_last(bias*, weight*) alike_but(weight*, -1)
  to   bias = cat(bias*; dim=0)
  to   weight = cat(weight*; dim=-1)
  to   joined = like y(bias, x, weight)
  to   y* = split(joined; dim=-1)

# One weight used several times: its inputs are concatenated along a dim that isn't the rows', so that these stay where they are.
fuse_uses_of_a_weight: rounding
  from y* = linear(x*, weight, bias?)
  if   rank_at_least(x*, 3) alike_but(x*, -2)
  to   all = cat(x*; dim=-2)
  to   joined = like y(all, weight, bias)
  to   y* = split(joined; dim=-2)

# A sum of products is one product of the concatenations.
join_summed_linears: rounding
  from a = linear(x, v, bias?)
  from b = linear(z, w)
  from y = add(a, b; alpha=1)
  if   rank(v, 2) rank(w, 2) alike_but(x, z, -1)
  to   inputs = cat(x, z; dim=-1)
  to   weight = cat(v, w; dim=-1)
  to   y = like a(inputs, weight, bias)

# A number that multiplies what a product reads may multiply its result, which may be smaller.
scale_after_linear: rounding
  from scaled = mul(x; other=s)
  from y = linear(scaled, weight)
  to   product = like y(x, weight)
  to   y = like scaled(product)

# Elementwise operators pass through concatenations and permutations.
unary_before_cat: rounding
  from joined = cat(x*)
  from y = @unary(joined)
  to   part* = like y(x*)
  to   y = like joined(part*)

unary_after_cat: rounding
  from part* = @unary(x*)
  from y = cat(part*)
  to   joined = like y(x*)
  to   y = like part(joined)

unary_before_permute: rounding
  from moved = permute(x)
  from y = @unary(moved)
  to   made = like y(x)
  to   y = like moved(made)

unary_after_permute: rounding
  from made = @unary(x)
  from y = permute(made)
  to   moved = like y(x)
  to   y = like made(moved)

# Parts and concatenations.
split_at_once: bits
  from y* = narrow(x; dim=d, start=s*, length=n*)
  if   covers(x, d, s*, n*)
  to   y* = split(x; dim=d)

cat_of_all_parts: bits
  from part* = narrow(x; dim=d, start=s*, length=n*)
  from y = cat(part*; dim=d)
  if   covers(x, d, s*, n*)
  to   y = x

part_of_cat: bits
  from joined = cat(x*; dim=d)
  from y = narrow(joined; dim=d, start=s, length=n)
  if   is_part(x*, d, s, n)
  to   y = x*[s]

flatten_cats: bits
  from inner = cat(x*; dim=d)
  from y = cat(before*, inner, after*; dim=d)
  to   y = like y(before*, x*, after*)

# Permutations, one after another.
cancel_permutes: bits
  from once = permute(x; dims=p)
  from y = permute(once; dims=q)
  if   undoes(q, p)
  to   y = x

merge_permutes: bits
  from once = permute(x; dims=p)
  from y = permute(once; dims=q)
  if   doesnt_undo(q, p)
  to   y = like y(x; dims=compose(p, q))
)";
}

}  // namespace soap
