// Tab 2: a layer before and after a pass as drawings, laid out in ranks from top to bottom.

const MOST_NODES = 250;
const AROUND = 3;
const MOST_READERS = 3;
const NODE_WIDTH = 198;
const SMALLEST = 0.72;
const LINE_HEIGHT = 14;
const FAMILIES = [
  ["matrix product", "matrix", /linear|matmul|\.mm|bmm|addmm|conv|einsum/],
  ["attention", "attention", /attention/],
  ["cache, lookup", "lookup", /kv_write|embedding|index|gather|select/],
  ["norm, rope, gate", "fused", /norm|rope|glu/],
  [
    "shape only",
    "shape",
    /view|reshape|transpose|permute|expand|squeeze|slice|split|chunk|cat|contiguous|sym_size|sym\.|aten\.to|clone|select/,
  ],
  ["elementwise, other", "other", /./],
];

/** Which family of ops a line is of: its name in the style sheet. */
function family(line) {
  if (line.kind !== "call") return "input";
  return FAMILIES.find(([, , pattern]) => pattern.test(line.op))[1];
}

/** Blocks of a pass's graphs; those that are alike before and after are one choice. */
function regionsOf(pass) {
  if (pass.regions) return pass.regions;
  const blocks = new Map();
  const of = (name) => {
    if (!blocks.has(name)) blocks.set(name, { rows: [], changed: 0 });
    return blocks.get(name);
  };
  const rows =
    pass.step === null
      ? step(pass.basis).lines.map((line) => ({ before: line, after: line, change: "same" }))
      : rowsOf(pass);
  for (const row of rows) {
    const line = row.after || row.before;
    if (line.kind !== "call") continue;
    const found = of(block(line.layer));
    found.rows.push(row);
    found.changed += row.change !== "same";
  }
  const alike = new Map();
  for (const [name, found] of blocks) {
    const key = isNumbered(name)
      ? `${name.replace(/\d+$/, "#")} ${found.rows.map((row) => row.change)} ${signature(
          found.rows.flatMap((row) => [row.before, row.after]),
          name,
        )}`
      : name;
    if (!alike.has(key)) alike.set(key, { names: [], changed: found.changed });
    alike.get(key).names.push(name);
  }
  pass.regions = [...alike.values()].map(({ names, changed }) => ({
    name: names[0],
    names,
    changed,
    title: `${nameRange(names) || "outside of all layers"}${names.length > 1 ? ` ×${names.length}` : ""}`,
  }));
  return pass.regions;
}

/** The region that the tab starts with: the first changed layer that stands for the most. */
function firstRegion(pass) {
  const regions = regionsOf(pass);
  const rank = (region) =>
    (region.changed ? 1e6 : 0) + (isNumbered(region.name) ? 1e3 : 0) + region.names.length;
  return regions.reduce((best, region) => (rank(region) > rank(best) ? region : best), regions[0]);
}

/** Lines of a block, or around a line. */
function regionLines(where, name, around) {
  if (!around)
    return where.lines.filter((line) => line.kind === "call" && block(line.layer) === name);
  const start = where.values.get(around.id);
  const found = new Set(start && start.kind === "call" ? [start] : []);
  let edge = [...found];
  for (let i = 0; i < AROUND; i += 1) {
    edge = edge
      .flatMap((line) => [
        ...line.references.map((name) => where.values.get(name)),
        ...usersOf(where, line.id),
      ])
      .filter(
        (line) =>
          line && line.kind === "call" && !line.type.startsWith("size[") && !found.has(line),
      );
    for (const line of edge) found.add(line);
  }
  return where.lines.filter((line) => found.has(line));
}

/** The tab's content. state: {region: name or null, around: line or null}. */
function renderGraph(panel, pass, state, app) {
  const regions = regionsOf(pass);
  const region = regions.find((found) => found.names.includes(state.region)) || firstRegion(pass);
  if (!region) {
    panel.replaceChildren(h("p", { class: "empty" }, "This graph calls nothing."));
    return;
  }
  // Of layers that are alike, the one that was asked for.
  const drawn = region.names.includes(state.region) ? state.region : region.name;
  const around = state.around;
  const picker = h(
    "select",
    { id: "region", on: { change: (event) => app.draw(event.target.value) } },
    ...[...regions]
      .sort((a, b) => (b.changed > 0) - (a.changed > 0))
      .map((found) =>
        h(
          "option",
          { value: found.name },
          `${found.title}${found.changed ? `, ${found.changed} changed` : ""}`,
        ),
      ),
  );
  picker.value = region.name;
  if (around) {
    picker.prepend(h("option", { value: "" }, `around ${label(around)} (${AROUND} steps)`));
    picker.value = "";
  }
  const legend = h(
    "p",
    { class: "legend families" },
    ...FAMILIES.map(([title, name]) => h("span", {}, h("i", { class: `swatch ${name}` }), title)),
  );
  panel.replaceChildren(
    h(
      "div",
      { class: "heading" },
      h(
        "h2",
        {},
        pass.name,
        h("small", {}, ` ${pass.stage} · ${data.explain[pass.index].summary}`),
      ),
      h("div", { class: "controls" }, h("label", { class: "field" }, "layer ", picker), legend),
    ),
  );
  const changes = new Map();
  if (pass.step !== null) {
    for (const row of rowsOf(pass)) {
      if (row.change === "same") continue;
      if (row.before) changes.set(`b${row.before.index}`, row.change);
      if (row.after) changes.set(`a${row.after.index}`, row.change);
    }
  }
  const sides = h("div", { class: "sides" });
  panel.append(sides);
  const shown =
    pass.step === null
      ? [["unchanged", pass.basis, "a"]]
      : [
          ["before", pass.basis, "b"],
          ["after", pass.step, "a"],
        ];
  // Both frames first: how wide they are decides how the drawings fit.
  const frames = shown.map(() => {
    const frame = h("figure", {});
    sides.append(frame);
    return frame;
  });
  shown.forEach(([word, index, side], i) => {
    const where = step(index);
    const lines = regionLines(where, drawn, around);
    const title = `${word}: ${around ? `around ${label(around)}` : drawn || "outside of all layers"}`;
    drawSide(
      frames[i],
      title,
      where,
      lines,
      (line) => changes.get(`${side}${line.index}`),
      state.selected?.line.index,
      app,
    );
  });
}

/** One drawing. changeOf: line -> "added", "removed", "changed" or undefined; selected: index of
 * the line to have in view. */
function drawSide(figure, title, where, lines, changeOf, selected, app) {
  const shown = lines.slice(0, MOST_NODES);
  const cut = lines.length - shown.length;
  const bar = h(
    "figcaption",
    {},
    h("span", {}, `${title}, ${shown.length} nodes${cut ? ` of ${lines.length}` : ""}`),
  );
  const host = h("div", { class: "canvas" });
  figure.append(bar, host);
  if (!shown.length) {
    host.append(h("p", { class: "empty" }, "No call of this region is in this graph."));
    return;
  }
  const { nodes, edges, width, height } = layOut(where, shown);
  const svg = d3
    .select(host)
    .append("svg")
    .attr("role", "group")
    .attr("aria-label", `drawing, ${title}, ${shown.length} nodes`);
  const scene = svg.append("g");
  const curve = d3
    .line(
      (p) => p.x,
      (p) => p.y,
    )
    .curve(d3.curveBasis);
  scene
    .append("g")
    .selectAll("path")
    .data(edges)
    .join("path")
    .attr("class", "edge")
    .attr("d", (edge) => curve(edge.points));
  scene
    .append("g")
    .selectAll("path")
    .data(edges)
    .join("path")
    .attr("class", "tip")
    .attr("d", (edge) => arrow(edge.points));
  const drawn = scene
    .append("g")
    .selectAll("g")
    .data(nodes)
    .join("g")
    .attr(
      "class",
      (node) =>
        `node ${family(node.line)} ${node.isInside ? changeOf(node.line) || "" : "outside"}`,
    )
    .attr(
      "transform",
      (node) => `translate(${node.x - node.width / 2},${node.y - node.height / 2})`,
    )
    .attr("data-entry", (node) => node.line.index)
    .attr("tabindex", 0)
    .attr("role", "button")
    .attr("aria-label", (node) =>
      [label(node.line), node.line.op, node.line.type, changeOf(node.line)]
        .filter(Boolean)
        .join(", "),
    )
    .on("click", (event, node) => app.select(node.line, where.index))
    .on("keydown", (event, node) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        app.select(node.line, where.index);
      }
    });
  drawn
    .append("rect")
    .attr("class", "box")
    .attr("width", (node) => node.width)
    .attr("height", (node) => node.height)
    .attr("rx", 5);
  drawn
    .append("rect")
    .attr("class", "stripe")
    .attr("width", 6)
    .attr("height", (node) => node.height)
    .attr("rx", 3);
  drawn.each(function write(node) {
    node.texts.forEach((text, i) =>
      d3
        .select(this)
        .append("text")
        .attr("class", i ? "minor" : "major")
        .attr("x", 14)
        .attr("y", 17 + i * LINE_HEIGHT)
        .text(text),
    );
    const sign = node.isInside ? SIGNS[changeOf(node.line)] : "";
    if (sign)
      d3.select(this)
        .append("text")
        .attr("class", "badge")
        .attr("x", node.width - 16)
        .attr("y", 18)
        .text(sign);
    d3.select(this)
      .append("title")
      .text(`${code(node.line)}\n${place(node.line)}`);
  });
  const box = DOMRect.fromRect(host.getBoundingClientRect());
  const zoom = d3
    .zoom()
    .scaleExtent([0.05, 4])
    .extent(() => [
      [0, 0],
      [box.width, box.height],
    ])
    .on("zoom", (event) => scene.attr("transform", event.transform));
  svg.call(zoom).on("dblclick.zoom", null);
  const fit = () => {
    const scale = Math.min(box.width / (width + 24), box.height / (height + 24), 1.2);
    svg.call(
      zoom.transform,
      d3.zoomIdentity
        .translate((box.width - width * scale) / 2, (box.height - height * scale) / 2)
        .scale(scale),
    );
  };
  const button = (text, name, run) =>
    h("button", { "aria-label": `${name}, ${title}`, title: name, on: { click: run } }, text);
  bar.append(
    h(
      "span",
      { class: "zoom" },
      button("−", "zoom out", () => svg.call(zoom.scaleBy, 1 / 1.4)),
      button("+", "zoom in", () => svg.call(zoom.scaleBy, 1.4)),
      button("fit", "show all", fit),
    ),
  );
  // Readable first: all of it when that can be read, else the first change in a size that can.
  const scale = Math.min(
    1,
    Math.max(SMALLEST, Math.min(box.width / (width + 24), box.height / (height + 24))),
  );
  const changed = nodes.filter((node) => node.isInside && changeOf(node.line));
  const wanted = nodes.find((node) => node.line.index === selected);
  const first = wanted || changed[0] || nodes[0];
  const middle = wanted ? wanted.x : (d3.mean(changed, (node) => node.x) ?? first.x);
  const x =
    width * scale <= box.width ? (box.width - width * scale) / 2 : box.width / 2 - middle * scale;
  const y =
    height * scale <= box.height
      ? (box.height - height * scale) / 2
      : Math.min(12, 70 - (first.y - first.height) * scale);
  svg.call(zoom.transform, d3.zoomIdentity.translate(x, y).scale(scale));
  // What is in the middle stays there when the panel beside it opens.
  new ResizeObserver(() => {
    const now = host.getBoundingClientRect();
    // A drawing that is hidden or gone has no size.
    if (!now.width) return;
    const moved = (now.width - box.width) / 2;
    box.width = now.width;
    box.height = now.height;
    if (moved) svg.call(zoom.translateBy, moved / d3.zoomTransform(svg.node()).k, 0);
  }).observe(host);
}

/** False for weights, sizes, and inputs that every layer reads: they would hide the rest. */
function isDrawn(where, line) {
  if (line.kind === "weight" || line.type.startsWith("size[")) return false;
  return line.kind !== "input" || usersOf(where, line.id).length <= MOST_READERS;
}

/** Places of nodes and edges; values from outside are drawn once. */
function layOut(where, lines) {
  const graph = new dagre.graphlib.Graph()
    .setGraph({ rankdir: "TB", nodesep: 18, ranksep: 26, marginx: 10, marginy: 10 })
    .setDefaultEdgeLabel(() => ({}));
  const inside = new Set(lines);
  const nodes = new Map();
  const add = (line) => {
    const key = String(line.index);
    if (!nodes.has(key)) {
      const texts = textsOf(line, inside.has(line));
      const node = {
        key,
        line,
        isInside: inside.has(line),
        texts,
        width: NODE_WIDTH,
        height: 10 + texts.length * LINE_HEIGHT,
      };
      nodes.set(key, node);
      graph.setNode(key, node);
    }
    return key;
  };
  for (const line of lines) add(line);
  for (const line of lines) {
    for (const name of line.references) {
      const from = where.values.get(name);
      if (from && isDrawn(where, from)) graph.setEdge(add(from), String(line.index));
    }
  }
  dagre.layout(graph);
  const { width, height } = graph.graph();
  return {
    nodes: [...nodes.values()],
    edges: graph.edges().map((edge) => graph.edge(edge)),
    width,
    height,
  };
}

const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

/** What a node says: its value and op, its layer, its type. */
function textsOf(line, isInside) {
  const op = line.kind === "call" ? line.op.split(".")[1] : line.kind;
  if (!isInside) return [clip(`${label(line)} ${op}`, 24), clip(line.type, 28)];
  const tail = line.layer.slice(block(line.layer).length).replace(/^\./, "");
  return [clip(`${line.id} ${op}`, 22), clip(tail, 28), clip(line.type, 28)].filter(Boolean);
}

/** A small triangle at the end of an edge. */
function arrow(points) {
  const end = points[points.length - 1];
  const from = points[points.length - 2];
  const angle = Math.atan2(end.y - from.y, end.x - from.x);
  const at = (turn) =>
    `${end.x - 7 * Math.cos(angle + turn)},${end.y - 7 * Math.sin(angle + turn)}`;
  return `M${end.x},${end.y}L${at(0.45)}L${at(-0.45)}Z`;
}
