// The graph: modules that may be collapsed, boxes coloured by SOAP letters, pan and zoom, and what is chosen.
const SIZES = {op: [176, 46], edge: [130, 26], group: [190, 54]};
const SHOWN = 48; // boxes at first: smaller modules are collapsed until no more are there

const nodes = data.nodes;
nodes.forEach((n, i) => {
  n.index = i;
  n.outputs = [];
});
nodes.forEach((n) => n.inputs.forEach((i) => nodes[i].outputs.push(n.index)));

// Modules that hold at least two operators, by path: {path, members, parent}.
const groups = new Map();
for (const n of nodes) {
  if (n.kind !== "op") continue;
  const slash = n.name.indexOf("/");
  const words = (slash >= 0 ? n.name.slice(0, slash) : n.name).split(".").filter((w) => w);
  n.path = words.join(".");
  for (let depth = 1; depth <= words.length; ++depth) {
    const path = words.slice(0, depth).join(".");
    if (!groups.has(path)) groups.set(path, {path, depth, members: []});
    groups.get(path).members.push(n);
  }
}
// A box can stand for a module only where no path leaves it and comes back.
function convex(group) {
  const inside = new Set(group.members.map((n) => n.index)), last = Math.max(...inside), seen = new Set();
  const queue = group.members.flatMap((n) => n.outputs.filter((o) => !inside.has(o)));
  while (queue.length) {
    const at = queue.pop();
    if (at > last || seen.has(at)) continue;
    if (inside.has(at)) return false;
    seen.add(at);
    queue.push(...nodes[at].outputs);
  }
  return true;
}
for (const [path, group] of groups) {
  const outer = groups.get(path.split(".").slice(0, -1).join("."));
  if (group.members.length < 2 || (outer && outer.members.length === group.members.length) || group.members.length === nodes.filter((n) => n.kind === "op").length || !convex(group)) groups.delete(path);
}
for (const n of nodes) {
  n.groups = [...groups.values()].filter((g) => n.path !== undefined && (n.path === g.path || n.path.startsWith(g.path + "."))).sort((a, b) => a.depth - b.depth);
}

let open = new Set();
function openLargerThan(limit) {
  open = new Set([...groups.values()].filter((g) => g.members.length > limit).map((g) => g.path));
}
const holderOf = (n) => n.groups.find((g) => !open.has(g.path));
function collapseSmall() {
  const sizes = [0, ...new Set([...groups.values()].map((g) => g.members.length))].sort((a, b) => a - b);
  for (const limit of sizes) {
    openLargerThan(limit);
    if (new Set(nodes.map((n) => holderOf(n) || n)).size <= SHOWN) return;
  }
}

// What is visible now, in an order in which sources come first.
function visible() {
  const boxes = new Map();
  for (const n of nodes) {
    const group = holderOf(n), key = group ? "group:" + group.path : "node:" + n.index;
    if (!boxes.has(key)) {
      const [w, h] = SIZES[group ? "group" : n.kind];
      boxes.set(key, {key, group, node: group ? null : n, w, h, first: n.index, into: new Set(), out: new Set(), moved: 0});
    }
    n.box = boxes.get(key);
  }
  for (const n of nodes) {
    for (const i of n.inputs) {
      if (nodes[i].box === n.box) continue;
      n.box.into.add(nodes[i].box);
      nodes[i].box.out.add(n.box);
    }
  }
  const left = new Map([...boxes.values()].map((b) => [b, b.into.size])), sorted = [];
  const ready = (b) => left.get(b) === 0;
  while (left.size) {
    const next = [...left.keys()].filter(ready).sort((a, b) => a.first - b.first)[0] || [...left.keys()][0];
    left.delete(next);
    sorted.push(next);
    for (const b of next.out) if (left.has(b)) left.set(b, left.get(b) - 1);
  }
  return sorted;
}

const stage = byId("graph");
const world = svg("g");
stage.append(world);
let view = {x: 0, y: 0, scale: 1}, extent = {width: 1, height: 1}, chosen = null;
const totalNs = Math.max(1, ...nodes.map((n) => n.ns));

function draw(fit) {
  const boxes = visible();
  const edges = boxes.flatMap((b) => [...b.into].map((a) => [a.key, b.key]));
  const panel = stage.getBoundingClientRect();
  const laid = layered(boxes, edges, panel.width / panel.height);
  extent = laid;
  world.replaceChildren(...frames(boxes), ...laid.routes.map((r) => edge(r, boxes)), ...boxes.map(boxElement));
  mark();
  if (fit) fitView();
}

function edge({from, to, route}, boxes) {
  const source = boxes.find((b) => b.key === from);
  const moved = (source.group ? source.group.members.filter((n) => n.outputs.some((o) => nodes[o].box !== source)) : [source.node]).reduce((s, n) => s + n.moved, 0);
  const out = svg("path", {class: moved ? "edge moves" : "edge", d: pathOf(route), "data-from": from, "data-to": to});
  if (moved) out.style.strokeWidth = Math.min(5, 1.2 + Math.log10(1 + moved / 65536));
  if (moved) out.append(svg("title", {}, `${bytes(moved)} move, forward and backward`));
  return out;
}

// A light frame around each open module, in each column that it reaches.
function frames(boxes) {
  const out = [];
  for (const group of groups.values()) {
    if (!open.has(group.path)) continue;
    const columns = new Map();
    for (const b of boxes) {
      if (!(b.node || b.group.members[0]).groups.includes(group) || b.group === group) continue;
      columns.set(b.column, [...(columns.get(b.column) || []), b]);
    }
    [...columns.keys()].sort((a, b) => a - b).forEach((column, i) => {
      const inside = columns.get(column), pad = Math.max(4, 12 - 3 * group.depth);
      const x = Math.min(...inside.map((b) => b.x - b.w / 2)) - pad, y = Math.min(...inside.map((b) => b.y - b.h / 2)) - pad - 5;
      const width = Math.max(...inside.map((b) => b.x + b.w / 2)) + pad - x, height = Math.max(...inside.map((b) => b.y + b.h / 2)) + pad - y;
      out.push(svg("rect", {class: "frame", x, y, width, height, rx: 10}));
      if (i > 0) return;
      const name = svg("text", {class: "frame-name", x: x + 8, y: y - 3, onclick: () => toggle(group)}, `− ${group.path}`);
      name.append(svg("title", {}, "collapse"));
      out.push(name);
    });
  }
  return out;
}

// How much of a box each colour gets: an operator's letters alike, a module's by its operators' time.
function shares(box) {
  const out = new Map(), members = box.group ? box.group.members : [box.node];
  for (const n of members) {
    const mine = letters(n);
    for (const letter of mine.length ? mine : [""]) out.set(letter, (out.get(letter) || 0) + (box.group ? n.ns + 1 : 1) / (mine.length || 1));
  }
  const sum = [...out.values()].reduce((a, b) => a + b, 0);
  return ["S", "O", "A", "P", ""].filter((l) => out.get(l) / sum > 0.01).map((l) => [l, out.get(l) / sum]);
}

function boxElement(b) {
  const n = b.node, left = -b.w / 2, top = -b.h / 2, strip = 7;
  const g = svg("g", {class: "node", transform: `translate(${b.x},${b.y})`, "data-key": b.key, "data-name": n ? n.name : b.group.path, tabindex: 0, role: "button"});
  const act = () => choose(n ? {node: n} : {group: b.group});
  g.addEventListener("click", act);
  g.addEventListener("keydown", (e) => { if (e.key === "Enter") act(); });
  if (b.group) g.append(svg("rect", {class: "box", x: left + 4, y: top - 4, width: b.w, height: b.h, rx: 8}));
  g.append(svg("rect", {class: "box", x: left, y: top, width: b.w, height: b.h, rx: n && n.kind === "edge" ? b.h / 2 : 8}));
  if (n && n.kind === "edge") {
    g.append(svg("text", {class: "more", "text-anchor": "middle", y: 4}, clipped(n.name, 20)));
    return g;
  }
  let y = top + 5;
  for (const [letter, share] of shares(b)) {
    const height = (b.h - 10) * share;
    g.append(svg("rect", {x: left + 5, y, width: strip, height, fill: colour(letter), rx: 2}));
    y += height;
  }
  const ns = n ? n.ns : b.group.members.reduce((sum, m) => sum + m.ns, 0);
  const more = n ? [n.cuts || (n.devices.length === 1 ? `device ${n.devices[0]}` : "whole"), ms(ns)] : [`${b.group.members.length} operators`, ms(ns)];
  g.append(svg("text", {class: "name", x: left + 20, y: top + 18}, clipped(n ? shortName(n) : b.group.path, b.group ? 22 : 23)));
  g.append(svg("text", {class: "more", x: left + 20, y: top + 33}, clipped(more.join("  ·  "), 28)));
  g.append(svg("rect", {class: "heat", x: left + 20, y: top + b.h - 7, width: Math.max(1, (b.w - 30) * Math.min(1, ns / totalNs)), height: 2.5, rx: 1}));
  if (b.group) {
    const button = svg("g", {onclick: (e) => { e.stopPropagation(); toggle(b.group); }});
    button.append(svg("circle", {class: "toggle", cx: -left - 15, cy: top + 15, r: 8}), svg("text", {x: -left - 15, y: top + 19, "text-anchor": "middle"}, "+"));
    button.append(svg("title", {}, "expand"));
    g.append(button);
    g.addEventListener("dblclick", () => toggle(b.group));
  }
  return g;
}
const clipped = (text, most) => (text.length <= most ? text : text.slice(0, most - 1) + "…");
// The end of the path says more than its begin.
function shortName(n) {
  if (n.name.length <= 23) return n.name;
  const cut = n.name.length - 22, dot = n.name.slice(cut).search(/[./]/);
  return "…" + n.name.slice(dot >= 0 && dot < 9 ? cut + dot : cut);
}

function toggle(group) {
  if (open.has(group.path)) open.delete(group.path);
  else open.add(group.path);
  draw(true);
}
// Opens what hides an operator.
function reveal(n) {
  const hidden = n.groups.filter((g) => !open.has(g.path));
  hidden.forEach((g) => open.add(g.path));
  if (hidden.length) draw(true);
}

function choose(what, moveThere) {
  chosen = what;
  if (what.node) reveal(what.node);
  mark();
  inspect(what);
  if (!moveThere || !what.node) return;
  const panel = stage.getBoundingClientRect();
  view.scale = Math.max(view.scale, 0.8);
  view.x = panel.width / 2 - what.node.box.x * view.scale;
  view.y = panel.height / 2 - what.node.box.y * view.scale;
  move();
}
function mark() {
  if (!chosen) return;
  const key = chosen.node ? chosen.node.box.key : "group:" + chosen.group.path, near = new Set();
  for (const e of world.querySelectorAll(".edge")) {
    const touches = e.dataset.from === key || e.dataset.to === key;
    e.classList.toggle("near", touches);
    if (touches) near.add(e.dataset.from).add(e.dataset.to);
  }
  for (const g of world.querySelectorAll(".node")) {
    g.classList.toggle("chosen", g.dataset.key === key);
    g.classList.toggle("near", near.has(g.dataset.key) && g.dataset.key !== key);
  }
}

const move = () => world.setAttribute("transform", `translate(${view.x},${view.y}) scale(${view.scale})`);
function fitView() {
  const panel = stage.getBoundingClientRect(), pad = 30;
  const whole = Math.min((panel.width - 2 * pad) / extent.width, (panel.height - 2 * pad) / extent.height);
  view.scale = Math.min(Math.max(whole, 0.12), 1.15);
  view.x = (panel.width - (extent.width - GAP.column) * view.scale) / 2;
  view.y = Math.max(pad, (panel.height - extent.height * view.scale) / 2);
  move();
}

let drag = null;
stage.addEventListener("pointerdown", (e) => { drag = {x: e.clientX, y: e.clientY, at: {...view}, moved: false}; });
addEventListener("pointermove", (e) => {
  if (!drag) return;
  if (Math.hypot(e.clientX - drag.x, e.clientY - drag.y) > 4) drag.moved = true;
  if (!drag.moved) return;
  stage.classList.add("dragging");
  view.x = drag.at.x + e.clientX - drag.x;
  view.y = drag.at.y + e.clientY - drag.y;
  move();
});
addEventListener("pointerup", () => {
  if (drag && drag.moved) stage.addEventListener("click", (e) => e.stopPropagation(), {capture: true, once: true});
  drag = null;
  stage.classList.remove("dragging");
});
stage.addEventListener("wheel", (e) => {
  e.preventDefault();
  const panel = stage.getBoundingClientRect(), factor = Math.exp(-e.deltaY * 0.0015);
  const scale = Math.min(3, Math.max(0.05, view.scale * factor)), x = e.clientX - panel.left, y = e.clientY - panel.top;
  view.x = x - ((x - view.x) * scale) / view.scale;
  view.y = y - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
  move();
}, {passive: false});
