// State of the page, what the user can do, and the keyboard.

const TABS = ["changes", "graph", "candidates", "costs", "search"];
const at = (id) => document.getElementById(id);
data.passes.forEach((pass, index) => Object.assign(pass, { index }));

/** The pass to start with: the one that removed the most nodes, else one that changed something. */
function firstPass() {
  const gain = (pass) => (pass.step === null ? -1 : pass.before - pass.after);
  return data.passes.reduce(
    (best, pass) => (gain(pass) > gain(data.passes[best]) ? pass.index : best),
    0,
  );
}

const state = {
  pass: firstPass(),
  tab: "changes",
  region: null,
  around: null,
  selected: null,
  query: "",
  filter: { pass: "selected", outcome: "" },
  machine: 0,
};

const app = {
  /** Show a pass. */
  go(index) {
    if (index < 0 || index >= data.passes.length) return;
    state.pass = index;
    showPasses();
    showTab();
    at("status").textContent = `${data.passes[index].name}: ${data.explain[index].summary}`;
  },
  /** Show a tab. */
  tab(name) {
    state.tab = name;
    showTab();
  },
  /** Show what is known about a line. */
  select(line, where) {
    state.selected = { line, where };
    showDetails();
    markSelected();
  },
  unselect() {
    state.selected = null;
    showDetails();
    markSelected();
  },
  /** Go to a line from a list: the pass that made or found it, the text around it, its details. */
  jump(line, where, pass) {
    const target =
      pass >= 0
        ? pass
        : data.passes.findIndex(
            (found) =>
              found.step === where || (where === 0 && found.basis === 0 && found.step !== null),
          );
    if (target >= 0) state.pass = target;
    state.region = block(line.layer);
    state.around = null;
    state.tab = line.kind === "call" ? "graph" : "changes";
    state.selected = { line, where };
    showPasses();
    showDetails();
    showTab();
  },
  /** Draw a layer. */
  draw(region) {
    state.region = region;
    state.around = null;
    app.tab("graph");
    markSelected();
  },
  /** Draw what is around a line. */
  around(line) {
    state.around = line;
    app.tab("graph");
    markSelected();
  },
  filter(changes) {
    Object.assign(state.filter, changes);
    showTab();
  },
  /** The step of a range that is next to the one shown. */
  nearest(first, last) {
    const pass = data.passes[state.pass];
    return Math.min(last, Math.max(first, pass.step ?? pass.basis));
  },
};

function showHeader() {
  at("name").textContent = data.name;
  const [first, last] = [data.passes[0], data.passes[data.passes.length - 1]];
  const changed = data.passes.filter((pass) => pass.step !== null).length;
  const time = data.passes.reduce((sum, pass) => sum + pass.ms, 0);
  at("facts").textContent =
    `graphopt ${data.graphopt} · ${data.passes.length} passes, ${changed} changed the graph, ${Math.round(time)} ms · ${first.before} → ${last.after} nodes`;
  at("machine").append(
    ...data.machines.map((machine, index) => h("option", { value: index }, machine.name)),
  );
  at("machine").addEventListener("change", (event) => {
    state.machine = Number(event.target.value);
    if (state.tab === "costs") showTab();
    showDetails();
  });
}

function showPasses() {
  const slowest = Math.max(...data.passes.map((pass) => pass.ms));
  let stage = "";
  const items = [];
  for (const pass of data.passes) {
    if (pass.stage !== stage)
      items.push(h("li", { class: "stage", role: "presentation" }, pass.stage));
    stage = pass.stage;
    const delta = pass.after - pass.before;
    const moved = delta ? `${delta > 0 ? "+" : "−"}${Math.abs(delta)}` : "=";
    const bar = h("span", { class: "time", "aria-hidden": "true" });
    bar.style.width = `${Math.max(1, (100 * pass.ms) / slowest)}%`;
    items.push(
      h(
        "li",
        {},
        h(
          "button",
          {
            class: `pass${pass.step === null ? " idle" : ""}`,
            data: { pass: pass.index },
            "aria-current": pass.index === state.pass ? "true" : null,
            "aria-label": `${pass.name}, ${Math.round(pass.ms)} milliseconds, ${pass.sites} sites, nodes ${pass.before} to ${pass.after}${pass.step === null ? ", changed nothing" : ""}`,
            title: `nodes ${pass.before} → ${pass.after}; verified in ${Math.round(pass.verify_ms)} ms${pass.rejected ? `; ${pass.rejected} rejected` : ""}`,
            on: { click: () => app.go(pass.index) },
          },
          h("span", { class: "label" }, pass.name),
          h("span", { class: "number" }, pass.ms < 10 ? pass.ms.toFixed(1) : Math.round(pass.ms)),
          h("span", { class: "number" }, pass.sites),
          h("span", { class: "number" }, pass.step === null ? "" : moved),
          bar,
        ),
      ),
    );
  }
  at("passes").replaceChildren(...items);
  at("passes").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
}

function buildTabs() {
  at("tabs").append(
    ...TABS.map((name, index) =>
      h(
        "button",
        {
          role: "tab",
          id: `tab-${name}`,
          "aria-controls": `panel-${name}`,
          on: { click: () => app.tab(name) },
        },
        h("kbd", { "aria-hidden": "true" }, index + 1),
        ` ${name[0].toUpperCase()}${name.slice(1)}`,
      ),
    ),
  );
  at("tabs").addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    app.tab(TABS[(TABS.indexOf(state.tab) + move + TABS.length) % TABS.length]);
    at(`tab-${state.tab}`).focus();
  });
}

function showTab() {
  const pass = data.passes[state.pass];
  for (const name of TABS) {
    const isShown = name === state.tab;
    at(`panel-${name}`).hidden = !isShown;
    at(`tab-${name}`).setAttribute("aria-selected", String(isShown));
    at(`tab-${name}`).tabIndex = isShown ? 0 : -1;
  }
  const panel = at(`panel-${state.tab}`);
  panel.scrollTop = 0;
  if (state.tab === "changes") renderChanges(panel, pass, app);
  if (state.tab === "graph") renderGraph(panel, pass, state, app);
  if (state.tab === "candidates") renderCandidates(panel, pass, state.filter, app);
  if (state.tab === "costs") renderCosts(panel, pass, data.machines[state.machine], app);
  if (state.tab === "search") renderSearch(panel, state.query, app);
  markSelected();
}

function showDetails() {
  const panel = at("details");
  panel.hidden = !state.selected;
  if (state.selected)
    renderDetails(
      panel,
      state.selected.line,
      state.selected.where,
      data.machines[state.machine],
      app,
    );
  else panel.replaceChildren();
}

function markSelected() {
  for (const element of document.querySelectorAll(".selected"))
    element.classList.remove("selected");
  if (!state.selected) return;
  for (const element of document.querySelectorAll(`[data-entry="${state.selected.line.index}"]`))
    element.classList.add("selected");
}

document.addEventListener("keydown", (event) => {
  const isTyping = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape") {
    if (event.target === at("query")) {
      at("query").blur();
      return;
    }
    if (state.selected) app.unselect();
    return;
  }
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    at("query").focus();
    at("query").select();
  }
  if (event.key === "j") app.go(state.pass + 1);
  if (event.key === "k") app.go(state.pass - 1);
  const tab = TABS[Number(event.key) - 1];
  if (tab) app.tab(tab);
});

at("query").addEventListener("input", (event) => {
  state.query = event.target.value.trim();
  app.tab("search");
});

showHeader();
buildTabs();
showPasses();
showTab();
performance.mark("shown");
