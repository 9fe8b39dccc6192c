// Wiring only: unpacks Vega-Embed and DataTables, draws the figures, and passes the switches of the rows to them.
const unpack = async (id) => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  return import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
};
const hidden = new Set();
const views = new Map();

const draw = async (plot) => {
  const spec = JSON.parse(document.getElementById(`spec-${plot.dataset.spec}`).textContent);
  const { view } = await window.vegaEmbed(plot, spec, { renderer: "svg", actions: false });
  view.logLevel(1); // where all rows are switched off, it would warn of axes without an extent
  if (plot.parentElement.querySelector(".keys")) views.set(plot, view);
};
const show = () => {
  document.querySelectorAll(".key[data-row]").forEach((key) => key.setAttribute("aria-pressed", !hidden.has(key.dataset.row)));
  return Promise.all([...views.values()].map((view) => view.signal("hidden", [...hidden]).runAsync()));
};
const toggle = (row, off) => (off ? hidden.add(row) : hidden.delete(row));

document.querySelectorAll(".key[data-row]").forEach((key) => {
  key.addEventListener("click", () => (toggle(key.dataset.row, !hidden.has(key.dataset.row)), show()));
});
document.querySelectorAll(".all").forEach((all) => {
  const rows = [...all.parentElement.querySelectorAll(".key[data-row]")].map((key) => key.dataset.row);
  const switchAll = () => {
    const none = rows.every((row) => !hidden.has(row));
    rows.forEach((row) => toggle(row, none));
    return show();
  };
  all.addEventListener("click", switchAll);
});

const tables = document.querySelectorAll(".table table");
if (tables.length) {
  const { ITable } = await unpack("bundle-tables");
  const columns = [{ targets: "_all", orderSequence: ["asc", "desc", ""] }, { targets: "number", type: "num" }];
  const layout = (many) => ({ topStart: null, topEnd: many ? "search" : null, bottomStart: null, bottomEnd: null });
  tables.forEach((table) => {
    const many = table.tBodies[0].rows.length > 1;
    const looks = { paging: false, info: false, order: [], autoWidth: false, language: { search: "Filter" } };
    new ITable(table, { ...looks, columnDefs: columns, layout: layout(many) });
  });
}
const plots = document.querySelectorAll(".plot");
if (plots.length) {
  await unpack("bundle-figures");
  await Promise.all([...plots].map(draw));
}
document.documentElement.dataset.drawn = plots.length;
