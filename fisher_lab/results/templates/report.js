"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = table.tHead.rows[0].cells;
  const body = table.tBodies[0];
  const key = (row, i) => {
    const cell = row.cells[i];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    const number = Number(text);
    return text !== "" && !Number.isNaN(number) ? number : text;
  };
  const order = (a, b) => {
    // Numbers before texts: a cell without a number stays at the end, whichever the direction.
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };
  [...heads].forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [key(row, i), row]);
      const known = rows.filter(([value]) => typeof value === "number");
      const rest = rows.filter(([value]) => typeof value !== "number");
      known.sort(([a], [b]) => order(a, b));
      rest.sort(([a], [b]) => order(a, b));
      if (down) { known.reverse(); rest.reverse(); }
      body.append(...[...known, ...rest].map(([, row]) => row));
    });
  });
}
