// Tab 1: the graph text before and after a pass, side by side. Unchanged lines are folded; layers
// that changed alike are shown once.

const CONTEXT = 1;
const FOLD_FROM = 4;
const CHUNK = 200;

/** Rows in runs of one layer: {name, rows, changed}. Layers without a number are one run. */
function segmentsOf(rows) {
  const segments = [];
  for (const row of rows) {
    const line = row.after || row.before;
    const own = line.kind === "call" ? block(line.layer) : "";
    const name =
      line.kind === "call"
        ? isNumbered(own)
          ? own
          : "outside of numbered layers"
        : "inputs, weights, outputs";
    const last = segments[segments.length - 1];
    if (last && last.name === name) last.rows.push(row);
    else segments.push({ name, rows: [row] });
  }
  for (const segment of segments) {
    segment.changed = segment.rows.filter((row) => row.change !== "same").length;
    segment.signature =
      segment.rows.map((row) => row.change).join() +
      signature(
        segment.rows.flatMap((row) => [row.before, row.after]),
        segment.name,
      );
  }
  return segments;
}

/** Segments in groups: unchanged ones, or ones that changed alike, next to each other. */
function groupsOf(segments) {
  const groups = [];
  for (const segment of segments) {
    const last = groups[groups.length - 1]?.[0];
    const alike = last && (segment.changed ? last.signature === segment.signature : !last.changed);
    if (alike) groups[groups.length - 1].push(segment);
    else groups.push([segment]);
  }
  return groups;
}

/** The tab's content for a pass. */
function renderChanges(panel, pass, app) {
  panel.replaceChildren(passHeading(pass));
  if (pass.step === null) {
    panel.append(
      h(
        "p",
        { class: "empty" },
        "This pass changed nothing. ",
        pass.candidates
          ? `It considered ${pass.candidates} candidates; tab 3 says why they were left alone.`
          : "It found no candidates.",
      ),
    );
    return;
  }
  const body = h("tbody");
  const before = data.steps[pass.basis].name;
  const table = h(
    "table",
    { class: "diff", "aria-label": `lines before and after ${pass.name}` },
    h("colgroup", {}, h("col"), h("col")),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        h(
          "th",
          { scope: "col" },
          `before: ${before === "capture" ? "as captured" : `as ${before} left it`}`,
        ),
        h("th", { scope: "col" }, `after: as ${pass.name} left it`),
      ),
    ),
    body,
  );
  for (const group of groupsOf(segmentsOf(rowsOf(pass)))) {
    if (!group[0].changed) {
      body.append(
        foldOf(
          group.flatMap((segment) => segment.rows),
          titleOf(group),
          pass,
          app,
        ),
      );
      continue;
    }
    showSegment(body, group[0], pass, app);
    if (group.length > 1) {
      const rest = group.slice(1);
      const lines = rest.reduce((sum, segment) => sum + segment.changed, 0);
      const fold = h("tr", { class: "fold alike" });
      const open = () => {
        const shown = h("tbody");
        for (const segment of rest) showSegment(shown, segment, pass, app);
        fold.replaceWith(...shown.children);
      };
      const text = `${rest.length} more ${rest.length > 1 ? "layers" : "layer"} changed alike: ${nameRange(rest.map((segment) => segment.name))} (${lines} changed lines)`;
      fold.append(h("td", { colspan: 2 }, h("button", { on: { click: open } }, `⋯ ${text}`)));
      body.append(fold);
    }
  }
  panel.append(table);
}

/** Name, counts and operator changes of a pass. */
function passHeading(pass) {
  const counts = { added: 0, removed: 0, changed: 0 };
  for (const row of rowsOf(pass)) if (row.change !== "same") counts[row.change] += 1;
  const delta = Object.entries(pass.delta).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const chips = delta.map(([op, count]) =>
    h(
      "span",
      { class: `chip ${count > 0 ? "added" : "removed"}` },
      `${count > 0 ? "+" : "−"}${Math.abs(count)} ${op}`,
    ),
  );
  const legend = Object.entries(counts).map(([kind, count]) =>
    h(
      "span",
      { class: `count ${kind}`, data: { count: kind } },
      h("b", { class: "sign" }, SIGNS[kind]),
      ` ${count} ${kind}`,
    ),
  );
  return h(
    "div",
    { class: "heading" },
    h("h2", {}, pass.name, h("small", {}, ` ${pass.stage} · ${data.explain[pass.index].summary}`)),
    pass.step === null ? null : h("p", { class: "legend" }, ...legend),
    chips.length ? h("p", { class: "chips" }, ...chips) : null,
  );
}

function titleOf(group) {
  const names = [...new Set(group.map((segment) => segment.name))];
  const numbered = names.filter(isNumbered);
  return [
    ...names.filter((name) => !isNumbered(name)),
    ...(numbered.length ? [nameRange(numbered)] : []),
  ].join("; ");
}

/** The rows of one layer, long unchanged runs folded. */
function showSegment(body, segment, pass, app) {
  body.append(
    h("tr", { class: "layer" }, h("th", { colspan: 2, scope: "rowgroup" }, segment.name)),
  );
  const [rows, repeated] = withoutRepeats(segment.rows);
  for (let i = 0; i < rows.length;) {
    let end = i;
    while (end < rows.length && rows[end].change === "same") end += 1;
    const first = i === 0 ? i : i + CONTEXT;
    const last = end === rows.length ? end : end - CONTEXT;
    if (last - first >= FOLD_FROM) {
      for (const row of rows.slice(i, first)) body.append(rowOf(row, pass, app, segment.name));
      body.append(foldOf(rows.slice(first, last), "", pass, app, segment.name));
      for (const row of rows.slice(last, end)) body.append(rowOf(row, pass, app, segment.name));
    } else for (const row of rows.slice(i, end)) body.append(rowOf(row, pass, app, segment.name));
    if (end < rows.length) body.append(rowOf(rows[end], pass, app, segment.name));
    if (repeated.has(rows[end])) body.append(foldOf(repeated.get(rows[end]), "alike", pass, app));
    i = end + 1;
  }
}

/** Rows without the inputs that differ in their number only (a cache for each layer), where there
 * are many; and those that are left out, by the row that they come after. */
function withoutRepeats(rows) {
  const shapeOf = (row) => {
    const line = row.after || row.before;
    return line.kind === "input" && row.change !== "same"
      ? `${row.change} ${code(line).replace(/_\d+ /, "_# ")}`
      : "";
  };
  const seen = new Set();
  const isRepeat = (row) => {
    const shape = shapeOf(row);
    const found = shape !== "" && seen.has(shape);
    seen.add(shape);
    return found;
  };
  const repeats = rows.filter(isRepeat);
  if (repeats.length < FOLD_FROM) return [rows, new Map()];
  const left = new Set(repeats);
  return [
    rows.filter((row) => !left.has(row)),
    new Map([[rows[rows.indexOf(repeats[0]) - 1], repeats]]),
  ];
}

/** A button that stands for unchanged rows (or "alike": for rows like the ones above), and shows
 * some of them at a time. */
function foldOf(rows, title, pass, app, from = "") {
  const isAlike = title === "alike";
  const fold = h("tr", { class: isAlike ? "fold alike" : "fold" });
  const open = () => {
    const rest = rows.slice(CHUNK);
    fold.replaceWith(
      ...rows.slice(0, CHUNK).map((row) => rowOf(row, pass, app, from)),
      ...(rest.length ? [foldOf(rest, isAlike ? title : "", pass, app, from)] : []),
    );
  };
  const noun = rows.length > 1 ? "lines" : "line";
  const text = isAlike
    ? `${rows.length} more ${noun} that differ in their number only`
    : `${rows.length} unchanged ${noun}${title ? `: ${title}` : ""}`;
  fold.append(h("td", { colspan: 2 }, h("button", { on: { click: open } }, `⋯ ${text}`)));
  return fold;
}

/** from: the layer that the row stands below. */
function rowOf(row, pass, app, from) {
  const marked =
    row.change === "changed" ? differing(code(row.before), code(row.after)) : [null, null];
  return h(
    "tr",
    { class: row.change, data: { change: row.change } },
    cellOf(row.before, row.change === "added" ? "" : row.change, marked[0], pass.basis, app, from),
    cellOf(row.after, row.change === "removed" ? "" : row.change, marked[1], pass.step, app, from),
  );
}

function cellOf(line, kind, marked, where, app, from) {
  if (!line) return h("td", { class: "none" });
  const tokens = tokensOf(code(line)).map((token, i) =>
    marked && marked[i] ? h("mark", {}, token) : token,
  );
  const comment = place(line, from);
  const cell = h(
    "td",
    { data: { entry: line.index } },
    h("span", { class: "sign", role: "img", "aria-label": kind || "none" }, SIGNS[kind] || ""),
    h("code", {}, ...tokens, comment ? h("span", { class: "place" }, `# ${comment}`) : null),
  );
  if (line.kind === "head" || line.kind === "return") return cell;
  const pick = () => app.select(line, where);
  const first = cell.querySelector("code");
  first.tabIndex = 0;
  first.setAttribute("role", "button");
  first.setAttribute("aria-label", `${label(line)} ${line.op}`);
  first.addEventListener("click", () => {
    if (String(window.getSelection()) === "") pick();
  });
  first.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pick();
    }
  });
  return cell;
}

const tokensOf = (text) => text.match(/[%@][\w.]+|[\w.]+|\s+|[^\w\s]/g) || [];

/** For two texts, which of their tokens the other one has not (longest common subsequence). */
function differing(before, after) {
  const [a, b] = [tokensOf(before), tokensOf(after)];
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      table[i][j] =
        a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
  }
  const marks = [a.map(() => true), b.map(() => true)];
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      marks[0][i] = marks[1][j] = false;
      i += 1;
      j += 1;
    } else if (table[i + 1][j] >= table[i][j + 1]) i += 1;
    else j += 1;
  }
  return marks;
}
