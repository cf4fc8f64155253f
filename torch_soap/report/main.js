function drawHeader() {
  const m = data.machine, devices = `${data.world} device${data.world > 1 ? "s" : ""}`;
  byId("title").textContent = `${data.title} on ${devices}`;
  const others = data.candidates.slice(1), manual = others.filter((c) => c.fits && !["optcnn", "descent", "mcmc", "before"].includes(c.name));
  const ddp = others.find((c) => c.name === "ddp"), best = manual.sort((a, b) => a.step_ns - b.step_ns)[0];
  const against = (c, name) => {
    const times = c.step_ns / data.step_ns, percent = 100 * (times - 1);
    if (Math.abs(percent) < 0.05) return `as fast as ${name}`;
    return times >= 1.05 ? `${times.toFixed(2)} times as fast as ${name}` : `${Math.abs(percent).toFixed(1)} % ${percent > 0 ? "faster" : "slower"} than ${name}`;
  };
  const words = [], own = ["optcnn", "descent", "mcmc", "before", ""].includes(data.chosen) ? "" : data.chosen;
  if (ddp) words.push(against(ddp, "data parallelism") + (ddp.fits ? "" : ", which doesn't fit"));
  if (best && best.name !== "ddp" && !own) words.push(`${against(best, `the best plan that a person would write (${best.name})`)}`);
  if (own && data.progress.length) words.push(`nothing found is faster than what a person would write (${own})`);
  const headline = `A step is predicted to take ${ms(data.step_ns)}${words.length ? `: ${words.join(", and ")}` : ""}.`;
  byId("headline").append(headline, data.exact ? "" : " Results may differ from one process (plan.exact is False).");
  const memory = Math.max(...data.device_totals.map((d) => d.memory)), tile = (value, text) => element("div", {class: "tile"}, element("b", {}, value), element("span", {}, text));
  const tiles = [tile(ms(data.step_ns), "predicted step")];
  const step = data.measured.find((r) => r.what.startsWith("step") && r.measured !== null);
  if (step) tiles.push(tile(ms(step.measured), "measured step"));
  const {compute, communication} = data.parts, share = (ns) => `${((100 * ns) / data.step_ns).toFixed(0)} %`;
  tiles.push(tile(share(compute), "of it compute"), tile(share(communication), m.overlap ? "communication, beside it" : "communication"));
  tiles.push(tile(bytes(memory), `fullest device, of ${bytes(data.memory_limit)}`));
  tiles.push(tile(m.name, m.hosts > 1 ? `${m.hosts} hosts, ${m.host_of.length} devices` : "one host"));
  byId("tiles").append(...tiles);
}

function drawLegend() {
  const used = new Set(nodes.filter((n) => n.kind === "op").flatMap((n) => (letters(n).length ? letters(n) : ["whole"])));
  const item = (name, text, style) => element("span", {}, element("i", {style}), element("b", {}, name), ` ${text}`);
  for (const [letter, [name, text]] of Object.entries(LETTERS)) {
    byId("legend").append(item(name, text + (used.has(letter) ? "" : " (none here)"), `background:${colour(letter)}`));
  }
  byId("legend").append(item("Whole", "not cut", "background:var(--whole)"), item("Red lines", "what moves between devices", "background:var(--move);height:3px;vertical-align:3px"));
}

drawHeader();
drawLegend();
collapseSmall();
draw(true);
drawCandidates();
drawMeasured();
drawHealth();
drawProgress();
drawStats();
drawRest();
byId("names").append(...nodes.filter((n) => n.kind === "op").map((n) => element("option", {value: n.name})));
byId("find").addEventListener("input", (e) => {
  const found = nodes.find((n) => n.name === e.target.value);
  if (found) choose({node: found}, true);
});
byId("expand").addEventListener("click", () => {
  open = new Set(groups.keys());
  draw(true);
});
byId("collapse").addEventListener("click", () => {
  collapseSmall();
  draw(true);
});
byId("fit").addEventListener("click", fitView);
const slowest = nodes.filter((n) => n.kind === "op").sort((a, b) => b.ns - a.ns)[0];
if (slowest && slowest.box.node) choose({node: slowest});
else if (slowest) choose({group: slowest.box.group});
drawTimeline();
let resized = 0;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => {
    draw(true);
    drawProgress();
    drawTimeline();
  }, 120);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawTimeline);
