// The panel beside the tabs: everything known about the selected node.

const MOST_LINKS = 12;

/** Fill the panel. where: index of the step that the line is seen in. */
function renderDetails(panel, line, where, machine, app) {
  const here = step(where);
  const last = step(data.steps.length - 1);
  const captured = line.history.filter((name) => !name.includes("#"));
  const sites = line.history.filter((name) => name.includes("#"));
  panel.replaceChildren(
    h(
      "div",
      { class: "title" },
      h("h2", {}, h("span", { class: "value" }, label(line)), ` ${line.op || line.kind}`),
      h(
        "button",
        {
          class: "close",
          "aria-label": "close",
          title: "close (Esc)",
          on: { click: () => app.unselect() },
        },
        "×",
      ),
    ),
    h("p", { class: "minor" }, where ? `as ${here.name} left it` : "as captured"),
    section("Value", [
      ["type", line.type],
      ["layer", line.layer || "none"],
      ["source", line.source || "none"],
      ["arguments", line.args],
    ]),
    linkSection(
      "Reads",
      line.references.map((name) => [
        here.values.get(name) || { id: name, kind: "weight", op: "", type: "" },
        where,
      ]),
      app,
    ),
    linkSection(
      "Read by",
      usersOf(here, line.id).map((user) => [user, where]),
      app,
    ),
    line.kind === "call" ? costSection(line, machine) : null,
    line.kind === "call" ? kernelSection(line, last, app) : null,
    line.kind === "call"
      ? section("Draw", [
          [
            "",
            h("button", { on: { click: () => app.draw(block(line.layer)) } }, "its layer"),
            " ",
            h("button", { on: { click: () => app.around(line) } }, "around it"),
          ],
        ])
      : null,
    linkSection(
      "Comes from (captured)",
      captured.map((name) => [step(0).values.get(name), 0]).filter(([found]) => found),
      app,
    ),
    sites.length
      ? h(
          "section",
          {},
          h("h3", {}, "Made by"),
          h("ul", {}, ...sites.map((site) => h("li", {}, siteButton(site, app)))),
        )
      : null,
    became(line, last, app),
    timeSection(line.id, app),
  );
}

function section(title, pairs) {
  const list = h("dl", {});
  for (const [name, ...values] of pairs) {
    if (name && values[0] === "") continue;
    list.append(...(name ? [h("dt", {}, name)] : []), h("dd", { data: { fact: name } }, ...values));
  }
  return h("section", {}, h("h3", {}, title), list);
}

function costSection(line, machine) {
  const limit = bound(line, machine);
  if (!limit)
    return section("Cost", [["", "not known: the text of this graph could not be read back"]]);
  const intensity = line.bytes ? `${trim(line.flops / line.bytes)} FLOP/byte` : "no bytes moved";
  return section("Cost", [
    ["FLOPs", short(line.flops)],
    ["bytes", short(line.bytes, "B")],
    ["intensity", intensity],
    [
      "bound",
      line.bytes || line.flops
        ? `${limit.limit}, at least ${duration(limit.seconds)} on ${machine.name}`
        : "none: no work",
    ],
    ["arithmetic", line.unit === "vector" ? "vector units" : `matrix product in ${line.unit}`],
  ]);
}

/** Its own kernel in the last graph; for an earlier value, those of what it became. */
function kernelSection(line, last, app) {
  if (line.kernel) return section("Kernel (cpu backend)", [["", line.kernel]]);
  const runs = becameOf(line, last).filter((found) => found.kernel);
  if (!runs.length) return null;
  return h(
    "section",
    {},
    h("h3", {}, "Runs in the end as (cpu backend)"),
    h(
      "ul",
      {},
      ...runs
        .slice(0, 4)
        .map((found) =>
          h(
            "li",
            {},
            nodeButton(found, last.index, app),
            h("span", { class: "minor" }, ` ${found.kernel}`),
          ),
        ),
    ),
  );
}

/** Lines of the last graph that come from this line: from its own value, or from those it stands for. */
function becameOf(line, last) {
  const wanted = new Set(
    line.history.includes(line.id) ? [line.id] : line.history.filter((name) => !name.includes("#")),
  );
  return last.lines.filter((found) => found.history.some((name) => wanted.has(name)));
}

/** What is left of it in the last graph, or the values that read it where it was removed. */
function became(line, last, app) {
  const found = becameOf(line, last);
  if (found.length)
    return linkSection(
      "Became (last graph)",
      found.map((other) => [other, last.index]),
      app,
    );
  const gone = data.steps.findIndex(
    (_, index) => index && step(index - 1).values.has(line.id) && !step(index).values.has(line.id),
  );
  if (gone < 0) return null;
  return linkSection(
    `Removed by ${data.steps[gone].name}; read by`,
    survivors(line.id, gone).map((other) => [other, gone]),
    app,
  );
}

/** Values of a step that were the next readers of a removed one. */
function survivors(id, gone) {
  const [before, after] = [step(gone - 1), step(gone)];
  const found = new Set();
  const seen = new Set([id]);
  for (let edge = [id]; edge.length;) {
    const users = edge
      .flatMap((name) => usersOf(before, name))
      .filter((user) => user.id && !seen.has(user.id));
    users.forEach((user) => seen.add(user.id));
    for (const user of users) if (after.values.has(user.id)) found.add(after.values.get(user.id));
    edge = users.filter((user) => !after.values.has(user.id)).map((user) => user.id);
  }
  return [...found];
}

function nodeButton(line, where, app) {
  return h(
    "button",
    { class: "link", on: { click: () => app.select(line, where) } },
    `${label(line)} ${line.op}`.trim(),
  );
}

function linkSection(title, found, app) {
  if (!found.length) return null;
  const items = found
    .slice(0, MOST_LINKS)
    .map(([line, where]) =>
      h(
        "li",
        {},
        line.index === undefined ? h("code", {}, line.id) : nodeButton(line, where, app),
        h("span", { class: "minor" }, ` ${line.type}`),
      ),
    );
  if (found.length > MOST_LINKS)
    items.push(h("li", { class: "minor" }, `and ${found.length - MOST_LINKS} more`));
  return h("section", {}, h("h3", {}, title), h("ul", {}, ...items));
}

function siteButton(site, app) {
  const name = site.split("#")[0];
  const index = data.passes.findIndex((pass) => pass.name === name);
  return index < 0
    ? site
    : h("button", { class: "link", on: { click: () => app.go(index) } }, site);
}

/** What each pass did to the value of this name. */
function timeSection(id, app) {
  const items = [];
  let before = null;
  data.steps.forEach((found, index) => {
    const now = step(index).values.get(id) || null;
    const word =
      !before && now
        ? index
          ? "added"
          : "captured"
        : before && !now
          ? "removed"
          : before && change(before.index, now.index) !== "same"
            ? "changed"
            : "";
    if (word) {
      const pass = data.passes.findIndex((made) => made.step === index);
      const sign = SIGNS[word] ? `${SIGNS[word]} ` : "";
      items.push(
        h(
          "li",
          {},
          pass < 0
            ? `${sign}${word}`
            : h(
                "span",
                {},
                `${sign}${word} by `,
                h("button", { class: "link", on: { click: () => app.go(pass) } }, found.name),
              ),
        ),
      );
    }
    before = now;
  });
  return h("section", {}, h("h3", {}, `${id} through the passes`), h("ul", {}, ...items));
}
