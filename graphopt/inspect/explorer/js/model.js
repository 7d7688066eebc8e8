// The data of the page, decoded when it is asked for, and small helpers to build elements.

const data = JSON.parse(document.getElementById("data").textContent);

/** An element. Text is only ever put in as text, never as markup. */
function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key === "on")
      for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
    else if (key === "class") element.className = value;
    else if (key === "data") Object.assign(element.dataset, value);
    else if (value !== null && value !== undefined && value !== false)
      element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const decoded = new Map();

/** One distinct line; see data.py for the fields. */
function entry(index) {
  let found = decoded.get(index);
  if (!found) {
    const [
      kind,
      id,
      type,
      op,
      args,
      references,
      layer,
      source,
      history,
      flops,
      bytes,
      unit,
      kernel,
    ] = data.entries[index];
    found = {
      index,
      kind,
      id,
      args,
      references,
      history,
      flops,
      bytes,
      type: data.types[type],
      op: data.ops[op],
      layer: data.layers[layer],
      source: data.sources[source],
      unit: data.units[unit],
      kernel: data.kernels[kernel],
    };
    decoded.set(index, found);
  }
  return found;
}

/** The line without its comment. */
function code(line) {
  if (line.kind === "head") return line.args;
  if (line.kind === "return") return `return ${line.args}`;
  if (line.kind !== "call") return `${line.kind} ${line.id} : ${line.type} ${line.args}`.trim();
  return `${line.id} : ${line.type} = ${line.op}(${line.args})`;
}

/** "layer | source"; the layer as seen from one of the blocks where that is given. */
function place(line, from = "") {
  const isInside = from && (line.layer === from || line.layer.startsWith(`${from}.`));
  return [isInside ? line.layer.slice(from.length + 1) : line.layer, line.source]
    .filter(Boolean)
    .join(" | ");
}

/** How a line is called in lists. */
function label(line) {
  return line.id || line.kind;
}

const stepCache = new Map();

/** A step with its lines, and its values by name. */
function step(index) {
  let found = stepCache.get(index);
  if (!found) {
    const lines = data.steps[index].lines.map(entry);
    const values = new Map(lines.filter((line) => line.id).map((line) => [line.id, line]));
    found = {
      index,
      name: data.steps[index].name,
      rows: data.steps[index].rows,
      lines,
      values,
      users: null,
    };
    stepCache.set(index, found);
  }
  return found;
}

/** Lines of a step that read a value. */
function usersOf(where, id) {
  if (!where.users) {
    where.users = new Map();
    for (const line of where.lines) {
      for (const name of line.references) {
        if (!where.users.has(name)) where.users.set(name, []);
        where.users.get(name).push(line);
      }
    }
  }
  return where.users.get(id) || [];
}

/** "model.layers.7" of "model.layers.7.mlp"; all of a path without a number. */
function block(layer) {
  const match = /^.*?\d+(?=\.|$)/.exec(layer);
  return match ? match[0] : layer;
}

const isNumbered = (name) => /\d+$/.test(name);

/** Names that differ in their number as one: "model.layers.{0-3,7}". */
function nameRange(names) {
  if (names.length < 2) return names[0] || "";
  const stem = names[0].replace(/\d+$/, "");
  const numbers = names.map((name) => Number(/\d+$/.exec(name)?.[0] ?? 0)).sort((a, b) => a - b);
  const spans = [];
  for (const number of numbers) {
    const last = spans[spans.length - 1];
    if (last && last[1] === number - 1) last[1] = number;
    else spans.push([number, number]);
  }
  return `${stem}{${spans.map(([a, b]) => (a === b ? a : `${a}-${b}`)).join(",")}}`;
}

/** Lines of one block with their own numbers left open: equal for layers that are alike. */
function signature(lines, own) {
  const names = new Map();
  const isLayer = isNumbered(own);
  const number = isLayer ? /\d+$/.exec(own)[0] : "";
  const escaped = own.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const ownPath = isLayer ? new RegExp(`(?<![\\w.])${escaped}(?!\\w)`, "g") : null;
  const ownInput = isLayer ? new RegExp(`(%[A-Za-z_]\\w*_)${number}(?!\\w)`, "g") : null;
  return lines
    .map((line) => {
      if (!line) return "";
      let text = `${code(line)} ${line.layer} ${line.source}`;
      if (isLayer) text = text.replace(ownPath, "#").replace(ownInput, "$1#");
      return text.replace(/%\d+(?!\w)/g, (name) => {
        if (!names.has(name)) names.set(name, `%${names.size}`);
        return names.get(name);
      });
    })
    .join("\n");
}

/** What became of a row: "same", "added", "removed" or "changed". History does not count. */
function change(before, after) {
  if (before < 0) return "added";
  if (after < 0) return "removed";
  if (before === after) return "same";
  const [a, b] = [entry(before), entry(after)];
  return code(a) === code(b) && place(a) === place(b) ? "same" : "changed";
}

const SIGNS = { same: "", added: "+", removed: "−", changed: "~" };

/** Rows of a pass: {before, after (entries or null), change}. */
function rowsOf(pass) {
  if (pass.step === null) return [];
  if (!pass.rows) {
    const flat = data.steps[pass.step].rows;
    pass.rows = [];
    for (let i = 0; i < flat.length; i += 2) {
      const [a, b] = [flat[i], flat[i + 1]];
      pass.rows.push({
        before: a < 0 ? null : entry(a),
        after: b < 0 ? null : entry(b),
        change: change(a, b),
      });
    }
  }
  return pass.rows;
}

/** 1234567 -> "1.23 M". */
function short(value, unit = "") {
  if (value === null || value === undefined) return "not known";
  const scales = [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ];
  for (const [size, prefix] of scales)
    if (Math.abs(value) >= size) return `${trim(value / size)} ${prefix}${unit}`;
  return `${trim(value)} ${unit}`.trim();
}

const trim = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString());

/** Seconds in a readable unit. */
function duration(seconds) {
  if (seconds >= 1) return `${trim(seconds)} s`;
  if (seconds >= 1e-3) return `${trim(seconds * 1e3)} ms`;
  if (seconds >= 1e-6) return `${trim(seconds * 1e6)} µs`;
  return `${trim(seconds * 1e9)} ns`;
}

/** {seconds, limit} of a line on a machine; null where its cost is not known. */
function bound(line, machine) {
  if (line.flops === null) return null;
  const peak =
    line.unit === "vector" ? machine.vector : (machine.matrix[line.unit] ?? machine.matrix.f32);
  const [arithmetic, traffic] = [line.flops / peak, line.bytes / machine.bytes_per_second];
  return {
    seconds: Math.max(arithmetic, traffic),
    limit: arithmetic > traffic ? "compute" : "memory",
  };
}
