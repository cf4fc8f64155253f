// Where boxes lie: layers by the longest path, order by barycentres, long edges through place holders, and layers wrapped into columns like text.
const GAP = {x: 26, y: 30, column: 64};

// boxes: [{key, w, h, order}], in topological order; edges: [[from key, to key]]. Sets x, y (centres), column of each box; gives the routes and the size.
function layered(boxes, edges, aspect) {
  const at = new Map(boxes.map((b, i) => [b.key, i]));
  const cells = boxes.map((b) => ({box: b, w: b.w, h: b.h, up: [], down: [], layer: 0}));
  const links = edges.map(([a, b]) => [at.get(a), at.get(b)]).filter(([a, b]) => a < b); // what points back is drawn, not ranked
  for (const [a, b] of links) cells[b].layer = Math.max(cells[b].layer, cells[a].layer + 1);
  // The links come in the order of their targets, so sources are done. Then each box goes down to its first reader: labels stand beside the loss.
  for (let i = cells.length - 1; i >= 0; --i) {
    const readers = links.filter(([a]) => a === i).map(([, b]) => cells[b].layer);
    if (readers.length) cells[i].layer = Math.min(...readers) - 1;
  }
  const routes = links.map(([a, b]) => {
    const route = [cells[a]];
    for (let l = cells[a].layer + 1; l < cells[b].layer; ++l) {
      const holder = {w: 10, h: 0, up: [], down: [], layer: l};
      cells.push(holder);
      route.push(holder);
    }
    route.push(cells[b]);
    for (let i = 1; i < route.length; ++i) {
      route[i - 1].down.push(route[i]);
      route[i].up.push(route[i - 1]);
    }
    return {from: boxes[a].key, to: boxes[b].key, route};
  });
  const layers = [];
  for (const c of cells) (layers[c.layer] = layers[c.layer] || []).push(c);
  for (let l = 0; l < layers.length; ++l) layers[l] = layers[l] || [];
  order(layers);
  place(layers);
  return {routes, ...wrap(layers, cells, aspect)};
}

function order(layers) {
  const rank = (layer) => layer.forEach((c, i) => { c.rank = i; });
  layers.forEach(rank);
  for (let sweep = 0; sweep < 8; ++sweep) {
    const down = sweep % 2 === 0, near = down ? "up" : "down";
    for (const layer of down ? layers : [...layers].reverse()) {
      for (const c of layer) c.mean = c[near].length ? c[near].reduce((sum, o) => sum + o.rank, 0) / c[near].length : c.rank;
      layer.sort((a, b) => a.mean - b.mean || a.rank - b.rank);
      rank(layer);
    }
  }
}

// As near as possible to the mean of the neighbours, without overlap: half way between packing from the left and from the right.
function place(layers) {
  const room = (a, b) => (a.w + b.w) / 2 + GAP.x;
  for (const layer of layers) {
    let x = 0;
    layer.forEach((c, i) => { c.x = x += i ? room(layer[i - 1], c) : 0; });
    const middle = x / 2;
    for (const c of layer) c.x -= middle;
  }
  for (let sweep = 0; sweep < 12; ++sweep) {
    for (const layer of sweep % 2 === 0 ? layers : [...layers].reverse()) {
      const wish = layer.map((c) => {
        const near = sweep < 10 ? c[sweep % 2 === 0 ? "up" : "down"] : [...c.up, ...c.down];
        return near.length ? near.reduce((sum, o) => sum + o.x, 0) / near.length : c.x;
      });
      const left = [...wish], right = [...wish];
      for (let i = 1; i < layer.length; ++i) left[i] = Math.max(left[i], left[i - 1] + room(layer[i - 1], layer[i]));
      for (let i = layer.length - 2; i >= 0; --i) right[i] = Math.min(right[i], right[i + 1] - room(layer[i], layer[i + 1]));
      layer.forEach((c, i) => { c.x = (left[i] + right[i]) / 2; });
    }
  }
}

// Into as many columns as let the whole be shown largest in a panel of this aspect (width by height).
function wrap(layers, cells, aspect) {
  const heights = layers.map((layer) => Math.max(20, ...layer.map((c) => c.h)) + GAP.y);
  const total = heights.reduce((a, b) => a + b, 0);
  const columnsOf = (most) => {
    const out = [];
    let used = Infinity;
    layers.forEach((layer, l) => {
      if (used + heights[l] > most && used > 0) {
        out.push([]);
        used = 0;
      }
      out[out.length - 1].push(l);
      used += heights[l];
    });
    return out;
  };
  const extent = (column) => {
    const inside = column.flatMap((l) => layers[l]);
    return [Math.min(...inside.map((c) => c.x - c.w / 2)), Math.max(...inside.map((c) => c.x + c.w / 2))];
  };
  let best = null;
  for (let k = 1; k <= 12 && k <= layers.length; ++k) {
    const columns = columnsOf(total / k + Math.max(...heights) / 2);
    const width = columns.map(extent).reduce((sum, [a, b]) => sum + b - a + GAP.column, 0);
    const height = Math.max(...columns.map((c) => c.reduce((sum, l) => sum + heights[l], 0)));
    const scale = Math.min(aspect / width, 1 / height);
    if (!best || scale > best.scale * 1.05) best = {scale, columns, width, height};
  }
  let x = 0;
  best.columns.forEach((column, number) => {
    const [a, b] = extent(column);
    let y = 0;
    for (const l of column) {
      for (const c of layers[l]) {
        c.x += x - a;
        c.y = y + heights[l] / 2;
        c.gutter = c.x - x + GAP.column / 2 + ((c.rank % 7) - 3) * 6; // how far to the left edges from the column before come up
        c.column = number;
      }
      y += heights[l];
    }
    x += b - a + GAP.column;
  });
  for (const c of cells) if (c.box) Object.assign(c.box, {x: c.x, y: c.y, column: c.column});
  return {width: best.width, height: best.height};
}

// An SVG path along a route: down through the layers, and over the gutter to the top of the next column.
function pathOf(route) {
  const from = route[0];
  let out = `M${from.x},${from.y + from.h / 2}`;
  for (let i = 1; i < route.length; ++i) {
    const a = route[i - 1], b = route[i], y0 = a.y + a.h / 2, y1 = b.y - b.h / 2;
    if (a.column === b.column) {
      const bend = Math.max(10, (y1 - y0) / 2);
      out += `C${a.x},${y0 + bend} ${b.x},${y1 - bend} ${b.x},${y1}`;
    } else {
      const gutter = b.x - b.gutter;
      out += `C${a.x},${y0 + 26} ${gutter},${y0 + 26} ${gutter},${y0 - 14}`;
      out += `L${gutter},${y1 + 8}C${gutter},${y1 - 24} ${b.x},${y1 - 24} ${b.x},${y1}`;
    }
    if (b.h === 0 && i < route.length - 1) out += `L${b.x},${b.y}`;
  }
  return out;
}
