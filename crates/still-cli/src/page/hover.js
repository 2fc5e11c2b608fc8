{
  const tip = document.getElementById("tip"), charts = new Map();
  const short = (value) => value === 0 || (Math.abs(value) >= 1e-4 && Math.abs(value) < 1e5)
    ? String(+value.toPrecision(4)) : value.toExponential(2);
  const chart = (svg) => {
    if (!charts.has(svg)) {
      const cursor = document.createElementNS(svg.namespaceURI, "path");
      cursor.setAttribute("class", "cursor");
      svg.append(cursor);
      charts.set(svg, { ...JSON.parse(svg.dataset.chart), cursor });
    }
    return charts.get(svg);
  };
  const hide = () => {
    tip.style.display = "none";
    for (const { cursor } of charts.values()) cursor.removeAttribute("d");
  };
  // The points of all curves at the x that is nearest to the pointer.
  const readOff = (svg, event) => {
    const { x, series, cursor } = chart(svg), box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const at = (event.clientX - box.left) / box.width * view.width;
    let nearest = null;
    for (const { points } of series) for (const point of points)
      if (!nearest || Math.abs(point[0] - at) < Math.abs(nearest[0] - at)) nearest = point;
    if (!nearest) return [];
    cursor.setAttribute("d", `M${nearest[0]} 8V${view.height - 34}`);
    const here = series.map(({ name, points }) => [name, points.find((point) => point[2] === nearest[2])]);
    return [`${x} ${short(nearest[2])}`, ...here.filter(([, point]) => point).map(([name, point]) => `${name} ${short(point[3])}`)];
  };
  const show = (event) => {
    hide();
    const told = event.target.closest?.("[data-tip]"), svg = event.target.closest?.("svg[data-chart]");
    const lines = [...(told ? [told.dataset.tip] : []), ...(svg ? readOff(svg, event) : [])];
    if (!lines.length) return;
    tip.textContent = lines.join("\n");
    tip.style.display = "block";
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 4) + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("pointerleave", hide);
  document.addEventListener("scroll", hide, { passive: true });
}
