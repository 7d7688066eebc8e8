// Tab 3: every candidate of every pass and what became of it, the rows of graphopt.explain.

const MOST_MEMBERS = 60;

/** The tab's content. state: {pass: index, "selected" or "all"; outcome: "" for all}. */
function renderCandidates(panel, selected, state, app) {
  const only = state.pass === "selected" ? selected.index : Number(state.pass);
  const rows = data.explain.flatMap((found, index) =>
    found.rows.map((row) => ({ ...row, pass: index })),
  );
  const outcomes = [...new Set(rows.map((row) => row.outcome))];
  const pick = (name, options, value) => {
    const select = h(
      "select",
      {
        id: `filter-${name}`,
        on: { change: (event) => app.filter({ [name]: event.target.value }) },
      },
      ...options.map(([key, text]) => h("option", { value: key }, text)),
    );
    select.value = String(value);
    return h("label", { class: "field" }, `${name} `, select);
  };
  const passes = data.passes
    .map((pass, index) => [index, `${pass.name}: ${data.explain[index].summary}`])
    .filter(([index]) => data.explain[index].rows.length);
  const chosen = rows.filter(
    (row) =>
      (state.pass === "all" || row.pass === only) &&
      (!state.outcome || row.outcome === state.outcome),
  );
  const count = chosen.reduce((sum, row) => sum + row.members.length, 0);
  const body = h("tbody");
  for (const row of chosen) body.append(...candidateRows(row, app));
  panel.replaceChildren(
    h(
      "div",
      { class: "heading" },
      h(
        "h2",
        {},
        "Candidates",
        h(
          "small",
          {},
          ` ${count} in ${chosen.length} kinds; layers that differ in their number only are one kind`,
        ),
      ),
      h(
        "div",
        { class: "controls" },
        pick(
          "pass",
          [["selected", `the selected one (${selected.name})`], ["all", "all passes"], ...passes],
          state.pass,
        ),
        pick(
          "outcome",
          [["", "all outcomes"], ...outcomes.map((name) => [name, name])],
          state.outcome,
        ),
      ),
    ),
    chosen.length
      ? h(
          "table",
          { class: "candidates" },
          h(
            "colgroup",
            {},
            ...["pass", "outcome", "count", "candidate"].map((name) =>
              h("col", { class: `column-${name}` }),
            ),
            h("col"),
          ),
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              ...["pass", "outcome", "count", "candidate", "change, or why not"].map((text) =>
                h("th", { scope: "col" }, text),
              ),
            ),
          ),
          body,
        )
      : h(
          "p",
          { class: "empty" },
          "No candidate: this pass found nothing to consider, or the filter leaves nothing.",
        ),
  );
}

function candidateRows(row, app) {
  const details = h("tr", { class: "members", hidden: true }, h("td", { colspan: 5 }));
  const toggle = h("button", { "aria-expanded": "false" }, row.count);
  toggle.addEventListener("click", () => {
    details.hidden = !details.hidden;
    toggle.setAttribute("aria-expanded", String(!details.hidden));
    if (!details.hidden && !details.firstChild.childElementCount)
      showMembers(details.firstChild, row.members, app);
  });
  const first = row.members[0];
  const jump = h(
    "button",
    {
      class: "link",
      disabled: first[5] < 0 ? "" : null,
      title: "show the first of them",
      on: { click: () => app.jump(entry(first[5]), first[6], row.pass) },
    },
    row.op,
  );
  const mark = { applied: "✓", rejected: "✕", limited: "▪", absorbed: "·", matches: "✓" }[
    row.outcome
  ];
  return [
    h(
      "tr",
      { data: { outcome: row.outcome } },
      h("td", {}, data.passes[row.pass].name),
      h(
        "td",
        { class: `outcome ${row.outcome}` },
        h("span", { "aria-hidden": "true" }, `${mark} `),
        row.word,
      ),
      h("td", { class: "number" }, toggle),
      h(
        "td",
        {},
        jump,
        h("div", { class: "minor" }, row.layer),
        h("div", { class: "minor" }, row.source),
      ),
      h("td", { class: "reason" }, row.reason || row.change),
    ),
    details,
  ];
}

function showMembers(cell, members, app) {
  const list = h("ul", { class: "memberlist" });
  for (const [node, layer, text, blocker, site, at, where] of members.slice(0, MOST_MEMBERS)) {
    const line = at < 0 ? null : entry(at);
    const name = line ? `${label(line)} ${line.op}` : node;
    const note = [layer, site, text, blocker && blocker !== node ? `in the way: ${blocker}` : ""]
      .filter(Boolean)
      .join(" · ");
    list.append(
      h(
        "li",
        {},
        line
          ? h("button", { class: "link", on: { click: () => app.jump(line, where, -1) } }, name)
          : name,
        h("span", { class: "minor" }, ` ${note}`),
      ),
    );
  }
  const rest = members.slice(MOST_MEMBERS);
  cell.replaceChildren(list);
  if (rest.length) {
    const more = h("button", {}, `⋯ ${rest.length} more`);
    more.addEventListener("click", () => {
      showMembers(cell, members.slice(0, MOST_MEMBERS), app);
      more.remove();
      const next = h("div");
      showMembers(next, rest, app);
      cell.append(next);
    });
    cell.append(more);
  }
}
