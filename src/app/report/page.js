"use strict";
const table = document.getElementById("rows");
const filter = document.getElementById("filter");
const shown = document.getElementById("shown");
const state = new URLSearchParams(location.hash.slice(1));

function remember() {
  history.replaceState(null, "", state.size ? `#${state}` : location.pathname + location.search);
}

function compare(first, second) {
  const numbers = [Number(first), Number(second)];
  return numbers.some(Number.isNaN)
    ? first.localeCompare(second, undefined, { numeric: true })
    : numbers[0] - numbers[1];
}

function sortBy(head, direction) {
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.indexOf(head);
  for (const other of heads) {
    if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  }
  head.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  const keyed = [...table.tBodies].map((body) => [body.rows[0].cells[column].dataset.v, body]);
  keyed.sort(([a], [b]) => (a === "") - (b === "") || (a === "" ? 0 : sign * compare(a, b)));
  table.append(...keyed.map(([, body]) => body));
}

function applyFilter() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const body of table.tBodies) {
    // not the values of the configuration that it is compared with
    const cells = [...body.rows[0].cells, ...body.querySelectorAll(".detail td:not(.soft)")];
    const text = cells.map((cell) => cell.textContent).join(" ").toLowerCase();
    body.hidden = !words.every((word) => text.includes(word));
    count += !body.hidden;
  }
  shown.textContent = `${count} of ${table.tBodies.length} shown`;
}

if (table) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("button")?.parentElement;
    if (!head) return;
    const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    sortBy(head, direction);
    state.set("sort", head.dataset.key);
    state.set("direction", direction);
    remember();
  });
  table.addEventListener("click", (event) => {
    const button = event.target.closest(".more");
    if (!button) return;
    const isOpen = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!isOpen));
    button.closest("tbody").rows[1].hidden = isOpen;
  });
  filter.addEventListener("input", () => {
    applyFilter();
    if (filter.value) state.set("filter", filter.value);
    else state.delete("filter");
    remember();
  });
  const wanted = [...table.tHead.rows[0].cells].find((head) => head.dataset.key === state.get("sort"));
  if (wanted) sortBy(wanted, state.get("direction") === "descending" ? "descending" : "ascending");
  filter.value = state.get("filter") ?? "";
  applyFilter();
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest(".copy");
  if (!button) return;
  const code = button.parentElement.querySelector("pre");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code); // where a page from a file may not: for Ctrl-C
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
});
