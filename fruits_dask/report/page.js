"use strict";
// Draws the plots of this page, and keeps them in step with the legend, the colour scheme and paper.
(() => {
  const plots = new Map();
  const views = [];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hidden = { label: new Set(), split: new Set() };

  async function draw(script) {
    const name = script.dataset.plot;
    const [view] = [...await Bokeh.embed.embed_item(JSON.parse(script.textContent), name)];
    const plot = view.model;
    views.push(view);
    plots.set(name, plot);
    if (innerWidth <= 560) fit_phone(plot);
    if (!matchMedia("(pointer: fine)").matches) {
      // On a touch screen a finger that crosses the plot scrolls the page.
      for (const tool of plot.toolbar.tools) if (tool.type === "BoxZoomTool") tool.active = false;
    }
  }

  function fit_phone(plot) {
    plot.height = Math.min(plot.height, 380);
    for (const tool of plot.toolbar.tools) {
      if (tool.type !== "HoverTool") continue;
      // Beside a point there is no room: the tooltip takes the foot of the screen.
      tool.tooltips = tool.tooltips.replace("</style>", `
        :host { left: 14px !important; right: 14px !important; top: auto !important;
          bottom: 14px !important; width: auto !important; }
        .tip { max-width: none; }</style>`);
      tool.show_arrow = false;
    }
  }

  function paint(ink, line) {
    for (const plot of plots.values()) {
      for (const axis of [...plot.left, ...plot.below]) {
        axis.setv({ axis_line_color: line, major_tick_line_color: line,
          major_label_text_color: ink, axis_label_text_color: ink });
      }
      for (const grid of plot.center) grid.setv({ grid_line_color: line, grid_line_alpha: 0.7 });
    }
    const points = points_renderer();
    if (points) points.glyph.line_color = { value: ink };
  }

  function paint_for_screen() {
    const style = getComputedStyle(document.documentElement);
    paint(style.getPropertyValue("--soft").trim(), style.getPropertyValue("--line").trim());
  }

  function points_renderer() {
    return plots.get("scatter")?.renderers.find((renderer) => renderer.name === "points");
  }

  function buttons(kind) {
    return [...document.querySelectorAll(`#legend button[data-kind="${kind}"]`)];
  }

  function update() {
    for (const kind of ["label", "split"]) {
      for (const button of buttons(kind)) {
        button.setAttribute("aria-pressed", String(!hidden[kind].has(+button.dataset.index)));
      }
    }
    const points = points_renderer();
    const { label_index: labels, split_index: splits } = points.data_source.data;
    const shown = Array.from(labels, (label, i) =>
      !hidden.label.has(label) && !hidden.split.has(splits[i]));
    points.view.filter.booleans = shown;
    const n = shown.filter(Boolean).length;
    document.getElementById("shown").textContent =
      `${n.toLocaleString("en")} of ${shown.length.toLocaleString("en")} points shown.`;
  }

  function toggle(button) {
    const set = hidden[button.dataset.kind];
    const index = +button.dataset.index;
    if (!set.delete(index)) set.add(index);
  }

  function isolate(button) {
    const { kind, index } = button.dataset;
    hidden[kind] = new Set(buttons(kind).map((other) => +other.dataset.index));
    hidden[kind].delete(+index);
  }

  function all(action) {
    hidden.split.clear();
    hidden.label = new Set(action === "hide" ? buttons("label").map((b) => +b.dataset.index) : []);
  }

  function connect_legend(legend) {
    legend.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      if (button.dataset.all) all(button.dataset.all); else toggle(button);
      update();
    });
    legend.addEventListener("dblclick", (event) => {
      const button = event.target.closest("button[data-kind]");
      if (!button) return;
      isolate(button);
      update();
    });
    document.getElementById("find-label")?.addEventListener("input", (event) => {
      const wanted = event.target.value.toLowerCase();
      for (const button of buttons("label")) {
        button.hidden = !button.textContent.toLowerCase().includes(wanted);
      }
    });
  }

  function connect_print() {
    let closed = [];
    addEventListener("beforeprint", () => {
      closed = [...document.querySelectorAll("details:not([open])")];
      for (const details of closed) details.open = true;
      paint("#4a5058", "#cfd2d6");
      for (const view of views) view.paint();  // now: the next frame comes after the print
    });
    addEventListener("afterprint", () => {
      for (const details of closed) details.open = false;
      paint_for_screen();
    });
  }

  async function start() {
    for (const script of document.querySelectorAll("script[data-plot]")) await draw(script);
    const legend = document.getElementById("legend");
    if (legend) connect_legend(legend);
    connect_print();
    paint_for_screen();
    dark.addEventListener("change", paint_for_screen);
    document.documentElement.dataset.drawn = String(plots.size);
  }

  start();
})();
