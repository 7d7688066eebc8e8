// Tab 5: lines of any step that a text is found in.

const MOST_FOUND = 200;
let searchable = null;

/** Distinct lines with the steps they are in, and their text in lower case. */
function searchIndex() {
  if (searchable) return searchable;
  const known = new Map();
  data.steps.forEach((found, index) => {
    for (const at of found.lines) {
      if (!known.has(at)) known.set(at, { at, first: index, last: index });
      known.get(at).last = index;
    }
  });
  searchable = [...known.values()].filter(({ at }) => !["head", "return"].includes(entry(at).kind));
  for (const found of searchable) {
    const line = entry(found.at);
    found.text = `${code(line)} ${place(line)} ${line.history.join(" ")}`.toLowerCase();
  }
  return searchable;
}

/** What a query finds: all of its words, wherever. "%12" finds the value of that name first. */
function find(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const isName = words.length === 1 && /^[%@]/.test(words[0]);
  const edge = isName
    ? new RegExp(`${words[0].replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}(?![\\w])`)
    : null;
  const found = searchIndex().filter(({ text }) =>
    edge ? edge.test(text) : words.every((word) => text.includes(word)),
  );
  return isName
    ? [
        ...found.filter(({ at }) => entry(at).id.toLowerCase() === words[0]),
        ...found.filter(({ at }) => entry(at).id.toLowerCase() !== words[0]),
      ]
    : found;
}

/** The tab's content. */
function renderSearch(panel, query, app) {
  const found = find(query);
  const stepName = (index) => (index ? `after ${data.steps[index].name}` : "as captured");
  const rows = found.slice(0, MOST_FOUND).map(({ at, first, last }) => {
    const line = entry(at);
    const where = app.nearest(first, last);
    return h(
      "tr",
      {},
      h(
        "td",
        {},
        h("button", { class: "link", on: { click: () => app.jump(line, where, -1) } }, label(line)),
      ),
      h("td", {}, line.op || line.kind),
      h("td", { class: "type" }, line.type),
      h("td", {}, line.layer),
      h("td", {}, line.source),
      h(
        "td",
        { class: "minor" },
        first === last ? stepName(first) : `${stepName(first)} to ${data.steps[last].name}`,
      ),
    );
  });
  const summary = !query
    ? "Type in the search field: an op, a layer, a source line, a value such as %123, or any text; several words must all be there."
    : `${found.length} lines${found.length > MOST_FOUND ? `, the first ${MOST_FOUND} are shown` : ""}`;
  panel.replaceChildren(
    h(
      "div",
      { class: "heading" },
      h(
        "h2",
        {},
        query ? `Search: ${query}` : "Search",
        h("small", {}, query ? ` ${summary}` : ""),
      ),
    ),
  );
  if (!rows.length) panel.append(h("p", { class: "empty" }, query ? "Nothing found." : summary));
  else
    panel.append(
      h(
        "table",
        { class: "found" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ...["value", "op", "type", "layer", "source", "in the graph"].map((text) =>
              h("th", { scope: "col" }, text),
            ),
          ),
        ),
        h("tbody", {}, ...rows),
      ),
    );
}
