// Lanes per device: simulated compute, communication and, where there are any, the host's launches, the recorded ones beneath; and the memory, with the same
// scale of time.
const LANE = 13, DEVICE_GAP = 9, LABEL = 128;
const canvas = byId("timeline");
const recorded = data.timeline.measured.length > 0;
const endNs = Math.max(data.step_ns, ...data.timeline.measured.map((e) => e[4]));
const launches = data.timeline.simulated.some((e) => e[2] === 2);
let span = [0, endNs]; // what is shown, in ns

// [text, events of it by device, is recorded]
const lanes = [];
{
  const split = (events, communication) => {
    const out = new Map(data.devices.map((d) => [d, []]));
    for (const e of events) if (e[2] === communication) out.get(e[1]).push(e);
    return out;
  };
  const kinds = [["compute", split(data.timeline.simulated, 0), false], ["movement", split(data.timeline.simulated, 1), false]];
  if (launches) kinds.push(["host", split(data.timeline.simulated, 2), false]);
  if (recorded) kinds.push(["compute, real", split(data.timeline.measured, 0), true], ["movement, real", split(data.timeline.measured, 1), true]);
  for (const d of data.devices) kinds.forEach(([text, events, real], i) => lanes.push({device: d, text, real, first: i === 0, events: events.get(d)}));
}
let laneY = 26;
for (const lane of lanes) {
  if (lane.first) laneY += DEVICE_GAP;
  lane.y = laneY;
  laneY += LANE + 2;
}

const widthOf = () => canvas.clientWidth - LABEL - 8;
const toX = (ns) => LABEL + ((ns - span[0]) / (span[1] - span[0])) * widthOf();
const toNs = (x) => span[0] + ((x - LABEL) / widthOf()) * (span[1] - span[0]);
const told = (lane, e) => (lane.real ? [...data.timeline.names[e[0]], ""] : data.timeline.steps[e[0]]);

function drawTimeline() {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = laneY + 10;
  canvas.style.height = height + "px";
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const ink = computed("--ink"), quiet = computed("--quiet"), line = computed("--line"), movement = computed("--move");
  const colours = Object.fromEntries(["S", "O", "A", "P", "whole"].map((l) => [l, computed("--" + l)]));
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  for (const at of ticks(span[1] - span[0], 8)) {
    const x = toX(span[0] + at);
    pen.fillStyle = line;
    pen.fillRect(x, 20, 1, height);
    pen.fillStyle = quiet;
    if (x < width - 30) pen.fillText(ms(span[0] + at), x + 3, 11);
  }
  for (const lane of lanes) {
    pen.globalAlpha = 1;
    pen.fillStyle = lane.first ? ink : quiet;
    pen.fillText(lane.first ? `device ${lane.device}` : lane.text, lane.first ? 6 : 16, lane.y + LANE / 2);
    pen.save();
    pen.beginPath();
    pen.rect(LABEL, 0, width - LABEL - 4, height);
    pen.clip();
    for (const e of lane.events) {
      const x0 = toX(e[3]), x1 = toX(e[4]);
      if (x1 < LABEL || x0 > width) continue;
      const [, node, kind] = told(lane, e), letter = node >= 0 ? letters(nodes[node])[0] || "whole" : "whole";
      pen.globalAlpha = kind === "compute_backward" ? 0.6 : lane.real ? 0.85 : 1;
      pen.fillStyle = e[2] === 1 ? movement : e[2] === 2 || lane.real ? quiet : colours[letter];
      pen.fillRect(x0, lane.y, Math.max(x1 - x0 - (x1 - x0 > 3 ? 0.6 : 0), 0.6), LANE);
      if (chosen && chosen.node && chosen.node.index === node) {
        pen.globalAlpha = 1;
        pen.strokeStyle = ink;
        pen.lineWidth = 1.5;
        pen.strokeRect(x0, lane.y - 0.5, Math.max(x1 - x0, 1.5), LANE + 1);
      }
      if (x1 - x0 > 60) {
        pen.globalAlpha = 1;
        pen.fillStyle = computed("--card");
        pen.fillText(clipped(told(lane, e)[0].replace(/^compute_?/, "").replace(/^backward /, "← ").trim(), Math.floor((x1 - x0) / 7)), Math.max(x0, LABEL) + 4, lane.y + LANE / 2 + 0.5);
      }
    }
    pen.restore();
  }
  drawMemory();
}

function eventAt(e) {
  const box = canvas.getBoundingClientRect(), y = e.clientY - box.top, ns = toNs(e.clientX - box.left), slack = ((span[1] - span[0]) / widthOf()) * 2;
  const lane = lanes.find((l) => y >= l.y - 1 && y <= l.y + LANE + 1);
  const found = lane && lane.events.find((x) => x[3] - slack <= ns && ns <= x[4] + slack);
  return found ? [lane, found] : null;
}
canvas.addEventListener("mousemove", (e) => {
  const hit = eventAt(e);
  if (!hit) return hideTip();
  const [lane, x] = hit;
  showTip(e, `${told(lane, x)[0]}\n${ms(x[4] - x[3])}, from ${ms(x[3])} to ${ms(x[4])}, ${lane.real ? "recorded" : "simulated"} on device ${lane.device}`);
});
canvas.addEventListener("mouseleave", hideTip);
canvas.addEventListener("click", (e) => {
  const hit = eventAt(e), node = hit ? told(...hit)[1] : -1;
  if (node < 0 || swept) return;
  choose({node: nodes[node]}, true);
  drawTimeline();
});
// Wheel with Ctrl, or a horizontal drag, zooms: a plain wheel scrolls the page.
function zoom(factor, x) {
  const at = toNs(x), length = Math.min(endNs, Math.max(1000, (span[1] - span[0]) * factor));
  const from = Math.min(Math.max(0, at - ((at - span[0]) / (span[1] - span[0])) * length), endNs - length);
  span = [from, from + length];
  drawTimeline();
}
canvas.addEventListener("wheel", (e) => {
  if (!e.ctrlKey && !e.shiftKey) return;
  e.preventDefault();
  zoom(Math.exp((e.deltaY || e.deltaX) * 0.002), e.clientX - canvas.getBoundingClientRect().left);
}, {passive: false});
let sweep = null, swept = false;
canvas.addEventListener("pointerdown", (e) => { sweep = e.clientX; swept = false; });
addEventListener("pointerup", (e) => {
  if (sweep === null) return;
  const left = canvas.getBoundingClientRect().left, [a, b] = [sweep - left, e.clientX - left].sort((p, q) => p - q);
  sweep = null;
  if (b - a < 8) return;
  swept = true;
  const [from, to] = [Math.max(0, toNs(Math.max(a, LABEL))), Math.min(endNs, toNs(b))];
  if (to - from < 1000) return;
  span = [from, to];
  drawTimeline();
});
byId("timeline-fit").addEventListener("click", () => {
  span = [0, endNs];
  drawTimeline();
});
byId("timeline-hint").textContent = "drag to zoom, click for the operator; lighter is backward" + (recorded ? "; grey is what ran" : "");

const HELD = [["stored", "parameters, optimizer state, inputs"], ["tiles", "results"], ["copies", "copies that are read"], ["gradients", "gradients"], ["moving", "in messages"]];
const devicePicker = byId("memory-device");
data.devices.forEach((d) => devicePicker.append(element("option", {value: d}, `${d}`)));
const fullest = data.devices.reduce((a, b) => (data.device_totals[b].memory > data.device_totals[a].memory ? b : a), data.devices[0]);
devicePicker.value = fullest;
devicePicker.addEventListener("change", drawMemory);
byId("memory-legend").append(...HELD.map(([name, text]) => element("span", {}, element("i", {class: "swatch", style: `background:var(--${name})`}), text)));

function drawMemory() {
  const stage = byId("memory"), width = stage.clientWidth, height = stage.clientHeight, foot = 20, top = 14;
  const points = data.memory[devicePicker.value], peak = Math.max(...data.devices.map((d) => data.device_totals[d].memory));
  const limitShown = data.memory_limit < peak * 1.6, most = limitShown ? Math.max(data.memory_limit, peak) * 1.05 : peak * 1.08;
  const y = (b) => height - foot - (b / most) * (height - foot - top), out = [];
  const unit = 1024 ** Math.min(4, Math.floor(Math.log(most) / Math.log(1024)));
  for (const at of ticks(most / unit, 4)) {
    out.push(svg("line", {class: "grid", x1: LABEL, x2: width, y1: y(at * unit), y2: y(at * unit)}));
    out.push(svg("text", {class: "axis", x: LABEL - 8, y: y(at * unit) + 4, "text-anchor": "end"}, bytes(at * unit)));
  }
  for (const at of ticks(span[1] - span[0], 8)) out.push(svg("text", {class: "axis", x: toX(span[0] + at) + 3, y: height - 5}, ms(span[0] + at)));
  const clip = svg("clipPath", {id: "memory-clip"}, svg("rect", {x: LABEL, y: 0, width: Math.max(0, width - LABEL), height}));
  const curves = svg("g", {"clip-path": "url(#memory-clip)"});
  const below = points.map(() => 0);
  HELD.forEach(([name], kind) => {
    const lower = [...below], upper = points.map((p, i) => (below[i] += p[kind + 1]));
    const steps = (values) => values.map((v, i) => [[toX(points[i][0]), y(v)], [toX(i + 1 < points.length ? points[i + 1][0] : data.step_ns), y(v)]]).flat();
    const outline = [...steps(upper), ...steps(lower).reverse()];
    curves.append(svg("path", {d: "M" + outline.map((p) => p.map((v) => v.toFixed(1)).join(",")).join("L") + "Z", fill: `var(--${name})`, class: "area"}));
  });
  const top_ = points.reduce((a, p, i) => (below[i] > below[a] ? i : a), 0);
  curves.append(svg("circle", {cx: toX(points[top_][0]), cy: y(below[top_]), r: 3.5, fill: "var(--ink)"}));
  curves.append(svg("text", {class: "axis", x: Math.min(toX(points[top_][0]) + 8, width - 120), y: y(below[top_]) - 4, style: "fill:var(--ink)"}, `peak ${bytes(below[top_])}`));
  if (limitShown) {
    curves.append(svg("line", {x1: LABEL, x2: width, y1: y(data.memory_limit), y2: y(data.memory_limit), stroke: "var(--bad)", "stroke-dasharray": "5 4"}));
    curves.append(svg("text", {class: "axis", x: LABEL + 6, y: y(data.memory_limit) - 4, style: "fill:var(--bad)"}, `limit ${bytes(data.memory_limit)}`));
  }
  stage.replaceChildren(clip, ...out, curves);
}
