// Tables sort by a click on a column's head; charts show their values under the pointer.
"use strict";

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        const numbers = [Number(x), Number(y)];
        const both = x !== "" && y !== "" && !numbers.some(Number.isNaN);
        return both ? numbers[0] - numbers[1] : x.localeCompare(y);
      };
      const rows = [...body.rows].filter((row) => !row.classList.contains("sum"));
      const sums = [...body.rows].filter((row) => row.classList.contains("sum"));
      rows.sort((a, b) => (down ? -order(a, b) : order(a, b)));
      body.append(...rows, ...sums);
    });
  });
}

const svgNode = (name, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};

for (const chart of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(chart.dataset.hover);
  const cross = svgNode("line", { class: "cross", y1: data.top, y2: data.bottom });
  const dots = data.series.map(() => svgNode("circle", { class: "dot", r: 4 }));
  const tip = document.createElement("div");
  tip.className = "tip";
  const leave = () => [cross, tip, ...dots].forEach((node) => node.remove());
  chart.addEventListener("pointerleave", leave);
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const scale = box.width / chart.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / scale;
    let near = 0;
    data.x.forEach((value, index) => {
      if (Math.abs(value - x) < Math.abs(data.x[near] - x)) near = index;
    });
    cross.setAttribute("x1", data.x[near]);
    cross.setAttribute("x2", data.x[near]);
    chart.append(cross);
    data.series.forEach((series, index) => {
      const y = series.y[near];
      if (y === null || y === undefined || y < 0) return dots[index].remove();
      dots[index].setAttribute("cx", data.x[near]);
      dots[index].setAttribute("cy", y);
      chart.append(dots[index]);
    });
    tip.textContent =
      `step ${data.step[near].toLocaleString("en")}` +
      data.series.map((s) => ` · ${data.series.length > 1 ? s.name + " " : ""}${s.text[near] ?? "-"}`).join("");
    chart.parentElement.append(tip);
    const wanted = box.left - chart.parentElement.getBoundingClientRect().left + data.x[near] * scale + 12;
    const room = chart.parentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.min(wanted, wanted > room ? wanted - tip.offsetWidth - 24 : wanted)}px`;
    tip.style.top = `${box.top - chart.parentElement.getBoundingClientRect().top + data.top * scale}px`;
  });
}
