// Draws each chart from the data beside it; where there are no scripts, its words remain.
"use strict";
const hasMouse = window.matchMedia("(pointer: fine)").matches;  // a finger that drags wants to scroll
const charts = [...document.querySelectorAll(".chart")];
for (const chart of charts) {
  const { data, layout } = JSON.parse(chart.nextElementSibling.textContent);
  layout.dragmode = hasMouse ? "zoom" : false;
  Plotly.newPlot(chart, data, layout, { displaylogo: false, responsive: true, displayModeBar: false });
}
// Paper is narrower than most screens: two charts of half a page, or one of a whole one.
window.addEventListener("beforeprint", () => {
  for (const chart of charts) {
    const isAlone = !chart.closest(".charts") || chart.closest(".charts").childElementCount === 1;
    Plotly.relayout(chart, { width: isAlone ? 660 : 320, height: Math.min(chart.clientHeight, 260) });
  }
});
window.addEventListener("afterprint", () => {
  for (const chart of charts) Plotly.relayout(chart, { width: null, height: null, autosize: true });
});
