// Tab 4: FLOPs, bytes and least time of each layer, and the number of nodes over the passes.

const MEASURES = [
  ["flops", "FLOPs", (value) => short(value)],
  ["bytes", "bytes", (value) => short(value, "B")],
  ["seconds", "least time", duration],
];
const CHART = { width: 540, height: 264, left: 62, right: 12, top: 12, bottom: 86 };

/** Sums of a step by block: Map of name -> {flops, bytes, seconds, compute, memory}. */
function sumsOf(where, machine) {
  const sums = new Map();
  for (const line of where.lines) {
    const limit = bound(line, machine);
    if (!limit) continue;
    const name = block(line.layer) || "(no layer)";
    if (!sums.has(name)) sums.set(name, { flops: 0, bytes: 0, seconds: 0, compute: 0, memory: 0 });
    const sum = sums.get(name);
    sum.flops += line.flops;
    sum.bytes += line.bytes;
    sum.seconds += limit.seconds;
    sum[limit.limit] += limit.seconds;
  }
  return sums;
}

const totalOf = (sums, key) => d3.sum(sums.values(), (sum) => sum[key]);

/** The tab's content. */
function renderCosts(panel, pass, machine, app) {
  const after = step(pass.step ?? pass.basis);
  const [old, now] = [sumsOf(step(pass.basis), machine), sumsOf(after, machine)];
  const size = `${data.batch} × ${data.sequence} tokens`;
  panel.replaceChildren(
    h(
      "div",
      { class: "heading" },
      h("h2", {}, `Costs after ${pass.name}`, h("small", {}, ` ${size}, on ${machine.name}`)),
    ),
  );
  if (!now.size) {
    panel.append(
      h(
        "p",
        { class: "empty" },
        "The costs of this graph are not known: its text could not be read back.",
      ),
    );
    return;
  }
  panel.append(
    h(
      "div",
      { class: "totals" },
      ...MEASURES.map(([key, title, format]) => {
        const [a, b] = [totalOf(old, key), totalOf(now, key)];
        const moved =
          a && Math.abs(b / a - 1) >= 0.0005
            ? `${b > a ? "+" : "−"}${trim(Math.abs(b / a - 1) * 100)} % by this pass`
            : "not changed by this pass";
        return h(
          "div",
          { class: "total", data: { total: key } },
          h("b", {}, format(b)),
          h("span", {}, title),
          h("small", {}, moved),
        );
      }),
      h(
        "div",
        { class: "total" },
        h("b", {}, `${Math.round((100 * totalOf(now, "memory")) / totalOf(now, "seconds"))} %`),
        h("span", {}, "of the least time is memory"),
        h("small", {}, "the rest is arithmetic"),
      ),
    ),
  );
  const charts = h("div", { class: "charts" });
  panel.append(charts);
  for (const [key, title, format] of MEASURES) {
    charts.append(
      figureOf(
        `${title} by layer`,
        "bar: after this pass; line: before it, where it was another",
        barChart(old, now, key, format, app),
      ),
    );
  }
  charts.append(
    figureOf("nodes over the passes", "click a point to go to the pass", nodesChart(pass, app)),
  );
}

function figureOf(title, note, svg) {
  return h(
    "figure",
    { class: "chart" },
    h("figcaption", {}, h("b", {}, title), h("small", {}, ` ${note}`)),
    svg,
  );
}

function canvas(name) {
  return d3
    .create("svg")
    .attr("viewBox", `0 0 ${CHART.width} ${CHART.height}`)
    .attr("role", "img")
    .attr("aria-label", name);
}

/** Short name of a block below its bar: its number, or its last part. */
const tick = (name) => /\d+$/.exec(name)?.[0] ?? clip(name.split(".").pop(), 11);

function barChart(old, now, key, format, app) {
  const names = [...new Set([...now.keys(), ...old.keys()])].filter(
    (name) => (now.get(name)?.[key] || 0) + (old.get(name)?.[key] || 0) > 0,
  );
  const svg = canvas(`${key} by layer, a bar a layer`);
  const x = d3.scaleBand(names, [CHART.left, CHART.width - CHART.right]).padding(0.2);
  const most =
    d3.max(names, (name) => Math.max(now.get(name)?.[key] || 0, old.get(name)?.[key] || 0)) || 1;
  const y = d3.scaleLinear([0, most], [CHART.height - CHART.bottom, CHART.top]).nice(4);
  svg
    .append("g")
    .attr("class", "axis")
    .attr("transform", `translate(${CHART.left},0)`)
    .call(
      d3
        .axisLeft(y)
        .ticks(4)
        .tickFormat(format)
        .tickSize(-(CHART.width - CHART.left - CHART.right)),
    )
    .call((g) => g.select(".domain").remove());
  const every = Math.ceil(names.length / 18);
  const named = names.filter((name, i) => !isNumbered(name) || i % every === 0);
  svg
    .append("g")
    .attr("class", "axis")
    .attr("transform", `translate(0,${CHART.height - CHART.bottom})`)
    .call(d3.axisBottom(x).tickValues(named).tickFormat(tick).tickSize(3))
    .selectAll("text")
    .attr("transform", (name) => (isNumbered(name) ? null : "translate(0,13) rotate(-55)"))
    .attr("text-anchor", (name) => (isNumbered(name) ? "middle" : "end"));
  const bars = svg
    .append("g")
    .selectAll("g")
    .data(names)
    .join("g")
    .attr("class", "bar")
    .on("click", (event, name) => app.draw(name === "(no layer)" ? "" : name));
  bars
    .append("rect")
    .attr("x", (name) => x(name))
    .attr("width", x.bandwidth())
    .attr("y", (name) => y(now.get(name)?.[key] || 0))
    .attr("height", (name) => y(0) - y(now.get(name)?.[key] || 0));
  const isMoved = (name) =>
    Math.abs((old.get(name)?.[key] || 0) - (now.get(name)?.[key] || 0)) > most / 1000;
  bars
    .filter(isMoved)
    .append("line")
    .attr("x1", (name) => x(name) - 1)
    .attr("x2", (name) => x(name) + x.bandwidth() + 1)
    .attr("y1", (name) => y(old.get(name)?.[key] || 0))
    .attr("y2", (name) => y(old.get(name)?.[key] || 0));
  bars
    .append("title")
    .text(
      (name) =>
        `${name}: ${format(now.get(name)?.[key] || 0)}, before ${format(old.get(name)?.[key] || 0)}`,
    );
  return svg.node();
}

function nodesChart(pass, app) {
  const points = [
    { name: "capture", nodes: data.passes[0].before, index: -1 },
    ...data.passes.map((found, index) => ({ name: found.name, nodes: found.after, index })),
  ];
  const svg = canvas("nodes over the passes");
  const x = d3.scalePoint(
    points.map((point) => point.index),
    [CHART.left + 6, CHART.width - CHART.right - 6],
  );
  const y = d3
    .scaleLinear(
      [0, d3.max(points, (point) => point.nodes)],
      [CHART.height - CHART.bottom, CHART.top],
    )
    .nice(4);
  svg
    .append("g")
    .attr("class", "axis")
    .attr("transform", `translate(${CHART.left},0)`)
    .call(
      d3
        .axisLeft(y)
        .ticks(4)
        .tickSize(-(CHART.width - CHART.left - CHART.right)),
    )
    .call((g) => g.select(".domain").remove());
  svg
    .append("g")
    .attr("class", "axis")
    .attr("transform", `translate(0,${CHART.height - CHART.bottom})`)
    .call(
      d3
        .axisBottom(x)
        .tickFormat((index) => (index < 0 ? "capture" : index + 1))
        .tickSize(3),
    );
  svg
    .append("path")
    .attr("class", "curve")
    .attr(
      "d",
      d3
        .line(
          (point) => x(point.index),
          (point) => y(point.nodes),
        )
        .curve(d3.curveStepAfter)(points),
    );
  svg
    .append("g")
    .selectAll("circle")
    .data(points)
    .join("circle")
    .attr("class", (point) => (point.index === pass.index ? "point current" : "point"))
    .attr("cx", (point) => x(point.index))
    .attr("cy", (point) => y(point.nodes))
    .attr("r", (point) => (point.index === pass.index ? 6 : 4))
    .on("click", (event, point) => {
      if (point.index >= 0) app.go(point.index);
    })
    .append("title")
    .text((point) => `${point.name}: ${point.nodes} nodes`);
  return svg.node();
}
