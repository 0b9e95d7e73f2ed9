// A click on the head of a column sorts its table: words from a to z, numbers from high to low, and back again.
// "12.34 ± 0.56" counts as 12.34, "5 ms" as 0.005; what is missing (–) stays last, and no row crosses a dividing line.
(() => {
  const units = { ms: 1e-3, "µs": 1e-6, min: 60, h: 3600 };
  const number = text => {
    const plain = text.replace(/−/g, "-").replace(/(\d),(?=\d\d\d)/g, "$1");
    const found = plain.match(/^[-+]?\d*\.?\d+(e[-+]?\d+)?\s*(ms|µs|min|h)?/i);
    return found ? parseFloat(plain) * (units[found[2]] || 1) : NaN;
  };
  const missing = text => text === "" || text === "–";
  const text = (row, column) => row.cells[column].textContent.trim();

  const sort = (table, column, direction) => {
    const rows = [...table.tBodies[0].rows];
    const cells = rows.filter(r => !r.matches(".rule")).map(r => text(r, column)).filter(t => !missing(t));
    const numeric = cells.every(t => !isNaN(number(t)));
    const up = direction || (numeric ? "descending" : "ascending");
    const compare = (a, b) => {
      const [s, t] = [text(a, column), text(b, column)];
      if (missing(s) || missing(t)) return missing(s) - missing(t);
      const d = numeric ? number(s) - number(t) : s.localeCompare(t, undefined, { numeric: true });
      return up === "ascending" ? d : -d;
    };
    const groups = [[]];
    for (const row of rows) row.matches(".rule") ? groups.push([row], []) : groups.at(-1).push(row);
    table.tBodies[0].append(...groups.flatMap(g => g.length > 1 ? g.sort(compare) : g));
    return up;
  };

  // on a phone the rows of wide tables are cards (see style.css): there each cell says which column it is of
  for (const table of document.querySelectorAll("table.middling, table.broad")) {
    if (!table.tHead) continue;
    const heads = [...table.tHead.rows[0].cells].map(h => h.textContent.trim());
    for (const row of table.tBodies[0].rows) {
      if (!row.matches(".rule")) [...row.cells].forEach((cell, j) => { cell.dataset.head = heads[j]; });
    }
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    if (!table.tHead) continue;
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      const turn = () => {
        const before = head.ariaSort;
        const up = sort(table, column, before && (before === "ascending" ? "descending" : "ascending"));
        heads.forEach(h => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up);
      };
      head.addEventListener("click", turn);
      head.addEventListener("keydown", e => { if (e.key === "Enter") turn(); });
    });
  }
})();
