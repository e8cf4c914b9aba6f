// Headings of tables of the class "sortable" become buttons that sort the rows by their column: numbers by size, texts
// by their letters, and what was not measured last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const value = (row, column) => row.cells[column].textContent.trim();
  table.tHead.querySelectorAll("th").forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const sign = heading.ariaSort === "ascending" ? -1 : 1;
      table.tHead.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      heading.ariaSort = sign > 0 ? "ascending" : "descending";
      const sorted = [...body.rows].map(row => [row, value(row, column), parseFloat(value(row, column).replaceAll(",", ""))]);
      const texts = sorted.every(([, , number]) => Number.isNaN(number));
      sorted.sort(([, a, x], [, b, y]) => {
        if (texts) return sign * a.localeCompare(b, "en", { numeric: true });
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return sign * (x - y);
      });
      body.append(...sorted.map(([row]) => row));
    });
  });
}
